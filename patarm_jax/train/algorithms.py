"""Algorithms of reinforcement learning, each two pure functions of arrays.

    advantages(rewards [R, G], valid [R, G], rollouts) → [R, G] or [R, G, Tc]      over the whole batch
    loss(logprobs [R, G, Tc], tokens) → Loss                                       over a micro-batch of whole units

A loss that adds up over tokens takes a chunk of tokens as well, every array [n] instead of [R, G, Tc]; the fused head
then computes it while a chunk's logits are there. One that does not, such as a ratio of sequences, takes the detour of
`steps.exact_loss`. Both must be free of the weights but through `logprobs`.

Axis letters: R prompts · G rollouts per prompt · Tc completion tokens
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Array, Rollouts
from patarm_jax.reward import advantages_within
from patarm_jax.train.losses import Loss, mask_from_lengths

Aggregation = Literal["token_mean", "sequence_mean"]


class SampledTokens(NamedTuple):
    """What a loss knows of sampled tokens, arrays of one shape: [R, G, Tc], or [n] of a chunk of them."""

    mask: jax.Array  # bool, False on padding
    weights: jax.Array  # float32, of the token in the sum that is minimised; 0 on padding
    counts: jax.Array  # float32, which add up to what that sum is divided by; 0 on padding
    advantages: jax.Array  # float32
    old_logprobs: Array  # float32
    ref_logprobs: Array | None  # float32


Advantages = Callable[[jax.Array, jax.Array, Rollouts], jax.Array]
PolicyLoss = Callable[[jax.Array, SampledTokens], Loss]


class Algorithm(NamedTuple):
    """How rewards become advantages, and what is minimised."""

    advantages: Advantages
    loss: PolicyLoss
    adds_up: bool  # whether the loss is a sum over tokens


# --------------------------------------------------------------------------------------------------------- algorithms


def grpo(
    *, clip_low: float, clip_high: float, kl_coef: float, prompts_per_group: int = 1, normalise_std: bool = True
) -> Algorithm:
    """GRPO (arXiv 2402.03300): advantages within groups, a clipped ratio for each token, the KL in the loss."""
    return Algorithm(
        partial(group_advantages, prompts_per_group=prompts_per_group, normalise_std=normalise_std),
        partial(clipped_loss, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef),
        adds_up=True,
    )


def gspo(
    *, clip_low: float, clip_high: float, kl_coef: float, prompts_per_group: int = 1, normalise_std: bool = True
) -> Algorithm:
    """GSPO (arXiv 2507.18071): as GRPO, with one ratio for each sequence; its authors clip at 3e-4 and 4e-4."""
    return Algorithm(
        partial(group_advantages, prompts_per_group=prompts_per_group, normalise_std=normalise_std),
        partial(clipped_sequence_loss, clip_low=clip_low, clip_high=clip_high, kl_coef=kl_coef),
        adds_up=False,
    )


ALGORITHMS: dict[str, Callable[..., Algorithm]] = {"grpo": grpo, "gspo": gspo}

# --------------------------------------------------------------------------------------------------------- advantages


def group_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    rollouts: Rollouts,
    *,
    prompts_per_group: int = 1,
    ddof: int = 1,
    eps: float = 1e-6,
    normalise_std: bool = True,
) -> jax.Array:
    """A = (r − mean) / (std + ε) within each group; see `reward.group_advantages`.

    A rollout that failed is a member of its group like any other: its penalty is its reward.

    Args:
        rewards: [R, G].
        valid: [R, G] bool, not looked at.
        rollouts: not looked at.
        prompts_per_group: so many consecutive prompts make one group, such as 2 for both responses of a pair.
        ddof: as of `reward.group_advantages`, as are eps and normalise_std.
        eps: ε.
        normalise_std: False for A = r − mean.

    Returns:
        [R, G] float32.
    """
    groups = rewards.reshape(-1, prompts_per_group * rewards.shape[1])
    return advantages_within(groups, ddof, eps, normalise_std).reshape(rewards.shape)


# ------------------------------------------------------------------------------------------------------------- losses


def sampled_tokens(rollouts: Rollouts, aggregation: Aggregation) -> SampledTokens:
    """What is known of every token of a batch, [R, G, Tc]."""
    mask = mask_from_lengths(rollouts.completion_lengths, rollouts.completion_tokens.shape[-1])
    advantages = rollouts.advantages if rollouts.advantages.ndim == 3 else rollouts.advantages[..., None]
    return SampledTokens(
        mask,
        *token_weights(mask, aggregation),
        jnp.broadcast_to(advantages, mask.shape),
        rollouts.old_logprobs,
        rollouts.ref_logprobs,
    )


def token_weights(mask: jax.Array, aggregation: Aggregation = "token_mean") -> tuple[jax.Array, jax.Array]:
    """Weights of the tokens [..., T] of a mean, and counts [..., T] that add up to what their sum is divided by.

    token_mean:     Σ over all tokens / number of tokens              (DAPO; verl's default)
    sequence_mean:  Σ over sequences of each one's token mean / number of non-empty sequences     (GRPO's paper)
    """
    if aggregation == "token_mean":
        return mask.astype(jnp.float32), mask.astype(jnp.float32)
    if aggregation != "sequence_mean":
        raise ValueError(f"aggregation must be token_mean or sequence_mean, got {aggregation!r}")
    length = mask.sum(axis=-1, keepdims=True)
    # A sequence counts at its first token: so the number of sequences is exact, however tokens are chunked.
    first = mask & (jnp.arange(mask.shape[-1]) == 0)
    return mask / jnp.maximum(length, 1), first.astype(jnp.float32)


def clipped_loss(
    logprobs: jax.Array, tokens: SampledTokens, *, clip_low: float, clip_high: float, kl_coef: float
) -> Loss:
    """The clipped surrogate with a ratio for each token, plus kl_coef times the k3 KL; adds up over tokens."""
    logprobs = _of_tokens(logprobs, tokens)
    per_token, clipped = clipped_surrogate(
        logprobs - tokens.old_logprobs, tokens.advantages, clip_low=clip_low, clip_high=clip_high
    )
    return _loss_of(per_token, clipped, logprobs, tokens, kl_coef)


def clipped_sequence_loss(
    logprobs: jax.Array, tokens: SampledTokens, *, clip_low: float, clip_high: float, kl_coef: float
) -> Loss:
    """The clipped surrogate with a ratio for each sequence, plus kl_coef times the k3 KL.

        s = exp( (1/|y|)·Σₜ (logprobₜ − old_logprobₜ) ),   per token sg(s)·π/sg(π), whose value is s

    Args:
        logprobs: [R, G, Tc].
        tokens: all arrays [R, G, Tc].
        clip_low: ε_low.
        clip_high: ε_high.
        kl_coef: of the KL.

    Source: GSPO (arXiv 2507.18071) eq. 5, in the form of its GSPO-token, eq. 14, as TRL and verl have it.
    """
    logprobs = _of_tokens(logprobs, tokens)
    length = jnp.maximum(tokens.mask.sum(axis=-1, keepdims=True), 1)
    differences = jnp.where(tokens.mask, logprobs - tokens.old_logprobs, 0.0)
    mean = jax.lax.stop_gradient(differences.sum(axis=-1, keepdims=True) / length)
    log_ratio = mean + logprobs - jax.lax.stop_gradient(logprobs)
    per_token, clipped = clipped_surrogate(log_ratio, tokens.advantages, clip_low=clip_low, clip_high=clip_high)
    return _loss_of(per_token, clipped, logprobs, tokens, kl_coef)


def clipped_surrogate(
    log_ratio: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """The clipped surrogate, per token.

        ρ = exp(log ratio),   loss = −min(ρ·A, clip(ρ, 1 − ε_low, 1 + ε_high)·A)

    Args:
        log_ratio: [...], logprob − old_logprob.
        advantages: [...].
        clip_low: ε_low.
        clip_high: ε_high.

    Returns:
        loss [...] and whether clipping bit [...] bool.

    Source: PPO (arXiv 1707.06347) eq. 7, with the two bounds of DAPO (arXiv 2503.14476).
    """
    ratio = jnp.exp(log_ratio)
    free = ratio * advantages
    bound = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
    return -jnp.minimum(free, bound), bound < free


def kl_k3(logprobs: jax.Array, ref_logprobs: Array) -> jax.Array:
    """Schulman's k3 estimate of KL(policy ‖ reference) per token: expm1(d) − d ≥ 0 with d = ref − logprob."""
    difference = ref_logprobs - logprobs
    return jnp.expm1(difference) - difference


def _of_tokens(logprobs: jax.Array, tokens: SampledTokens) -> jax.Array:
    """Log-probs without those of padding, whose exponentials might not be finite."""
    return jnp.where(tokens.mask, logprobs, 0.0)


def _loss_of(
    per_token: jax.Array, clipped: jax.Array, logprobs: jax.Array, tokens: SampledTokens, kl_coef: float
) -> Loss:
    """The weighted sum over tokens with the KL, and what is reported of them."""
    mask, denominator = tokens.mask, tokens.counts.sum()
    number = mask.sum().astype(jnp.float32)
    policy_loss = (per_token * tokens.weights).sum()
    metrics = {
        "policy_loss": (policy_loss, denominator),
        "clip_ratio/region_mean": ((clipped & mask).sum().astype(jnp.float32), number),
        "sampling/logprob_gap_mean": ((jnp.abs(logprobs - tokens.old_logprobs) * mask).sum(), number),
    }
    total = policy_loss
    if tokens.ref_logprobs is not None:
        kl = kl_k3(logprobs, tokens.ref_logprobs)
        total += kl_coef * (kl * tokens.weights).sum()
        metrics["kl"] = ((kl * mask).sum(), number)
    return Loss((total, denominator), metrics | {"loss": (total, denominator)})
