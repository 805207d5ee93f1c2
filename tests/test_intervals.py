"""Intervals of proportions and of differences: equal to libraries and hand computations, monotone, and never too sure.

How often they cover the truth is in test_coverage.py.
"""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from patarm_jax.evaluate.proportions import clopper_pearson, difference, effective_count, limits
from patarm_jax.evaluate.statistics import Formulas, Measured, Number, compare, intervals, means


def units(values, stratum=None, size=None):
    """Units of one item each, unless sizes are given."""
    values = np.asarray(values, float)
    values = values[:, None] if values.ndim == 1 else values
    stratum = np.zeros(len(values), int) if stratum is None else np.asarray(stratum)
    return Measured(values, np.ones(len(values)) if size is None else np.asarray(size, float), stratum)


def weighted(*weights, proportion=True, trials=1.0, **named):
    """One number `x` of one measure, or several by name; each by its weights of the strata."""
    every = {"x": weights} if weights else named
    numbers = {name: Number(0, np.array(each, float)) for name, each in every.items()}
    strata = len(next(iter(every.values())))
    return Formulas(numbers, np.array([trials]), np.broadcast_to(proportion, strata))


def interval(measured, *weights, **how):
    return intervals(measured, weighted(*(weights or (1,)), **how), seed=0)["x"]


def right_of(right, count):
    return np.append(np.ones(right), np.zeros(count - right))


# ---- One stratum ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "count"), [(0, 3), (1, 2), (7, 9), (40, 40), (99, 100), (1234, 2985)])
def test_of_single_items_the_interval_is_that_of_the_library(right, count):
    want = stats.binomtest(right, count).proportion_ci(method="exact")
    assert clopper_pearson(np.array(right), np.array(count)) == pytest.approx((want.low, want.high), abs=1e-9)
    assert interval(units(right_of(right, count))) == pytest.approx((want.low, want.high), abs=1e-9)


def test_more_right_never_lowers_a_limit():
    """Every number right of every number of prompts up to 200; all right reaches above all but one, as 100 of 100."""
    for count in range(1, 201):
        values = np.tri(count + 1, count, -1)  # 0, 1, … count right
        low, high = limits(values, np.ones(count)).interval
        assert (np.diff(low) > 0).all() and (np.diff(high) >= 0).all()
        assert low[0] == 0 and high[-1] == 1
    every, but_one = (interval(units(right_of(right, 100)))[0] for right in (100, 99))
    assert (every, but_one) == pytest.approx((0.96378, 0.94554), abs=1e-5)


def test_ties_are_between_right_and_wrong_and_make_nobody_surer():
    values = np.array([[*[1.0] * right, *[0.5] * ties, *[0.0] * (20 - right - ties)] for right, ties in HALVES])
    low, high = limits(values, np.ones(20)).interval
    points = values.sum(axis=1)
    assert (np.diff(low[np.argsort(points, kind="stable")]) >= -1e-12).all()
    same = clopper_pearson(points, np.full(len(points), 20.0))
    assert np.array([low, high]) == pytest.approx(np.array(same), abs=1e-12)
    assert interval(units(np.full(30, 0.5))) == pytest.approx(interval(units(right_of(15, 30))))


HALVES = [(right, ties) for right in range(21) for ties in range(21 - right)]


def test_items_of_one_prompt_are_one_unit():
    """Prompts of five items: alike, they count as prompts; of items that have nothing to do with each other more."""
    alike = right_of(60, 80)
    low, high = interval(units(alike, size=np.full(80, 5)))
    assert (low, high) == pytest.approx(interval(units(alike)), abs=0.002)
    scattered = np.random.default_rng(0).binomial(5, 0.75, 80) / 5
    narrow = interval(units(scattered, size=np.full(80, 5)))
    assert narrow[1] - narrow[0] < 0.55 * (high - low)
    assert interval(units(np.ones(80), size=np.full(80, 5))) == pytest.approx(interval(units(np.ones(80))))


def test_the_effective_count_by_hand():
    """Four prompts of five items: variance 4/3 · Σ(value − p)²/4² over p(1 − p)/19; three of four are not all right."""
    values = np.array([1.0, 0.8, 0.4, 0.6])
    spread = 0.7 * 0.3
    design = 4 / 3 * (0.09 + 0.01 + 0.09 + 0.01) / 16 * 19 / spread
    leaning = (3 * design + 5) / 4
    freedom = (stats.t.ppf(0.975, 19) / stats.t.ppf(0.975, 3)) ** 2
    want = max(20 / leaning * freedom, min(20 / leaning, 4))
    assert effective_count(values, np.full(4, 5.0)) == pytest.approx(want)


