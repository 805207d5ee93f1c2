"""From rewards to advantages, as pure functions of arrays over a whole batch.

Every function takes rewards [R, G] and `valid` [R, G], whether a rollout has a reward at all. A rollout without one is
left out of its group's baseline and spread, and its advantage is 0; what stands in its place is not looked at, be it a
NaN. A judgement that cannot be read has a reward, its penalty, and is valid. Members that are equal lie exactly 0 from
their mean, although the mean of equal floats may lie beside them, and so does one that is alone, where verl keeps its
reward. Whitened advantages are 0 only where those of the whole batch are equal.

Axis letters: R prompts · G rollouts per prompt · Tc completion tokens
"""

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Rollouts
from patarm_jax.reward import centred_within, normalised
from patarm_jax.train.losses import mask_from_lengths
from patarm_jax.train.penalties import KLPenalty, estimated_kl

# Added to a variance by which tokens are whitened (verl, OpenRLHF).
WHITENING_EPS = 1e-8


def group_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    rollouts: Rollouts,
    *,
    prompts_per_group: int = 1,
    normalise_std: bool = True,
    eps: float = 1e-6,
    kl: KLPenalty | None = None,
) -> jax.Array:
    """A = (r − mean) / (std + ε) within each group, std with n − 1; without `normalise_std` A = r − mean.

    A group with one valid member, or none, gives 0.

    Args:
        rewards: [R, G].
        valid: [R, G] bool.
        rollouts: whose log-probs a KL in the reward is of.
        prompts_per_group: so many consecutive prompts make one group, such as 2 for both responses of a pair.
        normalise_std: False for Dr. GRPO (arXiv 2503.20783).
        eps: ε; verl 1e-6, TRL 1e-4, OpenRLHF 1e-9.
        kl: taken off the rewards where its place is there, summed over each sequence.

    Returns:
        [R, G] float32.

    Equals: verl `compute_grpo_outcome_advantage` (ε 1e-6) and TRL's `scale_rewards` "group" and "none" (ε 1e-4), its
    rewards that are None as not valid; but a group of one, or of equal rewards, gives exactly 0 here.
    """
    centred, equal, count = _centred(_penalised(rewards, valid, rollouts, kl), valid, prompts_per_group)
    return (normalised(centred, equal, count, 1, eps) if normalise_std else centred).reshape(rewards.shape)


def leave_one_out_advantages(
    rewards: jax.Array,
    valid: jax.Array,
    rollouts: Rollouts,
    *,
    prompts_per_group: int = 1,
    kl: KLPenalty | None = None,
) -> jax.Array:
    """A = r − mean of the other valid members = (r − mean)·n / (n − 1); arguments as of `group_advantages`.

    A group with one valid member gives 0.

    Equals: TRL's RLOOTrainer (with the KL k1 in the reward, summed over each sequence), verl `compute_rloo_outcome_
    advantage`; of a group of one verl gives r.

    Source: RLOO (arXiv 2402.14740).
    """
    centred, _, count = _centred(_penalised(rewards, valid, rollouts, kl), valid, prompts_per_group)
    return (centred * count / jnp.maximum(count - 1, 1)).reshape(rewards.shape)


def returns_whitened(
    rewards: jax.Array, valid: jax.Array, rollouts: Rollouts, *, kl: KLPenalty | None = None
) -> jax.Array:
    """The return from each token on, whitened over all tokens of the batch.

        Gₜ = r − coef·Σ_{t' ≥ t} klₜ',   A = (G − mean) / √(var + 1e-8)

    with mean and variance, which divides by n − 1, over the tokens of valid rollouts.

    Args:
        rewards: [R, G].
        valid: [R, G] bool.
        rollouts: whose lengths and log-probs these are of.
        kl: taken off each token where its place is the reward.

    Returns:
        [R, G, Tc] float32, 0 on padding.

    Equals: verl `compute_reinforce_plus_plus_outcome_advantage` with γ 1.

    Source: REINFORCE++ (arXiv 2501.03262).
    """
    mask = _tokens(rollouts) & valid[..., None]
    earned = jnp.where(valid, rewards, 0.0).astype(jnp.float32)[..., None]
    if kl is not None and kl.place == "reward" and rollouts.ref_logprobs is not None:
        penalties = jnp.where(mask, estimated_kl(rollouts.old_logprobs, rollouts.ref_logprobs, kl.kind), 0.0)
        earned = earned - kl.coef * jnp.cumsum(penalties[..., ::-1], axis=-1)[..., ::-1]
    return whitened(jnp.broadcast_to(earned, mask.shape), mask)


def centred_whitened(
    rewards: jax.Array,
    valid: jax.Array,
    rollouts: Rollouts,
    *,
    prompts_per_group: int = 1,
    kl: KLPenalty | None = None,
) -> jax.Array:
    """Rewards minus their group's mean, the same for each token, whitened as in `returns_whitened`.

    A KL in the reward is summed over its sequence before the mean is taken.

    Equals: verl `compute_reinforce_plus_plus_baseline_outcome_advantage` where no group has one member.

    Source: REINFORCE++ (arXiv 2501.03262), with the baseline of its section on reasoning.
    """
    mask = _tokens(rollouts) & valid[..., None]
    centred, _, _ = _centred(_penalised(rewards, valid, rollouts, kl), valid, prompts_per_group)
    return whitened(jnp.broadcast_to(centred.reshape(rewards.shape)[..., None], mask.shape), mask)


def whitened(values: jax.Array, mask: jax.Array) -> jax.Array:
    """(x − mean) / √(var + 1e-8) over what the mask holds, var with n − 1; 0 elsewhere, and where all are equal."""
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    mean = jnp.where(mask, values, 0.0).sum() / count
    centred = jnp.where(mask, values - mean, 0.0)
    variance = jnp.square(centred).sum() / jnp.maximum(count - 1, 1)
    low, high = jnp.where(mask, values, jnp.inf).min(), jnp.where(mask, values, -jnp.inf).max()
    return jnp.where(low < high, centred * jax.lax.rsqrt(variance + WHITENING_EPS), 0.0)


def _centred(rewards: jax.Array, valid: jax.Array, prompts_per_group: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`centred_within` of so many prompts' rollouts each."""
    groups, member = (x.reshape(-1, prompts_per_group * x.shape[1]) for x in (rewards, valid))
    return centred_within(groups, member)


def _penalised(rewards: jax.Array, valid: jax.Array, rollouts: Rollouts, kl: KLPenalty | None) -> jax.Array:
    """Rewards [R, G] without the KL of their sequences, where that is its place; 0 for what is not valid."""
    earned = jnp.where(valid, rewards, 0.0).astype(jnp.float32)
    if kl is None or kl.place != "reward" or rollouts.ref_logprobs is None:
        return earned
    tokens = jnp.where(_tokens(rollouts), estimated_kl(rollouts.old_logprobs, rollouts.ref_logprobs, kl.kind), 0.0)
    return jnp.where(valid, earned - kl.coef * tokens.sum(axis=-1), 0.0)


def _tokens(rollouts: Rollouts) -> jax.Array:
    return mask_from_lengths(rollouts.completion_lengths, rollouts.completion_tokens.shape[-1])
