"""Pairs by a generator's rubric: what the judge is shown of it, in which order, and how rubrics are kept."""

import dataclasses
import json

import numpy as np
import pytest

from patarm_jax.config.load import from_mapping
from patarm_jax.config.rubric_arm import RubricArmConfig
from patarm_jax.config.sections import DataSection
from patarm_jax.data.judged import read_judged_preferences
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.ruled import place_of, with_rubric, without_some
from patarm_jax.data.tokenizer import decode, load_tokenizer
from patarm_jax.judge.criteria import criteria_of, parse_rubric, parse_rubric_judge
from patarm_jax.judge.forms import RUBRIC, RUBRIC_JUDGE
from patarm_jax.reward import verdict_reward
from patarm_jax.run.rubrics import RubricRow, keep_rubrics, kept_rubrics, sha256_of
from patarm_jax.types import Status, UsageError, UserError
from tests.arms import write_arms_world

THREE = "\n".join(
    f"{number}. The response is {word}. [Principle]" for number, word in enumerate(("kind", "short", "new"), 1)
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_arms_world(tmp_path_factory.mktemp("arms"), pairs=20)


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer(world / "model")


@pytest.fixture(scope="module")
def section(world):
    return DataSection(path=str(world / "pairs.jsonl"))


@pytest.fixture(scope="module")
def record(tokenizer, section):
    preferences, _ = read_preferences(section)
    return encode_pairs(tokenizer, preferences, "adaptive", section, Room(4096), RUBRIC)[0][0]


def test_a_generator_reads_the_prompt_alone(record, tokenizer):
    assert record.places == (0,) and len(record.prompt_tokens) == 1
    shown = decode(tokenizer, record.prompt_tokens[0])
    assert record.preference.prompt[-1]["content"] in shown and record.preference.chosen not in shown
    assert shown.endswith("<think>\n\n</think>\n\n")  # its turn begins unthought


def test_both_orders_show_the_rubric(record, tokenizer, section):
    pair = with_rubric(tokenizer, record, THREE, section, Room(4096))
    assert pair.preference.rubric == THREE and pair.places == (0, 1)
    for tokens, first in zip(pair.prompt_tokens, (record.preference.chosen, record.preference.rejected), strict=True):
        shown = decode(tokenizer, tokens)
        assert f"<rubrics>\n{THREE}\n</rubrics>" in shown
        assert f"<response_a>\n{first}\n</response_a>" in shown


def test_a_rubric_longer_than_its_place_loses_its_end(record, tokenizer, section):
    def length(rubric):
        return with_rubric(tokenizer, record, rubric, section, Room(4096)).longest_prompt

    first_two = "\n".join(THREE.split("\n")[:2])
    for limit, kept in ((length(THREE), THREE), (length(THREE) - 1, first_two), (length(""), "")):
        pair = with_rubric(tokenizer, record, THREE, dataclasses.replace(section, max_prompt_tokens=limit), Room(4096))
        assert pair.preference.rubric == kept and pair.longest_prompt <= limit
    room = Room(length(first_two) + 7, new_tokens=7)
    assert with_rubric(tokenizer, record, THREE, section, room).preference.rubric == first_two


def test_orders_are_drawn_evenly_and_anew_in_each_round():
    drawn = np.array([[place_of(seed, number, f"p{i}") for i in range(2000)] for seed in (0, 1) for number in (1, 2)])
    assert ((0.46 < drawn.mean(axis=1)) & (drawn.mean(axis=1) < 0.54)).all()
    for one in range(4):
        for other in range(one):
            assert 0.44 < (drawn[one] == drawn[other]).mean() < 0.56


def test_dropout_leaves_out_its_share_and_never_all():
    ids = [f"p{i}" for i in range(2000)]
    kept = [criteria_of(without_some(THREE, 0.4, 0, 1, one)) for one in ids]
    assert all(kept) and all(set(one) <= set(criteria_of(THREE)) for one in kept)
    # Where all three would go, one stays.
    assert np.mean([len(one) for one in kept]) == pytest.approx(3 * 0.6 + 0.4**3, abs=0.06)
    assert without_some(THREE, 0.0, 0, 1, "p") == THREE and without_some("Be kind.", 0.9, 0, 1, "p") == "Be kind."
    assert without_some(THREE, 0.4, 0, 1, "p1") == without_some(THREE, 0.4, 0, 1, "p1")
    assert any(without_some(THREE, 0.4, 0, 1, one) != without_some(THREE, 0.4, 0, 2, one) for one in ids)


def test_judgements_must_go_through_the_rubric_they_are_given(record, section):
    judged, _ = read_judged_preferences(section, RUBRIC_JUDGE)
    text = judged[0].judgements[0]
    assert RUBRIC_JUDGE.read(text, judged[0].preference.rubric).status is Status.OK
    wrong = RUBRIC_JUDGE.read(text, THREE)
    assert wrong.status is Status.BAD_TAGS and wrong.choice is None
    assert RUBRIC_JUDGE.read(text, "Be kind.").status is Status.OK  # criteria that nobody can count


def test_rewards_equal_a_plain_loop():
    right, valid = (
        np.array([[1.0, 0.0, np.nan], [np.nan, 1.0, 0.0]]),
        np.array([[True, True, False], [True, False, True]]),
    )
    found = verdict_reward(right, valid, 0.5)
    for place in np.ndindex(right.shape):
        expected = (1.0 if right[place] == 1 else 0.0) + (0.5 if valid[place] else 0.0)
        assert float(found.total[place]) == expected


# --------------------------------------------------------------------------------------------------------------- sft


def test_rows_teach_the_rubric_and_a_judgement_in_each_order(world, section):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    rubrics, _ = read_judged_preferences(section, RUBRIC)
    judged, _ = read_judged_preferences(section, RUBRIC_JUDGE)
    for row, rubric, judgement in zip(rows, rubrics, judged, strict=True):
        assert rubric.judgements == (row["rubric"],)
        assert judgement.judgements == (row["chosen_first_judgement"], row["rejected_first_judgement"])
        assert judgement.preference.rubric == row["rubric"]


def test_templates_are_in_form_and_right(world, tmp_path):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    bare = [{name: row[name] for name in ("id", "domain", "prompt", "chosen", "rejected")} for row in rows]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    section = DataSection(path=str(tmp_path / "bare.jsonl"), missing_judgements="template")
    for one in read_judged_preferences(section, RUBRIC)[0]:
        assert parse_rubric(one.judgements[0]).status is Status.OK
    for one in read_judged_preferences(section, RUBRIC_JUDGE)[0]:
        count = len(criteria_of(one.preference.rubric))
        choices = [parse_rubric_judge(text, count).choice for text in one.judgements]
        assert choices == ["A", "B"]
    with pytest.raises(UserError, match="has no rubric, which SFT learns from"):
        read_judged_preferences(dataclasses.replace(section, missing_judgements="error"), RUBRIC)


def test_rows_that_are_out_of_form_are_dropped_and_counted(world, tmp_path):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()][:4]
    rows[0]["rubric"] = "Be kind."
    rows[1]["rubric"] = THREE  # of which its judgements know nothing
    rows[2]["chosen_first_judgement"] = "Winner: Response A"
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(path=str(tmp_path / "odd.jsonl"))
    kept, report = read_judged_preferences(section, RUBRIC)
    assert len(kept) == 3 and report.dropped == {"rubric that is out of form": 1}
    kept, report = read_judged_preferences(section, RUBRIC_JUDGE)
    assert len(kept) == 1
    assert report.dropped == {"rubric that is out of form": 1, "judgement that is out of form": 2}


