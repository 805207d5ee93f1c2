"""Attention over keys that lie in several places, merged exactly.

A completion attends to the prompt its group shares and to its own past. Each part is computed where its keys lie, and
the parts are merged through their log-sum-exp, so the shared keys are never copied to the G rows that read them.

Every query reads one contiguous span of keys; causal, padded, shared and packed rows differ only in their spans.

Axis letters: B rows · T query tokens · S key positions · N query heads · K key-value heads · Q = N/K · H head width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from patarm_jax.arrays import Tree
from patarm_jax.model.pages import Held

# The logit of a key that may not be read. Finite, so that a row without any readable key gives zeros and no NaN.
MASKED = -1e30
# Queries whose scores exist at a time: few enough that [QUERY_BLOCK, S] scores of a head stay in a CPU's cache.
QUERY_BLOCK = 64
# A causal pass is cut into at most so many parts, each of which looks at no keys behind its own last query.
CAUSAL_PARTS = 8
# Keys and values of pages that are read at a time: few enough to stay in a CPU's cache, many enough for its loop.
PAGES_BYTES = 4 << 20
# Keys of wide pages, such as prompts, that are read at a time where a result must not depend on how wide they are.
KEY_BLOCK = 256
# Of a part of a pool that is no larger all pages are read at once.
WHOLE_BYTES = 64 << 20

# By this name `model.remat` knows what the backward pass needs of a forward one beside queries, keys and values.
KEPT = "attention"

# Normalised output [B, T, N, H] float32 and log-sum-exp of the logits [B, T, N] float32.
Partial: TypeAlias = tuple[jax.Array, jax.Array]
# The parts of a layer's pool of pages.
Pool: TypeAlias = tuple[jax.Array, ...]
# First key a query reads, and the first it does not: [B or 1, T] int32 each.
Span: TypeAlias = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Streams:
    """What rows of S tokens are made of: a prompt, or packed sequences, and completions that share the prompt."""

    lengths: jax.Array  # [R], of the prompts
    starts: jax.Array | None  # [R, Tp], where in its row the sequence of a token begins; None: one sequence
    width: int = field(metadata={"static": True})  # Tp
    group: int = field(metadata={"static": True})  # G, completions behind the prompt


def causal_span(length: int, starts: jax.Array | None = None) -> Span:
    """Each query reads its sequence up to itself. Right-padded rows need no more: no real token reads padding."""
    stop = jnp.arange(1, length + 1, dtype=jnp.int32)[None]
    return jnp.zeros_like(stop) if starts is None else starts, stop


def prefix_span(lengths: jax.Array, queries: int) -> Span:
    """Every one of so many queries reads the first `lengths[b]` keys."""
    stop = jnp.broadcast_to(lengths[:, None], (lengths.shape[0], queries)).astype(jnp.int32)
    return jnp.zeros_like(stop), stop


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q: jax.Array, k: jax.Array, v: jax.Array, span: Span, causal: bool) -> Partial:
    """Softmax attention over one set of keys, with what is needed to merge it with others.

        z_s = q·k_s / √H,   lse = log Σ_s exp z_s,   out = Σ_s exp(z_s − lse) v_s        over start ≤ s < stop

    The backward pass recomputes the scores, a block of queries at a time, as in FlashAttention-2 (arXiv 2307.08691,
    algorithm 2); the gradient of lse, which merging needs, joins that of the scores: ∂lse/∂z_s = exp(z_s − lse).

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H], N a multiple of K.
        v: [B, S, K, H].
        span: which keys each query reads.
        causal: promises stop[t] ≤ t + 1 and T = S, so that keys behind a block of queries need not be looked at.

    Returns:
        out [B, T, N, H] and lse [B, T, N], both float32; where no key may be read, out is 0 and lse −1e30.
    """
    return _forward(q, k, v, span, causal)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, span: Span, causal: bool) -> tuple[Partial, Tree]:
    q_heads, k_heads, v_heads = _queries_by_head(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)

    def block(carry: None, part: tuple[jax.Array, ...], k: jax.Array, v: jax.Array) -> tuple[None, Partial]:
        q, start, stop = part
        return carry, _softmax_read(q, k.swapaxes(2, 3), v, _inside(start, stop, k.shape[2]))

    parts = (q_heads, *_expanded(span))
    _, found = _over_queries(block, lambda keys: None, parts, (k_heads, v_heads), causal)
    out, lse = checkpoint_name(found, KEPT)
    return (_by_token(out), _by_token(lse)), (q_heads, k_heads, v_heads, span, out, lse)


def _backward(causal: bool, saved: Tree, gradients: Partial) -> tuple[jax.Array | None, ...]:
    q, k, v, span, out, lse = saved
    batch, heads, width, size = k.shape
    d_out, d_lse = (_queries_by_head(x, heads) for x in gradients)
    # Σ_s weight_s·d_weight_s, which the softmax takes off; the gradient of lse enters where that leaves.
    delta = (d_out * out).sum(axis=-1) - d_lse

    def block(sums: Tree, part: tuple[jax.Array, ...], k: jax.Array, v: jax.Array) -> tuple[Tree, jax.Array]:
        q, d_out, lse, delta, start, stop = part
        readable = _inside(start, stop, k.shape[2])
        scores = jnp.einsum("bkqth,bksh->bkqts", q, k, preferred_element_type=jnp.float32) * size**-0.5
        weights = jnp.where(readable, jnp.exp(jnp.where(readable, scores, MASKED) - lse[..., None]), 0.0)
        d_weights = jnp.einsum("bkqth,bksh->bkqts", d_out, v, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - delta[..., None]) * size**-0.5).astype(k.dtype)
        d_q = jnp.einsum("bkqts,bksh->bkqth", d_scores, k, preferred_element_type=jnp.float32)
        # Keys last: the many keys are then a matrix's columns, which a CPU multiplies three times as fast as its rows.
        d_k = jnp.einsum("bkqth,bkqts->bkhs", q, d_scores, preferred_element_type=jnp.float32)
        d_v = jnp.einsum("bkqth,bkqts->bkhs", d_out, weights.astype(v.dtype), preferred_element_type=jnp.float32)
        return (sums[0] + d_k, sums[1] + d_v), d_q

    def zeros(keys: int) -> tuple[jax.Array, jax.Array]:
        nothing = jnp.zeros((batch, heads, size, keys), jnp.float32)
        return nothing, nothing

    parts = (q, d_out.astype(v.dtype), lse, delta, *_expanded(span))
    sums, d_q = _over_queries(block, zeros, parts, (k, v), causal)
    d_k, d_v = jax.tree.map(lambda *parts: _added_up(parts, width), *sums)
    found = (_by_token(d_q).astype(q.dtype), *(jnp.moveaxis(x, 3, 1).astype(k.dtype) for x in (d_k, d_v)))
    return (*found, None)


attend.defvjp(_forward, _backward)


def _added_up(parts: tuple[jax.Array, ...], width: int) -> jax.Array:
    """The sum of gradients by the first keys, [B, K, H, ≤ S] each, as one by all S keys."""
    return functools.reduce(jnp.add, (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[3]))) for x in parts))


def _over_queries(
    block: Callable[..., tuple[Tree, Tree]],
    init: Callable[[int], Tree],
    parts: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    causal: bool,
) -> tuple[list[Tree], Tree]:
    """`block(carry, part of the queries, keys, values)` over all queries, QUERY_BLOCK at a time.

    Args:
        block: gives a new carry and an output whose axis 3 is the queries'.
        init: the first carry, given how many keys will be seen.
        parts: arrays whose axis 3 is the queries'.
        keys: keys and values, [B, K, S, H].
        causal: whether queries are cut into parts that see no keys behind themselves.

    Returns:
        one carry per part, and the outputs put together.
    """
    length = parts[0].shape[3]
    # A part has two blocks at least: blocks of one part follow one another in the same memory, parts need not.
    step = QUERY_BLOCK * max(2, -(-length // (QUERY_BLOCK * CAUSAL_PARTS))) if causal else length
    carries, outputs = [], []
    for start in range(0, length, step):
        stop = min(start + step, length)
        seen = tuple(x[:, :, :stop] for x in keys) if causal else keys
        part = tuple(x[:, :, :, start:stop] for x in parts)
        carry, output = _in_blocks(lambda c, p, seen=seen: block(c, p, *seen), init(seen[0].shape[2]), part)
        carries.append(carry)
        outputs.append(output)
    return carries, jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *outputs)


def _in_blocks(block: Callable[..., tuple[Tree, Tree]], carry: Tree, part: tuple[jax.Array, ...]) -> tuple[Tree, Tree]:
    """A scan over blocks of queries; those that fill the last one up read nothing, for their span is empty."""
    length = part[0].shape[3]
    count = -(-length // QUERY_BLOCK)
    if count == 1:
        return block(carry, part)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, count * QUERY_BLOCK - length if axis == 3 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:3], count, QUERY_BLOCK, *x.shape[4:]), 3, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], count * QUERY_BLOCK, *x.shape[5:])[:, :, :, :length]

    carry, output = jax.lax.scan(block, carry, jax.tree.map(split, part))
    return carry, jax.tree.map(join, output)


def _inside(start: jax.Array, stop: jax.Array, width: int) -> jax.Array:
    """[B or 1, 1, 1, T] bounds of spans → [B or 1, 1, 1, T, S]."""
    position = jnp.arange(width)
    return (start[..., None] <= position) & (position < stop[..., None])


def _expanded(span: Span) -> Span:
    """[B or 1, T] → [B or 1, 1, 1, T], beside the heads."""
    return span[0][:, None, None], span[1][:, None, None]


def _queries_by_head(x: jax.Array, heads: int) -> jax.Array:
    """[B, T, N, …] → [B, K, Q, T, …], the queries that share a key-value head together."""
    b, t, n = x.shape[:3]
    return jnp.moveaxis(x.reshape(b, t, heads, n // heads, *x.shape[3:]), 1, 3)


def _by_token(x: jax.Array) -> jax.Array:
    """[B, K, Q, T, …] → [B, T, N, …]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def merge(a: Partial, b: Partial) -> jax.Array:
    """Attention over the union of two disjoint sets of keys: Σᵢ outᵢ·exp(lseᵢ) / Σᵢ exp(lseᵢ)."""
    share = jax.nn.sigmoid(a[1] - b[1])[..., None]  # exp(lse_a) / (exp(lse_a) + exp(lse_b))
    return share * a[0] + (1.0 - share) * b[0]


