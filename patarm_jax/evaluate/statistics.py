"""How sure a number is: 95 % intervals over prompts, and whether two judges differ.

A benchmark's numbers are functions of means over its strata (subsets). So a resample is a set of means, and every
number comes with an interval from the same resamples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_AT_A_TIME = 500  # resamples, so that [resamples, units] stays small
_NOTHING = 1e-9  # more than what differs by rounding alone

# [..., S, k] means of k measures over each of S strata → numbers by name, each [...] and a weighted mean of theirs.
Aggregate = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Measured:
    """What was measured of each unit, the thing that is resampled: a prompt with all its items."""

    values: np.ndarray  # [units, k], means over the unit's items
    size: np.ndarray  # [units] its items
    stratum: np.ndarray  # [units] int, 0 … S − 1; every stratum has a unit


def means(measured: Measured) -> np.ndarray:
    """[S, k]: the mean over the items of each stratum."""
    return np.stack([_mean(measured, rows) for rows in _strata(measured)])


def intervals(measured: Measured, aggregate: Aggregate, seed: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of every number: units are resampled within their stratum (bootstrap, percentile method).

    Strata of one unit, which says nothing of their spread, share one pool for it; if there is only one such stratum,
    its pool is all units (collapsed strata, as in surveys). NaN where there is one unit in all. Where nothing varies
    there is nothing to resample, and Wilson's intervals of the strata are put together instead:

        low = v − √Σ wₛ²·(pₛ − lowₛ)²    high = v + √Σ wₛ²·(highₛ − pₛ)²

    with a number's weights w (MOVER: Zou and Donner, Statistics in Medicine 27, 2008).

    Args:
        measured: of each unit.
        aggregate: from means to numbers.
        seed: of the resampling.
    """
    values = aggregate(means(measured))
    least, most = _bounds(measured, aggregate)
    result: dict[str, tuple[float, float]] = {
        name: _percentiles(np.clip(draws, least[name], most[name]))
        for name, draws in aggregate(_resampled(measured, seed)).items()
    }
    flat = [name for name, (low, high) in result.items() if high - low < _NOTHING]
    if flat:
        below, above = _from_wilson(measured, aggregate, seed)
        for name in flat:
            value = float(values[name])
            result[name] = (
                max(value - below[name], float(least[name])),
                min(value + above[name], float(most[name])),
            )
    return result


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share p among n: (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    square = 1.959964**2 / count  # z²/n
    middle, half = share + square / 2, (square * (share * (1 - share) + square / 4)) ** 0.5
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


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
    together = Measured(np.concatenate([ours.values, theirs.values], axis=1), ours.size, ours.stratum)
    drawn = _differences(aggregate, *np.split(_resampled(together, seed), 2, axis=-1))
    exchanged = _differences(aggregate, *_exchanged(ours, theirs, seed))
    (least, most), (their_least, their_most) = (_bounds(one, aggregate) for one in (ours, theirs))
    return {
        name: Difference(
            float(value),
            _percentiles(np.clip(drawn[name], least[name] - their_most[name], most[name] - their_least[name])),
            _share_as_large(exchanged[name], float(value)),
        )
        for name, value in observed.items()
    }


def _bounds(measured: Measured, aggregate: Aggregate) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """What every number can be: measures lie from 0 to 1, or as far out as any unit does."""
    shape = (int(measured.stratum.max()) + 1, 1)
    least, most = np.minimum(measured.values.min(axis=0), 0.0), np.maximum(measured.values.max(axis=0), 1.0)
    return aggregate(np.tile(least, shape)), aggregate(np.tile(most, shape))


def _differences(aggregate: Aggregate, ours: np.ndarray, theirs: np.ndarray) -> dict[str, np.ndarray]:
    first, second = aggregate(ours), aggregate(theirs)
    return {name: first[name] - second[name] for name in first}


def _share_as_large(exchanged: np.ndarray, observed: float) -> float:
    if np.isnan(observed):
        return float("nan")
    # Sums in another order differ by rounding, and what equals the observed difference counts.
    as_large = np.abs(exchanged) >= abs(observed) - _NOTHING
    return float((1 + as_large.sum()) / (1 + len(exchanged)))


def _strata(measured: Measured) -> list[np.ndarray]:
    return [np.flatnonzero(measured.stratum == each) for each in range(int(measured.stratum.max()) + 1)]


def _mean(measured: Measured, rows: np.ndarray) -> np.ndarray:
    size = measured.size[rows]
    return size @ measured.values[rows] / size.sum()


def _pools(measured: Measured) -> list[np.ndarray]:
    """For each stratum the units that tell how much one of it may differ from another."""
    strata = _strata(measured)
    single = np.array([row for rows in strata if len(rows) == 1 for row in rows], int)
    collapsed = single if len(single) > 1 else np.arange(len(measured.size))
    return [rows if len(rows) > 1 else collapsed for rows in strata]


def _resampled(measured: Measured, seed: int) -> np.ndarray:
    """[resamples, S, k]: the mean of each stratum, as often as it is drawn anew."""
    rng = np.random.default_rng(seed)
    columns = [
        _mean(measured, rows) + _deviations(measured, pool, len(rows), rng)
        for rows, pool in zip(_strata(measured), _pools(measured), strict=True)
    ]
    return np.stack(columns, axis=1)


def _deviations(measured: Measured, pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples, k]: how far the mean of `count` units, drawn from the pool with replacement, lies from the pool's.

    Units bring their items along, so that a mean is a ratio of sums.
    """
    size = measured.size[pool, None]
    # Units are alike in what was measured more often than not: their kinds are drawn.
    kinds, numbers = np.unique(np.concatenate([size * measured.values[pool], size], axis=1), axis=0, return_counts=True)
    shares = numbers / len(pool)
    sums = np.concatenate([rng.multinomial(count, shares, size=each) @ kinds for each in _portions(RESAMPLES)])
    # Resamples of n units vary by a factor of √((n − 1)/n) too little; of one unit, by nothing.
    wider = np.sqrt(len(pool) / (len(pool) - 1)) if len(pool) > 1 else np.nan
    return wider * (sums[:, :-1] / sums[:, -1:] - _mean(measured, pool))


def _from_wilson(measured: Measured, aggregate: Aggregate, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """How far Wilson's intervals of the strata, put together, reach below and above every number."""
    strata = _strata(measured)
    sizes = [measured.size[rows] for rows in strata]
    count = np.array([size.sum() ** 2 / (size**2).sum() for size in sizes])  # units of unlike size count for fewer
    share = np.clip(means(measured), 0.0, 1.0)
    low, high = np.vectorize(wilson)(share, count[:, None])
    # Σ wₛ²·dₛ² is the mean square of Σ ±wₛ·dₛ over random signs, which spares the weights.
    signs = np.random.default_rng([seed, 2]).choice([-1.0, 1.0], size=(RESAMPLES, *share.shape))

    def put_together(reach: np.ndarray) -> dict[str, float]:
        return {name: float(np.sqrt(np.mean(np.square(x)))) for name, x in aggregate(signs * reach).items()}

    return put_together(share - low), put_together(high - share)


def _exchanged(ours: Measured, theirs: Measured, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, 1])  # another stream than the resamples'
    first, second = [], []
    for rows in _strata(ours):
        size = ours.size[rows, None]
        gain = size * (theirs.values[rows] - ours.values[rows]) / size.sum()
        moved = np.concatenate(
            [rng.integers(0, 2, size=(each, len(rows))).astype(float) @ gain for each in _portions(RESAMPLES)]
        )
        first.append(_mean(ours, rows) + moved)
        second.append(_mean(theirs, rows) - moved)
    return np.stack(first, axis=1), np.stack(second, axis=1)


def _portions(total: int) -> list[int]:
    whole, rest = divmod(total, _AT_A_TIME)
    return [_AT_A_TIME] * whole + [rest] * (rest > 0)


def _percentiles(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
