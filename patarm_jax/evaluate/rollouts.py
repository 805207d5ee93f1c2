"""What the judgements of a training step say: the metrics logged of them, and the rows written of them."""

from collections.abc import Sequence

import numpy as np

from patarm_jax.evaluate.accuracy import pairwise_accuracy
from patarm_jax.reward import Rewards
from patarm_jax.run.rollouts import RolloutRow
from patarm_jax.types import CHOSEN, REJECTED, Judgement, Status


def rollout_metrics(
    scores: np.ndarray,
    status: np.ndarray,
    rewards: Rewards,
    advantages: np.ndarray,
    lengths: np.ndarray,
    truncated: np.ndarray,
) -> dict[str, float]:
    """The vitals of a step; TRL's names where TRL has the metric.

    Args:
        scores: [P, 2, G], NaN where not valid.
        status: [P, 2, G].
        rewards: on the host.
        advantages: of any shape.
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
        "advantages/abs_mean": np.abs(advantages).mean(),
        "judge/valid": accuracy.valid,
        "judge/accuracy_strict": accuracy.accuracy_strict,
        "judge/accuracy_half": accuracy.accuracy_half,
        "judge/score_gap": accuracy.gap,
        "judge/pairs_without_par": (~valid.any(axis=-1).all(axis=-1)).mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def advantages_by_rollout(advantages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[R, G]: the advantages themselves, or of those by token [R, G, Tc] the mean over a rollout's own tokens."""
    if advantages.ndim == 2:
        return advantages
    mask = np.arange(advantages.shape[-1]) < lengths[..., None]
    mean: np.ndarray = np.where(mask, advantages, 0.0).sum(axis=-1) / np.maximum(lengths, 1)
    return mean


def rollout_rows(
    ids: Sequence[str], judgements: Sequence[Sequence[Judgement]], rewards: np.ndarray, advantages: np.ndarray
) -> list[RolloutRow]:
    """One row per judgement, pairs in order, chosen before rejected.

    Args:
        ids: of the P pairs.
        judgements: [R][G].
        rewards: [R, G].
        advantages: [R, G].
    """
    return [
        RolloutRow(
            pair_id=ids[row // 2],
            side="rejected" if row % 2 else "chosen",
            text=one.text,
            status=one.status,
            score=one.score,
            reward=float(rewards[row, g]),
            advantage=float(advantages[row, g]),
        )
        for row, group in enumerate(judgements)
        for g, one in enumerate(group)
    ]
