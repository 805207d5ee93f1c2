"""A run of Rubric-ARM from end to end, in processes of its own: two models, their phases, and what they leave."""

import hashlib
import json

import pytest

from patarm_jax.config.load import load
from patarm_jax.config.rubric_arm import RubricArmConfig
from patarm_jax.data.ruled import place_of
from patarm_jax.judge.criteria import parse_rubric, parse_rubric_judge
from patarm_jax.types import Status
from tests.arms import arms_config, write_arms_world
from tests.runs import (
    exported,
    judgements,
    lines_of,
    timeless,
)

PHASES = [("generator warm-up", 0)] * 60 + [("judge warm-up", 0)] * 60
PHASES += [(role, number) for number in (1, 2) for role in ("judge", "generator") for _ in range(3)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_arms_world(tmp_path_factory.mktemp("arms"))


@pytest.fixture(scope="module")
def whole(world, started):
    """A run that was never stopped."""
    started("rubric-arm", arms_config(world, "whole")).end()
    return world / "whole"


def rubrics_of(run, number):
    return [json.loads(line) for line in (run / "rubrics" / f"round-{number}.jsonl").read_text().splitlines()]


def test_the_phases_are_taken_in_turns(whole):
    lines = lines_of(whole)
    assert [(line["phase"], line["round"]) for line in lines] == PHASES
    assert [line["step"] for line in lines] == list(range(1, len(PHASES) + 1))
    judged = [line for line in lines if line["round"]]
    assert all("judge/accuracy_half" in line for line in judged)
    measured = [line for line in judged if "eval/accuracy_half" in line]
    assert {(line["phase"], line["round"]) for line in measured} == set(PHASES[120:])
    assert all("eval/chose_first" in line and "eval/rubrics/valid" in line for line in measured)


def test_each_round_has_pairs_of_its_own(whole):
    first, second = ({row["prompt_id"] for row in rubrics_of(whole, number)} for number in (1, 2))
    assert len(first) == len(second) == 20 and not first & second
    for number, ids in ((1, first), (2, second)):
        steps = range(121 + 6 * (number - 1), 127 + 6 * (number - 1))
        rows = [row for step in steps for row in judgements(whole)[f"step_{step:06}.parquet"]]
        assert {row["pair_id"] for row in rows} <= ids


def test_the_kept_rubric_is_the_one_judged_by(whole):
    for number in (1, 2):
        kept = {row["prompt_id"]: row for row in rubrics_of(whole, number)}
        assert all(hashlib.sha256(row["text"].encode()).hexdigest() == row["sha256"] for row in kept.values())
        for step in range(121 + 6 * (number - 1), 124 + 6 * (number - 1)):
            for row in judgements(whole)[f"step_{step:06}.parquet"]:
                assert row["rubric_sha256"] == kept[row["pair_id"]]["sha256"]


def test_rewards_equal_a_plain_loop(whole):
    config = load(RubricArmConfig, whole / "config.yaml")
    seen = {"judge": 0, "generator": 0}
    for step, (role, number) in enumerate(PHASES[120:], 121):
        for row in judgements(whole)[f"step_{step:06}.parquet"]:
            place = place_of(config.run.seed, number, row["pair_id"])
            assert row["side"] == ("chosen first", "rejected first")[place]
            rubric = {one["prompt_id"]: one["text"] for one in rubrics_of(whole, number)}[row["pair_id"]]
            if role == "judge":
                criteria = rubric.count("\n") + 1 if parse_rubric(rubric).status is Status.OK else None
                verdict = parse_rubric_judge(row["text"], criteria)
                form = 1.0 * (verdict.status is Status.OK)
            else:
                written = parse_rubric(row["text"])
                verdict = parse_rubric_judge(row["judgement"])
                form = 0.5 * (written.status is Status.OK)
            right = verdict.choice == "AB"[place]
            assert row["choice"] == verdict.choice
            assert row["reward"] == right + form
            seen[role] += bool(row["reward"])
    assert all(seen.values()), "nothing was rewarded, so nothing was compared"


def test_what_rests_does_not_change(whole):
    """The judge's weights after its last phase are those of its export, though the generator was trained after it."""
    steps = {
        role: json.loads((whole / role / "export" / "judge.json").read_text())["step"]
        for role in ("judge", "generator")
    }
    assert steps == {"judge": 129, "generator": 132}
    kinds = {role: json.loads((whole / role / "export" / "judge.json").read_text())["judge"] for role in steps}
    assert kinds == {"judge": "rubric_judge", "generator": "rubric"}


def test_killed_in_any_phase_it_ends_as_if_it_had_not_been(world, whole, started):
    config = arms_config(world, "killed")
    for step in (30, 75, 121, 125, 128, 131):
        killed = started("rubric-arm", config)
        killed.until(lambda least=step: len(lines_of(world / "killed")) >= least)
        killed.process.kill()
        killed.process.wait()
    started("rubric-arm", config).end()
    assert timeless(world / "killed") == timeless(whole)
    assert judgements(world / "killed") == judgements(whole)
    for role in ("generator", "judge"):
        assert exported(world / "killed" / role) == exported(whole / role)
    assert (world / "killed" / "rubrics" / "round-2.jsonl").read_bytes() == (
        whole / "rubrics" / "round-2.jsonl"
    ).read_bytes()
