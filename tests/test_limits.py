"""What has no position in the network is left out and counted by every verb, before anything is computed."""

import json
from dataclasses import replace

import pytest
import yaml

from patarm_jax.cli import main
from patarm_jax.config.load import load
from patarm_jax.config.recipes import GRPOConfig
from patarm_jax.config.sections import DataSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.data.sft import JudgedPreference
from patarm_jax.data.tokenizer import load_tokenizer
from patarm_jax.evaluate.heldout import open_heldout
from patarm_jax.model.sharding import make_mesh
from patarm_jax.run.open_model import open_model
from patarm_jax.types import UsageError, UserError
from tests.toys import tiny_model_folder, write_preferences

ROOMY = DataSection(max_prompt_tokens=9000, max_completion_tokens=9000)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four pairs, of which the second has a long response, and one is trained on that is in none of the others."""
    root = tmp_path_factory.mktemp("world")
    rows = [json.loads(line) for line in write_preferences(root / "pairs.jsonl", 4).read_text().splitlines()]
    rows[1]["chosen"] += " It is wet." * 20
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "heldout.jsonl").write_text((root / "pairs.jsonl").read_text().replace("I like", "I love"))
    tiny_model_folder(root / "model")
    return root


@pytest.fixture(scope="module")
def lengths(world):
    """Of the longer prompt of each pair."""
    records, _ = encode_pairs(load_tokenizer(world / "model"), given(world), "adaptive", ROOMY, Room(100_000))
    return [record.longest_prompt for record in records]


def given(world, judged=""):
    preferences, _ = read_preferences(DataSection(path=str(world / "pairs.jsonl")))
    return [JudgedPreference(one, (judged, judged)) for one in preferences] if judged else preferences


def test_a_prompt_with_what_may_follow_fits_exactly_or_is_left_out(world, lengths):
    tokenizer, longest = load_tokenizer(world / "model"), max(lengths)
    exact = Room(longest + 50, 50)
    kept, report = encode_pairs(tokenizer, given(world), "adaptive", ROOMY, exact)
    assert len(kept) == 4 and report.dropped == {}
    kept, report = encode_pairs(tokenizer, given(world), "adaptive", ROOMY, replace(exact, new_tokens=51))
    assert [pair.index for pair in kept] == [0, 2, 3]
    reason = (
        f"prompt longer than the {longest - 1:,} tokens that sampling.max_new_tokens 51 leaves of "
        f"max_position_embeddings {longest + 50:,}"
    )
    assert report.dropped == {reason: 1}


def test_a_judgement_that_is_learnt_counts_with_its_prompt(world):
    tokenizer, judged = load_tokenizer(world / "model"), "<answer>7</answer>"
    records, _ = encode_pairs(tokenizer, given(world, judged), "adaptive", ROOMY, Room(100_000))
    together = max(max(map(sum, record.lengths)) for record in records)
    kept, report = encode_pairs(tokenizer, given(world, judged), "adaptive", ROOMY, Room(together))
    assert len(kept) == 4 and report.dropped == {}
    _, report = encode_pairs(tokenizer, given(world, judged), "adaptive", ROOMY, Room(together - 1))
    clause = f"longer than max_position_embeddings {together - 1:,} of the model"
    assert report.dropped == {f"prompt and judgement together {clause}": 1}


def test_the_config_s_own_limit_comes_first(world, lengths):
    section = replace(ROOMY, max_prompt_tokens=max(lengths) - 1)
    _, report = encode_pairs(load_tokenizer(world / "model"), given(world), "adaptive", section, Room(max(lengths), 50))
    assert set(report.dropped) >= {f"prompt longer than data.max_prompt_tokens {max(lengths) - 1:,}"}


def test_where_nothing_fits_the_remedy_does(world, lengths):
    tokenizer, room = load_tokenizer(world / "model"), Room(min(lengths) + 9, 10)
    with pytest.raises(UserError, match=r"where it is the model's, lower sampling\.max_new_tokens, give shorter texts"):
        encode_pairs(tokenizer, given(world), "adaptive", ROOMY, room)
    assert len(encode_pairs(tokenizer, given(world), "adaptive", ROOMY, replace(room, new_tokens=9))[0]) > 0
    with pytest.raises(
        UsageError, match=r"sampling\.max_new_tokens is 50, and max_position_embeddings of the model 50"
    ):
        encode_pairs(tokenizer, given(world), "adaptive", ROOMY, Room(50, 50))


def config_file(world, name, recipe, **sections):
    config = {
        "model": {"path": str(world / name), "weights": "random", "dtype": "float32"},
        "data": {"path": str(world / "pairs.jsonl"), **({"missing_judgements": "template"} if recipe == "sft" else {})},
        "run": {"folder": str(world / f"run-{name}")},
        **sections,
    }
    (world / f"{name}-{recipe}.yaml").write_text(yaml.safe_dump(config))
    return world / f"{name}-{recipe}.yaml"


@pytest.mark.parametrize(("recipe", "more", "words"), [
    ("sft", (), "prompt longer than max_position_embeddings 64 of the model"),
    ("grpo", ("--sampling.max_new_tokens", "8"), "sampling.max_new_tokens 8 leaves of max_position_embeddings 64"),
    ("grpo", ("--sampling.max_new_tokens", "64"), "sampling.max_new_tokens is 64, and max_position_embeddings of the"),
])  # fmt: skip
def test_training_on_what_the_model_cannot_place_is_refused(world, capsys, recipe, more, words):
    tiny_model_folder(world / "short", max_position_embeddings=64)
    assert main([recipe, str(config_file(world, "short", recipe)), *more]) in (1, 2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("patarm: ") and words in said
    assert not (world / "run-short").exists()


def test_held_out_pairs_are_left_out_and_counted(world, lengths, capsys):
    tiny_model_folder(world / "tight", max_position_embeddings=max(lengths) + 7)
    sections = {"heldout": {"path": str(world / "heldout.jsonl"), "sampling": {"max_new_tokens": 8}}}
    config = load(GRPOConfig, config_file(world, "tight", "grpo", **sections))
    heldout = open_heldout(config, open_model(config.model), make_mesh(config.mesh), given(world))
    assert [record.index for record in heldout.records] == [0, 2, 3]
    assert "1 × prompt longer than the" in capsys.readouterr().err


def questions_too_long(world, lengths, tmp_path):
    tiny_model_folder(world / "judge", max_position_embeddings=max(lengths) + 3)
    return ["--model.weights", "random", "--model.dtype", "float32", "--sampling.max_new_tokens", "4"]


def test_a_dry_run_counts_what_will_not_be_asked(world, lengths, capsys, tmp_path):
    settings = questions_too_long(world, lengths, tmp_path)
    arguments = [
        "eval",
        "pairs",
        "--model",
        world / "judge",
        "--data",
        world / "pairs.jsonl",
        "--output",
        tmp_path / "e",
    ]
    assert main([str(each) for each in [*arguments, *settings, "--dry-run"]]) == 0
    shown = capsys.readouterr().out
    assert "1 questions are longer than the" in shown and "leaves of max_position_embeddings" in shown


@pytest.mark.long
def test_judging_records_what_does_not_fit(world, lengths, tmp_path):
    settings = questions_too_long(world, lengths, tmp_path)
    out = tmp_path / "scores.jsonl"
    arguments = ["judge", world / "judge", "--input", world / "pairs.jsonl", "--output", out]
    assert main([str(each) for each in [*arguments, *settings]]) == 0
    kinds = [
        [one["kind"] for side in ("chosen", "rejected") for one in json.loads(line)["judgements"][side]]
        for line in out.read_text().splitlines()
    ]
    assert [[kind == "TOO_LONG" for kind in pair] for pair in kinds] == [[False, False], [True, False]] + 2 * [
        [False] * 2
    ]
    reason = json.loads(out.read_text().splitlines()[1])["judgements"]["chosen"][0]["reason"]
    assert reason.startswith(
        f"{max(lengths):,} tokens, longer than the {max(lengths) - 1:,} tokens that sampling.max_new"
    )


def test_judging_without_room_is_refused(world, capsys, tmp_path):
    tiny_model_folder(world / "judge", max_position_embeddings=64)
    arguments = ["judge", world / "judge", "--input", world / "pairs.jsonl", "--output", tmp_path / "scores.jsonl"]
    assert main([str(each) for each in [*arguments, "--model.weights", "random"]]) == 2
    assert "so that no prompt fits before it. Lower the setting." in capsys.readouterr().err
