"""Margins, opponents and rewards by their settings: what reaches the reward, and what is refused by name."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from patarm_jax.config.load import from_mapping, load_run, override, to_yaml
from patarm_jax.config.presets import CHOSEN_BY_MARGIN, MARGINS, value_at
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.reward import MARGINS as FUNCTIONS
from patarm_jax.reward import accuracy_reward, format_reward, graded, label_reward, preference_aware_reward
from patarm_jax.rollout.rewards import make_rewards, opponent_draws
from patarm_jax.run.margin import margin_of, values_of
from patarm_jax.run.whose import refuse_another_run
from patarm_jax.train.penalties import overlong_penalty
from patarm_jax.types import Status, UsageError, UserError

OWN = """
import math
import jax
import jax.numpy as jnp

def of_arrays(delta):
    return 1 + jnp.sqrt(delta)

def of_numbers(delta):
    return 1 + math.sqrt(delta) if delta > 2 else 1.25

def infinite(delta):
    return 1 / jnp.floor(delta)

def wrong(delta):
    raise RuntimeError("not today")

number = 3
"""


def config(*arguments):
    return override(GRPOConfig(), arguments)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_margins.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [each for each in __import__("sys").path if each])


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_has_values_of_its_own_for_what_is_unset(name):
    settings = inspect.signature(FUNCTIONS[name]).parameters
    own = {key.removeprefix("reward.margin."): value for key, value in MARGINS[name].items()}
    assert own == {each.name: each.default for each in list(settings.values())[1:]}
    complete = config("--reward.margin.name", name).complete()
    assert {key: value_at(complete, key) for key in CHOSEN_BY_MARGIN} == dict.fromkeys(CHOSEN_BY_MARGIN) | MARGINS[name]
    assert complete.complete() == complete == from_mapping(GRPOConfig, yaml.safe_load(to_yaml(complete)), "there")
    deltas = jnp.arange(1, 101) / 10
    np.testing.assert_array_equal(margin_of(complete)(deltas), FUNCTIONS[name](deltas))


def test_what_is_set_reaches_the_margin():
    margin = margin_of(
        config("--reward.margin.name", "tanh", "--reward.margin.scale", "2", "--reward.margin.width", "4")
    )
    assert float(margin(jnp.float32(3))) == pytest.approx(1 + 2 * math.tanh(3 / 4))


@pytest.mark.parametrize("name", ["of_arrays", "of_numbers"])
def test_any_python_function_is_a_margin(own, name):
    """Of arrays or of one number, by name; the reward is the plain loop's."""
    given = config("--reward.margin.name", f"my_margins:{name}")
    margin = margin_of(given)
    scores = np.array([[[9.0, 3.0], [2.0, 5.0]]], np.float32)
    plain = {"of_arrays": lambda d: 1 + math.sqrt(d), "of_numbers": lambda d: 1 + math.sqrt(d) if d > 2 else 1.25}[name]
    expected = [[[plain(9 - 3.5), 0], [plain(6 - 2), plain(6 - 5)]]]
    status, zero = np.zeros(scores.shape, int), np.zeros(scores.shape, np.float32)
    got = make_rewards(given, margin)(scores, status, zero, zero, zero[..., 0])
    np.testing.assert_allclose(got.earned, expected, rtol=1e-6)
    known = values_of(given, margin)["margin of 0.1 to 10"]
    assert len(known) == 100 and known[29] == pytest.approx(plain(3.0), abs=1e-5)
    assert values_of(config(), graded) == {}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_margins:absent", "cannot be imported .* has no attribute 'absent'"),
        ("no_such_module:f", "cannot be imported .* No module named 'no_such_module'"),
        ("my_margins:number", "is int; allowed is a function"),
        ("my_margins:wrong", "gives no number for a margin from 0.1 to 10: .*not today"),
        ("my_margins:infinite", "gives inf for the margin 0.1"),
    ],
)
def test_a_function_that_is_none_is_refused(own, name, says):
    with pytest.raises(UsageError, match=says):
        margin_of(config("--reward.margin.name", name))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reward.margin.name", "gradd"], "allowed is graded, constant, .*, or module:name .* Did you mean graded?"),
        (["--reward.margin.name", "constant", "--reward.margin.low", "1"], "reward.margin.low is 1.0, and .* constant"),
        (["--reward.margin.name", "a:b", "--reward.margin.low", "1"], "a:b does not use it; it uses none of them"),
        (["--reward.margin", "graded"], "--reward.margin is a section. Give one of its settings: --reward.margin.name"),
        (["--reward.kind", "labels", "--reward.loser", "minus"], "reward.loser is set, and reward.kind is labels"),
        (
            ["--reward.kind", "threshold", "--reward.margin.name", "tanh"],
            "reward.margin is set, and reward.kind is",
        ),
        (["--reward.accuracy.right", "2"], "reward.accuracy is set, and judge is pointwise"),
        (["--judge", "pairwise", "--reward.opponent", "one"], "reward.opponent is set, and judge is pairwise"),
        (["--judge", "pairwise", "--reward.kind", "labels"], "reward.kind is set, and judge is pairwise"),
        (["--pairwise.orders", "alternate"], "pairwise.orders is alternate, and a pointwise judge reads one response"),
        (["--judge", "pairwise", "--group_size", "3"], "group_size is 3; allowed is an even number where pairwise.ord"),
        (["--judge", "pairwise", "--heldout.best", "score_gap"], "heldout.best is score_gap, and a pairwise judge"),
        (["--dapo.max_rounds", "3"], "dapo.max_rounds is 3, and update.algorithm grpo does not use it"),
        (
            ["--update.algorithm", "dapo", "--dapo.overlong_buffer", "2000"],
            "dapo.overlong_buffer is 2000; allowed is 0 to sampling.max_new_tokens 1024",
        ),
        (
            ["--judge", "pairwise", "--reward.group_by", "response", "--group_size", "2"],
            "group_size is 2 where reward.group_by is response; allowed is 4 or more",
        ),
    ],
)
def test_what_a_reward_does_not_use_is_refused_by_name(arguments, says):
    with pytest.raises(UsageError, match=says):
        config(*arguments)


