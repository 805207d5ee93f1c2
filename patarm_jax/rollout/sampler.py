"""Draws G completions of each of R prompts in one compiled loop. Knows tokens and logits, no text and no network.

The prompt is computed once and shared by its group. Randomness belongs to the row: the key of a token is
`fold_in(fold_in(key, row·G + g), position)`, so neither the batch a row stands in nor the devices it runs on change it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from patarm_jax.types import Completions, Prompts

Cache = TypeVar("Cache")
Prefill = Callable[[jax.Array, jax.Array], tuple[jax.Array, Cache]]  # tokens [R,Tp], lengths [R] -> logits [R,V], cache
Decode = Callable[[jax.Array, Cache], tuple[jax.Array, Cache]]  # tokens [R,G], cache -> logits [R,G,V], cache


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen; static under jit."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0


class _Loop(NamedTuple, Generic[Cache]):
    position: jax.Array  # [] the position drawn next
    token: jax.Array  # [R, G] drawn last
    done: jax.Array  # [R, G] bool
    tokens: jax.Array  # [R, G, Tc]
    logprobs: jax.Array  # [R, G, Tc]
    lengths: jax.Array  # [R, G]
    cache: Cache


def sample(
    prefill: Prefill[Cache], decode: Decode[Cache], prompts: Prompts, key: jax.Array, group: int, settings: Settings
) -> Completions:
    """Samples until every row has ended or `max_new_tokens` are drawn.

    Args:
        prefill: reads the prompts and gives the logits of the first new token.
        decode: takes the newest token of every row and gives the logits of the next.
        prompts: a negative row id marks a filler row: nothing is drawn for it and its lengths are 0.
        key: of this step; rows fold their ids into it.
        group: G.
        settings: see `Settings`.

    Returns:
        Completions; log-probs are of the softmax at `temperature` (at 1 when it is 0) before top-k and top-p, which is
        what training compares them with. Past its end a row holds token 0 and log-prob 0.
    """
    rows, width = prompts.tokens.shape[0], settings.max_new_tokens
    ids = prompts.rows[:, None] * group + jnp.arange(group)
    keys = jax.vmap(jax.vmap(lambda row: jax.random.fold_in(key, row)))(ids)

    logits, cache = prefill(prompts.tokens, prompts.lengths)
    logits = jnp.broadcast_to(logits[:, None], (rows, group, logits.shape[-1]))
    start = _Loop(
        position=jnp.int32(0),
        token=jnp.zeros((rows, group), jnp.int32),
        done=jnp.broadcast_to(prompts.rows[:, None] < 0, (rows, group)),
        tokens=jnp.zeros((rows, group, width), jnp.int32),
        logprobs=jnp.zeros((rows, group, width), jnp.float32),
        lengths=jnp.zeros((rows, group), jnp.int32),
        cache=cache,
    )

    def step(loop: _Loop[Cache]) -> _Loop[Cache]:
        logits, cache = decode(loop.token, loop.cache)
        return _take(loop._replace(cache=cache), logits, keys, settings)

    end = jax.lax.while_loop(
        lambda loop: (loop.position < width) & ~loop.done.all(), step, _take(start, logits, keys, settings)
    )
    return Completions(end.tokens, end.lengths, end.logprobs, truncated=~end.done)


def _take(loop: _Loop[Cache], logits: jax.Array, keys: jax.Array, settings: Settings) -> _Loop[Cache]:
    """Draws the token at `loop.position` and records it for the rows that have not ended."""
    here = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, loop.position)))(keys)
    token, logprob = draw(logits, here, settings)
    token = jnp.where(loop.done, 0, token)
    logprob = jnp.where(loop.done, 0.0, logprob)
    return _Loop(
        position=loop.position + 1,
        token=token,
        done=loop.done | jnp.isin(token, jnp.array(settings.stop_ids, jnp.int32)),
        tokens=jax.lax.dynamic_update_index_in_dim(loop.tokens, token, loop.position, axis=2),
        logprobs=jax.lax.dynamic_update_index_in_dim(loop.logprobs, logprob, loop.position, axis=2),
        lengths=loop.lengths + ~loop.done,
        cache=loop.cache,
    )


def draw(logits: jax.Array, keys: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """One token per row and its log-prob.

    Args:
        logits: [..., V].
        keys: [...] PRNG keys.
        settings: temperature, top-k, top-p.

    Returns:
        token [...] int32 and its log-prob [...] float32 before top-k and top-p.
    """
    logits = logits.astype(jnp.float32)
    if settings.temperature > 0:
        logits = logits / settings.temperature
        kept = keep_top_p(keep_top_k(logits, settings.top_k), settings.top_p)
        categorical = jax.random.categorical
        for _ in range(keys.ndim):
            categorical = jax.vmap(categorical)
        token = categorical(keys, kept)
    else:
        token = logits.argmax(axis=-1)
    logprob = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return token.astype(jnp.int32), logprob


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """−∞ for all but the k largest logits [..., V]; tokens equal to the k-th stay. k = 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """−∞ for all but the smallest set of likeliest tokens [..., V] whose probabilities reach p; p = 1 keeps all."""
    if p >= 1.0:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the likeliest token always stays: 0 < p
    least = jnp.where(before < p, ordered, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
