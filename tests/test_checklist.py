"""Checklists: what is read of them, how likely their words were, and what they earn."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patarm_jax.data.tokenizer import encode_text, load_tokenizer
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.judge.checklist import WEIGHTS, parse_checklist, render_checklist
from patarm_jax.judge.criteria import Criterion, render_criteria
from patarm_jax.judge.forms import CHECKLIST
from patarm_jax.reward import checked_rubric_reward, checklist_reward, constant, preference_aware_reward
from patarm_jax.rollout.verdicts import weighed, words_of
from patarm_jax.types import Status, UserError
from tests.arms import write_arms_world

ci = settings(derandomize=True, deadline=None, max_examples=200, database=None)
CRITERIA = (
    Criterion("The response names three primes.", "Hard Rule"),
    Criterion("The response is short.", "Principle"),
)
RUBRIC = render_criteria(CRITERIA)
GOOD = '{"1": {"why": "It names 2, 3, 5.", "met": true}, "2": {"why": "It rambles.", "met": false}}'

whys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda text: text.strip())
findings = st.lists(st.tuples(whys, st.booleans()), min_size=1, max_size=8)


# ------------------------------------------------------------------------------------------------------------- reading


@ci
@given(findings, st.sampled_from(["", "<think>true false</think>\n", " \n"]))
def test_what_is_written_is_read_back(said, before):
    """Whatever the reasons hold, such as quotes, braces and the words themselves."""
    text = before + render_checklist([*said, ('"met": true} false', True)])
    read = parse_checklist(text)
    assert read.status is Status.OK
    assert [one.met for one in read.verdicts] == [*(met for _, met in said), True]
    assert all(text[one.place :].startswith(json.dumps(one.met)) for one in read.verdicts)
    assert read.score == pytest.approx((sum(1 if met else -1 for _, met in said) + 1) / (len(said) + 1))


@ci
@given(
    st.one_of(st.text(), st.lists(st.sampled_from([GOOD, "{", "}", '"1"', ": true", ",", "[", "1e999"])).map("".join))
)
def test_nothing_is_raised_and_nothing_guessed(text):
    read = parse_checklist(text, CRITERIA)
    assert (read.status is Status.OK) == bool(read.verdicts) == (read.score is not None) == (not read.reason)


REFUSED = {
    "nothing": ("", Status.BAD_TAGS, "it is no JSON: Expecting value at character 1"),
    "a fence": (f"```json\n{GOOD}\n```", Status.BAD_TAGS, "it is no JSON"),
    "a remark behind": (f"{GOOD} Done.", Status.BAD_TAGS, "it is no JSON: Extra data at character"),
    "a list": ("[true, false]", Status.BAD_TAGS, "no JSON object with a member for each criterion"),
    "none": ("{}", Status.BAD_TAGS, "no JSON object with a member for each criterion"),
    "too few": ('{"1": {"why": "So.", "met": true}}', Status.BAD_TAGS, "1 criterion is judged and the rubric has 2"),
    "too many": (GOOD[:-1] + ', "3": {"why": "So.", "met": true}}', Status.BAD_TAGS, "3 criteria are judged"),
    "the second first": (GOOD.replace('"1"', '"0"'), Status.BAD_TAGS, "criterion 1 is missing"),
    "exchanged": (
        '{"2": {"why": "So.", "met": true}, "1": {"why": "So.", "met": true}}',
        Status.BAD_TAGS,
        "criterion 1 is out of order",
    ),
    "twice": (GOOD.replace('"2"', '"1"'), Status.BAD_TAGS, "is repeated"),
    "the verdict first": (GOOD.replace('"why": "It rambles.", "met": false', '"met": false, "why": "So."'),
                          Status.BAD_TAGS, 'criterion 2 is no object of "why" and "met", in this order'),
    "no reason": (GOOD.replace("It rambles.", " "), Status.BAD_TAGS, 'criterion 2 has no "why"'),
    "a word": (GOOD.replace("false", '"no"'), Status.BAD_SCORE, 'criterion 2 has the "met" '),
    "a number": (GOOD.replace("false", "0"), Status.BAD_SCORE, "it must be true or false"),
    "Python": (GOOD.replace("false", "False"), Status.BAD_TAGS, "it is no JSON"),
    "no number": (GOOD.replace("false", "NaN"), Status.BAD_TAGS, "it is no JSON: NaN is no number"),
    "a deep one": ("[" * 100_000, Status.BAD_TAGS, "it is no JSON that can be read"),
    "thinking without end": (f"<think>{GOOD}", Status.BAD_TAGS, ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "status", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_out_of_form_says_why(text, status, reason):
    read = parse_checklist(text, CRITERIA)
    assert (read.status, read.score, read.verdicts) == (status, None, ())
    assert reason in read.reason


def test_hard_rules_weigh_three_times_as_much():
    assert CHECKLIST.read(GOOD, RUBRIC).score == 3 - 1
    assert CHECKLIST.read(GOOD, "").score == CHECKLIST.read(GOOD, "Be kind.").score == 0
    assert WEIGHTS == {"Hard Rule": 3, "Principle": 1}


def test_a_longer_list_of_a_judges_own_is_worth_no_more():
    for number in (1, 2, 7):
        assert CHECKLIST.read(render_checklist([("So.", True)] * number)).score == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------ probabilities


def test_a_verdict_counts_by_the_probabilities_of_both_words(real_inputs):
    """By Qwen3's own tokens: of each verdict those of its own place, whatever stands elsewhere."""
    tokenizer = load_tokenizer(real_inputs / "qwen3_tokenizer")
    words = words_of(tokenizer)
    assert words.of == {True: (830, 1866), False: (895, 3849)}
    for text in (GOOD, GOOD.replace("It names 2, 3, 5.", "Ünïcode 日本 🙂: true, false")):
        ids = encode_text(tokenizer, text)
        rng = np.random.default_rng(0)
        named = np.log(rng.dirichlet(np.ones(8), len(ids))[:, :4]).astype(np.float32)
        places = [step for step, token in enumerate(ids) if token in (830, 895)][-2:]
        found = weighed(tokenizer, words, ids, named, CHECKLIST.read(text, RUBRIC))
        p = np.exp(named.astype(np.float64))
        leads = [p[step, 0] + p[step, 1] - p[step, 2] - p[step, 3] for step in places]
        assert found.score == pytest.approx(3 * leads[0] + 1 * leads[1], rel=1e-9)
        assert found.verdicts == CHECKLIST.read(text, RUBRIC).verdicts


