"""PAR, penalty and advantages against a plain loop over Python floats, and the decisions taken one by one."""

import math
import statistics
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.reward import (
    accuracy_reward,
    constant,
    format_reward,
    graded,
    group_advantages,
    in_all,
    label_reward,
    linear,
    power,
    tanh,
    threshold_reward,
)
from patarm_jax.reward import preference_aware_reward as uncompiled_reward
from patarm_jax.types import Status

preference_aware_reward = jax.jit(uncompiled_reward, static_argnums=(2, 3, 4), static_argnames=("opponent", "loser"))

MARGINS = {
    "graded": (graded, lambda d: 1.4 if d > 2 else 1.2),
    "constant": (constant, lambda d: 1.3),
    "linear": (linear, lambda d: 1 + d / 10),
    "tanh": (tanh, lambda d: 1 + math.tanh(d / 2) / 2),
    "power": (power, lambda d: math.sqrt(d)),
    "own": (lambda d: d**2 + 1, lambda d: d**2 + 1),
}


def plain_reward(scores, valid, f, opponent="mean", loser="zero", draws=None):
    """The rules of PAR, read aloud."""
    rewards = [[[0.0] * len(side) for side in pair] for pair in scores]
    for p, pair in enumerate(scores):
        kept = [[s for s, ok in zip(side, oks, strict=True) if ok] for side, oks in zip(pair, valid[p], strict=True)]
        if not kept[0] or not kept[1]:
            continue
        for side, other, sign in ((0, 1, 1), (1, 0, -1)):
            for i, score in enumerate(pair[side]):
                if not valid[p][side][i]:
                    continue
                met = kept[other]
                if opponent == "mean":
                    met = [sum(met) / len(met)]
                if opponent == "one":
                    met = [met[int(draws[p][side][i] * len(met))]]
                for theirs in met:
                    delta = sign * (score - theirs)
                    if delta > 0:
                        rewards[p][side][i] += f(delta) / len(met)
                    elif delta < 0 and loser == "minus":
                        rewards[p][side][i] -= f(-delta) / len(met)
    return rewards


def random_case(seed, pairs=40, group=5, valid_share=0.7):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 21, (pairs, 2, group)) / 2  # halves: sums are exact, so ties are ties in both
    valid = rng.random((pairs, 2, group)) < valid_share
    return np.where(valid, scores, np.nan).astype(np.float32), valid


@pytest.mark.parametrize(("ours", "plain"), MARGINS.values(), ids=MARGINS.keys())
@pytest.mark.parametrize("loser", ["zero", "minus"])
@pytest.mark.parametrize("opponent", ["mean", "every", "one"])
def test_reward_equals_a_plain_loop(ours, plain, opponent, loser):
    for group in (1, 2, 4, 8):
        scores, valid = random_case(group, group=group)
        draws = np.random.default_rng(1).random(scores.shape)
        given = (scores.astype(float).tolist(), valid.tolist())
        expected = plain_reward(*given, plain, opponent, loser, draws.tolist())
        got = preference_aware_reward(
            jnp.asarray(scores), jnp.asarray(valid), ours, opponent, loser, jnp.asarray(draws)
        )
        cancels = 1e-6 if loser == "minus" else 0.0  # what is won and lost may add up to nearly nothing
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=cancels)
        assert (np.asarray(expected) > 0).any() and (np.asarray(expected) < 0).any() == (loser == "minus")


def test_the_defaults_are_the_method():
    scores, valid = random_case(7)
    expected = preference_aware_reward(scores, valid, graded, opponent="mean", loser="zero")
    np.testing.assert_array_equal(preference_aware_reward(scores, valid), expected)
    for other in ({"opponent": "every"}, {"loser": "minus"}, {"opponent": "one", "draws": np.zeros(scores.shape)}):
        assert (np.asarray(preference_aware_reward(scores, valid, **other)) != np.asarray(expected)).any()


def test_every_valid_opponent_is_drawn_alike_and_no_other():
    draws = np.linspace(0, 1, 1000, endpoint=False, dtype=np.float32)  # a pair for each
    scores = jnp.tile(jnp.array([[5.0] * 3, [1.0, math.nan, 2.0]]), (1000, 1, 1))
    each = jnp.broadcast_to(draws[:, None, None], scores.shape)
    reward = preference_aware_reward(scores, ~jnp.isnan(scores), lambda d: d, "one", "zero", each)
    np.testing.assert_array_equal(reward[:, 0, 0], np.where(draws < 0.5, 4.0, 3.0))


