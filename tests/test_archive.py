"""A finished run that was put away: on a disk that takes nothing any more, or without its checkpoints."""

import shutil

import pytest

from patarm_jax.cli import main
from tests.toys import small_world, write_recipes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of two steps, to be."""
    root = small_world(tmp_path_factory.mktemp("world"), 8)
    write_recipes(root, "sft", folder=str(root / "run"), steps=2)
    return root


@pytest.fixture(scope="module")
def finished(world):
    """Its folder, when it has been done."""
    assert main(["sft", str(world / "sft.yaml")]) == 0
    return world / "run"


def said(capsys, code, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    return capsys.readouterr().err.strip().splitlines()[-1]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_run_on_a_read_only_disk(world, finished, small_disk, capsys, tmp_path):
    disk, remount = small_disk
    remount("32m")
    run = disk / "run"
    shutil.copytree(finished, run)
    remount("32m,ro")
    again = ["sft", world / "sft.yaml", "--run.folder", run]

    assert said(capsys, 0, *again) == f"{run} is complete, 2 of 2 steps, and is left as it is: {run / 'export'}"
    assert f"{run} holds another run: optimizer.learning_rate is 1e-06 there and 0.5 here" in said(
        capsys, 1, *again, "--optimizer.learning_rate", "0.5"
    )
    refusal = f"cannot write {run}: Read-only file system. Nothing can be written on that disk; name another place."
    assert said(capsys, 1, *again, "--run.steps", "3") == f"patarm: {refusal}"

    page = run / "report.html"
    told = f"patarm: {refusal} For the page, that is --out FILE.".replace(str(run), str(page), 1)
    assert said(capsys, 1, "report", run) == told
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert main(["export", str(run), str(tmp_path / "judge")]) == 0
    weights = (tmp_path / "judge" / "model.safetensors").read_bytes()
    assert weights == (run / "export" / "model.safetensors").read_bytes()
    judge = ["judge", run, "--input", world / "pairs.jsonl", "--output", tmp_path / "scores.jsonl"]
    assert "none of the 16 answers could be read" in said(capsys, 0, *judge, "--sampling.max_new_tokens", "4")


@pytest.mark.long
def test_a_run_without_its_checkpoints(world, finished, capsys, tmp_path):
    """Which are large, and are removed where the export is kept."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    again = ["sft", world / "sft.yaml", "--run.folder", run]
    assert said(capsys, 0, *again) == f"{run} is complete, 2 of 2 steps, and is left as it is: {run / 'export'}"
    assert said(capsys, 1, *again, "--run.steps", "3") == (
        f"patarm: {run} holds a finished run of 2 steps, whose checkpoints are gone: the 3 steps of this one cannot go "
        "on from there. Give another run folder."
    )
    assert {path: text for path, text in content(run).items() if path.name != ".patarm-lock"} == before


def test_an_unfinished_run_on_a_read_only_disk(world, small_disk, capsys):
    disk, remount = small_disk
    (disk / "run").mkdir()
    remount("256k,ro")
    assert said(capsys, 1, "sft", world / "sft.yaml", "--run.folder", disk / "run") == (
        f"patarm: cannot write {disk / 'run'}: Read-only file system. Nothing can be written on that disk; name "
        "another place."
    )
