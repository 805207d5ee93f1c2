"""Pairwise accuracy of judged pairs, with ties told apart and an interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from patarm_jax.evaluate.outcomes import Choices, Scores, gaps, outcomes, position_bias
from patarm_jax.evaluate.proportions import limits
from patarm_jax.types import CHOSEN, REJECTED


@dataclass(frozen=True)
class Accuracy:
    """What the judgements of P pairs say about a judge; all but `gap` are shares from 0 to 1."""

    valid: float  # the share of judgements that could be read
    accuracy_strict: float  # chosen scored above rejected, or chosen more often; a tie counts as wrong
    accuracy_half: float  # a tie counts as half
    ties: float  # pairs that are decided for neither side, such as those one of whose sides has no valid judgement
    interval: tuple[float, float]  # 95 %, of accuracy_half over pairs (Clopper and Pearson's); NaN of one pair
    # Of scores: the mean of the chosen side minus the rejected side's, over pairs with both; NaN without any.
    gap: float | None = None
    position: Mapping[str, float] = field(default_factory=dict)  # of choices: `position_bias`


def pairwise_accuracy(scores: np.ndarray, valid: np.ndarray) -> Accuracy:
    """Compares the mean scores of the two sides of each pair.

    A side is its mean over valid judgements. A pair with a side that has none decides nothing, and counts as a tie.

    Args:
        scores: [P, 2, N], ignored where not valid.
        valid: [P, 2, N] bool.
    """
    here = np.ones((len(scores), 1), bool)
    side = np.where(valid, scores, np.nan)
    none_lost = np.zeros((len(side), 1, side.shape[-1]), bool)
    judged = Scores(
        chosen=side[:, CHOSEN, None],
        rejected=side[:, REJECTED, None],
        has_chosen=here,
        has_rejected=here,
        lost_chosen=none_lost,
        lost_rejected=none_lost,
    )
    gap = gaps(judged)
    decided = gap[~np.isnan(gap)]
    return replace(_accuracy(outcomes(judged), valid), gap=float(decided.mean()) if decided.size else math.nan)


def accuracy_of_choices(right: np.ndarray, valid: np.ndarray) -> Accuracy:
    """Counts the choices of each pair, in both orders where it was shown in both.

    Args:
        right: [P, orders, N], 1 for the choice of the chosen response and 0 for the other, ignored where not valid.
        valid: [P, orders, N] bool.
    """
    choices = np.full((len(right), 1, 1, 2, right.shape[-1]), np.nan)
    choices[:, 0, 0, : right.shape[1]] = np.where(valid, 2.0 * right - 1.0, np.nan)
    judged = Choices(choices, np.ones((len(right), 1, 1), bool))
    found = _accuracy(outcomes(judged), valid)
    return replace(found, position=position_bias(judged)) if right.shape[1] == 2 else found


def _accuracy(outcome: np.ndarray, valid: np.ndarray) -> Accuracy:
    """Of outcomes [P, 1, 1]."""
    outcome = outcome[:, 0, 0]
    low, high = limits(outcome, np.ones(len(outcome))).interval if len(outcome) > 1 else (math.nan, math.nan)
    return Accuracy(
        valid=float(valid.mean()),
        accuracy_strict=float((outcome == 1.0).mean()),
        accuracy_half=float(outcome.mean()),
        ties=float((outcome == 0.5).mean()),
        interval=(float(low), float(high)),
    )


def gap_or_position(found: Accuracy) -> dict[str, float]:
    """Of scores their gap; of choices in both orders what the order did; by the names of metrics."""
    if found.gap is not None:
        return {"score_gap": found.gap}
    if not found.position:
        return {}
    return {
        "accuracy_chosen_first": found.position["right with chosen first"],
        "accuracy_rejected_first": found.position["right with rejected first"],
        "chose_first": found.position["chose the first"],
        "same_in_both_orders": found.position["same in both orders"],
    }
