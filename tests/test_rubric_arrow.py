"""Rubric-ARM with a judge that checks one response at a time, as RUBRIC-ARROW has it: a run from end to end."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.cli import main
from patarm_jax.config.sections import DataSection, MeshSection, ModelSection
from patarm_jax.data.pipeline import encode_question
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.tokenizer import decode, encode_text
from patarm_jax.judge.criteria import parse_rubric
from patarm_jax.judge.forms import CHECKLIST
from patarm_jax.model.sharding import TRAIN_RULES, make_mesh
from patarm_jax.model.transformer import forward, logits
from patarm_jax.run.open_model import load_params, open_model
from patarm_jax.types import Status
from tests.arms import arms_config, write_arms_world
from tests.runs import CUBE, assert_nearly_equal, exported, judgements, lines_of, run_whole_and_killed, timeless

pytestmark = pytest.mark.long  # a warm-up of its own; what is read, weighed and earned stands in test_checklist

OPTIMISED = {"XLA_FLAGS": ""}  # a hundred steps and more take longer than what it takes to optimise them


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_arms_world(tmp_path_factory.mktemp("arrow"), kind=CHECKLIST)


@pytest.fixture(scope="module")
def whole(world, started):
    """Warm-up and one round."""
    config = arms_config(world, "whole", judge={"kind": "checklist"}, rounds=1)
    started("rubric-arm", config, **OPTIMISED).end()
    return world / "whole"


def from_warmup(world, whole, name, **sections):
    """A run that begins with what the warm-up has made."""
    begun = {role: {"path": str(whole / role / "warmup"), "steps": 2} for role in ("judge", "generator")}
    begun["judge"]["kind"] = "checklist"
    begun["generator"]["sampling"] = {"max_new_tokens": 24, "temperature": 1.6}
    return arms_config(world, name, warmup={"epochs": 0, "steps": 0}, model={"path": ""}, rounds=1, **begun, **sections)


def test_both_responses_are_checked_by_one_rubric_and_compared(whole):
    """The judge's rewards are those of a plain loop over the scores in the rows."""
    rubrics = {
        row["prompt_id"]: row for row in map(json.loads, (whole / "rubrics/round-1.jsonl").read_text().splitlines())
    }
    seen = set()
    for step in (121, 122, 123):
        pairs = {}
        for row in judgements(whole)[f"step_{step:06}.parquet"]:
            pairs.setdefault(row["pair_id"], {"chosen": [], "rejected": []})[row["side"]].append(row)
            assert row["rubric_sha256"] == rubrics[row["pair_id"]]["sha256"]
            read = CHECKLIST.read(row["text"], rubrics[row["pair_id"]]["text"])
            assert read.status.name == row["status"]
            most = sum(one.weight for one in read.verdicts)
            assert row["score"] is None if read.score is None else abs(row["score"]) <= most
        for sides in pairs.values():
            assert all(len(rows) == 4 for rows in sides.values())
            for side, other, sign in (("chosen", "rejected", 1), ("rejected", "chosen", -1)):
                theirs = [row["score"] for row in sides[other] if row["score"] is not None]
                for row in sides[side]:
                    if row["score"] is None:
                        expected = -1.0
                    elif not theirs:
                        expected = 1.0
                    else:
                        expected = 1.0 + (1 if sign * (row["score"] - np.mean(theirs)) > 1e-5 else -1)
                    assert row["reward"] == expected
                    seen.add(expected)
    assert {0.0, 2.0} <= seen


def test_a_rubric_is_worth_what_the_checklists_of_both_responses_say(whole):
    """A greedy judge writes the likelier word: of one criterion, words that differ decide."""
    decided = set()
    for step in (124, 125, 126):
        for row in judgements(whole)[f"step_{step:06}.parquet"]:
            valid = parse_rubric(row["text"]).status is Status.OK
            chosen, rejected = (CHECKLIST.read(text) for text in row["judgement"].split("\n\n"))
            assert row["reward"] in ({1.5, -0.5} if valid else {-1.0})
            if valid and {len(one.verdicts) for one in (chosen, rejected)} == {1} and chosen.score != rejected.score:
                assert row["reward"] == (1.5 if chosen.score > rejected.score else -0.5)
                decided.add(row["reward"])
            if None in (chosen.score, rejected.score):
                assert row["reward"] == (-0.5 if valid else -1.0)
    assert decided
    lines = lines_of(whole)[120:]
    assert all("judge/score_gap" in line for line in lines[:3])
    assert all("eval/score_gap" in line for line in lines if "eval/valid" in line)


