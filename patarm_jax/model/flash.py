"""Attention as Pallas kernels for NVIDIA GPUs: plain, packed and shared-prompt rows in one pass over a row's tokens.

A query reads the first so many keys (the prompt it shares) and one span (its own past); a block of queries visits only
blocks of keys that one of them reads. So a group's completions read their prompt's keys where they lie, and neither
scores nor masks ever exist beyond a block. FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, with these ranges.

Axis letters: R rows · S tokens of a row · N query heads · K key-value heads · H head width
"""

import math
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from patarm_jax.arrays import Tree
from patarm_jax.model.attention import KEPT

# Logits are in base 2, whose exponential is what the hardware has.
LOG2_E = math.log2(math.e)
MASKED = -1e30

# Queries and keys of a block; rows are padded to whole blocks. Four warps hold the [64, H] float32 sums of keys and
# values that the backward pass needs at a time.
FORWARD_BLOCKS = (128, 64)
BACKWARD_BLOCKS = (64, 64)
PADDED_TO = math.lcm(*FORWARD_BLOCKS, *BACKWARD_BLOCKS)


class Ref(Protocol):
    """Memory that a kernel reads and writes, one block of an array."""

    @property
    def dtype(self) -> jnp.dtype:
        """The type of its numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are."""

    @property
    def at(self) -> Tree:
        """`at[index]`: a part of it, to be read or written under a mask."""

    def __getitem__(self, index: Tree) -> jax.Array:
        """What is there."""

    def __setitem__(self, index: Tree, value: jax.Array) -> None:
        """Writes there."""


class Reads(NamedTuple):
    """Which keys of its row a query reads: s < prefix, and start ≤ s < stop. Each [R or 1, S] int32."""

    prefix: jax.Array
    start: jax.Array
    stop: jax.Array


def attend(q: jax.Array, k: jax.Array, v: jax.Array, reads: Reads, interpret: bool = False) -> jax.Array:
    """Softmax attention of every token to those tokens of its row that it reads.

        out_t = Σ_s softmax_s(q_t·k_s / √H) v_s        over s < prefix_t and start_t ≤ s < stop_t

    Args:
        q: [R, S, N, H], H a power of two.
        k: [R, S, K, H], N a multiple of K.
        v: [R, S, K, H].
        reads: which keys each query reads.
        interpret: run the kernels as ordinary JAX, on any device.

    Returns:
        [R, S, N, H] in q's dtype, accumulated in float32; 0 where nothing is read.
    """
    rows, length = q.shape[:2]
    padding = -length % PADDED_TO
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    spread = (jnp.broadcast_to(x, (rows, length)) for x in reads)
    reads = Reads(*(jnp.pad(x, ((0, 0), (0, padding))) for x in spread))  # padding reads nothing
    return _attend(q, k, v, reads, interpret)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, reads: Reads, interpret: bool) -> jax.Array:
    return _forward(q, k, v, reads, interpret)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, reads: Reads, interpret: bool) -> tuple[jax.Array, Tree]:
    (rows, length, heads, width), kv_heads = q.shape, k.shape[2]
    queries, keys = FORWARD_BLOCKS
    visits = visits_of(reads, queries, keys)
    of_queries, of_keys, per_query, per_head, per_block = _specs(q, kv_heads, queries)
    call = pl.pallas_call(
        partial(_forward_kernel, keys=keys),
        grid=(length // queries, rows, heads),
        in_specs=[of_queries, of_keys, of_keys, *[per_query] * 3, *[per_block] * 3],
        out_specs=[of_queries, per_head],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=8 if width > 64 else 4, num_stages=3),
        interpret=interpret,
        name="shared_prompt_attention",
    )
    out, lse = checkpoint_name(call(q, k, v, *reads, *visits), KEPT)
    return out, (q, k, v, reads, out, lse)