def attend_streams(q: jax.Array, k: jax.Array, v: jax.Array, streams: Streams) -> jax.Array:
    """Attention of rows of tokens as `streams` says what each reads.

    Args:
        q: [R, S, N, H], S = Tp + G·Tc: the prompt first, then its completions one after another.
        k: [R, S, K, H].
        v: [R, S, K, H].
        streams: what the rows are made of.

    Returns:
        [R, S, N, H] float32.
    """
    width, group = streams.width, streams.group
    qp, kp, vp = (x[:, :width] for x in (q, k, v))
    prompt, _ = attend(qp, kp, vp, causal_span(width, streams.starts), True)
    if not group:
        return prompt
    qc, kc, vc = (x[:, width:] for x in (q, k, v))
    read = attend(qc, kp, vp, prefix_span(streams.lengths, qc.shape[1]), False)
    own_out, own_lse = attend(*(_split_group(x, group) for x in (qc, kc, vc)), causal_span(qc.shape[1] // group), True)
    own = own_out.reshape(qc.shape), own_lse.reshape(qc.shape[:3])
    return jnp.concatenate([prompt, merge(read, own)], axis=1)


def attend_behind(
    q: jax.Array, k: jax.Array, v: jax.Array, before: tuple[jax.Array, jax.Array], lengths: jax.Array
) -> jax.Array:
    """Attention of tokens to keys that were kept of what stands before them, and to one another, causally.

    Args:
        q: [R, S, N, H].
        k: [R, S, K, H].
        v: [R, S, K, H].
        before: keys [R, K, H, Tp] and values [R, K, Tp, H], as a cache holds them.
        lengths: [R], how many of them there are. Where Tp is a multiple of KEY_BLOCK, the time follows the largest.

    Returns:
        [R, S, N, H] float32.
    """
    heads = before[1].shape[1]

    def block(carry: None, part: tuple[jax.Array]) -> tuple[None, Partial]:
        (asked,) = part
        together = asked.reshape(*asked.shape[:2], -1, asked.shape[-1])
        out, lse = _read_in_blocks(together, *before, lengths)
        return carry, (out.reshape(asked.shape), lse.reshape(asked.shape[:-1]))

    _, (out, lse) = _in_blocks(block, None, (_queries_by_head(q, heads),))
    own = attend(q, k, v, causal_span(q.shape[1]), True)
    return merge((_by_token(out), _by_token(lse)), own)


def _split_group(x: jax.Array, group: int) -> jax.Array:
    """[R, G·Tc, …] → [R·G, Tc, …]."""
    return x.reshape(x.shape[0] * group, x.shape[1] // group, *x.shape[2:])


def read_pages(q: jax.Array, k: Pool, v: Pool, held: Held, blockwise: bool = False) -> Partial:
    """Softmax attention of every query to the keys that its row holds.

    Pages are read where they lie, a part of the pool at a time, and no part that holds no key; then what was read of
    each row is merged in its own order. So the time follows what is held, and no row's numbers hang on those beside it.

    Args:
        q: [B, K, M, H], M queries that read a row's keys through each of its K heads.
        k: the pool's parts, [Pᵢ, K, H, S] each.
        v: [Pᵢ, K, S, H] each.
        held: how many keys each row has, and on which pages.
        blockwise: whether pages that are a multiple of KEY_BLOCK are read a block at a time. A block that holds no key
            changes no bit, so that the result does not depend on how wide pages are; many rows of few queries are read
            at half the speed.

    Returns:
        out [B, K, M, H] and lse [B, K, M], both float32; of a row without keys 0 and −1e30.
    """
    read_part = partial(_read_part, read=_read_in_blocks if blockwise else _read_whole)
    sizes, size = [part.shape[0] for part in k], v[0].shape[2]
    written = held.written(sum(sizes), size)
    asked = q if held.owner is None else q[jnp.minimum(held.owner, q.shape[0] - 1)]
    parts, begin = [], 0
    for pages, part_k, part_v in zip(sizes, k, v, strict=True):
        arguments = asked[begin : begin + pages], part_k, part_v, written[begin : begin + pages]
        nothing = jnp.zeros(arguments[0].shape, jnp.float32), jnp.full(arguments[0].shape[:3], MASKED)
        if len(sizes) == 1:
            parts.append(read_part(*arguments))
        else:
            parts.append(jax.lax.cond(arguments[3].any(), read_part, lambda *_, nothing=nothing: nothing, *arguments))
        begin += pages
    out, lse = (jnp.concatenate(one) if len(one) > 1 else one[0] for one in zip(*parts, strict=True))
    return (out, lse) if held.table is None else _merged_pages(out, lse, held.table, held.count, size)


def _read_part(q: jax.Array, k: jax.Array, v: jax.Array, written: jax.Array, read: Callable[..., Partial]) -> Partial:
    """Queries [P, K, M, H] over pages that hold so many keys [P]; of a large part some pages at a time."""
    pages, heads, width, size = k.shape
    each = 2 * heads * width * size * k.dtype.itemsize

    # Taking pages out copies them, which counts where little is computed with each: that is so in small pools.
    if pages * each <= WHOLE_BYTES:
        return read(q, k, v, written)
    at_a_time = max(1, min(pages, PAGES_BYTES // each))
    number = -(-pages // at_a_time)
    busy = (jnp.pad(written, (0, number * at_a_time - pages)).reshape(number, at_a_time) > 0).any(axis=1)
    (where,) = jnp.nonzero(busy, size=number, fill_value=0)

    def visit(step: jax.Array, carry: Partial) -> Partial:
        # The last ones begin earlier where the pages are no multiple: some are read twice, and come out the same.
        start = jnp.minimum(where[step] * at_a_time, pages - at_a_time)
        new = read(*(jax.lax.dynamic_slice_in_dim(x, start, at_a_time) for x in (q, k, v, written)))
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return put(carry[0], new[0]), put(carry[1], new[1])

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASKED)
    found: Partial = jax.lax.fori_loop(0, busy.sum(), visit, nothing)
    return found


def _read_whole(q: jax.Array, k: jax.Array, v: jax.Array, written: jax.Array) -> Partial:
    """Queries [P, K, M, H] over the keys that pages hold."""
    return _softmax_read(q, k, v, (jnp.arange(k.shape[3]) < written[:, None])[:, None, None])


def _read_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, written: jax.Array) -> Partial:
    """As `_read_whole`, KEY_BLOCK keys of every page at a time where pages are a multiple of it."""
    if k.shape[3] <= KEY_BLOCK or k.shape[3] % KEY_BLOCK:
        return _read_whole(q, k, v, written)

    def add(number: jax.Array, carry: Partial) -> Partial:
        begin = number * KEY_BLOCK
        keys, values = (jax.lax.dynamic_slice_in_dim(x, begin, KEY_BLOCK, axis) for x, axis in ((k, 3), (v, 2)))
        readable = (begin + jnp.arange(KEY_BLOCK) < written[:, None])[:, None, None]
        new = _softmax_read(q, keys, values, readable)
        return merge(carry, new), jnp.logaddexp(carry[1], new[1])

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASKED)
    found: Partial = jax.lax.fori_loop(0, -(-written.max() // KEY_BLOCK), add, nothing)
    return found


def _merged_pages(out: jax.Array, lse: jax.Array, table: jax.Array, count: jax.Array, size: int) -> Partial:
    """Of the parts of pages [P, K, M, H] those of each row, one after another."""

    def add(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, peak, weight = carry
        there = (number * size < count)[:, None, None]
        new = jnp.where(there, lse[table[:, number]], MASKED)
        higher = jnp.maximum(peak, new)
        shrink, share = jnp.exp(peak - higher), jnp.where(there, jnp.exp(new - higher), 0.0)
        total = total * shrink[..., None] + out[table[:, number]] * share[..., None]
        return total, higher, weight * shrink + share

    shape = (table.shape[0], *out.shape[1:])
    nothing = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], MASKED), jnp.zeros(shape[:3], jnp.float32)
    total, peak, weight = jax.lax.fori_loop(0, (count.max() + size - 1) // size, add, nothing)
    safe = jnp.where(weight > 0, weight, 1.0)
    return total / safe[..., None], peak + jnp.log(safe)


def _softmax_read(q: jax.Array, k: jax.Array, v: jax.Array, readable: jax.Array) -> Partial:
    """Queries [B, K, …, H] over keys [B, K, H, S] where `readable` [B, 1, …, S]: output and log-sum-exp."""
    scores = jnp.einsum("bk...h,bkhs->bk...s", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(readable, scores, MASKED)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.where(readable, jnp.exp(scores - peak), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("bk...s,bksh->bk...h", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / safe
    return out, (peak + jnp.log(safe))[..., 0]
