"""Every verb's outputs: refused at once where they cannot be written or are someone else's, and never an address."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from patarm_jax.cli import main
from patarm_jax.config.recipes import BenchConfig, EvalConfig, GRPOConfig, JudgeConfig, SFTConfig
from patarm_jax.config.sections import RunSection
from patarm_jax.files import LOCK
from patarm_jax.types import UsageError
from tests.toys import small_world, tiny_model_folder, write_recipes, write_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = small_world(tmp_path_factory.mktemp("world"), 8)
    rows = (root / "pairs.jsonl").read_text().splitlines(keepends=True)
    (root / "others.jsonl").write_text("".join(row.replace("pair-", "other-").replace("Say", "Tell") for row in rows))
    write_run(root / "run", write_recipes(root, "sft", "grpo", steps=1))
    return root


def refused(capsys, code, *arguments):
    """The one sentence that a command line is refused with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("patarm: ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("patarm: ")


def contents(folder):
    """Of all files, but for the lock, which a process that failed keeps until it ends."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path: path.read_bytes() for path in files}


# ----------------------------------------------------------------------------------------------------------- addresses

ANYWHERE = {
    "sft": ["sft", "{sft}", "--run.folder", "{}"],
    "sft config": ["sft", "{}"],
    "sft with =": ["sft", "{sft}", "--run.folder={}"],
    "sft data": ["sft", "{sft}", "--run.folder", "x", "--data.path", "{}"],
    "sft dry": ["sft", "{sft}", "--run.folder", "{}", "--dry-run"],
    "grpo model": ["grpo", "{grpo}", "--run.folder", "x", "--model.path", "{}"],
    "grpo reference": ["grpo", "{grpo}", "--run.folder", "x", "--update.reference", "{}"],
    "grpo heldout": ["grpo", "{grpo}", "--run.folder", "x", "--heldout.path", "{}"],
    "judge": ["judge", "{}", "--input", "a", "--output", "b"],
    "judge input": ["judge", "m", "--input", "{}", "--output", "b"],
    "judge output": ["judge", "m", "--input", "a", "--output", "{}"],
    "judge again": ["judge", "m", "--input", "a", "--output", "b", "--data.path", "{}"],
    "eval model": ["eval", "pairs", "--model", "{}", "--output", "b"],
    "eval data": ["eval", "pairs", "--model", "m", "--data", "{}", "--output", "b"],
    "eval output": ["eval", "pairs", "--model", "m", "--output", "{}"],
    "eval with =": ["eval", "pairs", "--model", "m", "--output={}"],
    "eval against": ["eval", "pairs", "--model", "m", "--output", "b", "--against", "{}"],
    "eval again": ["eval", "pairs", "--output", "b", "--model.path", "{}"],
    "export": ["export", "{}", "out"],
    "export out": ["export", "run", "{}"],
    "report": ["report", "{}"],
    "report out": ["report", "run", "--out", "{}"],
    "bench": ["bench", "--json", "{}"],
    "demo": ["demo", "--short", "--out", "{}"],
}


@pytest.mark.parametrize("arguments", ANYWHERE.values(), ids=ANYWHERE.keys())
@pytest.mark.parametrize("address", ["gs://bucket/x", "s3://bucket/x", "hf://datasets/owner/x", "file:///tmp/x"])
def test_no_verb_takes_an_address(arguments, address, world, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"sft": world / "sft.yaml", "grpo": world / "grpo.yaml"}
    said = refused(capsys, 2, *(argument.format(address, **files) for argument in arguments))
    assert f" is {address}, an address; a path is wanted. " in said
    assert list(tmp_path.iterdir()) == []


def test_an_address_in_a_config_file(world, capsys, tmp_path):
    config = yaml.safe_load((world / "sft.yaml").read_text())
    config["run"]["folder"] = "gs://bucket/x"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    said = refused(capsys, 2, "sft", tmp_path / "config.yaml")
    assert said == (
        "run.folder is gs://bucket/x, an address; a path is wanted. Mount the bucket as a folder (with gcsfuse, s3fs "
        "or the like) and give that folder."
    )
    with pytest.raises(UsageError, match=r"run\.folder is gs://bucket/x, an address"):
        RunSection(folder="gs://bucket/x")  # nor from Python


def test_a_server_has_an_address():
    EvalConfig(endpoint=dataclasses.replace(EvalConfig().endpoint, url="http://localhost:8000/v1"))


def test_every_setting_that_is_a_text_is_a_place_or_known_not_to_be():
    """One that is added is to be sorted: a path has the metadata PLACE."""
    texts = {"recipe", "coordinator", "split", "domain", "wandb_project", "url", "model", "api_key_env", "name"}
    seen = set()

    def walk(section):
        hints = get_type_hints(section)
        for each in dataclasses.fields(section):
            if dataclasses.is_dataclass(hints[each.name]):
                walk(hints[each.name])
            elif hints[each.name] is str and not each.metadata.get("place"):
                seen.add(each.name)

    for config in (SFTConfig, GRPOConfig, JudgeConfig, EvalConfig, BenchConfig):
        walk(config)
    assert seen <= texts, f"{seen - texts}: is it a path?"


# ------------------------------------------------------------------------------------- noticed before anything is done

# None of the models and data that are named is there: nothing of them is looked at.
OUTPUTS = {
    "sft": ["sft", "{sft}", "--model.path", "/nowhere", "--run.folder", "{}"],
    "grpo": ["grpo", "{grpo}", "--model.path", "/nowhere", "--run.folder", "{}"],
    "judge": ["judge", "/nowhere", "--input", "/nowhere", "--output", "{}"],
    "eval": ["eval", "pairs", "--model", "/nowhere", "--data", "/nowhere", "--output", "{}"],
    "export": ["export", "/nowhere", "{}"],
    "report": ["report", "{run}", "--out", "{}"],
    "bench": ["bench", "--json", "{}"],
    "bench quick": ["bench", "--quick", "--json", "{}"],
    "demo": ["demo", "--short", "--out", "{}"],
}
EVERY_VERB = pytest.mark.parametrize("arguments", OUTPUTS.values(), ids=OUTPUTS.keys())


def command(world, arguments, output):
    files = {"sft": world / "sft.yaml", "grpo": world / "grpo.yaml", "run": world / "run"}
    return [argument.format(output, **files) for argument in arguments]


@EVERY_VERB
def test_a_parent_that_is_a_file(arguments, world, capsys, tmp_path):
    (tmp_path / "notes").write_text("mine")
    out = tmp_path / "notes" / "x"
    said = refused(capsys, 1, *command(world, arguments, out))
    assert said == f"cannot write {out}: {tmp_path / 'notes'} is a file. Name a place inside a folder."
    assert (tmp_path / "notes").read_text() == "mine"


@EVERY_VERB
@pytest.mark.parametrize("how", ["ro", "full"])
def test_a_disk_that_takes_nothing(how, arguments, world, capsys, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,ro" if how == "ro" else "size=64k", "none", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        if how == "full":
            with pytest.raises(OSError):
                (disk / "all").write_bytes(bytes(1 << 20))
        said = refused(capsys, 1, *command(world, arguments, disk / "x"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    remedy = {"ro": "Nothing can be written on that disk; name another place.", "full": "Free some space or name"}[how]
    assert said.startswith(f"cannot write {disk / 'x'}: ") and remedy in said


@EVERY_VERB
def test_what_is_not_ours_is_refused_and_left(arguments, world, capsys, tmp_path):
    """A folder with a thesis where a folder is written; a file that is no output of this verb where a file is."""
    out = tmp_path / "x"
    if arguments[0] in ("sft", "grpo", "eval", "export", "demo"):
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out.write_text("mine\n")
    said = refused(capsys, 1, *command(world, arguments, out))
    assert str(out) in said and any(word in said for word in ("Name another", "Give another"))
    assert (out / "thesis.tex" if out.is_dir() else out).read_text().strip() == "mine"
    assert len(list(tmp_path.rglob("*"))) == (2 if out.is_dir() else 1)


# ------------------------------------------------------------------------------------------------ whose an output is


def test_scores_of_another_command_are_refused_before_anything_is_judged(world, capsys, tmp_path):
    out = tmp_path / "scores.jsonl"
    out.write_text(json.dumps({"run": "0123456789abcdef", "id": "pair-0", "judgements": {}}) + "\n")
    arguments = ["judge", world / "model", "--input", world / "pairs.jsonl", "--output", out]
    said = refused(capsys, 1, *arguments, "--model.weights", "random")
    assert said.startswith(f"{out} holds scores of another judge, of other data or with other settings. Name another")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


@pytest.mark.long
def test_a_judges_scores_are_its_own(world, capsys, tmp_path):
    def judge(*more, data="pairs", model="model"):
        out = tmp_path / "scores.jsonl"
        arguments = ["judge", world / model, "--input", world / f"{data}.jsonl", "--output", out, *more]
        return [*arguments, "--model.weights", "random", "--model.dtype", "float32", "--sampling.max_new_tokens", "4"]

    assert main([str(each) for each in judge()]) == 0
    first = (tmp_path / "scores.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]
    capsys.readouterr()
    assert main([str(each) for each in judge()]) == 0  # the same again
    assert "these judgements were there already" in capsys.readouterr().err
    tiny_model_folder(world / "wider", intermediate_size=64)
    for other in (
        judge(model="wider"),
        judge(data="others"),
        judge("--votes", "2"),
        judge("--sampling.temperature", "0.5"),
        judge("--rubrics", "primary"),
    ):
        assert "holds scores of another judge, of other data or with other settings" in refused(capsys, 1, *other)
    assert (tmp_path / "scores.jsonl").read_bytes() == first


@pytest.mark.long
def test_an_evaluation_is_of_its_own_data(world, capsys, tmp_path):
    def evaluate(data):
        arguments = ["eval", "pairs", "--model", world / "model", "--data", data, "--output", tmp_path / "out"]
        arguments += ["--model.weights", "random", "--model.dtype", "float32", "--sampling.max_new_tokens", "4"]
        return [str(each) for each in arguments]

    assert main(evaluate(world / "pairs.jsonl")) in (0, 1)
    before = contents(tmp_path / "out")
    said = refused(capsys, 1, *evaluate(world / "others.jsonl"))
    assert "holds an evaluation on other data: none of its 16 questions is asked here" in said
    assert contents(tmp_path / "out") == before
    lines = (world / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[:6]))
    capsys.readouterr()
    main(evaluate(tmp_path / "fewer.jsonl"))
    assert "has answers to 4 questions that are not asked of these data; they are left out" in capsys.readouterr().err


def test_a_run_that_was_begun_is_not_taken_for_another(world, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".patarm_run.json").write_text(json.dumps({"recipe": "GRPOConfig"}))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    said = refused(capsys, 1, "sft", world / "sft.yaml", "--run.folder", run)
    assert said.startswith(
        f"{run}, where no checkpoint is saved yet, holds another run: recipe is 'GRPOConfig' there and"
    )
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n' and not (run / "config.yaml").exists()
    (run / ".patarm_run.json").unlink()  # nor where another program has left files of that name
    assert "is not a run's: it holds metrics.jsonl" in refused(
        capsys, 1, "sft", world / "sft.yaml", "--run.folder", run
    )


@pytest.mark.long
def test_a_run_that_has_saved_nothing_has_its_folder_too(world, capsys, tmp_path):
    def sft(*more):
        return ["sft", str(world / "sft.yaml"), "--run.folder", str(tmp_path / "run"), *more]

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("from tee")
    assert main(sft()) == 0
    run = tmp_path / "run"
    subprocess.run(["rm", "-r", str(run / "checkpoints"), str(run / "export")], check=True)  # killed before it saved
    before = contents(run)
    said = refused(capsys, 1, *sft("--optimizer.learning_rate", "0.5"))
    assert f"{run}, where no checkpoint is saved yet, holds another run: optimizer.learning_rate is 1e-06 there" in said
    assert contents(run) == before
    assert main(sft()) == 0  # the same command begins anew
    assert (run / "export").is_dir()


def test_a_page_is_of_one_run(world, capsys, tmp_path):
    out = tmp_path / "page.html"
    for _ in range(2):
        assert main(["report", str(world / "run"), "--out", str(out)]) == 0
    page = out.read_text()
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", str(world / "run"), str(other)], check=True)
    assert refused(capsys, 1, "report", other, "--out", out).startswith(
        f"{out} is there and is not the page of {other}"
    )
    assert out.read_text() == page
    assert main(["report", str(other)]) == 0 and main(["report", str(other)]) == 0  # inside it is always its own


def test_a_bench_has_its_own_file(capsys, tmp_path):
    out = tmp_path / "bench.json"
    small = ["--rows", "8", "--responses", "16", "--length", "16", "--repeats", "1", "--json", str(out)]
    for _ in range(2):
        assert main(["bench", "attention", *small]) == 0
    before = json.loads(out.read_text())
    for other in (["load", *small], ["attention", *small, "--seed", "1"]):
        assert "is not of this bench with these settings" in refused(capsys, 1, "bench", *other)
    assert json.loads(out.read_text()) == before


def test_an_empty_file_is_no_ones(world, tmp_path):
    (tmp_path / "page.html").touch()
    assert main(["report", str(world / "run"), "--out", str(tmp_path / "page.html")]) == 0
    assert Path(tmp_path / "page.html").stat().st_size