def test_a_word_in_several_tokens_counts_in_full(real_inputs):
    tokenizer = load_tokenizer(real_inputs / "qwen3_tokenizer")
    first, second = GOOD.index(" true"), GOOD.index(" false")
    pieces = [GOOD[:first], " t", "rue", GOOD[first + 5 : second], " false", GOOD[second + 6 :]]
    ids = [token for piece in pieces for token in encode_text(tokenizer, piece)]
    named = np.full((len(ids), 4), np.log(0.25), np.float32)
    found = weighed(tokenizer, words_of(tokenizer), ids, named, CHECKLIST.read(GOOD, RUBRIC))
    assert found.score == pytest.approx(3 + 0)


def test_a_vocabulary_without_the_words_is_refused(tmp_path):
    world = write_arms_world(tmp_path)  # of comparisons, which never say true or false
    with pytest.raises(UserError, match="has no token for 'true' behind a space"):
        words_of(load_tokenizer(world / "model"))
    write_untrained_model(tmp_path / "other", write_arms_world(tmp_path / "more", kind=CHECKLIST) / "pairs.jsonl", 0)
    assert len(words_of(load_tokenizer(tmp_path / "other")).ids) >= 2


# ------------------------------------------------------------------------------------------------------------- rewards


def test_rewards_equal_a_plain_loop():
    rng = np.random.default_rng(3)
    scores = rng.integers(-4, 5, (64, 2, 3)).astype(np.float32)  # with ties among them
    valid = rng.random(scores.shape) < 0.7
    scores[~valid] = np.nan
    found = checklist_reward(scores, valid, 0.5)
    right = rng.choice([0.0, 1.0, np.nan], (64, 1, 3))
    rubrics = checked_rubric_reward(right, valid[:, :1], 0.25)
    ties = 0
    for pair in range(64):
        for side in range(2):
            others = [scores[pair, 1 - side, g] for g in range(3) if valid[pair, 1 - side, g]]
            for g in range(3):
                if not valid[pair, side, g]:
                    expected = -1.0
                elif not others:
                    expected = 0.5
                else:
                    lead = (1 if side == 0 else -1) * (
                        float(scores[pair, side, g]) - sum(map(float, others)) / len(others)
                    )
                    ties += lead == 0
                    expected = (1.0 if lead > 0 else -1.0) + 0.5
                assert found.total[pair, side, g] == pytest.approx(expected)
        for g in range(3):
            ok = valid[pair, 0, g]
            assert rubrics.total[pair, 0, g] == (1 if ok and right[pair, 0, g] == 1 else -1) + 0.25 * ok
    assert ties


def test_a_tie_earns_nothing_unless_it_is_a_loss():
    scores, valid = np.array([[[5.0], [5.0]]]), np.ones((1, 2, 1), bool)
    for loser, tie, earned in (("zero", "zero", 0), ("minus", "zero", 0), ("zero", "lost", 0), ("minus", "lost", -1.3)):
        found = preference_aware_reward(scores, valid, constant, loser=loser, tie=tie)
        assert np.asarray(found) == pytest.approx(earned)
