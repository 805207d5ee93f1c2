"""Losses of sampled tokens, as pure functions of arrays: what an algorithm minimises once advantages are known.

    loss(logprobs [R, G, Tc], tokens) → Loss                                       over a micro-batch of whole units

A loss that adds up over tokens takes a chunk of tokens as well, every array [n] instead of [R, G, Tc]; the fused head
then computes it while a chunk's logits are there. One that does not, such as a ratio of sequences, takes the detour of
`steps.exact_loss`. None depends on the weights but through `logprobs`.

Axis letters: R prompts · G rollouts per prompt · Tc completion tokens
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Array, Rollouts
from patarm_jax.train.losses import Loss, mask_from_lengths
from patarm_jax.train.penalties import KLPenalty, estimated_kl

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant_length"]
# A log-ratio beyond it counts as the limit, without a gradient, so that no exponential overflows (verl).
LOG_RATIO_LIMIT = 20.0
# The same for the mean log-ratio of a sequence, from above alone (verl's GSPO).
SEQUENCE_LOG_LIMIT = 10.0


class SampledTokens(NamedTuple):
    """What a loss knows of sampled tokens, arrays of one shape: [R, G, Tc], or [n] of a chunk of them."""

    mask: jax.Array  # bool, False on padding
    weights: jax.Array  # float32, of the token in the sum that is minimised; 0 on padding
    counts: jax.Array  # float32, which add up to what that sum is divided by; 0 on padding
    advantages: jax.Array  # float32
    old_logprobs: Array  # float32
    ref_logprobs: Array | None  # float32
    sampler_logprobs: Array | None = None  # float32, where old_logprobs are not the sampler's own
    importance: jax.Array | None = None  # float32, by which a token's loss is multiplied


def sampled_tokens(
    rollouts: Rollouts, aggregation: Aggregation, longest: int = 0, importance_cap: float | None = None
) -> SampledTokens:
    """What is known of every token of a batch, [R, G, Tc].

    Args:
        rollouts: the batch.
        aggregation: how tokens are weighed against one another.
        longest: the limit of new tokens, by which constant_length divides.
        importance_cap: the largest exp(old − sampler) by which a token's loss is multiplied; None: by nothing.
    """
    mask = mask_from_lengths(rollouts.completion_lengths, rollouts.completion_tokens.shape[-1])
    advantages = rollouts.advantages if rollouts.advantages.ndim == 3 else rollouts.advantages[..., None]
    weights, counts = token_weights(mask, aggregation, longest)
    return SampledTokens(
        mask=mask,
        weights=weights,
        counts=counts,
        advantages=jnp.broadcast_to(advantages, mask.shape),
        old_logprobs=rollouts.old_logprobs,
        ref_logprobs=rollouts.ref_logprobs,
        sampler_logprobs=rollouts.sampler_logprobs,
        importance=None if importance_cap is None else importance_weights(rollouts, mask, importance_cap),
    )


def importance_weights(rollouts: Rollouts, mask: jax.Array, cap: float) -> jax.Array:
    """min(exp(old − sampler), cap) per token [R, G, Tc], 0 on padding: the sampler's numerics are not the trainer's.

    Equals: verl `compute_rollout_correction_weights` with rollout_is "token".

    Source: truncated importance sampling, F. Yao and others, "Your efficient RL framework secretly brings you
    off-policy RL training" (2025).
    """
    if rollouts.sampler_logprobs is None:
        raise ValueError("importance weights need the trainer's old log-probs beside the sampler's")
    difference = jnp.where(mask, rollouts.old_logprobs - rollouts.sampler_logprobs, 0.0)
    ratio = jnp.exp(jnp.clip(difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    return jnp.where(mask, jnp.minimum(ratio, cap), 0.0)


def token_weights(
    mask: jax.Array, aggregation: Aggregation = "token_mean", longest: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Weights of the tokens [..., T] of a mean, and counts [..., T] that add up to what their sum is divided by.

    token_mean:       Σ over all tokens / number of tokens              (DAPO; verl "token-mean", TRL "dapo")
    sequence_mean:    Σ over sequences of each one's token mean / number of sequences     (GRPO's paper; TRL "grpo")
    sequence_sum:     Σ over all tokens / number of sequences                       (verl "seq-mean-token-sum")
    constant_length:  Σ over all tokens / (number of sequences · longest)
                                                (Dr. GRPO; TRL "dr_grpo", verl "seq-mean-token-sum-norm")

    A sequence without tokens is none, as in verl, so that what is left out of a batch changes no mean; TRL counts it.
    """
    if aggregation == "token_mean":
        return mask.astype(jnp.float32), mask.astype(jnp.float32)
    length = mask.sum(axis=-1, keepdims=True)
    # A sequence counts at its first token: so the number of sequences is exact, however tokens are chunked.
    first = (mask & (jnp.arange(mask.shape[-1]) == 0)).astype(jnp.float32)
    if aggregation == "sequence_mean":
        return mask / jnp.maximum(length, 1), first
    if aggregation == "sequence_sum":
        return mask.astype(jnp.float32), first
    if aggregation != "constant_length" or longest < 1:
        raise ValueError(
            "aggregation must be token_mean, sequence_mean, sequence_sum, or constant_length with a longest ≥ 1, "
            f"got {aggregation!r} with {longest}"
        )
    return mask / jnp.float32(longest), first