def test_one_large_prompt_leaves_few():
    """Of ten items nine are one prompt's: as good as 100/82 prompts."""
    unlike = units(np.ones(2), size=[1, 9])
    assert interval(unlike) == pytest.approx((0.025 ** (82 / 100), 1.0))


def test_nine_comparisons_of_a_prompt():
    """A measure that is a mean of nine comparisons says more than a single one, and never more than nine."""
    rng = np.random.default_rng(1)
    cells = rng.binomial(9, 0.7, 100) / 9
    one, nine = (interval(units(cells), trials=trials) for trials in (1.0, 9.0))
    assert 2.2 < (one[1] - one[0]) / (nine[1] - nine[0]) < 3.0
    assert interval(units(np.ones(100)), trials=9.0) == pytest.approx(interval(units(np.ones(100))))
    low = [interval(units([*[1.0] * (100 - k), *[8 / 9] * k]), trials=9.0)[0] for k in range(4)]
    assert low[0] < min(low[1:]) and max(low[1:]) < 0.985  # a cell wrong of 900 does not make sure of the other 899


def test_of_one_unit_there_is_no_interval():
    assert np.isnan(interval(units([1.0]))).all() and np.isnan(interval(units([0.6], size=[5]))).all()
    two = units([1.0, 1.0], [0, 1])
    got = intervals(two, weighted(first=(1, 0), both=(0.5, 0.5)), seed=0)
    assert np.isnan(got["first"]).all()
    assert got["both"] == pytest.approx((0.025**0.5, 1))  # of the same weight: as 2 of 2


# ---- Several strata -------------------------------------------------------------------------------------------------


def reaches(right, count):
    """How far exact limits reach below and above; and at least, the standard error with one more right and wrong."""
    low, high = clopper_pearson(np.array(right), np.array(count))
    share, safe = right / count, (right + 1) / (count + 2)
    least = 1.959964 * math.sqrt(safe * (1 - safe) / count)
    return max(share - low, least), max(high - share, least)


def test_strata_of_unlike_weight_are_put_together():
    """By hand: the reaches of 40 and of 160 units, each times its weight, squared and added."""
    measured = units(np.concatenate([right_of(30, 40), right_of(160, 160)]), np.repeat([0, 1], [40, 160]))
    (below, above), (below_2, above_2) = reaches(30, 40), reaches(160, 160)
    assert above_2 > 0  # though none of 160 is wrong
    want = 0.875 - math.hypot(below, below_2) / 2, 0.875 + math.hypot(above, above_2) / 2
    assert interval(measured, 0.5, 0.5) == pytest.approx(want, abs=1e-7)
    got = intervals(measured, weighted(first=(1, 0), both=(0.5, 0.5)), seed=0)["first"]
    assert got == pytest.approx(interval(units(right_of(30, 40))))


def test_strata_whose_items_weigh_the_same_are_one():
    measured = units(np.concatenate([np.ones(40), right_of(150, 160)]), np.repeat([0, 1], [40, 160]))
    assert interval(measured, 0.2, 0.8) == pytest.approx(interval(units(right_of(190, 200))))


def test_a_stratum_in_which_all_are_right_brings_its_own_uncertainty():
    """Ten of ten say little of a stratum that weighs a half, however sure the other is."""
    sure = units(np.concatenate([np.ones(10), right_of(9_000, 10_000)]), np.repeat([0, 1], [10, 10_000]))
    low, high = interval(sure, 0.5, 0.5)
    assert low < 0.95 - 0.5 * (1 - 0.025**0.1) and high > 0.95
    apart = units(np.concatenate([np.ones(50), np.zeros(50)]), np.repeat([0, 1], 50))
    (more, less), least = interval(apart, 0.6, 0.4), reaches(50, 50)[1]
    away = 1 - 0.025 ** (1 / 50)
    assert more == pytest.approx(0.6 - math.hypot(0.6 * away, 0.4 * least), abs=1e-7)
    assert less == pytest.approx(0.6 + math.hypot(0.6 * least, 0.4 * away), abs=1e-7)


def test_more_right_in_a_stratum_never_lowers_the_whole():
    """All numbers right of three strata of 3, 7 and 12 units, of weights 0.5, 0.3 and 0.2, and one more in any."""
    sizes, weights = (3, 7, 12), (0.5, 0.3, 0.2)
    stratum = np.repeat([0, 1, 2], sizes)
    low, high = {}, {}
    for right in itertools.product(*(range(size + 1) for size in sizes)):
        values = np.concatenate([right_of(x, size) for x, size in zip(right, sizes, strict=True)])
        low[right], high[right] = interval(units(values, stratum), *weights)
    for right in low:
        for s in range(3):
            more = tuple(x + (i == s) for i, x in enumerate(right))
            if more in low:
                assert low[more] >= low[right] - 1e-12 and high[more] >= high[right] - 1e-12
    assert low[sizes] == max(low.values()) and low[0, 0, 0] == 0 and high[sizes] == 1


