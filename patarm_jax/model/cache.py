"""The cache of a decode: keys and values of prompts, which a group shares, and of the rows that are being written.

Axis letters: R prompts · Tp prompt tokens · B rows being written · P pages of a device · S keys of a page ·
              W devices that share them · K key-value heads · H head width · L layers
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from patarm_jax.arrays import Array
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.attention import Pool
from patarm_jax.model.pages import Pages, new_pages, of_rows, page_size
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
    """What B rows that are being written have read: R prompts, each shared by up to G rows, and their own past."""

    prompt: PromptCache
    # By layers, the parts of a pool: of a device's P pages the first P₀ lie in its first part, then come the second's.
    keys: tuple[Pool, ...]  # L × parts × [W·Pᵢ, K, H, S]
    values: tuple[Pool, ...]  # L × parts × [W·Pᵢ, K, S, H]
    pages: Pages | None  # whose is which; None: page b is row b's

    @property
    def page_size(self) -> int:
        """S."""
        return self.values[0][0].shape[2]

    @property
    def pages_in_all(self) -> int:
        """Pages of all devices."""
        return sum(part.shape[0] for part in self.keys[0])


@dataclass(frozen=True)
class CacheSizes:
    """The sizes of a cache on each of W devices."""

    shards: int  # W
    prompts: int
    prompt_width: int  # Tp
    rows: int
    most: int  # keys that a row may hold
    parts: tuple[int, ...]  # Pᵢ


def init_cache(arch: Architecture, sizes: CacheSizes, key_block: int, dtype: DTypeLike) -> KVCache:
    """An empty cache; pages hold a multiple of `key_block` keys."""
    shards = sizes.shards
    heads, size = arch.num_key_value_heads, arch.head_dim

    def empty(rows: int, width: int) -> tuple[jax.Array, jax.Array]:
        shapes = (rows, heads, size, width), (rows, heads, width, size)
        keys, values = (by_rows(jnp.zeros(shape, dtype)) for shape in shapes)
        return keys, values

    prompts = [empty(shards * sizes.prompts, sizes.prompt_width) for _ in range(arch.num_hidden_layers)]
    prompt_keys, prompt_values = (tuple(of_layer[which] for of_layer in prompts) for which in (0, 1))
    pages = page_size(sizes.most, key_block)
    pools = [[empty(shards * part, pages) for part in sizes.parts] for _ in range(arch.num_hidden_layers)]
    keys, values = (tuple(tuple(part[which] for part in pool) for pool in pools) for which in (0, 1))
    return KVCache(
        PromptCache(prompt_keys, prompt_values, jnp.ones(shards * sizes.prompts, jnp.int32)),
        keys,
        values,
        pages=new_pages(shards, sizes.rows, sum(sizes.parts), sizes.most),
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


def prompts_at(cache: PromptCache, place: Array, lengths: Array) -> PromptCache:
    """The first tokens, so many of each [W·n], of the prompts at places [W, n] within each device."""
    keys, values = jax.tree.map(partial(_taken, place), (cache.keys, cache.values))
    return PromptCache(keys, values, jnp.asarray(lengths))


def with_rest(before: PromptCache, rest: PromptCache, most: int) -> PromptCache:
    """Prompts put together of their beginnings and what stands behind them; none has more tokens than `most`."""

    def joined(axis: int, begin: jax.Array, rest: jax.Array) -> jax.Array:
        behind = rest.shape[axis]
        room = [(0, behind if place == axis else 0) for place in range(begin.ndim)]

        def one(begin: jax.Array, rest: jax.Array, length: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(begin, rest, length, axis - 1)

        whole = jax.vmap(one)(jnp.pad(begin, room), rest.astype(begin.dtype), before.lengths)
        return by_rows(jax.lax.slice_in_dim(whole, 0, min(most, whole.shape[axis]), axis=axis))

    keys = tuple(map(partial(joined, 3), before.keys, rest.keys))
    values = tuple(map(partial(joined, 2), before.values, rest.values))
    return PromptCache(keys, values, before.lengths + rest.lengths)


def resize_cache(cache: KVCache, rows: jax.Array, prompts: jax.Array, prompt_width: int) -> KVCache:
    """The cache with the rows [W, b] and prompts [W, r] named, counted within each device, and narrower prompts."""
    old = cache.prompt
    narrow = PromptCache(*_narrowed(old, prompt_width), old.lengths)
    prompt = jax.tree.map(partial(_taken, prompts), narrow)
    if cache.pages is not None:  # which stay where they lie
        return replace(cache, prompt=prompt, pages=of_rows(cache.pages, rows))
    keys, values = jax.tree.map(partial(_taken, rows), (cache.keys, cache.values))
    return replace(cache, prompt=prompt, keys=keys, values=values)


def _narrowed(cache: PromptCache, width: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Keys and values of the first so many tokens of each prompt."""
    return tuple(keys[..., :width] for keys in cache.keys), tuple(values[..., :width, :] for values in cache.values)


