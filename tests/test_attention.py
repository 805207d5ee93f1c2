"""Blocked attention over spans equals a plain softmax over the same keys, in values and in gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.model import attention
from patarm_jax.model.attention import attend, causal_span, merge, prefix_span

KEY = jax.random.key(3)


def arrays(batch, queries, keys, heads, kv_heads, size, dtype=jnp.float32):
    shapes = ((batch, queries, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size))
    return [jax.random.normal(jax.random.fold_in(KEY, i), s, dtype) for i, s in enumerate(shapes)]


def plain(q, k, v, span):
    """Every score at once, every key-value head repeated for its queries."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    position = jnp.arange(k.shape[1])
    readable = (span[0][..., None] <= position) & (position < span[1][..., None])
    scores = jnp.where(readable[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.where(readable[:, None], jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None]), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v), lse.swapaxes(1, 2)


def packed_span(lengths, width):
    """Sequences one after another in each row: a token reads its own up to itself."""
    ends = np.cumsum(lengths, axis=1)
    start = np.array([[[0, *row, 0][int(np.searchsorted(row, t, side="right"))] for t in range(width)] for row in ends])
    inside = np.arange(width) < ends[:, -1:]
    stop = np.where(inside, np.arange(1, width + 1), 0)
    return jnp.asarray(np.where(inside, start, 0), jnp.int32), jnp.asarray(stop, jnp.int32)


CASES = {
    "causal": (2, 11, 11, causal_span(11), True),
    "causal in one block": (2, 4, 4, causal_span(4), True),
    "causal in many parts": (1, 67, 67, causal_span(67), True),
    "prefix": (3, 9, 13, prefix_span(jnp.array([1, 13, 6]), 9), False),
    "one query": (3, 1, 13, prefix_span(jnp.array([1, 13, 6]), 1), False),
    "packed": (2, 23, 23, packed_span([[5, 1, 9], [23, 0, 0]], 23), True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (3, 3, 5), (4, 1, 2)])
def test_equals_plain_softmax_with_its_gradients(name, block, heads, kv_heads, size, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    batch, queries, keys, span, causal = CASES[name]
    q, k, v = arrays(batch, queries, keys, heads, kv_heads, size)
    read = np.asarray(span[1] > span[0])
    weight = jnp.where(read[..., None], jax.random.normal(KEY, (batch, queries, heads)), 0.0)

    def total(function, q, k, v):
        out, lse = function(q, k, v)
        return (jnp.sin(out) * weight[..., None]).sum() + (jnp.cos(lse) * weight).sum(), (out, lse)

    ours, theirs = (
        jax.jit(jax.value_and_grad(partial(total, function), argnums=(0, 1, 2), has_aux=True))(q, k, v)
        for function in (partial(attend, span=span, causal=causal), partial(plain, span=span))
    )
    (_, (out, lse)), gradients = ours
    (_, (expected, expected_lse)), expected_gradients = theirs
    np.testing.assert_allclose(out, expected, atol=2e-6)
    rows = np.broadcast_to(read, lse.shape[:2])
    np.testing.assert_allclose(np.asarray(lse)[rows], np.asarray(expected_lse)[rows], atol=2e-6)
    for ours_, theirs_ in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours_, theirs_, atol=1e-5)


def test_a_query_without_keys_gives_zero_and_no_gradient():
    q, k, v = arrays(2, 3, 5, 2, 1, 4)
    nothing = jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32)
    out, lse = attend(q, k, v, nothing, False)
    assert (out == 0).all() and (lse < -1e29).all()
    gradients = jax.grad(lambda q, k, v: attend(q, k, v, nothing, False)[0].sum(), argnums=(0, 1, 2))(q, k, v)
    assert all((g == 0).all() for g in gradients)


def test_parts_merge_to_the_whole_with_their_gradients():
    q, k, v = arrays(2, 6, 20, 4, 2, 8)
    lengths = jnp.array([20, 13])

    def whole(q, k, v):
        return jnp.sin(attend(q, k, v, prefix_span(lengths, 6), False)[0]).sum()

    def parts(q, k, v):
        first = attend(q, k[:, :7], v[:, :7], prefix_span(jnp.minimum(lengths, 7), 6), False)
        second = attend(q, k[:, 7:], v[:, 7:], prefix_span(lengths - 7, 6), False)
        return jnp.sin(merge(first, second)).sum()

    for one, other in zip(*(jax.grad(f, argnums=(0, 1, 2))(q, k, v) for f in (whole, parts)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_half_precision_is_near_single():
    single = arrays(2, 70, 70, 4, 2, 16)
    half = [x.astype(jnp.bfloat16) for x in single]
    function = jax.grad(lambda q, k, v: (attend(q, k, v, causal_span(70), True)[0] ** 2).sum(), argnums=(0, 1, 2))
    for a, b in zip(function(*single), function(*half), strict=True):
        assert b.dtype == jnp.bfloat16
        assert float(jnp.abs(a - b.astype(jnp.float32)).mean() / jnp.abs(a).mean()) < 0.02