def test_an_interval_holds_its_number_and_what_can_be():
    rng = np.random.default_rng(3)
    for _ in range(50):
        count = int(rng.integers(2, 40))
        stratum = np.sort(np.append([0, 1], rng.integers(0, 2, count - 2)))
        measured = units(rng.choice([0, 0.5, 1], count), stratum, rng.integers(1, 9, count))
        weight = rng.random()
        low, high = interval(measured, weight, 1 - weight)
        assert 0 <= low <= float(np.array([weight, 1 - weight]) @ means(measured)[:, 0]) <= high <= 1


# ---- What is no proportion ------------------------------------------------------------------------------------------


def test_what_is_no_proportion_is_resampled():
    """One stratum and a plain mean: scipy's percentile bootstrap."""
    values = np.random.default_rng(3).normal(size=200)
    got = interval(units(values), proportion=False)
    want = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert got == pytest.approx((want.low, want.high), abs=0.01)


def test_margins_may_exceed_one():
    """Of RewardBench 2's Ties, where nothing varies too: then as sure as so many prompts that are all right."""
    best = units(np.full(4, 1.01), size=np.full(4, 2))
    assert interval(best, proportion=False) == pytest.approx((1.01 - (1 - 0.025**0.25), 1.01))
    some = units([1.01, 0.99, 1.005, 0.6, 1.01, 1.0])
    low, high = interval(some, proportion=False)
    assert 0.6 < low < some.values.mean() < high <= 1.01


def test_margins_and_proportions_are_put_together():
    values = np.concatenate([np.random.default_rng(0).uniform(0, 1.01, 60), right_of(30, 40)])
    measured = units(values, np.repeat([0, 1], [60, 40]))
    kinds = np.array([False, True])
    got = intervals(measured, weighted(a=(1, 0), b=(0, 1), x=(0.5, 0.5), proportion=kinds), seed=0)
    (a, _), value = means(measured)[:, 0], means(measured)[:, 0].mean()
    of_b = reaches(30, 40)
    below, above = np.hypot(a - got["a"][0], of_b[0]) / 2, np.hypot(got["a"][1] - a, of_b[1]) / 2
    assert got["x"] == pytest.approx((value - below, value + above), abs=1e-7)
    other = intervals(measured, weighted(a=(1, 0), b=(0, 1), x=(0.5, 0.5), proportion=kinds), seed=1)
    assert got["b"] == other["b"] and got["a"] != other["a"]


# ---- Two judges -----------------------------------------------------------------------------------------------------


def against(ours, theirs, *weights, **how):
    return compare(ours, theirs, weighted(*(weights or (1,)), **how), seed=0)["x"]


def test_a_difference_by_hand():
    """Newcombe's method 10 with exact limits, of 40 pairs of answers: both right 20, ours 12, theirs 3, none 5."""
    ours, theirs = np.repeat([1, 1, 0, 0], [20, 12, 3, 5]), np.repeat([1, 0, 1, 0], [20, 12, 3, 5])
    first, second = 32 / 40, 23 / 40
    (low, high), (low_2, high_2) = (clopper_pearson(np.array(x), np.array(40)) for x in (32, 23))
    phi = (20 * 5 - 12 * 3 - 40 / 2) / math.sqrt(32 * 8 * 23 * 17)
    below = math.sqrt((first - low) ** 2 - 2 * phi * (first - low) * (high_2 - second) + (high_2 - second) ** 2)
    above = math.sqrt((high - first) ** 2 - 2 * phi * (high - first) * (second - low_2) + (second - low_2) ** 2)
    got = against(units(ours), units(theirs))
    assert got.value == pytest.approx(first - second)
    assert got.interval == pytest.approx((got.value - below, got.value + above))


def test_exchanging_the_judges_mirrors_the_difference():
    rng = np.random.default_rng(0)
    ours, theirs = (units(rng.integers(0, 2, 60), np.repeat([0, 1], 30), rng.integers(1, 4, 60)) for _ in range(2))
    theirs = Measured(theirs.values, ours.size, ours.stratum)
    one, other = against(ours, theirs, 0.7, 0.3), against(theirs, ours, 0.7, 0.3)
    assert one.value == pytest.approx(-other.value)
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]))


def test_a_difference_between_like_judges_is_surer_than_between_unlike_ones():
    rng = np.random.default_rng(0)
    ours = rng.integers(0, 2, 200)
    alike = np.where(rng.random(200) < 0.1, 1 - ours, ours)
    near, far = (against(units(ours), units(x)).interval for x in (alike, rng.permutation(alike)))
    assert near[1] - near[0] < 0.6 * (far[1] - far[0])


