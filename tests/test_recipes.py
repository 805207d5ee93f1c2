"""Whole runs through the command line: what they write, that they resume exactly, and what they say to mistakes."""

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType

from patarm_jax.cli import main
from patarm_jax.config.load import load
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.config.sections import MeshSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.evaluate.accuracy import pairwise_accuracy
from patarm_jax.evaluate.heldout import heldout_metrics, open_heldout
from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from patarm_jax.model.sharding import MESH_AXES, make_mesh
from patarm_jax.model.transformer import init_params
from patarm_jax.rollout.judging import judge_all, numbers_of, requests_of
from patarm_jax.run.open_model import open_model
from patarm_jax.types import Status
from tests.flags import FLAGS
from tests.runs import (
    CUBE,
    VAIN,
    assert_nearly_equal,
    config_file,
    exported,
    judged_texts,
    judgements,
    lines_of,
    timeless,
)
from tests.toys import tiny_model_folder

ALONE = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_a_killed_run_ends_like_an_uninterrupted_one(world, started, recipe):
    held_out = {} if recipe == "grpo" else {"heldout": {"path": ""}}  # of one of the two: it is what compiles longest
    whole = started(recipe, config_file(world, f"{recipe}_whole", recipe, **held_out))
    config, folder = config_file(world, f"{recipe}_killed", recipe, **held_out), world / f"{recipe}_killed"

    killed = started(recipe, config)
    killed.until(lambda: len(lines_of(folder)) >= 3)
    killed.process.send_signal(signal.SIGKILL)
    killed.end(-signal.SIGKILL)
    stopped = started(recipe, config)
    stopped.until(lambda: len(lines_of(folder)) >= 5)
    stopped.process.send_signal(signal.SIGTERM)
    assert "run the command again to resume" in stopped.end()
    assert not (folder / "export").exists()
    started(recipe, config).end(VAIN[recipe])

    whole.end(VAIN[recipe])
    expected = world / f"{recipe}_whole"
    assert len(timeless(folder)) == 7
    assert timeless(folder) == timeless(expected)
    assert exported(folder) == exported(expected)
    assert judgements(folder) == judgements(expected)
    # A finished run has nothing left to do.
    said = started(recipe, config).end(VAIN[recipe])
    assert ("is complete" if recipe == "sft" else "nothing but the format penalty was learnt: in ") in said
    assert exported(folder) == exported(expected)


