"""Losses against the formulas written out in NumPy, and the vocabulary that is never whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from patarm_jax.model.sharding import MESH_AXES
from patarm_jax.train import losses
from patarm_jax.train.losses import sum_over_tokens, token_logprobs


def plain_logprobs(hidden, head, targets, temperature):
    z = hidden.astype(np.float64) @ head.astype(np.float64).T / temperature
    log_softmax = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    taken = np.take_along_axis(log_softmax, targets[..., None], -1)[..., 0]
    return taken, -(np.exp(log_softmax) * log_softmax).sum(-1)


def case(rows=4, length=13, vocab=29, width=8):
    """Hidden states, head, targets and a weight of every token: the same for every test, whatever ran before it."""
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(rows, length, width)).astype(np.float32)
    head = rng.normal(size=(vocab, width)).astype(np.float32)
    return hidden, head, rng.integers(0, vocab, (rows, length)), rng.uniform(0.5, 2, (rows, length)).astype(np.float32)


@pytest.fixture(params=[1, 5, 52, 512])
def chunk(request, monkeypatch):
    """So many tokens at a time; the last chunk is seldom full."""
    monkeypatch.setattr(losses, "HEAD_TOKENS", request.param)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_the_formula(chunk, shards, temperature):
    hidden, head, targets, _ = case()
    got = token_logprobs(hidden, head, targets, temperature=temperature, shards=shards)
    for ours, plain in zip(got, plain_logprobs(hidden, head, targets, temperature), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "platform"), [("cpu", "cpu"), ("NVIDIA H100", "gpu"), ("TPU v5p", "tpu")])
def test_chunks_are_as_large_as_the_devices_like_them(kind, platform):
    """Of the mesh that is traced under, whatever devices are here."""
    device = AbstractDevice(kind, 1, platform)
    mesh = AbstractMesh((1, 1, 1), MESH_AXES, (AxisType.Auto,) * 3, abstract_device=device)
    hidden, targets = jnp.ones((1, 4096, 8)), jnp.ones((1, 4096), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(token_logprobs)(hidden, jnp.ones((16, 8)), targets))
    expected = 512 if platform == "cpu" else 2048
    assert f"[{expected},16]" in text
    assert losses.head_tokens() == 512  # without a mesh, here


def wave(logprobs, entropy, hit, weight):
    """Neither linear in the log-probs nor the same for all tokens; of one sign, so that the sum has no cancellation."""
    sums = {"entropy": (entropy * weight).sum(), "tokens": weight.sum(), "hits": (hit * weight).sum()}
    return (jnp.square(logprobs) * weight).sum(), sums


def unchunked(hidden, head, targets, weight, temperature):
    z = jnp.einsum("btd,vd->btv", hidden, head) / temperature
    log_softmax = jax.nn.log_softmax(z)
    taken = jnp.take_along_axis(log_softmax, targets[..., None], -1)[..., 0]
    return wave(taken, -(jnp.exp(log_softmax) * log_softmax).sum(-1), z.argmax(-1) == targets, weight)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sums_and_their_gradients_equal_the_unchunked(chunk, shards, temperature):
    hidden, head, targets, weight = case()
    ours = partial(sum_over_tokens, wave, temperature, shards)
    plain = partial(unchunked, temperature=temperature)
    expected, expected_sums = plain(hidden, head, targets, weight)
    for got, sums in (ours(hidden, head, targets, weight), jax.jit(ours)(hidden, head, targets, weight)):
        assert float(got) == pytest.approx(float(expected), rel=1e-5)
        assert {k: float(v) for k, v in sums.items()} == {
            k: pytest.approx(float(v), rel=1e-5) for k, v in expected_sums.items()
        }

    def gradient(function):  # of more than the sum alone, so that it is not 1 that comes back
        return jax.jit(jax.grad(lambda h, w: 3.0 * function(h, w, targets, weight)[0] ** 2, argnums=(0, 1)))(
            hidden, head
        )

    for mine, theirs in zip(gradient(ours), gradient(plain), strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max()


def test_no_gradient_flows_through_what_is_reported():
    hidden, head, targets, _ = case()
    ones = np.ones(targets.shape, np.float32)
    gradient = jax.grad(lambda h: sum_over_tokens(wave, 1.0, 1, h, head, targets, ones)[1]["entropy"])(hidden)
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["sum_over_tokens", "token_logprobs"])
def test_memory_does_not_grow_with_tokens_times_vocabulary(name, monkeypatch):
    monkeypatch.setattr(losses, "HEAD_TOKENS", 64)
    vocab, width = 4096, 8

    def temporary(tokens):
        def run(hidden, head, targets):
            if name == "token_logprobs":
                return token_logprobs(hidden, head, targets)
            one = jax.value_and_grad(
                lambda h, w: sum_over_tokens(wave, 1.0, 1, h, w, targets, jnp.ones(targets.shape))[0], argnums=(0, 1)
            )
            return one(hidden, head)

        shapes = [
            jax.ShapeDtypeStruct(s, d)
            for s, d in (((4, tokens, width), jnp.float32), ((vocab, width), jnp.float32), ((4, tokens), jnp.int32))
        ]
        return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    one, four, sixteen = (temporary(64 * times) for times in (1, 4, 16))
    assert four - one < 4 * 3 * 64 * vocab * 4 / 50
    assert sixteen - one < 4 * 15 * 64 * vocab * 4 / 50
