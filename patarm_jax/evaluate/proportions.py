"""95 % limits of proportions that hold their level near 0 and 1, with clusters, and for two judges on the same units.

    one stratum    Clopper and Pearson's limits on the effective number of comparisons n*, as Korn and Graubard have it
                   (Survey Methodology 24, 1998)
    several        v ∓ √Σ (wₛ·reachₛ)², their reaches put together by the number's weights (MOVER: Zou and Donner,
                   Statistics in Medicine 27, 2008)
    a difference   Newcombe's square-and-add limits for paired proportions (Statistics in Medicine 17, 1998, method 10),
                   with the reaches of both judges and the correlation φ between them

All functions take arrays with any leading axes, such as draws of a simulation, and draw nothing at random themselves.

    U units, the prompts that are sampled. A unit's value is the mean over its items, each the mean of `trials`
    comparisons.
"""

from dataclasses import dataclass

import numpy as np
from scipy import special

_TAIL = 0.025  # on either side
_NORMAL = float(special.ndtri(1.0 - _TAIL))


@dataclass(frozen=True)
class Limits:
    """A number and how far its 95 % interval reaches below and above, each [...]."""

    value: np.ndarray
    below: np.ndarray
    above: np.ndarray
    # What it reaches at least on either side where it is part of a whole: small strata that are all right by chance
    # reach nowhere above, and many of them together would be too sure.
    least: np.ndarray

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """(low, high)."""
        return self.value - self.below, self.value + self.above


