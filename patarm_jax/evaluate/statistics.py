"""How sure a number is: 95 % intervals over prompts, and whether two judges differ.

A benchmark's numbers are weighted means over its strata (subsets). `proportions` has the formulas of one stratum, of
several and of a difference; here stands which strata a number is made of. What is not a proportion (RewardBench 2's
Ties, whose margins may exceed 1) is resampled instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from patarm_jax.evaluate.proportions import Limits, difference, limits, put_together

RESAMPLES = 10_000
_AT_A_TIME = 500  # resamples, so that [resamples, units] stays small
_NOTHING = 1e-9  # more than what differs by rounding alone


@dataclass(frozen=True)
class Measured:
    """What was measured of each unit, the thing that is sampled: a prompt with all its items."""

    values: np.ndarray  # [units, k], means over the unit's items
    size: np.ndarray  # [units] its items
    stratum: np.ndarray  # [units] int, 0 … S − 1; every stratum has a unit


@dataclass(frozen=True)
class Number:
    """Σ over strata of weight · mean of one measure; weights are not negative."""

    measure: int  # 0 … k − 1
    weights: np.ndarray  # [S], those of an average sum to 1


TieRule = Literal["strict", "half"]


class Name(NamedTuple):
    """Names one of a benchmark's numbers: a tie rule, a place, and what is measured there."""

    rule: TieRule
    place: str  # "overall", a section, or "subset NAME"
    column: str = "accuracy"

    def __str__(self) -> str:
        return "/".join(self)


@dataclass(frozen=True)
class Formulas:
    """How a benchmark's numbers follow from its measures."""

    numbers: Mapping[Name, Number]
    trials: np.ndarray  # [k], how many comparisons of an item a measure is the mean of
    proportion: np.ndarray  # [S] bool, whether measures lie from 0 to 1 there

    def of(self, means: np.ndarray) -> dict[Name, np.ndarray]:
        """Every number, [...], of means [..., S, k]."""
        return {name: means[..., one.measure] @ one.weights for name, one in self.numbers.items()}


@dataclass(frozen=True)
class Difference:
    """How one number differs between two judges, ours minus theirs."""

    value: float
    interval: tuple[float, float]  # 95 %
    p_value: float  # two-sided, paired permutation test


def means(measured: Measured) -> np.ndarray:
    """[S, k]: the mean over the items of each stratum."""
    return np.stack([_mean(measured, rows) for rows in _strata(measured)])


def intervals(measured: Measured, formulas: Formulas, seed: int) -> dict[Name, tuple[float, float]]:
    """95 % intervals of every number, as `proportions` has them.

    Strata whose items weigh the same in a number are one sample of it, and are taken as one stratum; the others are put
    together by their weights. So a stratum in which everything is right brings the uncertainty of its own size. NaN
    where a number is made of a single unit, which tells nothing of its spread.

    Args:
        measured: of each unit.
        formulas: from means to numbers.
        seed: of the resampling of what is not a proportion.
    """

    def of_stratum(rows: np.ndarray, measure: int, is_share: bool) -> Limits:
        values, size = measured.values[rows, measure], measured.size[rows]
        if not is_share and _varies(values):
            return _resampled(values, size, _bounds(values), seed)
        return limits(np.clip(values, 0.0, 1.0), size, float(formulas.trials[measure]))

    def bounds(rows: np.ndarray, measure: int) -> tuple[float, float]:
        return _bounds(measured.values[rows, measure])

    return _of_every_number(measured, formulas, means(measured), of_stratum, bounds)


def compare(ours: Measured, theirs: Measured, formulas: Formulas, seed: int) -> dict[Name, Difference]:
    """Two judges on the same units.

    Interval: Newcombe's for paired proportions, of each stratum, put together as `intervals` does. p-value: if the
    judges were alike, it would not matter whose measures of a unit are whose; they are exchanged for each unit with
    probability ½, and p is the share of exchanges that make the numbers differ at least as much, the observed one
    included.

    Args:
        ours: of each unit.
        theirs: of the same units, in the same order.
        formulas: from means to numbers.
        seed: of the exchanges, and of the resampling of what is not a proportion.
    """
    if not np.array_equal(ours.stratum, theirs.stratum):
        raise ValueError("the two judges were not measured on the same units")

    def of_stratum(rows: np.ndarray, measure: int, is_share: bool) -> Limits:
        first, second, size = ours.values[rows, measure], theirs.values[rows, measure], ours.size[rows]
        if not is_share and _varies(first - second):
            return _resampled(first - second, size, bounds(rows, measure), seed)
        first, second = np.clip(first, 0.0, 1.0), np.clip(second, 0.0, 1.0)
        return difference(first, second, size, float(formulas.trials[measure]))

    def bounds(rows: np.ndarray, measure: int) -> tuple[float, float]:
        (least, most), (their_least, their_most) = (_bounds(one.values[rows, measure]) for one in (ours, theirs))
        return least - their_most, most - their_least

    change = means(ours) - means(theirs)
    observed = formulas.of(change)
    spread = _of_every_number(ours, formulas, change, of_stratum, bounds)
    exchanged = formulas.of(_exchanged(ours, theirs, seed))
    return {
        name: Difference(float(value), spread[name], _share_as_large(exchanged[name], float(value)))
        for name, value in observed.items()
    }