def test_a_judge_does_not_differ_from_itself():
    measured = units(np.random.default_rng(0).integers(0, 2, 90), np.repeat([0, 1, 2], 30))
    one = against(measured, measured, 0.5, 0.3, 0.2)
    assert one.value == 0 and one.p_value == 1.0
    assert one.interval[0] < 0 < one.interval[1]  # no prompt tells them apart, which is no proof that none would


def test_a_difference_is_one_that_can_be():
    stratum = np.append(np.zeros(20, int), [1, 1])
    ours, theirs = units(np.ones(22), stratum), units(np.append(np.ones(10), np.zeros(12)), stratum)
    for one, other, sign in ((ours, theirs, 1), (theirs, ours, -1)):
        got = compare(one, other, weighted(second=(0, 1), both=(0.5, 0.5)), seed=0)
        assert got["second"].value == sign and got["both"].value == sign * 0.75
        for each in got.values():
            assert -1 <= each.interval[0] <= each.value <= each.interval[1] <= 1
    lone = compare(units([1, 1, 1], [0, 0, 1]), units([1, 0, 0], [0, 0, 1]), weighted(x=(0, 1)), seed=0)["x"]
    assert lone.value == 1 and np.isnan(lone.interval).all() and lone.p_value == 1.0


def test_margins_of_two_judges_are_resampled_together():
    rng = np.random.default_rng(5)
    ours = rng.uniform(0, 1.01, 80)
    theirs = ours - 0.05  # which lies on the same units
    got = against(units(ours), units(theirs + rng.normal(0, 0.01, 80)), proportion=False)
    assert got.value == pytest.approx(0.05, abs=0.005) and got.interval[1] - got.interval[0] < 0.01


def test_difference_is_of_many_draws_at_once():
    """The same function takes one pair of judges, and all draws of a simulation."""
    rng = np.random.default_rng(0)
    ours, theirs, size = rng.integers(0, 2, (7, 30)) / 1.0, rng.integers(0, 2, (7, 30)) / 1.0, np.full(30, 2.0)
    many = difference(ours, theirs, size)
    for draw in range(7):
        one = difference(ours[draw], theirs[draw], size)
        # Quantiles of arrays may be computed by other instructions than those of numbers.
        of_many = many.value[draw], many.below[draw], many.above[draw]
        assert of_many == pytest.approx((one.value, one.below, one.above), rel=1e-12)


def test_a_paired_comparison_is_that_of_the_permutation_library():
    rng = np.random.default_rng(4)
    ours, theirs = rng.integers(0, 2, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    ours[:12] = 1.0
    got = against(units(ours), units(theirs))
    want = stats.permutation_test(
        (ours, theirs), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples", n_resamples=10_000, rng=2
    )
    assert got.value == pytest.approx(np.mean(ours - theirs))
    assert got.p_value == pytest.approx(want.pvalue, abs=0.02)


def test_a_comparison_over_strata_is_exact():
    """Of four units of unlike size in two strata all sixteen exchanges are counted by hand; p is never 0."""
    stratum, size, weights = np.array([0, 0, 0, 1]), np.array([1.0, 2.0, 1.0, 3.0]), np.array([0.7, 0.3])
    ours, theirs = np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 0.5, 0.75, 0.0])
    got = against(*(units(x, stratum, size) for x in (ours, theirs)), *weights)
    each = weights[stratum] * size / np.bincount(stratum, size)[stratum] * (ours - theirs)
    exchanged = np.array([signs @ each for signs in itertools.product((1, -1), repeat=4)])
    assert got.value == pytest.approx(each.sum())
    assert got.p_value == pytest.approx(np.mean(np.abs(exchanged) >= abs(each.sum()) - 1e-9), abs=0.02)
    # Three small prompts against a large one that says otherwise: 0.75 of 9, which half of the exchanges reach.
    ours, theirs = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 0.375])
    size = np.array([1.0, 1.0, 1.0, 6.0])
    got = against(*(units(x, size=size) for x in (ours, theirs)))
    exchanged = [abs(signs @ (size * (ours - theirs))) for signs in itertools.product((1, -1), repeat=4)]
    assert got.value == pytest.approx(0.75 / 9)
    assert got.p_value == pytest.approx(np.mean(np.array(exchanged) >= 0.75), abs=0.02)
    assert against(units(np.ones(60)), units(np.zeros(60))).p_value == 1 / 10_001


def test_the_mean_is_that_of_the_items():
    size = np.random.default_rng(5).integers(1, 6, 80)
    prompts = np.random.default_rng(6).integers(0, 2, 80).astype(float)
    apart = units(np.repeat(prompts, size))
    assert means(units(prompts, size=size)) == pytest.approx(means(apart))
    wide, narrow = interval(units(prompts, size=size)), interval(apart)
    assert narrow[1] - narrow[0] < 0.75 * (wide[1] - wide[0])