@pytest.mark.long
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_run_whose_reader_ends_at_the_same_ctrl_c_is_saved(world, environment, which):
    """As of `patarm … 2>&1 | tee log`: nothing more can be said, and the steps are not lost."""
    config = config_file(world, f"tee-{which.name}", "sft", heldout={"path": ""})
    folder = world / f"tee-{which.name}"
    command = [sys.executable, "-m", "patarm_jax", "sft", str(config)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while len(lines_of(folder)) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.stdout.close()
    process.send_signal(which)
    assert process.wait(timeout=120) == 0
    steps = len(lines_of(folder))
    assert 2 <= steps < 7 and (folder / "checkpoints" / str(steps)).is_dir()


def test_a_run_folder_holds_what_it_should(world):
    config = config_file(world, "inside", "grpo", run={"steps": 2, "show_every": 1, "tensorboard": True})
    assert main(["grpo", str(config), "--mesh.fsdp", "4", "--mesh.data", "2", "--pairs_per_step", "8"]) == 1
    folder = world / "inside"
    assert {path.name for path in folder.iterdir()} == {
        ".patarm_run.json", "config.yaml", "metrics.jsonl", "rollouts", "checkpoints", "export", "tensorboard",
    }  # fmt: skip
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (resolved["mesh"]["data"], resolved["mesh"]["fsdp"], resolved["mesh"]["tensor"]) == (2, 4, 1)
    line = lines_of(folder)[-1]
    phases = {"time/sample", "time/reward", "time/logprobs", "time/update"}
    assert phases <= line.keys()
    assert {"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "completions/mean_length"} <= line.keys()
    assert {"num_tokens", "epoch", "step_time", "completions/clipped_ratio", "time/tokens_per_second"} <= line.keys()
    assert line["sampling/logprob_gap_mean"] > 0  # of the second of two updates
    # As TRL counts: every rollout with its prompt.
    config = load(GRPOConfig, folder / "config.yaml")
    tokenizer, (preferences, _) = open_model(config.model).tokenizer, read_preferences(config.data)
    records, _ = encode_pairs(tokenizer, preferences, config.rubrics, config.data, Room(100_000))
    prompts = {record.preference.id: sum(map(len, record.prompt_tokens)) for record in records}
    counted = 0
    for step, each in enumerate(lines_of(folder), 1):
        pairs = {row["pair_id"] for row in judgements(folder)[f"step_{step:06}.parquet"]}
        counted += 3 * sum(prompts[pair] for pair in pairs) + round(each["completions/mean_length"] * 8 * 2 * 3)
        assert each["num_tokens"] == counted
    assert [each["epoch"] for each in lines_of(folder)] == [1.0, 2.0]  # twelve pairs fill one batch of eight
    # Two steps of two updates; also where a checkpoint is exported.
    assert main(["export", str(folder), str(world / "inside-export")]) == 0
    for card in (folder / "export", world / "inside-export"):
        assert "| optimiser updates | 4 |" in (card / "README.md").read_text()
    rows = judgements(folder)["step_000002.parquet"]
    assert len(rows) == 8 * 2 * 3
    assert {row["side"] for row in rows} == {"chosen", "rejected"}
    assert {row["status"] for row in rows} <= {"OK", "BAD_SCORE", "BAD_TAGS"}


@pytest.mark.long
def test_eight_devices_draw_and_learn_as_one(world, started):
    started("grpo", config_file(world, "one", "grpo", run={"steps": 2})).end(1)
    assert main(["grpo", str(config_file(world, "eight", "grpo", run={"steps": 2}, mesh=CUBE))]) == 1
    assert_nearly_equal(world / "eight", world / "one")
    assert judged_texts(world / "one") == judged_texts(world / "eight")


@pytest.mark.long
def test_two_processes_learn_as_one(world, started):
    """Real processes that find each other on a port, four CPU devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    sections = {"run": {"steps": 2}, "mesh": CUBE}
    pod = config_file(world, "pod", "grpo", run={"steps": 2}, mesh={**CUBE, "distributed": "auto"})
    flags = {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=4"}
    joined = ["--mesh.coordinator", address, "--mesh.processes", "2", "--mesh.process_id"]
    said = [process.end(1) for process in [started("grpo", pod, *joined, i, **flags) for i in range(2)]]
    assert ["nothing but the format penalty was learnt" in each for each in said] == [True, False]  # it is said once
    assert main(["grpo", str(config_file(world, "alone", "grpo", **sections))]) == 1
    assert_nearly_equal(world / "pod", world / "alone")
    assert judged_texts(world / "pod") == judged_texts(world / "alone")
    assert read_architecture(world / "pod" / "export") == read_architecture(world / "alone" / "export")


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_dry_run_shows_and_trains_nothing(world, capsys, recipe):
    config = config_file(world, f"dry_{recipe}", recipe)
    assert main([recipe, str(config), "--dry-run", "--pairs_per_step", "8"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 0.01" in shown and "GiB of temporary memory" in shown and "<response>" in shown
    assert not (world / f"dry_{recipe}").exists()


@pytest.mark.long
def test_judge_scores_a_file_and_goes_on_where_it_stopped(world, started, capsys):
    command = ["judge", str(world / "reference"), "--input", str(world / "pairs.jsonl"), "--votes", "2"]
    command += ["--model.dtype", "float32", "--sampling.max_new_tokens", "6"]
    whole, parted = world / "whole.jsonl", world / "parted.jsonl"
    assert main([*command, "--output", str(whole), "--sampling.rows", "8"]) == 0
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"pair-{i}" for i in range(12)]
    assert all(len(row["judgements"][side]) == 2 for row in rows for side in ("chosen", "rejected"))
    assert all(
        row["score_chosen"] is None and row["prefers"] is None for row in rows
    )  # random weights write nothing valid
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("none of the 48 answers could be read") and f"text and reason in {whole}" in last
    assert "Most were cut off: raise --sampling.max_new_tokens" in last

    # Another batch size draws the same; a first half that is there already is kept.
    process = started(*command, "--output", parted, "--sampling.rows", "2")
    answers = world / ".parted.jsonl.patarm-answers"
    process.until(lambda: answers.exists() and len(answers.read_text().splitlines()) > 2)
    process.process.send_signal(signal.SIGTERM)
    assert "of 24 questions; run the command again to resume" in process.end(1)
    assert not parted.exists()
    assert main([*command, "--output", str(parted), "--sampling.rows", "2"]) == 0
    assert parted.read_text() == whole.read_text()


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_heldout_pairs_are_judged_alike_by_any_mesh(world, recipe):
    """By training's weights, on one device and on eight, as the stream that judges files does it."""
    cls = {"sft": SFTConfig, "grpo": GRPOConfig}[recipe]
    config = load(cls, config_file(world, f"heldout-{recipe}", recipe))
    model = open_model(config.model)
    texts = []
    for mesh in (ALONE, make_mesh(MeshSection(**CUBE))):
        heldout = open_heldout(config, model, mesh, read_preferences(config.data)[0])
        params = init_params(model.arch, jax.random.key(4), mesh)
        finished, judgements = judge_all(
            heldout.judge, heldout.to_rollout(params, None), requests_of(heldout.records), heldout.key
        )
        assert len(judgements) == 2 * 5 and len(judgements[0]) == 2
        texts.append([[one.text for one in group] for group in judgements])
        scores, status = (x.reshape(5, 2, 2) for x in numbers_of(judgements, [0, 1] * 5))
        expected = pairwise_accuracy(np.nan_to_num(scores), status == Status.OK)
        assert heldout(params, None) == pytest.approx(heldout_metrics(expected, finished.truncated.mean()), nan_ok=True)
    assert texts[0] == texts[1] and len({text for group in texts[0] for text in group}) > 15
    assert [heldout.due(step, 7) for step in range(1, 8)] == [False, False, True, False, False, True, True]


def test_held_out_pairs_are_of_their_own_split(world):
    """Of a folder laid out by splits, training reads one and the held-out pairs are another."""
    folder = world / "splits"
    folder.mkdir()
    lines = (world / "pairs.jsonl").read_text().splitlines(keepends=True)
    for name, taken in (("train", lines[:6]), ("eval", lines[6:8])):
        (folder / f"{name}.jsonl").write_text("".join(taken))
    config = load(GRPOConfig, config_file(world, "splits-run", "grpo"))
    config = replace(
        config, data=replace(config.data, path=str(folder)), heldout=replace(config.heldout, path=str(folder), limit=0)
    )
    training, _ = read_preferences(config.data)
    assert [one.id for one in training] == [f"pair-{number}" for number in range(6)]
    heldout = open_heldout(config, open_model(config.model), ALONE, training)
    assert [record.preference.id for record in heldout.records] == ["pair-6", "pair-7"]


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_held_out_pairs_that_are_trained_on_are_refused(world, recipe, dry, capsys):
    """Whatever their ids, white space, and the order of their responses."""
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    exchanged = rows[3] | {"id": "h-3", "chosen": rows[3]["rejected"] + "\n", "rejected": "  " + rows[3]["chosen"]}
    fresh = [{**row, "id": f"h-{i}", "chosen": f"No {i}."} for i, row in enumerate(rows[:2])]
    (world / "leaking.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*fresh, exchanged]))
    sections = {"heldout": {"path": str(world / "leaking.jsonl"), "limit": 2}, "pairs_per_step": 8}
    config = config_file(world, f"leaking-{recipe}", recipe, **sections)
    assert main([recipe, str(config), *dry]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"1 of the 3 held-out pairs of {world / 'leaking.jsonl'} stands in the training data too" in said
    assert "h-3, for one, which is pair-3 there" in said
    assert not (world / f"leaking-{recipe}").exists()


def test_prompts_that_are_trained_on_are_counted(world, capsys):
    config = load(GRPOConfig, config_file(world, "same-prompts", "grpo"))
    open_heldout(config, open_model(config.model), ALONE, read_preferences(config.data)[0])
    said = " ".join(capsys.readouterr().err.split())
    assert "kept 12 of 12; dropped none; 12 of these pairs have a prompt that training has with other responses" in said


@pytest.mark.long
def test_export_of_a_checkpoint_equals_the_export_of_the_run(world):
    config = config_file(world, "exporting", "sft", run={"steps": 4}, heldout={"path": ""})
    assert main(["sft", str(config)]) == 0
    run = world / "exporting"
    assert main(["export", str(run), str(world / "newest")]) == 0
    assert {p.name: p.read_bytes() for p in (world / "newest").iterdir() if p.name != "README.md"} == exported(run)
    assert main(["export", str(run / "checkpoints" / "2"), str(world / "earlier")]) == 0
    earlier, newest = (weights.load(world / name)[0]["norm"] for name in ("earlier", "newest"))
    assert not np.array_equal(earlier, newest)


MISTAKES = {
    "no such config": (["sft", "nowhere.yaml"], 1, "nowhere.yaml"),
    "no verb": ([], 2, "VERB"),
    "a verb that is none": (["trian"], 2, "trian"),
    "unknown key": (["sft", "{typo}"], 2, "Did you mean optimizer"),
    "unknown option": (["sft", "{sft}", "--optimizer.learning_rat", "1"], 2, "Did you mean --optimizer.learning_rate"),
    "a value of the wrong type": (["sft", "{sft}", "--run.seed", "x"], 2, "run.seed"),
    "no model": (["sft", "{sft}", "--model.path", "/nowhere"], 1, "/nowhere"),
    "no data": (["sft", "{sft}", "--data.path", "/nowhere.jsonl"], 1, "/nowhere.jsonl"),
    "an empty file": (["sft", "{sft}", "--data.path", "{empty}"], 1, "empty"),
    "a broken line": (["sft", "{sft}", "--data.path", "{broken}"], 1, "broken.jsonl:2"),
    "prompts too long": (["sft", "{sft}", "--data.max_prompt_tokens", "5"], 1, "max_prompt_tokens 5"),
    "a batch the mesh cannot share": (["sft", "{sft}", "--pairs_per_step", "3"], 2, "cannot share evenly"),
    "micro-batches the batch cannot share": (["grpo", "{grpo}", "--micro_batches", "3"], 2, "cannot share evenly"),
    "more pairs than there are": (["sft", "{sft}", "--pairs_per_step", "64"], 1, "do not fill one batch"),
    "a mesh of too many devices": (["sft", "{sft}", "--mesh.tensor", "3"], 1, "8 devices"),
    "an unfinished run as model": (["grpo", "{grpo}", "--model.path", "{unfinished}"], 1, "not finished"),
    "no checkpoint to export": (["export", "{unfinished}", "out"], 1, "no checkpoint"),
    "judging without input": (["judge", "{reference}", "--output", "x"], 2, "--input"),
    "another network as reference": (["grpo", "{grpo}", "--update.reference", "{other}"], 1, "another network"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_gets_one_sentence(world, capsys, arguments, code, words):
    names = {
        "sft": config_file(world, "mistake_sft", "sft"),
        "grpo": config_file(world, "mistake_grpo", "grpo", pairs_per_step=8),
        "typo": world / "typo.yaml",
        "empty": world / "empty.jsonl",
        "broken": world / "broken.jsonl",
        "unfinished": world / "unfinished",
        "reference": world / "reference",
        "other": world / "other",
    }
    names["typo"].write_text("optimiser: {learning_rate: 1}\n")
    names["empty"].write_text("")
    names["broken"].write_text((world / "pairs.jsonl").read_text().splitlines()[0] + '\n{"prompt": \n')
    names["unfinished"].mkdir(exist_ok=True)
    (names["unfinished"] / "config.yaml").write_text(
        yaml.safe_dump({"recipe": "sft", "model": {"path": str(world / "model")}})
    )
    tiny_model_folder(names["other"], num_hidden_layers=1)
    assert main([argument.format(**names) for argument in arguments]) == code
    said = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("patarm: ")]
    assert len(said) == 1 and words in said[0], said


@pytest.mark.long
def test_a_checkpoint_of_another_model_is_refused(world, capsys):
    config = config_file(world, "changed", "sft", run={"steps": 1}, optimizer={"warmup_steps": 0})
    assert main(["sft", str(config)]) == 0
    tiny_model_folder(world / "wider", intermediate_size=64)
    before = (world / "changed" / "config.yaml").read_text()
    assert main(["sft", str(config), "--model.path", str(world / "wider"), "--run.steps", "2"]) == 1
    assert "checkpoint of another run: model.intermediate_size is 48 there and 64 here" in capsys.readouterr().err
    assert (world / "changed" / "export" / "model.safetensors").exists()
    assert (world / "changed" / "config.yaml").read_text() == before


def test_help_has_examples(capsys):
    for verb in ("demo", "sft", "grpo", "judge", "export"):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"patarm {verb}" in capsys.readouterr().out.split("examples:")[1]