def _taken(index: Array, x: jax.Array) -> jax.Array:
    """The rows [W, n] of an array [W·m, …], counted within each device."""
    shards = index.shape[0]
    taken = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(x.reshape(shards, -1, *x.shape[1:]), index)
    return by_rows(taken.reshape(-1, *x.shape[1:]))


def by_head(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T, K, H] each as a cache holds them: keys [B, K, H, T], values [B, K, T, H]."""
    return by_rows(keys.transpose(0, 2, 3, 1)), by_rows(values.swapaxes(1, 2))


def with_token(
    keys: Pool, values: Pool, key: jax.Array, value: jax.Array, page: jax.Array, place: jax.Array
) -> tuple[Pool, Pool]:
    """A layer's pools with the key and the value [B, K, H] of a new token of every row at its place [W, b] on a page.

    Those that go to no page are dropped.
    """
    shards, heads, width = page.shape[0], key.shape[1], key.shape[2]

    def put_key(keys: jax.Array, new: jax.Array, page: jax.Array, place: jax.Array) -> jax.Array:
        return keys.at[page, :, :, place].set(new, mode="drop")

    def put_value(values: jax.Array, new: jax.Array, page: jax.Array, place: jax.Array) -> jax.Array:
        return values.at[page, :, place, :].set(new, mode="drop")

    def put(pool: Pool, new: jax.Array, one: Callable[..., jax.Array]) -> Pool:
        parts, begin = [], 0
        new = new.astype(pool[0].dtype).reshape(shards, -1, heads, width)
        for part in pool:
            apart = part.reshape(shards, -1, *part.shape[1:])
            here = jnp.where(page >= begin, page - begin, apart.shape[1])
            parts.append(by_rows(jax.vmap(one)(apart, new, here, place).reshape(part.shape)))
            begin += apart.shape[1]
        return tuple(parts)

    return put(keys, key, put_key), put(values, value, put_value)


def another_part(part: jax.Array, shards: int, pages: int) -> jax.Array:
    """A further part of the pool of a part [W·Pᵢ, …], of so many empty pages on each device."""
    return by_rows(jnp.zeros((shards * pages, *part.shape[1:]), part.dtype))


def widen(x: jax.Array, shards: int, pages: int) -> jax.Array:
    """A layer's pages [W·P, …] with empty ones behind those of each device, so many in all on each."""
    apart = x.reshape(shards, -1, *x.shape[1:])
    wide = jnp.pad(apart, [(0, 0), (0, pages - apart.shape[1]), *[(0, 0)] * (x.ndim - 1)])
    return by_rows(wide.reshape(-1, *x.shape[1:]))


def by_rows(x: jax.Array) -> jax.Array:
    """A layer's part of a cache, [B, K, …]: rows over the batch axes, heads over `tensor`; lengths, [B], stay."""
    return x if x.ndim == 1 else constrain(x, BATCH_AXES, "tensor", None, None)