# ------------------------------------------------------------------------------------------------------------- losses


def clipped_loss(
    logprobs: jax.Array,
    tokens: SampledTokens,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    kl: KLPenalty | None = None,
) -> Loss:
    """The clipped surrogate with a ratio for each token; adds up over tokens.

    Equals: verl `compute_policy_loss_vanilla`, which has a dual clip of 3; TRL's losses "grpo" (sequence_mean), "dapo"
    (token_mean) and "dr_grpo" (constant_length), with the KL k3 in the loss, while |log ρ| ≤ 20 and no row is empty.
    """
    log_ratio = _log_ratio(logprobs, tokens)
    per_token, clipped = clipped_surrogate(
        jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT),
        tokens.advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    return _loss_of(per_token, clipped, logprobs, tokens, kl)


def clipped_sequence_loss(
    logprobs: jax.Array, tokens: SampledTokens, *, clip_low: float, clip_high: float, kl: KLPenalty | None = None
) -> Loss:
    """The clipped surrogate with a ratio for each sequence, the geometric mean of its tokens' ratios.

        s = exp( (1/|y|)·Σₜ (logprobₜ − old_logprobₜ) ),   per token sg(s)·π/sg(π), whose value is s

    Args:
        logprobs: [R, G, Tc].
        tokens: all arrays [R, G, Tc].
        clip_low: ε_low.
        clip_high: ε_high.
        kl: of each token, where its place is the loss.

    Equals: verl `compute_policy_loss_gspo` and, while log s ≤ 10, TRL's importance_sampling_level "sequence", with
    tokens weighed by sequence_mean.

    Source: GSPO (arXiv 2507.18071) eq. 5, in the form of its GSPO-token, eq. 14.
    """
    differences = _log_ratio(logprobs, tokens)
    length = jnp.maximum(tokens.mask.sum(axis=-1, keepdims=True), 1)
    mean = jax.lax.stop_gradient(differences.sum(axis=-1, keepdims=True) / length)
    log_ratio = jnp.minimum(mean + differences - jax.lax.stop_gradient(differences), SEQUENCE_LOG_LIMIT)
    per_token, clipped = clipped_surrogate(log_ratio, tokens.advantages, clip_low=clip_low, clip_high=clip_high)
    return _loss_of(per_token, clipped, logprobs, tokens, kl)


def clipped_product_loss(
    logprobs: jax.Array, tokens: SampledTokens, *, clip_low: float, clip_high: float, kl: KLPenalty | None = None
) -> Loss:
    """The clipped surrogate with a ratio for each sequence, the product of its tokens' ratios; a mean over sequences.

        ρ = exp( Σₜ (logprobₜ − old_logprobₜ) ),   one term for each sequence, however long

    Args:
        logprobs: [R, G, Tc].
        tokens: all arrays [R, G, Tc], weighed by sequence_mean; a sequence's advantage is its first token's.
        clip_low: ε_low.
        clip_high: ε_high.
        kl: of each token, where its place is the loss.

    Equals: TRL's RLOOTrainer while |log ρ| ≤ 20; beyond, where TRL's exponential grows on, nothing is learnt here.
    """
    log_ratio = _log_ratio(logprobs, tokens).sum(axis=-1, keepdims=True)
    per_sequence, clipped = clipped_surrogate(
        jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT),
        tokens.advantages[..., :1],
        clip_low=clip_low,
        clip_high=clip_high,
    )
    # Spread over its tokens, whose weights add up to 1.
    per_token, clipped = (jnp.broadcast_to(x, tokens.mask.shape) for x in (per_sequence, clipped))
    return _loss_of(per_token, clipped, logprobs, tokens, kl)