def test_scores_are_the_networks_own_probabilities(world, whole, tmp_path):
    """What `patarm judge` writes equals a forward over prompt and judgement, at the place of each word."""
    out = tmp_path / "judged.jsonl"
    models = [
        str(whole / "judge" / "warmup"),
        "--generator",
        str(whole / "generator" / "warmup"),
        "--judge",
        "checklist",
    ]
    more = ["--votes", "2", "--sampling.max_new_tokens", "96", "--generator.max_new_tokens", "24", "--mesh.data", "1"]
    dtypes = ["--model.dtype", "float32", "--generator.model.dtype", "float32"]
    command = ["judge", *models, "--input", str(world / "heldout.jsonl"), "--output", str(out), *more, *dtypes]
    assert main(command) == 0
    section = ModelSection(path=str(whole / "judge" / "warmup"), dtype="float32", remat="none")
    model = open_model(section, "checklist")
    params = load_params(section, model, make_mesh(MeshSection(data=1)), 0, TRAIN_RULES, "float32")
    ids = {word: encode_text(model.tokenizer, f" {word}")[0] for word in ("true", "false")}
    pairs, _ = read_preferences(DataSection(path=str(world / "heldout.jsonl"), split=""))
    compared = 0
    for pair, row in zip(pairs, map(json.loads, out.read_text().splitlines()), strict=True):
        for side, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            ask = CHECKLIST.ask(pair.prompt, response, domain=pair.domain, rubrics="adaptive", rubric=row["rubric"])
            prompt = encode_question(model.tokenizer, ask, CHECKLIST).tolist()
            for said in row["judgements"][side]:
                written = encode_text(model.tokenizer, said["text"])
                if said["status"] != "OK" or said["tokens"] != len(written) + 1:
                    continue  # or it was written in other tokens than it would be read as
                found = forward(params, model.arch, jnp.array([[*prompt, *written]]), dtype="float32")
                probabilities = np.asarray(jnp.exp(logits(params, model.arch, found.prompt[0], "float32")), np.float64)
                probabilities /= probabilities.sum(axis=-1, keepdims=True)
                score = 0.0
                for verdict in CHECKLIST.read(said["text"], row["rubric"]).verdicts:
                    step = next(
                        n for n in range(len(written)) if len(decode(model.tokenizer, written[: n + 1])) > verdict.place
                    )
                    at = probabilities[len(prompt) + step - 1]
                    score += verdict.weight * (at[ids["true"]] - at[ids["false"]])
                assert said["score"] == pytest.approx(score, abs=2e-4)
                assert abs(said["score"]) < 3.0  # not the words alone
                compared += 1
    assert compared >= 5


def test_the_cards_say_how_the_two_are_asked(whole):
    for role in ("judge", "generator"):
        card = (whole / role / "export" / "README.md").read_text()
        assert "patarm eval pairs --judge checklist --model JUDGE --generator GENERATOR" in card
        assert "parse_checklist" in card and "parse_rubric_judge" not in card


def test_another_kind_is_refused(world, whole, capsys):
    assert main(["rubric-arm", str(from_warmup(world, whole, "other", mesh=CUBE)), "--judge.kind", "rubric_judge"]) == 2
    assert "is a judge of the kind checklist, which says which criteria" in capsys.readouterr().err
    url = ["--endpoint.url", "http://127.0.0.1:1/v1", "--generator", "g", "--data", "d", "--output", "o"]
    assert main(["eval", "pairs", "--judge", "checklist", *url]) == 2
    assert "counts how likely the words true and false were" in capsys.readouterr().err


def test_killed_it_ends_as_if_it_had_not_been(world, whole, started):
    configs = [from_warmup(world, whole, name) for name in ("short", "short_killed")]
    run_whole_and_killed(started, "rubric-arm", *configs, world / "short_killed")
    assert timeless(world / "short_killed") == timeless(world / "short")
    for role in ("generator", "judge"):
        assert exported(world / "short_killed" / role) == exported(world / "short" / role)


def test_eight_devices_learn_as_one(world, whole, started):
    started("rubric-arm", from_warmup(world, whole, "one")).end()
    assert main(["rubric-arm", str(from_warmup(world, whole, "eight", mesh=CUBE, micro_batches=1))]) == 0
    assert_nearly_equal(world / "eight", world / "one")
