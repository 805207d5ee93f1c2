"""Pairwise accuracy of scored pairs, with ties told apart and an interval."""

from dataclasses import dataclass

import numpy as np

from patarm_jax.evaluate.outcomes import Scores, gaps, outcomes
from patarm_jax.evaluate.proportions import limits
from patarm_jax.types import CHOSEN, REJECTED


@dataclass(frozen=True)
class Accuracy:
    """What the scores of P pairs say about a judge; all but `gap` are shares from 0 to 1."""

    valid: float  # the share of judgements that could be read
    accuracy_strict: float  # chosen scored above rejected; a tie counts as wrong
    accuracy_half: float  # a tie counts as half
    ties: float  # pairs whose sides score the same, or one of whose sides has no valid judgement
    gap: float  # mean score of the chosen side minus the rejected side's, over pairs with both; NaN without any
    interval: tuple[float, float]  # 95 %, of accuracy_half over pairs (Clopper and Pearson's); NaN of one pair


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
    outcome = outcomes(judged)[:, 0]  # [P, 1]
    gap = gaps(judged)
    decided = gap[~np.isnan(gap)]
    low, high = limits(outcome[:, 0], np.ones(len(outcome))).interval if len(outcome) > 1 else (np.nan, np.nan)
    return Accuracy(
        valid=float(valid.mean()),
        accuracy_strict=float((outcome == 1.0).mean()),
        accuracy_half=float(outcome.mean()),
        ties=float((outcome == 0.5).mean()),
        gap=float(decided.mean()) if decided.size else float("nan"),
        interval=(float(low), float(high)),
    )