# ---- Which strata a number is made of -------------------------------------------------------------------------------


def _of_every_number(
    measured: Measured,
    formulas: Formulas,
    means_: np.ndarray,
    of_stratum: Callable[[np.ndarray, int, bool], Limits],
    bounds: Callable[[np.ndarray, int], tuple[float, float]],
) -> dict[Name, tuple[float, float]]:
    """The interval of every number.

    Args:
        measured: what tells units, sizes and strata.
        formulas: from means to numbers.
        means_: [S, k], of which the numbers are made.
        of_stratum: the limits of one stratum's mean; of its units, the measure, and whether it is a proportion.
        bounds: what that mean can be; of its units and the measure.
    """
    strata, values = _strata(measured), formulas.of(means_)
    result = {}
    for name, number in formulas.numbers.items():
        parts = _parts(measured, strata, number.weights, formulas.proportion)
        if sum(len(rows) for _, rows, _ in parts) < 2:
            result[name] = (float("nan"), float("nan"))
            continue
        each = [of_stratum(rows, number.measure, is_share) for _, rows, is_share in parts]
        weights = np.array([weight for weight, _, _ in parts])
        whole = put_together(each, weights)
        least, most = weights @ np.array([bounds(rows, number.measure) for _, rows, _ in parts])
        value = float(values[name])
        result[name] = max(value - float(whole.below), float(least)), min(value + float(whole.above), float(most))
    return result


def _parts(
    measured: Measured, strata: list[np.ndarray], weights: np.ndarray, proportion: np.ndarray
) -> list[tuple[float, np.ndarray, bool]]:
    """(weight, units, whether a proportion) of the strata of a number; those whose items weigh the same are one."""
    parts: dict[object, list[int]] = {}
    for s in np.flatnonzero(weights):
        each = weights[s] / measured.size[strata[s]].sum()
        parts.setdefault(f"{each:.9e}" if proportion[s] else int(s), []).append(int(s))
    return [
        (float(weights[members].sum()), np.concatenate([strata[s] for s in members]), bool(proportion[members].all()))
        for members in parts.values()
    ]


def _strata(measured: Measured) -> list[np.ndarray]:
    return [np.flatnonzero(measured.stratum == each) for each in range(int(measured.stratum.max()) + 1)]


def _mean(measured: Measured, rows: np.ndarray) -> np.ndarray:
    size = measured.size[rows]
    return size @ measured.values[rows] / size.sum()


# ---- What is no proportion ------------------------------------------------------------------------------------------


def _varies(values: np.ndarray) -> bool:
    return float(np.ptp(values)) > _NOTHING


def _bounds(values: np.ndarray) -> tuple[float, float]:
    """What a mean can be: measures lie from 0 to 1, or as far out as any unit does."""
    return min(float(values.min()), 0.0), max(float(values.max()), 1.0)


def _resampled(values: np.ndarray, size: np.ndarray, bounds: tuple[float, float], seed: int) -> Limits:
    """Units are drawn with replacement (bootstrap, percentile method) and bring their items along."""
    count, rng = len(values), np.random.default_rng(seed)
    mean = float(size @ values / size.sum())
    draws = np.concatenate(
        [rng.multinomial(count, np.full(count, 1 / count), size=each) for each in _portions(RESAMPLES)]
    )
    # Resamples of n units vary by a factor of √((n − 1)/n) too little.
    wider = np.sqrt(count / (count - 1))
    drawn = mean + wider * (draws @ (size * values) / (draws @ size) - mean)
    low, high = np.quantile(np.clip(drawn, *bounds), [0.025, 0.975])
    return Limits(*map(np.asarray, (mean, max(mean - low, 0.0), max(high - mean, 0.0), 0.0)))


# ---- Whether two judges differ --------------------------------------------------------------------------------------


def _exchanged(ours: Measured, theirs: Measured, seed: int) -> np.ndarray:
    """[exchanges, S, k]: our means minus theirs, as often as units are exchanged."""
    rng = np.random.default_rng([seed, 1])  # another stream than the resamples'
    columns = []
    for rows in _strata(ours):
        size = ours.size[rows, None]
        gain = size * (theirs.values[rows] - ours.values[rows]) / size.sum()
        moved = [rng.integers(0, 2, size=(each, len(rows))).astype(float) @ gain for each in _portions(RESAMPLES)]
        columns.append(_mean(ours, rows) - _mean(theirs, rows) + 2.0 * np.concatenate(moved))
    return np.stack(columns, axis=1)


def _share_as_large(exchanged: np.ndarray, observed: float) -> float:
    if np.isnan(observed):
        return float("nan")
    # Sums in another order differ by rounding, and what equals the observed difference counts.
    as_large = np.abs(exchanged) >= abs(observed) - _NOTHING
    return float((1 + as_large.sum()) / (1 + len(exchanged)))


def _portions(total: int) -> list[int]:
    whole, rest = divmod(total, _AT_A_TIME)
    return [_AT_A_TIME] * whole + [rest] * (rest > 0)
