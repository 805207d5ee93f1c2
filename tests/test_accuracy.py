"""Pairwise accuracy on pairs whose answer is known."""

import math

import numpy as np
import pytest
import scipy.stats

from patarm_jax.evaluate.accuracy import pairwise_accuracy
from patarm_jax.evaluate.heldout import heldout_metrics
from patarm_jax.rollout.judging import numbers_of
from patarm_jax.types import Judgement, Status

NONE = math.nan


def accuracy(*pairs):
    scores = np.array(pairs, np.float64)
    return pairwise_accuracy(scores, ~np.isnan(scores))


def test_a_win_a_loss_and_a_tie():
    got = accuracy([[8, 6], [5, 5]], [[1, 2], [9, 9]], [[4, 6], [5, 5]])
    assert (got.accuracy_strict, got.accuracy_half, got.ties) == pytest.approx((1 / 3, 1 / 2, 1 / 3))
    assert got.gap == pytest.approx((2 - 7.5 + 0) / 3)
    assert got.valid == 1.0


def test_means_are_over_valid_judgements_only():
    got = accuracy([[8, NONE], [5, 6]])
    assert (got.accuracy_strict, got.gap, got.valid) == (1.0, 2.5, 0.75)


def test_a_side_without_a_valid_judgement_decides_nothing():
    got = accuracy([[9, 9], [NONE, NONE]], [[9, 9], [1, 1]])
    assert (got.accuracy_strict, got.accuracy_half, got.ties, got.gap) == (0.5, 0.75, 0.5, 8.0)
    nothing = accuracy([[NONE], [NONE]])
    assert (nothing.accuracy_strict, nothing.accuracy_half, nothing.valid) == (0.0, 0.5, 0.0)
    assert math.isnan(nothing.gap)


def test_equal_means_are_ties_whatever_they_are_the_means_of():
    got = accuracy([[7.1, 7.3], [7.2, 7.2]], [[0.1, 0.2], [0.3, 0.0]])
    assert (got.ties, got.accuracy_strict, got.gap) == (1.0, 0.0, 0.0)


def of_outcomes(outcome):
    scores = np.stack([outcome, np.full(len(outcome), 0.5)], axis=1)[..., None]
    return pairwise_accuracy(scores, np.ones_like(scores, bool))


@pytest.mark.parametrize("right", [0, 1, 210, 299, 300])
def test_the_interval_equals_scipys(right):
    want = scipy.stats.binomtest(right, 300).proportion_ci(method="exact")
    got = of_outcomes(np.where(np.arange(300) < right, 1.0, 0.0)).interval
    assert got == pytest.approx((want.low, want.high), abs=1e-9)


def test_a_tie_is_half_right_in_the_interval_too():
    assert of_outcomes(np.repeat([1.0, 0.5, 0.0], [100, 100, 100])).interval == pytest.approx(
        of_outcomes(np.repeat([1.0, 0.0], [150, 150])).interval
    )


def test_one_pair_has_no_interval():
    assert all(map(math.isnan, accuracy([[8], [5]]).interval))


def test_swapping_the_sides_mirrors_the_accuracy():
    scores = np.random.default_rng(0).integers(0, 11, (200, 2, 3)).astype(float)
    valid = np.random.default_rng(1).random(scores.shape) < 0.9
    one, other = pairwise_accuracy(scores, valid), pairwise_accuracy(scores[:, ::-1], valid[:, ::-1])
    assert one.accuracy_half == pytest.approx(1 - other.accuracy_half)
    assert one.gap == pytest.approx(-other.gap)
    assert one.accuracy_half == pytest.approx(one.accuracy_strict + one.ties / 2)


def test_metrics_of_held_out_pairs():
    """Three pairs of two votes: a win, a tie, and one side that cannot be read."""
    sides = [(8, 6), (5, None), (4, 4), (3, 5), (None, None), (2, 2)]
    judgements = [
        [Judgement("", Status.BAD_TAGS, "") if one is None else Judgement("", Status.OK, "", one) for one in side]
        for side in sides
    ]
    scores, status = (x.reshape(3, 2, 2) for x in numbers_of(judgements, [0, 1] * 3))
    found = heldout_metrics(pairwise_accuracy(scores, status == Status.OK), 0.25)
    assert found.pop("eval/clipped_ratio") == 0.25
    low, high = found.pop("eval/accuracy_low"), found.pop("eval/accuracy_high")
    assert found == pytest.approx({
        "eval/accuracy_strict": 1 / 3, "eval/accuracy_half": 2 / 3, "eval/score_gap": 1.0, "eval/valid": 9 / 12,
        "eval/ties": 2 / 3,
    })  # fmt: skip
    assert (low, high) == pytest.approx(of_outcomes(np.array([1.0, 0.5, 0.5])).interval)