# ---------------------------------------------------------------------------------------------------------- keeping


def test_kept_rubrics_come_back_and_changed_ones_are_refused(tmp_path):
    path, ids = tmp_path / "rubrics" / "round-1.jsonl", ["a", "b"]
    texts = ["1. The response is kind. [Principle]", "odd\u2028text"]
    rows = [RubricRow(one, text, sha256_of(text), "OK") for one, text in zip(ids, texts, strict=True)]
    keep_rubrics(path, rows)
    assert kept_rubrics(path, ids) == rows
    with pytest.raises(UserError, match="of other pairs"):
        kept_rubrics(path, ["b", "a"])
    path.write_text(path.read_text().replace("kind", "rude"))
    with pytest.raises(UserError, match="the rubric of a is not the one of its sha256"):
        kept_rubrics(path, ids)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        kept_rubrics(path, ids)


# ----------------------------------------------------------------------------------------------------------- config

REFUSED = {
    "greedy rollouts": ({"judge": {"sampling": {"temperature": 0}}}, "of the judge: sampling.temperature is 0"),
    "a group of one": ({"generator": {"group_size": 1}}, "generator.group_size is 1; allowed is 2 or more"),
    "another reference": ({"judge": {"update": {"reference": "x"}}}, "judge.update.reference is x"),
    "steps of all": ({"run": {"steps": 3}}, "run.steps is 3, and this run has phases"),
    "adapters alone": ({"lora": {"rank": 4, "export": "adapter"}}, "lora.export is adapter"),
    "a best checkpoint": ({"heldout": {"best": "valid"}}, "heldout.best is valid"),
    "an order": ({"order": "judge_frist"}, "Did you mean judge_first?"),
    "of another algorithm": (
        {"generator": {"update": {"algorithm": "rloo", "aggregation": "token_mean"}}},
        "of the generator: update.aggregation is token_mean, and update.algorithm rloo does not use it",
    ),
}


@pytest.mark.parametrize("given, said", REFUSED.values(), ids=REFUSED)
def test_settings_that_do_not_go_together_are_refused(given, said):
    with pytest.raises(UsageError) as refused:
        from_mapping(RubricArmConfig, given, "there")
    assert said in str(refused.value)