def _backward(interpret: bool, saved: Tree, d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, reads, out, lse = saved
    (rows, length, heads, width), kv_heads = q.shape, k.shape[2]
    queries, keys = BACKWARD_BLOCKS
    visits = visits_of(reads, queries, keys)
    # Σ_s weight_s·d_weight_s, which the softmax takes off.
    delta = jnp.einsum("rsnh,rsnh->rns", out, d_out, preferred_element_type=jnp.float32)
    given = (q, k, v, d_out, lse, delta, *reads)
    call = partial(
        pl.pallas_call, compiler_params=triton.CompilerParams(num_warps=4, num_stages=2), interpret=interpret
    )

    of_queries, of_keys, per_query, per_head, per_block = _specs(q, kv_heads, queries)
    d_q = call(
        partial(_d_q_kernel, keys=keys),
        grid=(length // queries, rows, heads),
        in_specs=[of_queries, of_keys, of_keys, of_queries, *[per_head] * 2, *[per_query] * 3, *[per_block] * 3],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="shared_prompt_attention_d_q",
    )(*given, *visits)

    heads_per_key = heads // kv_heads
    of_keys = pl.BlockSpec((None, keys, None, width), lambda j, r, n: (r, j, n, 0))
    of_queries = pl.BlockSpec((None, length, heads_per_key, width), lambda j, r, n: (r, 0, n, 0))
    per_head = pl.BlockSpec((None, heads_per_key, length), lambda j, r, n: (r, n, 0))
    per_query = pl.BlockSpec((None, length), lambda j, r, n: (r, 0))
    per_block = pl.BlockSpec((None, None), lambda j, r, n: (r, j))
    d_k, d_v = call(
        partial(_d_keys_kernel, queries=queries, heads=heads_per_key),
        grid=(length // keys, rows, kv_heads),
        in_specs=[of_queries, of_keys, of_keys, of_queries, *[per_head] * 2, *[per_query] * 3, *[per_block] * 2],
        out_specs=[of_keys, of_keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        name="shared_prompt_attention_d_keys",
    )(*given, *readers_of(visits, length // keys))
    return d_q, d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _specs(q: jax.Array, kv_heads: int, queries: int) -> tuple[pl.BlockSpec, ...]:
    """Blocks for a grid over (block of queries, row, query head): a block's tokens, a row's, and numbers of each."""
    length, width, heads_per_key = q.shape[1], q.shape[3], q.shape[2] // kv_heads
    return (
        pl.BlockSpec((None, queries, None, width), lambda i, r, n: (r, i, n, 0)),
        pl.BlockSpec((None, length, None, width), lambda i, r, n: (r, 0, n // heads_per_key, 0)),
        pl.BlockSpec((None, queries), lambda i, r, n: (r, i)),
        pl.BlockSpec((None, None, queries), lambda i, r, n: (r, n, i)),
        pl.BlockSpec((None, None), lambda i, r, n: (r, i)),
    )


# ------------------------------------------------------------------------------------------------------------ ranges


def visits_of(reads: Reads, queries: int, keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blocks of keys that a block of queries visits: the first `shared`, and first ≤ j < last. Each [R, S/queries]."""
    prefix, start, stop = (x.reshape(x.shape[0], -1, queries) for x in reads)
    has_own = stop > start
    shared = -(-prefix.max(axis=-1) // keys)
    first = jnp.where(has_own, start, jnp.iinfo(jnp.int32).max).min(axis=-1) // keys
    last = -(-jnp.where(has_own, stop, 0).max(axis=-1) // keys)
    return shared, jnp.minimum(jnp.maximum(first, shared), last), last


def readers_of(visits: tuple[jax.Array, ...], key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Blocks of queries first ≤ i < last that visit a block of keys; each [R, S/keys]."""
    shared, first, last = (x[..., None] for x in visits)
    block = jnp.arange(key_blocks)
    visited = (block < shared) | ((first <= block) & (block < last))  # [R, blocks of queries, blocks of keys]
    count, some = visited.shape[1], visited.any(axis=1)
    return (
        jnp.where(some, jnp.argmax(visited, axis=1), 0).astype(jnp.int32),
        jnp.where(some, count - jnp.argmax(visited[:, ::-1], axis=1), 0).astype(jnp.int32),
    )


# ----------------------------------------------------------------------------------------------------------- kernels


def _readable(bounds: tuple[jax.Array, ...], begin: jax.Array, keys: int) -> jax.Array:
    """[queries, keys]: whether a query reads each of so many keys from `begin` on."""
    prefix, start, stop = (x[:, None] for x in bounds)
    position = begin + jnp.arange(keys, dtype=jnp.int32)[None, :]
    return (position < prefix) | ((start <= position) & (position < stop))


def _dot(a: jax.Array, b: jax.Array, **options: bool) -> jax.Array:
    """A matrix product accumulated in float32; float32 itself is multiplied in full, not as TF32."""
    return triton.dot(a, b, allow_tf32=False, **options)


def _forward_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    prefix_ref: Ref,
    start_ref: Ref,
    stop_ref: Ref,
    shared_ref: Ref,
    first_ref: Ref,
    last_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    *,
    keys: int,
) -> None:
    q, bounds = q_ref[...], (prefix_ref[...], start_ref[...], stop_ref[...])
    queries, width = q.shape

    def visit(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, peak, total = carry
        here = pl.ds(block * keys, keys)
        readable = _readable(bounds, block * keys, keys)
        scores = _dot(q, k_ref[here, :], trans_b=True) * (width**-0.5 * LOG2_E)
        scores = jnp.where(readable, scores, MASKED)
        higher = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.where(readable, jnp.exp2(scores - higher[:, None]), 0.0)
        shrink = jnp.exp2(peak - higher)
        read = _dot(weights.astype(v_ref.dtype), v_ref[here, :])
        return out * shrink[:, None] + read, higher, total * shrink + weights.sum(axis=1)

    carry = (
        jnp.zeros((queries, width), jnp.float32),
        jnp.full((queries,), MASKED, jnp.float32),
        jnp.zeros((queries,), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, shared_ref[...], visit, carry)
    out, peak, total = jax.lax.fori_loop(first_ref[...], last_ref[...], visit, carry)
    total = jnp.where(total > 0.0, total, 1.0)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = peak + jnp.log2(total)


def _d_q_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    prefix_ref: Ref,
    start_ref: Ref,
    stop_ref: Ref,
    shared_ref: Ref,
    first_ref: Ref,
    last_ref: Ref,
    d_q_ref: Ref,
    *,
    keys: int,
) -> None:
    q, d_out, lse, delta = q_ref[...], d_out_ref[...], lse_ref[...], delta_ref[...]
    bounds = prefix_ref[...], start_ref[...], stop_ref[...]

    def visit(block: jax.Array, d_q: jax.Array) -> jax.Array:
        here = pl.ds(block * keys, keys)
        k = k_ref[here, :]
        _, d_scores = _weights_and_d_scores(
            q, k, v_ref[here, :], d_out, lse, delta, _readable(bounds, block * keys, keys)
        )
        return d_q + _dot(d_scores.astype(k.dtype), k)

    d_q = jax.lax.fori_loop(0, shared_ref[...], visit, jnp.zeros(q.shape, jnp.float32))
    d_q = jax.lax.fori_loop(first_ref[...], last_ref[...], visit, d_q)
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _d_keys_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    prefix_ref: Ref,
    start_ref: Ref,
    stop_ref: Ref,
    first_ref: Ref,
    last_ref: Ref,
    d_k_ref: Ref,
    d_v_ref: Ref,
    *,
    queries: int,
    heads: int,
) -> None:
    k, v = k_ref[...], v_ref[...]
    begin = pl.program_id(0) * k.shape[0]

    def visit(head: jax.Array, block: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        here = pl.ds(block * queries, queries)
        q, d_out = q_ref[here, head, :], d_out_ref[here, head, :]
        bounds = prefix_ref[here], start_ref[here], stop_ref[here]
        weights, d_scores = _weights_and_d_scores(
            q, k, v, d_out, lse_ref[head, here], delta_ref[head, here], _readable(bounds, begin, k.shape[0])
        )
        d_k, d_v = sums
        return (
            d_k + _dot(d_scores.astype(q.dtype), q, trans_a=True),
            d_v + _dot(weights.astype(d_out.dtype), d_out, trans_a=True),
        )

    def visit_head(head: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(first_ref[...], last_ref[...], partial(visit, head), sums)

    zeros = jnp.zeros(k.shape, jnp.float32)
    sums = jax.lax.fori_loop(0, heads, visit_head, (zeros, zeros))  # over the query heads that share these keys
    d_k_ref[...], d_v_ref[...] = sums[0].astype(d_k_ref.dtype), sums[1].astype(d_v_ref.dtype)


def _weights_and_d_scores(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    readable: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The softmax of a block of queries over a block of keys, and the gradient of q·k, both [queries, keys]."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.where(readable, _dot(q, k, trans_b=True) * (scale * LOG2_E), MASKED)
    weights = jnp.where(readable, jnp.exp2(scores - lse[:, None]), 0.0)
    d_weights = _dot(d_out, v, trans_b=True)
    return weights, weights * (d_weights - delta[:, None]) * scale