@pytest.mark.parametrize("wrong", [{"opponent": "best"}, {"loser": "half"}, {"opponent": "one"}], ids=str)
def test_what_par_does_not_know_is_refused(wrong):
    with pytest.raises(ValueError, match=r"opponent|loser"):
        uncompiled_reward(*random_case(0), **wrong)


def test_a_threshold_rewards_each_side_by_itself():
    scores = jnp.array([[[5.0, 4.9, 9.0, math.nan], [5.0, 4.9, 0.0, math.nan]]])
    assert threshold_reward(scores, ~jnp.isnan(scores)).tolist() == [[[1, 0, 1, 0], [0, 1, 1, 0]]]


def test_labels_reward_what_comes_near_them():
    scores = jnp.array([[[5.0, 9.0, math.nan], [5.0, 0.0, math.nan]]])
    earned = label_reward(scores, ~jnp.isnan(scores), jnp.array([[7.0, 10.0]]))
    np.testing.assert_allclose(earned, [[[-0.04, -0.04, 0], [-0.25, -1, 0]]], rtol=1e-6)
    # What cannot be read never earns more than the worst score that can.
    worst = in_all(earned, jnp.array([[[0, 0, Status.BAD_SCORE]] * 2])).total
    assert worst[..., 2].max() <= worst[..., :2].min()


def test_a_choice_is_rewarded_when_it_is_right():
    right, valid = jnp.array([[[1.0, 0.0, math.nan]]]), jnp.array([[[True, True, False]]])
    assert accuracy_reward(right, valid).tolist() == [[[1, 0, 0]]]
    assert accuracy_reward(right, valid, 2.0, -0.5).tolist() == [[[2, -0.5, 0]]]


def test_reward_under_jit_and_vmap_is_the_same():
    scores, valid = random_case(3)
    expected = preference_aware_reward(scores, valid)
    np.testing.assert_array_equal(uncompiled_reward(scores, valid), expected)
    split = jax.vmap(preference_aware_reward)(scores.reshape(8, 5, 2, 5), valid.reshape(8, 5, 2, 5))
    np.testing.assert_array_equal(split.reshape(40, 2, 5), expected)


def test_swapping_the_sides_mirrors_the_scores():
    scores, valid = random_case(4)
    swapped = preference_aware_reward(10 - scores[:, ::-1], valid[:, ::-1])
    np.testing.assert_array_equal(swapped[:, ::-1], preference_aware_reward(scores, valid))


def test_a_reward_has_no_nan_gradient():
    scores = jnp.array([[[1.0, 5.0], [5.0, 1.0]]])
    gradient = jax.grad(lambda s: preference_aware_reward(s, jnp.ones_like(s, bool), lambda d: jnp.sqrt(d)).sum())(
        scores
    )
    assert np.isfinite(gradient).all()


def par(chosen, rejected, f=graded):
    """PAR of one pair; None is a judgement that could not be read."""
    scores = jnp.array([[[math.nan if s is None else s for s in side] for side in (chosen, rejected)]])
    return np.asarray(preference_aware_reward(scores, ~jnp.isnan(scores), f))[0].tolist()


def near(expected):
    return [pytest.approx(side) for side in expected]


def test_decision_graded_margin_is_above_two_strictly():
    assert par([2.0, 2.5], [0.0, 0.0]) == near([[1.2, 1.4], [1.4, 1.4]])


def test_decision_the_rejected_margin_is_positive():
    assert par([9.0], [1.0]) == near([[1.4], [1.4]])


def test_decision_a_tie_earns_nothing():
    assert par([5.0, 5.0], [5.0, 5.0]) == [[0, 0], [0, 0]]


