"""Losses as sums over tokens, so that micro-batches add up exactly.

The vocabulary is met only here, in chunks of tokens: [tokens, V] never exists for a whole batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Array, Tree

# Tokens whose logits exist at a time on a device: on CPUs enough for the matmul to be bound by arithmetic; elsewhere
# more, since the head's gradient, V × D in float32, is read and written for each chunk. 2,048 tokens of a vocabulary of
# 151,936 are 1.2 GB of float32.
HEAD_TOKENS, HEAD_TOKENS_OF_ACCELERATORS = 512, 2048


# A sum and what it is to be divided by, both [] float32.
Mean: TypeAlias = tuple[jax.Array, jax.Array]


class Loss(NamedTuple):
    """What a loss gives for a (micro-)batch, or for a chunk of its tokens; those of parts add up."""

    loss: Mean  # what is minimised
    metrics: dict[str, Mean]  # reported, by name


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: Array, *, temperature: float = 1.0, shards: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each distribution, without a gradient.

        z = hidden·headᵀ / τ,   logprob = z[target] − log Σ exp z,   entropy = −Σ softmax(z)·log softmax(z)

    Args:
        hidden: [B, T, D], the states that predict the targets.
        head: [V, D].
        targets: [B, T] int32.
        temperature: τ, that of sampling.
        shards: into how many parts the devices share B; each works through its own tokens.

    Returns:
        logprobs [B, T] and entropy [B, T], float32.
    """
    hidden, head = jax.lax.stop_gradient((hidden, head))
    chunks = jax.tree.map(lambda x: _chunked(x, shards), (hidden, targets))

    def one(carry: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        states, wanted = part
        logprobs, entropy, _, _ = _read(states, wanted, head, temperature)
        return carry, (logprobs, entropy)

    _, (logprobs, entropy) = jax.lax.scan(one, None, chunks)
    return _unchunked(logprobs, targets.shape, shards), _unchunked(entropy, targets.shape, shards)


# Takes logprobs, entropies, whether the target has the largest logit, and what else is known of the same tokens, all
# [n]; gives a sum to minimise and sums to report.
TokenSum: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, Tree], tuple[jax.Array, Tree]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def sum_over_tokens(
    fn: TokenSum, temperature: float, shards: int, hidden: jax.Array, head: jax.Array, targets: Array, known: Tree
) -> tuple[jax.Array, Tree]:
    """Adds up a function of every token's log-prob and entropy, with the gradient of the sum by its log-probs.

    The gradient by hidden states and head is taken along with the value, chunk by chunk, while the chunk's logits are
    there; so they are computed once and never stored. A target that shares the largest logit counts as the largest. No
    gradient flows through entropies, reported sums and `known`.

    Args:
        fn: static; a token for which all of `known` is 0 must count for nothing, since chunks are filled up with such.
        temperature: τ, as in `token_logprobs`.
        shards: as in `token_logprobs`.
        hidden: [B, T, D].
        head: [V, D].
        targets: [B, T] int32.
        known: a tree of [B, T].

    Returns:
        what fn gave, added up over all tokens.
    """
    chunks = jax.tree.map(lambda x: _chunked(x, shards), (hidden, targets, known))

    def one(sums: Tree, part: tuple[jax.Array, jax.Array, Tree]) -> tuple[Tree, None]:
        states, wanted, known = part
        logprobs, entropy, hit, _ = _read(states, wanted, head, temperature)
        return jax.tree.map(jnp.add, sums, fn(logprobs, entropy, hit, known)), None

    return jax.lax.scan(one, _zero_sums(fn, chunks), chunks)[0]


