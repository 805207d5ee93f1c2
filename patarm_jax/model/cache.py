"""The cache of a decode: keys and values of prompts, which a group shares, and of the rows that are being written.

Axis letters: R prompts · Tp prompt tokens · Tc completion tokens · B rows being written · W devices that share them
              K key-value heads · H head width · L layers
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import BATCH_AXES, constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptCache:
    """Keys and values of R prompts, an array for each of L layers; keys lie as a matrix that queries multiply."""

    keys: tuple[jax.Array, ...]  # L × [R, K, H, Tp]
    values: tuple[jax.Array, ...]  # L × [R, K, Tp, H]
    lengths: jax.Array  # [R] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What B rows that are being written have read: R prompts, each shared by up to G rows, and their own past.

    A row's own keys stand in a ring of Tc places that all rows write at the same place: the newest at `clock` mod Tc,
    the ones before it behind. So a row may begin at any time, and writing is one slice whatever the rows' ages are.
    """

    prompt: PromptCache
    keys: tuple[jax.Array, ...]  # L × [B, K, H, Tc]
    values: tuple[jax.Array, ...]  # L × [B, K, Tc, H]
    clock: jax.Array  # [] int32, tokens written since the cache was made


def init_cache(
    arch: Architecture, prompts: int, prompt_width: int, rows: int, completion_width: int, dtype: DTypeLike
) -> KVCache:
    """An empty cache for R prompts of Tp tokens and for B rows of Tc."""
    heads, size = arch.num_key_value_heads, arch.head_dim

    def empty(rows: int, width: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        shapes = (rows, heads, size, width), (rows, heads, width, size)
        keys, values = (
            tuple(by_rows(jnp.zeros(shape, dtype)) for _ in range(arch.num_hidden_layers)) for shape in shapes
        )
        return keys, values

    lengths = jnp.ones(prompts, jnp.int32)
    return KVCache(
        PromptCache(*empty(prompts, prompt_width), lengths), *empty(rows, completion_width), clock=jnp.int32(0)
    )


def place_prompts(cache: PromptCache, new: PromptCache, place: jax.Array) -> PromptCache:
    """The cache with new prompts, no wider than its own, at places [W, n] within each device; r: nowhere."""
    shards = place.shape[0]

    def put(mine: jax.Array, new: jax.Array) -> jax.Array:
        def one(mine: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
            part = tuple(slice(size) for size in new.shape[1:])
            return mine.at[(place, *part)].set(new.astype(mine.dtype), mode="drop")

        shape = mine.shape
        mine, new = (x.reshape(shards, -1, *x.shape[1:]) for x in (mine, new))
        return by_rows(jax.vmap(one)(mine, new, place).reshape(shape))

    return jax.tree.map(put, cache, new)


def resize_cache(cache: KVCache, rows: jax.Array, prompts: jax.Array, prompt_width: int) -> KVCache:
    """The cache with the rows [W, b] and prompts [W, r] named, counted within each device, and narrower prompts."""

    def take(index: jax.Array, x: jax.Array) -> jax.Array:
        shards = index.shape[0]
        taken = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(x.reshape(shards, -1, *x.shape[1:]), index)
        return by_rows(taken.reshape(-1, *x.shape[1:]))

    old = cache.prompt
    narrow = PromptCache(
        tuple(keys[..., :prompt_width] for keys in old.keys),
        tuple(values[..., :prompt_width, :] for values in old.values),
        old.lengths,
    )
    keys, values = jax.tree.map(partial(take, rows), (cache.keys, cache.values))
    return KVCache(prompt=jax.tree.map(partial(take, prompts), narrow), keys=keys, values=values, clock=cache.clock)


def by_head(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T, K, H] each as a cache holds them: keys [B, K, H, T], values [B, K, T, H]."""
    return by_rows(keys.transpose(0, 2, 3, 1)), by_rows(values.swapaxes(1, 2))


def with_token(
    keys: jax.Array, values: jax.Array, key: jax.Array, value: jax.Array, place: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A layer's ring of own keys and values with those of a new token of every row, all at one place."""
    return (
        jax.lax.dynamic_update_slice_in_dim(keys, key.astype(keys.dtype), place, axis=3),
        jax.lax.dynamic_update_slice_in_dim(values, value.astype(values.dtype), place, axis=2),
    )


def by_rows(x: jax.Array) -> jax.Array:
    """A layer's part of a cache, [B, K, …]: rows over the batch axes, heads over `tensor`; lengths, [B], stay."""
    return x if x.ndim == 1 else constrain(x, BATCH_AXES, "tensor", None, None)
