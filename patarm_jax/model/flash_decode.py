"""Attention of new tokens to pages of kept keys: a Pallas kernel for NVIDIA GPUs that reads only what was written.

A page is cut into blocks of keys, and a row visits those that hold one of its own, page by page. They are dealt out to
a few programs, whose parts are merged through their log-sum-exp, so that a few long rows keep the whole device busy too
(Flash-Decoding, https://pytorch.org/blog/flash-decoding).

Axis letters: B rows · K key-value heads · M queries that read a row's keys through one such head · H head width ·
              P pages · S keys of a page · J pages that a row may have
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from patarm_jax.model.attention import MASKED, Partial, Pool
from patarm_jax.model.flash import LOG2_E, Ref
from patarm_jax.model.pages import Held

# Keys of a block: pages have whole blocks.
KEYS = 64
# Queries of a program: the tensor cores multiply 16 rows at least, and the float32 sums of 64 stay in registers.
LEAST_QUERIES, MOST_QUERIES = 16, 64
# A row is shared by at most so many programs, each of which has so many places at least.
MOST_PROGRAMS, LEAST_PLACES = 4, 512


def read_pool(q: jax.Array, k: Pool, v: Pool, held: Held, interpret: bool = False) -> Partial:
    """Softmax attention of every query to the keys its row holds: `attention.read_pages`, block by block.

    Args:
        q: [B, K, M, H], H a power of two from 16 on.
        k: the one part of a pool, [P, K, H, S], S a multiple of KEYS.
        v: [P, K, S, H], of one too.
        held: how many keys each row has, and on which pages.
        interpret: run the kernel as ordinary JAX, on any device.

    Returns:
        out [B, K, M, H] and lse [B, K, M], both float32; of a row without keys 0 and about −1e30.

    Raises:
        ValueError: a page has no whole number of blocks.
    """
    (keys,), (values,) = k, v
    (rows, heads, queries, width), (pages, _, _, places) = q.shape, keys.shape
    if places % KEYS:
        raise ValueError(f"a page has {places} places, and the kernel reads blocks of {KEYS}. Round it up.")
    size = min(max(LEAST_QUERIES, pl.next_power_of_2(queries)), MOST_QUERIES)
    padded = queries if queries <= size else queries + -queries % size
    parts = max(1, padded // size)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - queries), (0, 0)))
    # A row without a table is given its one page alone, the first of one.
    table = jnp.zeros((rows, 1), jnp.int32) if held.table is None else held.table
    seen = 1 if held.table is None else pages
    programs = min(max(table.shape[1] * places // LEAST_PLACES, 1), MOST_PROGRAMS)
    per_row = pl.BlockSpec((None,), lambda row, _head, _program: (row,))
    of_row = pl.BlockSpec((None, table.shape[1]), lambda row, _head, _program: (row, 0))
    queried = pl.BlockSpec((None, None, padded, width), lambda row, head, _program: (row, head // parts, 0, 0))

    def of_pages(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (seen, None, *shape), lambda row, head, _program: (row if held.table is None else 0, head // parts, 0, 0)
        )

    def of_program(*shape: int) -> pl.BlockSpec:
        whole = (0,) * len(shape)
        return pl.BlockSpec(
            (None, None, None, *shape), lambda row, head, program: (row, head // parts, program, *whole)
        )

    out, lse = pl.pallas_call(
        partial(_kernel, size=size, parts=parts),
        grid=(rows, heads * parts, programs),
        in_specs=[per_row, of_row, queried, of_pages(width, places), of_pages(places, width)],
        out_specs=[of_program(padded, width), of_program(padded)],
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads, programs, padded, width), jnp.float32),
            jax.ShapeDtypeStruct((rows, heads, programs, padded), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="flash_decode",
    )(held.count.astype(jnp.int32), table.astype(jnp.int32), q, keys, values)  # a weak type would be no program
    shares = jax.nn.softmax(lse, axis=2)[..., None]
    return (out * shares).sum(axis=2)[:, :, :queries], jax.nn.logsumexp(lse, axis=2)[:, :, :queries]


def _kernel(
    count_ref: Ref,
    table_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    *,
    size: int,
    parts: int,
) -> None:
    """Some queries of a row and head over one program's share of the blocks of their row."""
    _, places, width = v_ref.shape
    blocks, count = places // KEYS, count_ref[...]
    # Nothing that is divided is negative, for which `//` and `%` would be prepared.
    visits = jax.lax.div(count + (KEYS - 1), KEYS)
    each = pl.cdiv(visits, pl.num_programs(2))
    begin = pl.program_id(2) * each
    here = pl.ds(jax.lax.rem(pl.program_id(1), parts) * size, size)
    there = jnp.arange(size, dtype=jnp.int32) < q_ref.shape[0]
    q = triton.load(q_ref.at[here, :], mask=there[:, None], other=0.0)

    def visit(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, peak, total = carry
        page = table_ref[jax.lax.div(step, blocks)]
        keys = pl.ds(jax.lax.rem(step, blocks) * KEYS, KEYS)
        readable = (step * KEYS + jnp.arange(KEYS, dtype=jnp.int32) < count)[None, :]
        scores = triton.dot(q, k_ref[page, :, keys], allow_tf32=False) * (width**-0.5 * LOG2_E)
        scores = jnp.where(readable, scores, MASKED)
        higher = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.where(readable, jnp.exp2(scores - higher[:, None]), 0.0)
        shrink = jnp.exp2(peak - higher)
        read = triton.dot(weights.astype(v_ref.dtype), v_ref[page, keys, :], allow_tf32=False)
        return out * shrink[:, None] + read, higher, total * shrink + weights.sum(axis=1)

    nothing = jnp.zeros((size,), jnp.float32)
    carry = jnp.zeros((size, width), jnp.float32), nothing + MASKED, nothing
    out, peak, total = jax.lax.fori_loop(begin, jnp.minimum(begin + each, visits), visit, carry)
    total = jnp.where(total > 0.0, total, 1.0)
    triton.store(out_ref.at[here, :], out / total[:, None], mask=there[:, None])
    triton.store(lse_ref.at[here], (peak + jnp.log2(total)) * math.log(2.0), mask=there)