def clipped_weight_loss(
    logprobs: jax.Array,
    tokens: SampledTokens,
    *,
    clip_low: float | None,
    clip_high: float,
    kl: KLPenalty | None = None,
) -> Loss:
    """−sg(clip ρ)·A·logprob: ratios clipped as weights, so that every token keeps its gradient; adds up over tokens.

    Args:
        logprobs: [R, G, Tc].
        tokens: all arrays [R, G, Tc].
        clip_low: ρ is no less than 1 − clip_low; None: ρ has no floor.
        clip_high: ρ is no more than 1 + clip_high.
        kl: of each token, where its place is the loss.

    Equals: verl `compute_policy_loss_cispo`; TRL's "cispo", whose epsilon_high is 1 + clip_high, while |log ρ| ≤ 20.

    Source: CISPO, of MiniMax-M1 (arXiv 2506.13585) eq. 4; without a floor and capped at 5 as in ScaleRL (arXiv
    2510.13786).
    """
    ratio = jnp.exp(jnp.clip(_log_ratio(logprobs, tokens), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    low, high = -math.inf if clip_low is None else 1.0 - clip_low, 1.0 + clip_high
    weight = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
    per_token = -weight * tokens.advantages * jnp.where(tokens.mask, logprobs, 0.0)
    return _loss_of(per_token, (ratio < low) | (ratio > high), logprobs, tokens, kl)


# ------------------------------------------------------------------------------------------------------------- pieces


def clipped_surrogate(
    log_ratio: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The clipped surrogate, per token.

        ρ = exp(log ratio),   loss = −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A),   where A < 0 at most −c·A

    Args:
        log_ratio: [...], logprob − old_logprob.
        advantages: [...].
        clip_low: ε_low.
        clip_high: ε_high.
        dual_clip: c > 1; None: without it.

    Returns:
        loss [...] and whether clipping bit [...] bool.

    Source: PPO (arXiv 1707.06347) eq. 7, with the two bounds of DAPO (arXiv 2503.14476) and the dual clip of arXiv
    1912.09729.
    """
    ratio = jnp.exp(log_ratio)
    free = ratio * advantages
    bound = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    loss, clipped = -jnp.minimum(free, bound), bound < free
    if dual_clip is None:
        return loss, clipped
    most = -dual_clip * advantages
    bites = (advantages < 0) & (loss > most)
    return jnp.where(bites, most, loss), clipped | bites


def _log_ratio(logprobs: jax.Array, tokens: SampledTokens) -> jax.Array:
    """Logprob − old_logprob, 0 on padding, where an exponential might not be finite."""
    return jnp.where(tokens.mask, logprobs - tokens.old_logprobs, 0.0)


def _loss_of(
    per_token: jax.Array, clipped: jax.Array, logprobs: jax.Array, tokens: SampledTokens, kl: KLPenalty | None
) -> Loss:
    """The weighted sum over tokens with the KL, and what is reported of them."""
    mask, denominator = tokens.mask, tokens.counts.sum()
    number = mask.sum().astype(jnp.float32)
    if tokens.importance is not None:
        per_token = per_token * tokens.importance
    total = policy_loss = (per_token * tokens.weights).sum()
    metrics = {
        "policy_loss": (policy_loss, denominator),
        "clip_ratio/region_mean": ((clipped & mask).sum().astype(jnp.float32), number),
        **_numerics(logprobs, tokens),
    }
    if tokens.ref_logprobs is not None:
        logprobs, ref_logprobs = (jnp.where(mask, x, 0.0) for x in (logprobs, tokens.ref_logprobs))
        metrics["kl"] = ((estimated_kl(logprobs, ref_logprobs, "k3") * mask).sum(), number)
        if kl is not None and kl.place == "loss":
            charged = estimated_kl(logprobs, ref_logprobs, kl.kind)
            if kl.by_ratio:
                charged = charged * jnp.exp(jnp.clip(_log_ratio(logprobs, tokens), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
            total += kl.coef * (charged * tokens.weights).sum()
    return Loss((total, denominator), metrics | {"loss": (total, denominator)})


def _numerics(logprobs: jax.Array, tokens: SampledTokens) -> dict[str, tuple[jax.Array, jax.Array]]:
    """How far the trainer's log-probs d = trainer − sampler are from the sampler's: mean |d|, k3, share beyond log 2.

    The trainer's are the old ones where they were computed anew, else those of the update itself.
    """
    trainer, sampler = logprobs, tokens.old_logprobs
    if tokens.sampler_logprobs is not None:
        trainer, sampler = jnp.asarray(tokens.old_logprobs), tokens.sampler_logprobs
    number = tokens.mask.sum().astype(jnp.float32)
    d = jax.lax.stop_gradient(jnp.where(tokens.mask, trainer - sampler, 0.0))
    return {
        "sampling/logprob_gap_mean": (jnp.abs(d).sum(), number),
        "sampling/logprob_gap_k3": ((jnp.expm1(d) - d).sum(), number),
        "sampling/ratio_outside": ((jnp.abs(d) > math.log(2.0)).sum().astype(jnp.float32), number),
    }