def test_a_margin_that_a_config_names_as_it_was_before_is_said_to_be_renamed():
    with pytest.raises(UsageError, match=r"reward.margin graded is called reward.margin.name graded now. Rename it."):
        from_mapping(GRPOConfig, {"reward": {"margin": "graded"}}, "")


def test_a_run_of_before_is_read_and_goes_on(tmp_path):
    old = yaml.safe_load(to_yaml(GRPOConfig()))
    for name in ("judge", "pairwise", "dapo"):
        del old[name]
    old["reward"] = {"margin": "constant", "group_by": "pair", "normalise_std": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert load_run(tmp_path).reward.margin.name == "constant"
    now = config("--reward.margin.name", "constant", "--reward.group_by", "pair").complete()
    settings = yaml.safe_load(to_yaml(now))
    reward = {"margin": "constant", "group_by": "pair", "normalise_std": True}
    before = {name: settings[name] for name in ("optimizer", "sampling", "update", "group_size")} | {"reward": reward}
    expected = {name: settings[name] for name in ("judge", "pairwise", "dapo", "reward", *before)}
    refuse_another_run("there", expected, before)
    with pytest.raises(UserError, match=r"reward.margin.name is 'constant' there and 'tanh' here"):
        other = config("--reward.margin.name", "tanh", "--reward.group_by", "pair").complete()
        refuse_another_run("there", expected | {"reward": yaml.safe_load(to_yaml(other))["reward"]}, before)


@pytest.mark.parametrize("opponent", ["mean", "every", "one"])
@pytest.mark.parametrize("loser", ["zero", "minus"])
def test_what_is_set_reaches_par(opponent, loser):
    rng = np.random.default_rng(0)
    scores, status = rng.integers(0, 11, (6, 2, 4)).astype(np.float32), rng.integers(0, 3, (6, 2, 4))
    draws = opponent_draws(jax.random.key(1), np.arange(12), 4).reshape(6, 2, 4)
    given = config("--reward.opponent", opponent, "--reward.loser", loser)
    got = make_rewards(given, graded)(scores, status, scores, draws, scores[..., 0])
    expected = preference_aware_reward(scores, status == Status.OK, graded, opponent, loser, draws)
    np.testing.assert_array_equal(got.earned, expected)
    np.testing.assert_array_equal(got.total, expected + format_reward(status))


def test_what_is_compared_with_par_has_rewards_of_its_own():
    rng = np.random.default_rng(1)
    numbers, status = rng.integers(0, 2, (6, 2, 4)).astype(np.float32), rng.integers(0, 3, (6, 2, 4))
    labels, valid = rng.integers(0, 11, (6, 2)).astype(np.float32), status == Status.OK

    def earned(*arguments):
        return make_rewards(config(*arguments), graded)(numbers, status, numbers, numbers, labels).earned

    np.testing.assert_allclose(earned("--reward.kind", "labels"), label_reward(numbers, valid, labels), rtol=1e-6)
    right = ["--judge", "pairwise", "--reward.accuracy.right", "3", "--reward.accuracy.wrong", "-1"]
    np.testing.assert_array_equal(earned(*right), accuracy_reward(numbers, valid, 3.0, -1.0))
    assert set(np.unique(earned("--reward.kind", "threshold"))) == {0, 1}


def test_what_comes_near_the_limit_loses_in_tokens():
    lengths = np.array([[[1, 60, 70], [80, 90, 100]]])
    status, zero = np.zeros(lengths.shape, int), np.zeros(lengths.shape, np.float32)
    given = ["--update.algorithm", "dapo", "--sampling.max_new_tokens", "100", "--dapo.overlong_buffer", "40"]
    got = make_rewards(config(*given, "--dapo.overlong_factor", "2"), graded)(zero, status, lengths, zero, zero[..., 0])
    np.testing.assert_allclose(got.length, [[[0, 0, -0.5], [-1, -1.5, -2]]])
    np.testing.assert_array_equal(got.length, overlong_penalty(lengths, 100, 40, 2.0))
    np.testing.assert_array_equal(got.total, got.length)
    none = make_rewards(config(*given[:-1], "0"), graded)(zero, status, lengths, zero, zero[..., 0])
    assert not np.asarray(none.length).any()


def test_draws_belong_to_the_response():
    key = jax.random.key(3)
    every = opponent_draws(key, np.arange(50), 8)
    assert (every >= 0).all() and (every < 1).all() and len(np.unique(every)) == 400
    np.testing.assert_array_equal(opponent_draws(key, np.array([30, 2]), 8), every[[30, 2]])


def test_the_card_says_what_was_rewarded():
    said = {
        (): "PAR with the graded margin, 8 judgements of each response",
        ("--reward.opponent", "every", "--reward.loser", "minus"): (
            "PAR with the graded margin, against every score of the other side, the wrong side minus it, 8 judgements "
            "of each response"
        ),
        ("--judge", "pairwise"): "1 for the right choice, 0 for the wrong; 8 judgements, half of them in each order",
    }
    for arguments, words in said.items():
        assert config(*arguments).reward_in_words == words
    assert override(SFTConfig(), ["--judge", "pairwise"]).prompts_per_pair == 2