@pytest.mark.parametrize("group", range(1, 9))
def test_decision_ties_and_bands_are_those_of_decimals(group):
    """Judges write 7.3, which float32 does not hold: no rounding may win a tie or lift a margin over 2."""
    tenths = [Fraction(i, 10) for i in range(101)]
    tied = jnp.array([[[float(s)] * group] * 2 for s in tenths], jnp.float32)
    assert (preference_aware_reward(tied, jnp.ones_like(tied, bool)) == 0).all()
    pairs = [(high, high - 2) for high in tenths if high >= 2]
    exact = jnp.array([[[float(a)] * group, [float(b)] * group] for a, b in pairs], jnp.float32)
    np.testing.assert_allclose(preference_aware_reward(exact, jnp.ones_like(exact, bool)), 1.2)
    above = jnp.array([[[float(a)] * group, [float(b - Fraction(1, 10))] * group] for a, b in pairs if b], jnp.float32)
    np.testing.assert_allclose(preference_aware_reward(above, jnp.ones_like(above, bool)), 1.4)


def test_rewards_equal_exact_fractions():
    """The plain loop in exact arithmetic, on scores of one decimal."""
    rng = np.random.default_rng(9)
    tenths = rng.integers(0, 101, (200, 2, 7))
    valid = rng.random(tenths.shape) < 0.8
    exact = [[[Fraction(int(s), 10) for s in side] for side in pair] for pair in tenths]
    expected = plain_reward(exact, valid.tolist(), lambda d: 1.4 if d > 2 else 1.2)
    got = preference_aware_reward(jnp.asarray(tenths / 10, jnp.float32), jnp.asarray(valid))
    np.testing.assert_allclose(got, np.array(expected, float), rtol=1e-6)


def test_decision_a_failed_judgement_is_left_out_of_the_mean():
    # With the failed one counted as 0 the mean would be 3 and the chosen 5 would be rewarded.
    assert par([5.0, 5.0], [6.0, None]) == [[0, 0], [0, 0]]


def test_decision_a_side_without_valid_judgements_gives_no_reward():
    assert par([9.0, 8.0], [None, None]) == [[0, 0], [0, 0]]
    assert par([None], [2.0]) == [[0], [0]]


def test_decision_a_failed_judgement_earns_no_reward():
    assert par([9.0, None], [1.0, 2.0]) == near([[1.4, 0], [1.4, 1.4]])


def test_decision_format_penalties():
    status = jnp.array([[[Status.OK, Status.BAD_SCORE, Status.BAD_TAGS]]])
    assert format_reward(status).tolist() == [[[0.0, -1.0, -1.5]]]
    assert jax.jit(format_reward)(status).tolist() == [[[0.0, -1.0, -1.5]]]


def plain_advantages(rewards, group_by, ddof, eps, normalise_std):
    result = np.zeros_like(rewards)
    for p, pair in enumerate(rewards):
        groups = [[(0, g) for g in range(pair.shape[1])], [(1, g) for g in range(pair.shape[1])]]
        if group_by == "pair":
            groups = [groups[0] + groups[1]]
        for group in groups:
            values = [float(pair[i]) for i in group]
            mean = statistics.fmean(values)
            spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - ddof, 1))
            for i, value in zip(group, values, strict=True):
                result[p][i] = (value - mean) / (spread + eps) if normalise_std else value - mean
    return result


@pytest.mark.parametrize("group_by", ["response", "pair"])
@pytest.mark.parametrize(("ddof", "normalise_std"), [(1, True), (0, True), (1, False)])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_advantages_equal_a_plain_loop(group_by, ddof, normalise_std, group):
    rewards = np.random.default_rng(group).choice([-1.5, -1.0, 0.0, 1.25], (20, 2, group)).astype(np.float32)
    got = group_advantages(rewards, group_by, ddof, 1e-6, normalise_std)
    np.testing.assert_allclose(
        got, plain_advantages(rewards, group_by, ddof, 1e-6, normalise_std), rtol=2e-5, atol=1e-6
    )


def test_decision_the_group_is_one_response_by_default():
    rewards = jnp.array([[[1.0, 2.0], [10.0, 20.0]]])
    assert group_advantages(rewards)[0, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)


@pytest.mark.parametrize("group_by", ["response", "pair"])
def test_decision_equal_rewards_give_no_advantage(group_by):
    rewards = jnp.full((3, 2, 7), 1.1)  # 7 · 1.1 / 7 is not 1.1 in float32
    assert (group_advantages(rewards, group_by) == 0).all()
    gradient = jax.grad(lambda r: group_advantages(r, group_by).sum())(rewards)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[P, 2, G\]"):
        preference_aware_reward(jnp.zeros(shape), jnp.ones(shape, bool))
    with pytest.raises(ValueError, match=r"\[P, 2, G\]"):
        group_advantages(jnp.zeros(shape))
