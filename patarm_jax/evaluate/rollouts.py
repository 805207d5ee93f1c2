"""What the judgements of a training step say: the metrics logged of them, and the rows written of them."""

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.config.training import ReinforcedConfig
from patarm_jax.evaluate.accuracy import accuracy_of_choices, gap_or_position, pairwise_accuracy
from patarm_jax.judge.forms import FORMS, Form
from patarm_jax.model.sharding import process_in
from patarm_jax.reward import Rewards
from patarm_jax.rollout.rounds import JudgedBy, Reinforced
from patarm_jax.run.rollouts import RolloutRow, gather_rows
from patarm_jax.run.rubrics import sha256_of
from patarm_jax.types import CHOSEN, REJECTED, Status


def rollout_metrics(config: ReinforcedConfig, found: Reinforced) -> dict[str, float]:
    """The vitals of a step; TRL's names where TRL has the metric."""
    rounds, chosen = found.rounds, found.chosen
    numbers, status, lengths, truncated = (
        np.concatenate([getattr(each, name) for each in rounds])
        for name in ("numbers", "status", "lengths", "truncated")
    )
    rewards: Rewards = jax.tree.map(lambda *parts: np.concatenate(parts), *(each.rewards for each in rounds))
    groups = rewards.total.reshape(-1, config.prompts_per_group * status.shape[-1])
    metrics = {
        "reward": rewards.total.mean(),
        "reward_std": groups.std(axis=-1, ddof=min(1, groups.shape[-1] - 1)).mean(),
        "frac_reward_zero_std": (np.ptp(groups, axis=-1) == 0).mean(),
        f"rewards/{config.reward_name}/mean": rewards.earned.mean(),
        f"rewards/{config.reward_name}/std": rewards.earned.std(),
        "rewards/format/mean": rewards.format.mean(),
        "rewards/format/std": rewards.format.std(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "advantages/abs_mean": np.abs(found.advantages).sum() / max(chosen.valid.sum(), 1),
    }
    if "dapo.max_rounds" in config.algorithm_settings:
        metrics |= {
            "dapo/rounds": len(rounds),
            "dapo/filled": chosen.valid.mean(),
            "rewards/length/mean": rewards.length.mean(),
        }
    by_pair = rewards.total.shape
    # Of rubrics the numbers are those of the judgements by them, which have a form of their own.
    metrics |= _judge_metrics(config, numbers.reshape(by_pair), ~np.isnan(numbers).reshape(by_pair), rewards)
    if any(each.by for each in rounds):
        metrics["rubrics/valid"] = (status == Status.OK).mean()
        metrics["rubrics/shortened"] = np.mean([each.shortened for each in rounds])
    return {name: float(value) for name, value in metrics.items()}


def _judge_metrics(
    config: ReinforcedConfig, numbers: np.ndarray, valid: np.ndarray, rewards: Rewards
) -> dict[str, float]:
    """How good the judge is, from all that was sampled [P, S, G]."""
    scores = FORMS[config.judge].responses == 1
    found = pairwise_accuracy(numbers, valid) if scores else accuracy_of_choices(np.nan_to_num(numbers), valid)
    metrics = {
        "judge/valid": found.valid,
        "judge/accuracy_strict": found.accuracy_strict,
        "judge/accuracy_half": found.accuracy_half,
        **{f"judge/{name}": value for name, value in gap_or_position(found).items()},
    }
    if scores:
        metrics |= {
            "rewards/chosen/mean": float(rewards.total[:, CHOSEN].mean()),
            "rewards/rejected/mean": float(rewards.total[:, REJECTED].mean()),
            "judge/pairs_without_par": (~valid.any(axis=-1).all(axis=-1)).mean(),
        }
    return metrics


def advantages_by_rollout(advantages: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[R, G]: the advantages themselves, or of those by token [R, G, Tc] the mean over a rollout's own tokens."""
    if advantages.ndim == 2:
        return advantages
    mask = np.arange(advantages.shape[-1]) < lengths[..., None]
    mean: np.ndarray = np.where(mask, advantages, 0.0).sum(axis=-1) / np.maximum(lengths, 1)
    return mean


def rollout_rows(mesh: Mesh, form: Form, found: Reinforced) -> list[RolloutRow]:
    """One row for each sample of all processes, in the order of pairs and questions.

    Args:
        mesh: whose processes have a part each.
        form: of the questions.
        found: in the step.
    """
    mine, processes = process_in(mesh)
    rows: list[RolloutRow] = []
    for number, each in enumerate(found.rounds):
        share = slice(mine * len(each.status) // processes, (mine + 1) * len(each.status) // processes)
        learnt = found.chosen.of_round(number, found.advantages, len(each.status))[share]
        questions = [(record.preference.id, place) for record in each.pairs.records for place in record.places]
        own = [
            RolloutRow(
                pair_id=pair,
                side=form.places[place],
                text=one.text,
                status=one.status,
                score=one.score,
                choice=one.choice,
                reward=float(reward),
                advantage=None if np.isnan(advantage) else float(advantage),
                rubric_sha256=sha256_of(each.rubrics[pair].shown) if pair in each.rubrics else None,
            )
            for (pair, place), *group in zip(questions, each.judgements, each.total[share], learnt, strict=True)
            for one, reward, advantage in zip(*group, strict=True)
        ]
        if each.by:
            own = [_with_verdict(row, by) for row, by in zip(own, each.by, strict=True)]
        rows += gather_rows(mesh, own)
    return rows


def _with_verdict(rubric: RolloutRow, by: JudgedBy) -> RolloutRow:
    """The row of a rubric with what was judged by it."""
    first, *_ = by.verdicts
    said = "\n\n".join(one.text for one in by.verdicts)
    return replace(rubric, choice=first.choice, rubric_sha256=sha256_of(by.rubric), judgement=said)
