"""Algorithms of reinforcement learning by name, each two pure functions of arrays.

    advantages(rewards [R, G], valid [R, G], rollouts) → [R, G] or [R, G, Tc]      over the whole batch
    loss(logprobs [R, G, Tc], tokens) → Loss                                       over a micro-batch of whole units

Which settings an algorithm has are the arguments of its function here; their defaults stand in `config.presets`. How
tokens are weighed against one another is the caller's, in `policy_losses.sampled_tokens`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax

from patarm_jax.arrays import Rollouts
from patarm_jax.train.advantages import (
    centred_whitened,
    group_advantages,
    leave_one_out_advantages,
    returns_whitened,
)
from patarm_jax.train.losses import Loss
from patarm_jax.train.penalties import KLPenalty
from patarm_jax.train.policy_losses import (
    SampledTokens,
    clipped_loss,
    clipped_product_loss,
    clipped_sequence_loss,
    clipped_weight_loss,
)

Advantages: TypeAlias = Callable[[jax.Array, jax.Array, Rollouts], jax.Array]
PolicyLoss: TypeAlias = Callable[[jax.Array, SampledTokens], Loss]


class Algorithm(NamedTuple):
    """How rewards become advantages, and what is minimised."""

    advantages: Advantages
    loss: PolicyLoss
    adds_up: bool  # whether the loss is a sum over tokens


def grpo(
    *,
    clip_low: float,
    clip_high: float,
    kl: KLPenalty,
    dual_clip: float | None = None,
    prompts_per_group: int = 1,
    normalise_std: bool = True,
) -> Algorithm:
    """GRPO (arXiv 2402.03300): advantages within groups, a clipped ratio for each token, the KL in loss or reward.

    Equals verl's: std with n − 1 and ε 1e-6, failed members left out; with a dual clip of 3, verl's defaults.
    """
    return Algorithm(
        partial(group_advantages, prompts_per_group=prompts_per_group, normalise_std=normalise_std, kl=kl),
        partial(clipped_loss, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl),
        adds_up=True,
    )


def dr_grpo(
    *, clip_low: float, clip_high: float, kl: KLPenalty, dual_clip: float | None = None, prompts_per_group: int = 1
) -> Algorithm:
    """Dr. GRPO (arXiv 2503.20783): GRPO without the spread; its tokens are weighed by constant_length.

    Equals TRL's `loss_type` "dr_grpo" with `scale_rewards` "none"; failed members are left out.
    """
    return grpo(
        clip_low=clip_low,
        clip_high=clip_high,
        kl=kl,
        dual_clip=dual_clip,
        prompts_per_group=prompts_per_group,
        normalise_std=False,
    )


def rloo(*, clip_low: float, clip_high: float, kl: KLPenalty, prompts_per_group: int = 1) -> Algorithm:
    """RLOO (arXiv 2402.14740): against the mean of the others, one ratio for a whole sequence.

    Equals TRL's RLOOTrainer, the KL k1 in the reward; failed members are left out of the others' mean too.
    """
    return Algorithm(
        partial(leave_one_out_advantages, prompts_per_group=prompts_per_group, kl=kl),
        partial(clipped_product_loss, clip_low=clip_low, clip_high=clip_high, kl=kl),
        adds_up=False,
    )


def reinforce_pp(*, clip_low: float, clip_high: float, kl: KLPenalty, dual_clip: float | None = None) -> Algorithm:
    """REINFORCE++ (arXiv 2501.03262): returns without a group, whitened over the batch's tokens; the KL in them.

    Equals verl's: variance with n − 1 plus 1e-8; tokens of failed rollouts are left out of mean and variance.
    """
    return Algorithm(
        partial(returns_whitened, kl=kl),
        partial(clipped_loss, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl),
        adds_up=True,
    )


def reinforce_pp_baseline(
    *, clip_low: float, clip_high: float, kl: KLPenalty, dual_clip: float | None = None, prompts_per_group: int = 1
) -> Algorithm:
    """REINFORCE++-baseline (arXiv 2501.03262): against the group's mean, whitened over the batch's tokens.

    Equals verl's where no group has one member: variance with n − 1 plus 1e-8; failed members are left out.
    """
    return Algorithm(
        partial(centred_whitened, prompts_per_group=prompts_per_group, kl=kl),
        partial(clipped_loss, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl=kl),
        adds_up=True,
    )


def gspo(
    *, clip_low: float, clip_high: float, kl: KLPenalty, prompts_per_group: int = 1, normalise_std: bool = True
) -> Algorithm:
    """GSPO (arXiv 2507.18071): GRPO with one ratio for each sequence; its tokens are weighed by sequence_mean.

    Equals verl's: std with n − 1 and ε 1e-6; failed members are left out.
    """
    return Algorithm(
        partial(group_advantages, prompts_per_group=prompts_per_group, normalise_std=normalise_std, kl=kl),
        partial(clipped_sequence_loss, clip_low=clip_low, clip_high=clip_high, kl=kl),
        adds_up=False,
    )


def cispo(
    *,
    clip_low: float | None,
    clip_high: float,
    kl: KLPenalty,
    prompts_per_group: int = 1,
    normalise_std: bool = True,
) -> Algorithm:
    """CISPO (arXiv 2506.13585): GRPO with ratios clipped as weights, so that every token keeps its gradient.

    Equals verl's with a clip_low, TRL's without; std with n − 1 and ε 1e-6; failed members are left out.
    """
    return Algorithm(
        partial(group_advantages, prompts_per_group=prompts_per_group, normalise_std=normalise_std, kl=kl),
        partial(clipped_weight_loss, clip_low=clip_low, clip_high=clip_high, kl=kl),
        adds_up=True,
    )


# DAPO's loss is GRPO's with an upper bound of its own; its sampling of further pairs is the recipe's.
ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "gspo": gspo,
    "cispo": cispo,
}