def _sum_forward(
    fn: TokenSum, temperature: float, shards: int, hidden: jax.Array, head: jax.Array, targets: Array, known: Tree
) -> tuple[tuple[jax.Array, Tree], tuple[jax.Array, jax.Array]]:
    chunks = jax.tree.map(lambda x: _chunked(x, shards), (hidden, targets, known))

    def one(carry: Tree, part: tuple[jax.Array, jax.Array, Tree]) -> tuple[Tree, jax.Array]:
        sums, d_head = carry
        states, wanted, known = part
        logprobs, entropy, hit, (weights, total) = _read(states, wanted, head, temperature)
        value, pullback, reported = jax.vjp(lambda logprobs: fn(logprobs, entropy, hit, known), logprobs, has_aux=True)
        (d_logprobs,) = pullback(jnp.float32(1.0))
        scaled = (d_logprobs / temperature)[:, None]  # ∂logprob/∂logit = [is the target] − softmax
        is_target = wanted[:, None] == jnp.arange(head.shape[0])
        d_logits = (jnp.where(is_target, scaled, 0.0) - weights * (scaled / total[:, None])).astype(head.dtype)
        # One sum per part of the batch: devices that hold different parts meet once, behind the last chunk.
        apart = (x.reshape(shards, -1, x.shape[-1]) for x in (d_logits, states))
        d_head += jnp.einsum("wcv,wcd->wvd", *apart, preferred_element_type=jnp.float32)
        d_states = jnp.einsum("nv,vd->nd", d_logits, head, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, (value, reported)), d_head), d_states.astype(states.dtype)

    zero = _zero_sums(fn, chunks), jnp.zeros((shards, *head.shape), jnp.float32)
    (sums, d_head), d_hidden = jax.lax.scan(one, zero, chunks)
    return sums, (_unchunked(d_hidden, hidden.shape, shards), d_head.sum(axis=0).astype(head.dtype))


def _sum_backward(
    fn: TokenSum, temperature: float, shards: int, saved: tuple[jax.Array, ...], gradient: Tree
) -> tuple[jax.Array | None, ...]:
    return (*((gradient[0] * x).astype(x.dtype) for x in saved), None, None)


sum_over_tokens.defvjp(_sum_forward, _sum_backward)


def _read(
    states: jax.Array, targets: jax.Array, head: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Log-probs [n], entropies [n] and hits [n] of n tokens, and the softmax [n, V] with its divisor [n]."""
    logits = jnp.einsum("nd,vd->nv", states, head, preferred_element_type=jnp.float32) / temperature
    peak = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    total = weights.sum(axis=-1)
    normaliser = peak[:, 0] + jnp.log(total)
    taken = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    entropy = normaliser - (weights * logits).sum(axis=-1) / total
    # A hit without an argmax, whose index would be a second pass over the vocabulary.
    return taken - normaliser, entropy, taken == peak[:, 0], (weights, total)


def _zero_sums(fn: TokenSum, chunks: Tree) -> Tree:
    _, targets, known = jax.tree.map(lambda x: x[0], chunks)
    nothing = jnp.zeros(targets.shape, jnp.float32)
    hits = jnp.zeros(targets.shape, bool)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, nothing, nothing, hits, known))


def _chunked(x: jax.Array, shards: int) -> jax.Array:
    """[B, T, …] → [number of chunks, n, …], C tokens of each of W parts of the batch, filled up with zeros.

    Flat, for XLA's CPU backend reduces the rows of a matrix far faster than those of a stack of matrices.
    """
    tokens = x.reshape(shards, -1, *x.shape[2:])
    chunk = min(head_tokens(), tokens.shape[1])
    count = -(-tokens.shape[1] // chunk)
    tokens = jnp.pad(tokens, [(0, count * chunk - tokens.shape[1] if axis == 1 else 0) for axis in range(tokens.ndim)])
    return (
        tokens.reshape(shards, count, chunk, *x.shape[2:]).swapaxes(0, 1).reshape(count, shards * chunk, *x.shape[2:])
    )


def head_tokens() -> int:
    """Tokens of a chunk on the devices of the mesh that a program is traced under; without one, on JAX's own."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if described is None else described.platform
    return HEAD_TOKENS if platform == "cpu" else HEAD_TOKENS_OF_ACCELERATORS


def _unchunked(x: jax.Array, shape: tuple[int, ...], shards: int) -> jax.Array:
    """[number of chunks, n, …] → [B, T, …]."""
    tokens = x.reshape(x.shape[0], shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(shards, -1, *x.shape[2:])
    return tokens[:, : shape[0] * shape[1] // shards].reshape(shape)


def mask_from_lengths(lengths: Array, width: int) -> jax.Array:
    """True on the first `lengths` of `width` positions: [...] → [..., width]."""
    return jnp.arange(width) < lengths[..., None]
