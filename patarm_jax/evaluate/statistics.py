"""How sure a number is: bootstrap intervals over prompts, and whether two judges differ.

A benchmark's numbers are functions of means over its strata (subsets). So a resample is a set of means, and every
number comes with an interval from the same resamples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_AT_A_TIME = 500  # resamples, so that [resamples, units] stays small

# [..., S, k] means of k measures over each of S strata → numbers by name, each [...] and a weighted mean of theirs.
Aggregate = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Measured:
    """What was measured of each unit, the thing that is resampled: a prompt with all its responses."""

    values: np.ndarray  # [units, k]
    stratum: np.ndarray  # [units] int, 0 … S − 1; every stratum has a unit


def means(measured: Measured) -> np.ndarray:
    """[S, k]: the mean of each stratum."""
    return np.stack([measured.values[rows].mean(axis=0) for rows in _strata(measured)])


def intervals(measured: Measured, aggregate: Aggregate, seed: int) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of every number: units are resampled within their stratum; percentile method.

    A stratum of one unit says nothing of its spread, so that such strata are taken together for it, and a single one
    with all others (collapsed strata, as in surveys). NaN where there is but one unit in all.

    Args:
        measured: of each unit.
        aggregate: from means to numbers.
        seed: of the resampling.
    """
    spreads = _spreads(measured)
    lowest, highest = (aggregate(np.stack([end(values, axis=0) for values in spreads])) for end in (np.min, np.max))
    return {
        name: _percentiles(np.clip(draws, lowest[name], highest[name]))  # widened, they may leave what a mean can be
        for name, draws in aggregate(_resampled(measured, seed)).items()
    }


@dataclass(frozen=True)
class Difference:
    """Of one number between two judges, ours minus theirs."""

    value: float
    interval: tuple[float, float]  # 95 %, paired bootstrap
    p_value: float  # two-sided, paired permutation test


def compare(ours: Measured, theirs: Measured, aggregate: Aggregate, seed: int) -> dict[str, Difference]:
    """Two judges on the same units.

    Interval: both are resampled together. p-value: if the judges were alike, it would not matter whose measures of a
    unit are whose; they are exchanged for each unit with probability ½, and p is the share of exchanges that make the
    numbers differ at least as much, the observed one included.

    Args:
        ours: of each unit.
        theirs: of the same units, in the same order.
        aggregate: from means to numbers.
        seed: of the resampling.
    """
    if not np.array_equal(ours.stratum, theirs.stratum):
        raise ValueError("the two judges were not measured on the same units")
    observed = _differences(aggregate, means(ours), means(theirs))
    together = Measured(np.concatenate([ours.values, theirs.values], axis=1), ours.stratum)
    drawn = _differences(aggregate, *np.split(_resampled(together, seed), 2, axis=-1))
    exchanged = _differences(aggregate, *_exchanged(ours, theirs, seed))
    return {
        name: Difference(float(value), _percentiles(drawn[name]), _share_as_large(exchanged[name], float(value)))
        for name, value in observed.items()
    }


def _differences(aggregate: Aggregate, ours: np.ndarray, theirs: np.ndarray) -> dict[str, np.ndarray]:
    first, second = aggregate(ours), aggregate(theirs)
    return {name: first[name] - second[name] for name in first}


def _share_as_large(exchanged: np.ndarray, observed: float) -> float:
    if np.isnan(observed):
        return float("nan")
    # Sums in another order differ by rounding, and what equals the observed difference counts.
    as_large = np.abs(exchanged) >= abs(observed) - 1e-9
    return float((1 + as_large.sum()) / (1 + len(exchanged)))


def _strata(measured: Measured) -> list[np.ndarray]:
    return [np.flatnonzero(measured.stratum == each) for each in range(int(measured.stratum.max()) + 1)]


def _spreads(measured: Measured) -> list[np.ndarray]:
    """For each stratum the values, [n, k], that tell how much a unit of it may differ from another."""
    strata = _strata(measured)
    single = [row for rows in strata if len(rows) == 1 for row in rows]
    collapsed = measured.values[single] if len(single) > 1 else measured.values
    return [measured.values[rows] if len(rows) > 1 else collapsed for rows in strata]


def _resampled(measured: Measured, seed: int) -> np.ndarray:
    """[resamples, S, k]: the mean of each stratum, as often as it is drawn anew."""
    rng = np.random.default_rng(seed)
    columns = [
        measured.values[rows].mean(axis=0) + _deviations(spread, len(rows), rng)
        for rows, spread in zip(_strata(measured), _spreads(measured), strict=True)
    ]
    return np.stack(columns, axis=1)


def _deviations(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, k]: how far the mean of `count` of the values, drawn with replacement, lies from the mean of all."""
    # Units are alike in what was measured more often than not: their kinds are drawn.
    kinds, numbers = np.unique(values, axis=0, return_counts=True)
    parts = [rng.multinomial(count, numbers / len(values), size=size) @ kinds for size in _portions(RESAMPLES)]
    # Resamples of n units vary by a factor of √((n − 1)/n) too little; of one unit, by nothing.
    wider = np.sqrt(len(values) / (len(values) - 1)) if len(values) > 1 else np.nan
    return wider * (np.concatenate(parts) / count - values.mean(axis=0))


def _exchanged(ours: Measured, theirs: Measured, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 1])  # another stream than the resamples'
    first, second = [], []
    for rows in _strata(ours):
        a, b = ours.values[rows], theirs.values[rows]
        moved = [
            rng.integers(0, 2, size=(size, len(rows))).astype(float) @ (b - a) / len(rows)
            for size in _portions(RESAMPLES)
        ]
        first.append(a.mean(axis=0) + np.concatenate(moved))
        second.append(b.mean(axis=0) - np.concatenate(moved))
    return np.stack(first, axis=1), np.stack(second, axis=1)


def _portions(total: int) -> list[int]:
    whole, rest = divmod(total, _AT_A_TIME)
    return [_AT_A_TIME] * whole + [rest] * (rest > 0)


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
