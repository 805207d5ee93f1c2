"""Losses as functions of arrays to (sum, denominator), so that micro-batches add up exactly.

The vocabulary is met only here, in chunks of tokens: [tokens, V] never exists for a whole batch.
"""

from typing import Literal

import jax
import jax.numpy as jnp

# A sum and what it is to be divided by, both [] float32.
Mean = tuple[jax.Array, jax.Array]


def token_logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, *, temperature: float = 1.0, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of each distribution, the head's matmul inside.

        z = hidden·headᵀ / τ,   logprob = z[target] − log Σ exp z,   entropy = −Σ softmax(z)·log softmax(z)

    Args:
        hidden: [B, T, D], the states that predict the targets.
        head: [V, D].
        targets: [B, T] int32.
        temperature: τ, that of sampling.
        chunk: tokens of each row whose logits exist at a time: [B, chunk, V]; recomputed in the backward pass.

    Returns:
        logprobs [B, T] and entropy [B, T], float32; no gradient flows through the entropy.
    """
    rows, length, width = hidden.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    parts = (length + pad) // chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, parts, chunk, width).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, pad))).reshape(rows, parts, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        states, wanted = part
        logits = jnp.einsum("btd,vd->btv", states, head, preferred_element_type=jnp.float32) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        taken = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        fixed = jax.lax.stop_gradient(logits - normaliser[..., None])
        entropy = -(jnp.exp(fixed) * fixed).sum(axis=-1)
        return None, (taken - normaliser, entropy)

    _, (logprobs, entropy) = jax.lax.scan(one, None, (hidden, targets))
    return tuple(x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in (logprobs, entropy))


def mask_from_lengths(lengths: jax.Array, width: int) -> jax.Array:
    """True on the first `lengths` of `width` positions: [...] → [..., width]."""
    return jnp.arange(width) < lengths[..., None]


def masked_mean(
    values: jax.Array, mask: jax.Array, aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
) -> Mean:
    """Values [..., T] where mask [..., T] is True, averaged one of two ways, as (sum, denominator).

    Either

        token_mean:     Σ over all tokens / number of tokens              (DAPO; verl's default)
        sequence_mean:  Σ over sequences of each one's token mean / number of non-empty sequences     (GRPO's paper)
    """
    values = jnp.where(mask, values, 0.0)
    if aggregation == "token_mean":
        return values.sum(), mask.sum().astype(jnp.float32)
    if aggregation != "sequence_mean":
        raise ValueError(f"aggregation must be token_mean or sequence_mean, got {aggregation!r}")
    count = mask.sum(axis=-1)
    means = values.sum(axis=-1) / jnp.maximum(count, 1)
    return means.sum(), (count > 0).sum().astype(jnp.float32)


def clipped_policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """The clipped surrogate, per token.

        ρ = exp(logprob − old_logprob),   loss = −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A)

    Args:
        logprobs: [..., T] under the policy being trained.
        old_logprobs: [..., T] under the policy that sampled.
        advantages: [...], one per sequence.
        clip_low: ε_low.
        clip_high: ε_high.

    Returns:
        loss [..., T] and whether clipping bit [..., T] bool.

    Source: PPO (arXiv 1707.06347) eq. 7, with the two bounds of DAPO (arXiv 2503.14476).
    """
    advantages = advantages[..., None]
    ratio = jnp.exp(logprobs - old_logprobs)
    free = ratio * advantages
    bound = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    return -jnp.minimum(free, bound), bound < free


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy ‖ reference) per token: expm1(d) − d ≥ 0 with d = ref − logprob."""
    d = ref_logprobs - logprobs
    return jnp.expm1(d) - d
