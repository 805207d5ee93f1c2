"""Who won: from scores or choices to the outcome of each chosen response against each rejected one.

Items of a benchmark have up to M chosen and K rejected responses; what an item lacks is NaN. An outcome is 1 when the
chosen response won, 0 when it lost, ½ when neither did: equal, or one of them has no valid judgement. Whether a tie is
then wrong or half right is for the measures to say.

    I items · M chosen · K rejected · N votes
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Rule = Literal["mean", "majority"]


@dataclass(frozen=True)
class Scores:
    """Scores of responses that were judged one at a time; NaN where a judgement is not valid."""

    chosen: np.ndarray  # [I, M, N]
    rejected: np.ndarray  # [I, K, N]
    has_chosen: np.ndarray  # [I, M] bool, whether there is such a response
    has_rejected: np.ndarray  # [I, K] bool
    lost_chosen: np.ndarray  # [I, M, N] bool, whether the answer never came
    lost_rejected: np.ndarray  # [I, K, N] bool

    @property
    def votes(self) -> int:
        """N."""
        return self.chosen.shape[-1]

    def some(self, votes: np.ndarray) -> "Scores":
        """Some of the votes, by their numbers."""
        chosen, rejected = self.chosen[..., votes], self.rejected[..., votes]
        lost = self.lost_chosen[..., votes], self.lost_rejected[..., votes]
        return Scores(chosen, rejected, self.has_chosen, self.has_rejected, *lost)

    def unknown(self) -> tuple[np.ndarray, np.ndarray]:
        """[I, M] and [I, K] bool: responses without a valid score, of which an answer never came."""
        sides = (self.chosen, self.lost_chosen), (self.rejected, self.lost_rejected)
        chosen, rejected = (np.isnan(scores).all(axis=-1) & lost.any(axis=-1) for scores, lost in sides)
        return chosen, rejected


@dataclass(frozen=True)
class Choices:
    """Choices between two responses: 1 the chosen one, −1 the rejected one, NaN where a judgement is not valid."""

    choices: np.ndarray  # [I, M, K, 2, N], the chosen response standing first (0) or second (1)
    has_pair: np.ndarray  # [I, M, K] bool

    @property
    def votes(self) -> int:
        """N."""
        return self.choices.shape[-1]

    def some(self, votes: np.ndarray) -> "Choices":
        """Some of the votes, by their numbers."""
        return Choices(self.choices[..., votes], self.has_pair)


def mean_scores(scores: np.ndarray) -> np.ndarray:
    """[..., N] → [...]: the mean of the valid ones, NaN where there are none.

    Of several to six decimals: written scores are decimals and their sums are not quite, so that equal means could
    differ by rounding. A single score, such as a scalar head's, stays as it is.
    """
    if scores.shape[-1] == 1:
        return scores[..., 0].astype(np.float64)
    valid = ~np.isnan(scores)
    count = valid.sum(axis=-1)
    total = np.where(valid, scores, 0.0).sum(axis=-1, dtype=np.float64)
    return np.where(count > 0, np.round(total / np.maximum(count, 1), 6), np.nan)


def gaps(judged: Scores) -> np.ndarray:
    """[I, M, K]: mean score of a chosen response minus a rejected one's; NaN where one has no valid judgement."""
    return mean_scores(judged.chosen)[:, :, None] - mean_scores(judged.rejected)[:, None, :]


def outcomes(judged: Scores | Choices, rule: Rule = "mean") -> np.ndarray:
    """[I, M, K] in {0, ½, 1}, NaN where there is no such pair.

    Args:
        judged: scores, or choices.
        rule: of scores, "mean" compares their means over the votes; "majority" compares vote by vote and takes the
            side with more wins. Choices have a majority alone, over votes and both orders.
    """
    if isinstance(judged, Choices):
        lead = np.nansum(judged.choices, axis=(-2, -1))
        return np.where(judged.has_pair, _as_outcome(lead), np.nan)
    pairs = judged.has_chosen[:, :, None] & judged.has_rejected[:, None, :]
    if rule == "mean":
        lead = gaps(judged)
    else:
        lead = np.nansum(np.sign(judged.chosen[:, :, None] - judged.rejected[:, None, :]), axis=-1)
    return np.where(pairs, _as_outcome(lead), np.nan)


def _as_outcome(lead: np.ndarray) -> np.ndarray:
    """NaN, a side without a valid judgement, decides nothing."""
    return (np.sign(np.nan_to_num(lead)) + 1) / 2


def position_bias(judged: Choices) -> dict[str, float]:
    """What the order of the two responses does to a pairwise judge."""
    first, second = judged.choices[..., 0, :], judged.choices[..., 1, :]
    chose_first = np.concatenate([first[~np.isnan(first)] == 1.0, second[~np.isnan(second)] == -1.0])
    both = ~np.isnan(first) & ~np.isnan(second)
    here = judged.has_pair[..., None] & np.ones(first.shape, bool)
    right = [float(np.mean(side[here] == 1.0)) for side in (first, second)]
    return {
        "chose the first": float(chose_first.mean()) if chose_first.size else np.nan,
        "same in both orders": float((first == second)[both].mean()) if both.any() else np.nan,
        "right with chosen first": right[0],
        "right with rejected first": right[1],
        "right per answer": float(np.mean(right)),  # LLMBar's accuracy; what cannot be read is wrong
    }


def votes_curve(judged: Scores | Choices, seed: int, subsets: int = 32) -> dict[int, list[np.ndarray]]:
    """Votes 1 … N → sets of so many votes out of the N, drawn at random; beyond 32 only powers of 2, and N."""
    total, rng = judged.votes, np.random.default_rng(seed)
    sizes = [size for size in range(1, total + 1) if size <= 32 or size & (size - 1) == 0 or size == total]
    curve = {}
    for size in sizes:
        if size == 1:
            curve[size] = [np.array([vote]) for vote in range(total)]
        elif size == total:
            curve[size] = [np.arange(total)]
        else:
            drawn = {tuple(sorted(rng.permutation(total)[:size].tolist())) for _ in range(subsets)}
            curve[size] = [np.array(each) for each in sorted(drawn)]
    return curve
