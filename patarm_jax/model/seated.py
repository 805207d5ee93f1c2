"""Attention of new tokens, one of every row that is being written, over the prompts that rows share and their own past.

Axis letters: B rows · W devices that share them · R prompts · G seats of a prompt · N query heads ·
              K key-value heads · Q = N/K · H head width · Tp prompt tokens · P pages · S keys of a page
"""

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Seats
from patarm_jax.model import kernels
from patarm_jax.model.attention import Pool, merge
from patarm_jax.model.kernels import Kernel
from patarm_jax.model.pages import Held


def seated_attention(
    q: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    prompt_lengths: jax.Array,
    own: tuple[Pool, Pool],
    held: Held,
    seats: Seats,
    kernel: Kernel,
) -> jax.Array:
    """Attention of one new token of every row to the prompt it shares with others, and to its own cached past.

    The queries of a prompt's rows are brought together on its G seats, so that its keys are read once for all of them.

    Args:
        q: [B, N, H].
        prompt: keys [R, K, H, Tp] and values [R, K, Tp, H].
        prompt_lengths: [R].
        own: parts of keys [Pᵢ, K, H, S] and of values [Pᵢ, K, S, H], the new token's already written.
        held: how many of them each row has, and where.
        seats: who sits where; of a row of age −1, which writes nothing, the result means nothing.
        kernel: that `kernels.choose` gave for written rows.

    Returns:
        [B, N, H] float32.
    """
    (rows, heads, width), (prompts, kv_heads), shards = q.shape, prompt[1].shape[:2], seats.seat.shape[0]
    group = seats.row.shape[1] * shards // prompts
    by_head = q.reshape(rows, kv_heads, heads // kv_heads, width)
    past = kernels.read_pages(by_head, *own, held, kernel)

    nobody = jnp.zeros((shards, 1, *by_head.shape[1:]), q.dtype)
    seated = _taken(jnp.concatenate([by_head.reshape(shards, -1, *by_head.shape[1:]), nobody], axis=1), seats.row)
    together = jnp.moveaxis(seated.reshape(prompts, group, *by_head.shape[1:]), 1, 2)  # [R, K, G, Q, H]
    taken = (seats.row.reshape(prompts, group) < rows // shards).any(axis=1)
    of_prompts = Held(jnp.where(taken, prompt_lengths, 0))
    pools = (prompt[0],), (prompt[1],)
    shared = kernels.read_pages(together.reshape(prompts, kv_heads, -1, width), *pools, of_prompts, kernel)

    def at_own_seat(x: jax.Array) -> jax.Array:  # [R, K, G·Q, …] → [B, K, Q, …]
        x = jnp.moveaxis(x.reshape(prompts, kv_heads, group, -1, *x.shape[3:]), 2, 1)
        return _taken(x.reshape(shards, -1, kv_heads, *x.shape[3:]), seats.seat).reshape(rows, kv_heads, *x.shape[3:])

    return merge((at_own_seat(shared[0]), at_own_seat(shared[1])), past).reshape(rows, heads, width)


def _taken(x: jax.Array, index: jax.Array) -> jax.Array:
    """[W, n, …] at [W, m], of each device its own."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
