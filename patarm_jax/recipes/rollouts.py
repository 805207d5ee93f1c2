"""What the rollouts of a step say: their rewards, the metrics logged of them, and the rows written of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from patarm_jax.config import RewardSection
from patarm_jax.evaluate.accuracy import pairwise_accuracy
from patarm_jax.reward import constant, format_reward, graded, group_advantages, preference_aware_reward
from patarm_jax.run.metrics import RolloutRow
from patarm_jax.types import CHOSEN, REJECTED, Judgement, Status

MARGINS = {"graded": graded, "constant": constant}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rewards:
    """All [P, 2, G] float32."""

    par: Any
    format: Any
    total: Any  # par + format
    advantages: Any


@partial(jax.jit, static_argnums=2)
def rewards_of(scores: jax.Array, status: jax.Array, section: RewardSection) -> Rewards:
    """PAR plus the format penalty, and the advantages, from scores and statuses [P, 2, G]."""
    par = preference_aware_reward(scores, status == Status.OK, MARGINS[section.margin])
    penalty = format_reward(status)
    total = par + penalty
    advantages = group_advantages(total, section.group_by, normalise_std=section.normalise_std)
    return Rewards(par, penalty, total, advantages)


def rollout_metrics(
    scores: np.ndarray, status: np.ndarray, rewards: Rewards, lengths: np.ndarray, truncated: np.ndarray
) -> dict[str, float]:
    """The vitals of a step; TRL's names where TRL has the metric.

    Args:
        scores: [P, 2, G], NaN where not valid.
        status: [P, 2, G].
        rewards: on the host.
        lengths: [R, G] tokens of each completion.
        truncated: [R, G], whether it was cut off.
    """
    valid = status == Status.OK
    accuracy = pairwise_accuracy(scores, valid)
    spread = np.ptp(rewards.total, axis=-1)
    metrics = {
        "reward": rewards.total.mean(),
        "reward_std": rewards.total.std(axis=-1, ddof=min(1, rewards.total.shape[-1] - 1)).mean(),
        "frac_reward_zero_std": (spread == 0).mean(),
        "rewards/par/mean": rewards.par.mean(),
        "rewards/par/std": rewards.par.std(),
        "rewards/format/mean": rewards.format.mean(),
        "rewards/format/std": rewards.format.std(),
        "rewards/chosen/mean": rewards.total[:, CHOSEN].mean(),
        "rewards/rejected/mean": rewards.total[:, REJECTED].mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "advantages/abs_mean": np.abs(rewards.advantages).mean(),
        "judge/valid": accuracy.valid,
        "judge/accuracy_strict": accuracy.accuracy_strict,
        "judge/accuracy_half": accuracy.accuracy_half,
        "judge/score_gap": accuracy.gap,
        "judge/pairs_without_par": (~valid.any(axis=-1).all(axis=-1)).mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def rollout_rows(ids: Sequence[str], judgements: Sequence[Sequence[Judgement]], rewards: Rewards) -> list[RolloutRow]:
    """One row per judgement, pairs in order, chosen before rejected."""
    total, advantages = (x.reshape(len(judgements), -1) for x in (rewards.total, rewards.advantages))
    return [
        RolloutRow(
            pair_id=ids[row // 2],
            side="rejected" if row % 2 else "chosen",
            text=one.text,
            status=one.status,
            score=one.score,
            reward=float(total[row, g]),
            advantage=float(advantages[row, g]),
        )
        for row, group in enumerate(judgements)
        for g, one in enumerate(group)
    ]