def clopper_pearson(right: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact 95 % limits of a share, `right` of `count`, neither of which need be a whole number.

    low = B⁻¹(0.025; x, n − x + 1)    high = B⁻¹(0.975; x + 1, n − x)    with quantiles B⁻¹ of the beta distribution
    """
    right, count = np.broadcast_arrays(np.asarray(right, float), np.asarray(count, float))
    wrong = np.maximum(count - right, 0.0)
    return _lowest(right, wrong), 1.0 - _lowest(wrong, right)


def effective_count(values: np.ndarray, size: np.ndarray, trials: float = 1.0) -> np.ndarray:
    """n*, how many independent comparisons say as much as these units do.

        deff = v·(n − 1) / (p·(1 − p)), at least 1    v = m/(m − 1) · Σ size²·(value − p)² / (Σ size)²
        deff′ = (k·deff + n/m) / (k + 1)              m = (Σ size)² / Σ size², the number of units if all were alike
        n* = n/deff′ · (t(n − 1)/t(m − 1))²           at least n/deff′ or m, whichever is less; at most n

    n comparisons in all; t(f) is Student's 97.5 % quantile at f degrees of freedom; k is how many units tell whether
    the comparisons of a unit go together: those on the rarer side (not all right, or not all wrong), counted by their
    pairs of comparisons. Where they are few, deff′ leans on the most that it can be, n/m, where all comparisons of a
    unit say the same. Of units with one comparison each n* is n: their limits are Clopper and Pearson's, and a tie's ½
    makes them no narrower.

    Args:
        values: [..., U], from 0 to 1.
        size: [U] items of each unit.
        trials: comparisons of which an item's measure is the mean.
    """
    total, alike = size.sum(), _alike(size)
    count = total * trials
    share = values @ size / total
    variance = ((size * (values - share[..., None])) ** 2).sum(axis=-1) / total**2
    if len(size) > 1:
        variance *= alike / (alike - 1.0)
    spread = share * (1.0 - share)
    design = np.divide(variance * (count - 1.0), spread, out=np.ones_like(spread), where=spread > 0)
    telling = _telling(values, size * trials)
    design = (telling * np.maximum(design, 1.0) + count / alike) / (telling + 1.0)
    effective = count / design
    adjusted = effective * _freedom(count - 1.0, alike - 1.0)
    return np.minimum(np.maximum(adjusted, np.minimum(effective, alike)), count)


def limits(values: np.ndarray, size: np.ndarray, trials: float = 1.0) -> Limits:
    """The limits of the share over all items of one stratum; arguments as of `effective_count`."""
    share = np.clip(values @ size / size.sum(), 0.0, 1.0)
    count = effective_count(values, size, trials)
    low, high = clopper_pearson(share * count, count)
    # The standard error with one more right and one more wrong.
    safe = (share * count + 1.0) / (count + 2.0)
    least = _NORMAL * np.sqrt(safe * (1.0 - safe) / count)
    return Limits(share, share - low, high - share, least)


def difference(ours: np.ndarray, theirs: np.ndarray, size: np.ndarray, trials: float = 1.0) -> Limits:
    """The limits of our share minus theirs on the same units of one stratum.

    below² = b₁² − 2φ·b₁·a₂ + a₂²    above² = a₁² − 2φ·a₁·b₂ + b₂²    b, a: how far each one's limits reach
    φ = (c − 1/2m) / (s₁·s₂)         where c > 1/2m; 0 where 0 < c ≤ 1/2m, or nothing varies; no correction where c < 0

    with the covariance c and standard deviations s of the units' values, weighted by size².
    """
    first, second = limits(ours, size, trials), limits(theirs, size, trials)
    correlation = _correlation(ours, theirs, size)

    def reach(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum(one**2 - 2.0 * correlation * one * other + other**2, 0.0))

    below, above = reach(first.below, second.above), reach(first.above, second.below)
    return Limits(first.value - second.value, below, above, reach(first.least, second.least))


def put_together(strata: list[Limits], weights: np.ndarray) -> Limits:
    """The limits of Σ wₛ·vₛ, from those of independent strata; a single stratum keeps its own.

    reach = √Σ (wₛ·max(reachₛ, z·√(p̃·(1 − p̃)/n*)))²    p̃ = (x + 1)/(n* + 2), z = 1.96
    """
    if len(strata) == 1:
        (one,), (weight,) = strata, weights
        return Limits(weight * one.value, weight * one.below, weight * one.above, weight * one.least)

    def whole(reaches: list[np.ndarray]) -> np.ndarray:
        return np.sqrt(np.square(weights) @ np.square(np.stack(reaches).reshape(len(strata), -1))).reshape(shape)

    shape = np.shape(strata[0].value)
    below, above = ([np.maximum(getattr(one, side), one.least) for one in strata] for side in ("below", "above"))
    value = (weights @ np.stack([one.value for one in strata]).reshape(len(strata), -1)).reshape(shape)
    return Limits(value, whole(below), whole(above), whole([one.least for one in strata]))


def _lowest(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """B⁻¹(0.025; right, wrong + 1), which is 0 where nothing is right."""
    some = right > 0
    return np.where(some, special.betaincinv(np.where(some, right, 1.0), wrong + 1.0, _TAIL), 0.0)


def _telling(values: np.ndarray, comparisons: np.ndarray) -> np.ndarray:
    """[...]: units on the rarer side, each by its pairs of comparisons over those of a unit that holds many."""
    pairs = comparisons * (comparisons - 1.0)
    if not pairs.any():
        return np.zeros(values.shape[:-1])
    return np.minimum((values < 1.0) @ pairs, (values > 0.0) @ pairs) * (pairs.sum() / (pairs**2).sum())


def _alike(size: np.ndarray) -> float:
    """How many units of the same size would be worth as much as these, if all items of a unit said the same."""
    return float(size.sum() ** 2 / (size**2).sum())


def _freedom(count: float, units: float) -> float:
    """(t(count)/t(units))²: a variance estimated from few units is worth less; 0 where there is no second unit."""
    if units < 1e-9:
        return 0.0
    return float(special.stdtrit(count, 1.0 - _TAIL) / special.stdtrit(units, 1.0 - _TAIL)) ** 2


def _correlation(ours: np.ndarray, theirs: np.ndarray, size: np.ndarray) -> np.ndarray:
    weight = size**2 / (size**2).sum()
    first, second = (x - (x @ size / size.sum())[..., None] for x in (ours, theirs))
    covariance = (first * second) @ weight
    spread = np.sqrt((first**2 @ weight) * (second**2 @ weight))
    corrected = np.where(covariance > 0, np.maximum(covariance - 0.5 / _alike(size), 0.0), covariance)
    return np.clip(np.divide(corrected, spread, out=np.zeros_like(spread), where=spread > 0), -1.0, 1.0)
