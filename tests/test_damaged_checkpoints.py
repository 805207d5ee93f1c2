"""A checkpoint of which a file is cut or missing is never taken for a whole one; the one before it is, when asked."""

import json
import shutil

import numpy as np
import pytest
import yaml

from patarm_jax.cli import main
from patarm_jax.config.load import load
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.model import weights
from patarm_jax.recipes import grpo, sft
from patarm_jax.run.checkpoint import open_checkpoints
from patarm_jax.run.checkpoint_files import FILES, damage_of
from patarm_jax.types import LearntNothing, UserError
from tests.test_checkpoint import DATA_STATE, FINGERPRINT, abstract, assert_same, one_device, state
from tests.toys import tiny_model_folder, write_preferences

HOW = {
    "cut to nothing": lambda path: path.write_bytes(b""),
    "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "removed": lambda path: path.unlink(),
    "another of its length": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}
DAMAGES = pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two checkpoints, of which the first was the better."""
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    checkpoints = opened(folder)
    checkpoints.save(1, state(1), DATA_STATE, {"eval/x": 0.9})
    checkpoints.save(2, state(2), DATA_STATE, {"eval/x": 0.5})
    checkpoints.close()
    return folder


def opened(folder, **how):
    return open_checkpoints(folder, 3, FINGERPRINT, best="eval/x", **how)


def files_of(folder, step):
    return sorted(path.relative_to(folder) for path in (folder / step).rglob("*") if path.is_file())


def restored(folder, **how):
    """(step, whether its state is right) or the sentence that it is refused with, and what was said."""
    said = []
    checkpoints = opened(folder, say=said.append, **how)
    try:
        got, data_state, step = checkpoints.restore(abstract(state(), one_device()))
        assert_same(got, state(step))
        assert data_state == DATA_STATE
        best = checkpoints.best()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return str(error), said
    finally:
        checkpoints.close()
    return (step, best), said


@DAMAGES
def test_every_file_that_is_damaged_stops_the_run_or_takes_it_one_step_back(how, good, tmp_path):
    for name in files_of(good, "2"):
        folder = tmp_path / "run" / "checkpoints"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good, folder)
        how(folder / name)
        if not damage_of(folder / "2"):  # no list, and all files: nothing is lost
            assert name.name == FILES and restored(folder)[0] == (2, 1)
            continue
        refusal, said = restored(folder)
        assert refusal.startswith(f"cannot restore the checkpoint {folder}/2: ") and not said, name
        assert f"Set run.on_damaged to previous to go on from {folder}/1, remove that folder" in refusal
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
        found, said = restored(folder, on_damaged="previous")
        assert found == (1, 1), name
        assert said[0].startswith(f"{folder}/2 is damaged: ") and "\n" not in said[0]
        aside = folder.parent / "checkpoints-damaged" / "2"
        assert said[1:] == [
            "run.on_damaged is previous: the checkpoint of step 1 is taken",
            f"the damaged checkpoint of step 2 is kept as {aside}",
        ]
        # It is in no one's way when that step is saved again, and is not lost.
        checkpoints = opened(folder)
        checkpoints.save(2, state(2), DATA_STATE, {"eval/x": 0.95})
        checkpoints.close()
        assert restored(folder)[0] == (2, 2)
        assert set(files_of(aside.parent, "2")) >= set(files_of(good, "2")) - {name}


@DAMAGES
def test_without_the_list_of_files_nothing_is_read_wrongly(how, good, tmp_path):
    """The run was killed in the moment after it had saved: what orbax cannot notice is looked for."""
    for name in files_of(good, "2"):
        if name.name in (FILES, "_sharding", "commit_success.txt"):
            continue
        folder = tmp_path / "run" / "checkpoints"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / "2" / FILES).unlink()
        how(folder / name)
        found, _ = restored(folder)
        if isinstance(found, str):
            assert found.startswith(f"cannot restore the checkpoint {folder}/2: "), name
            assert restored(folder, on_damaged="previous")[0] == (1, 1)
        else:
            assert found == (2, 1), name


def test_the_folders_of_a_checkpoint_may_be_missing_too(good, tmp_path):
    folders = sorted(path.relative_to(good) for path in (good / "2").rglob("*") if path.is_dir())
    for listed in (True, False):
        for name in folders:
            folder = tmp_path / "run" / "checkpoints"
            shutil.rmtree(folder.parent, ignore_errors=True)
            shutil.copytree(good, folder)
            shutil.rmtree(folder / name)
            if not listed:
                (folder / "2" / FILES).unlink()
            if not listed and "ocdbt.process_0" in name.parts:  # its content was merged into the whole
                assert restored(folder)[0] == (2, 1)
            else:
                assert restored(folder)[0].startswith(f"cannot restore the checkpoint {folder}/2: "), name
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()
    assert restored(folder)[0].startswith(f"cannot restore the checkpoint {folder}/2: ")


def test_an_older_one_that_is_damaged_is_put_aside(good, tmp_path):
    """It may be the best so far, and its metrics would be read at every start."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    (folder / "1" / "metrics" / "metrics").write_bytes(b"")
    assert restored(folder) == ((2, 2), [f"the damaged checkpoint of step 1 is kept as {folder}-damaged/1"])
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_where_none_is_whole_nothing_is_begun_anew(good, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    for step in "12":
        (folder / step / "data" / "metadata").unlink()
    for how in ("stop", "previous"):
        assert restored(folder, on_damaged=how)[0].startswith(f"cannot restore the checkpoint {folder}/2: ")
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    shutil.rmtree(folder / "2")
    assert "There is none before it: remove that folder to begin anew" in restored(folder)[0]


def test_the_damaged_checkpoints_of_another_run_are_left_alone(good, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(good, folder)
    (folder / "2" / "data" / "metadata").unlink()
    checkpoints = open_checkpoints(folder, 3, FINGERPRINT | {"data": "other"}, on_damaged="previous")
    with pytest.raises(UserError, match="1 is a checkpoint of another run"):
        checkpoints.restore(abstract(state(), one_device()))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny_model_folder(root / "model")
    write_preferences(root / "pairs.jsonl", 8)
    return root


def config_of(world, recipe, folder, **run):
    base = {
        "model": {"path": str(world / "model"), "weights": "random", "dtype": "float32", "remat": "none"},
        "data": {"path": str(world / "pairs.jsonl"), "missing_judgements": "template"},
        "optimizer": {"learning_rate": 0.01},
        "run": {
            "folder": str(folder), "steps": 3, "checkpoint_every": 1, "keep_checkpoints": 9, "show_every": 0,
            "tensorboard": False, **run,
        },
        "mesh": {"data": 1, "fsdp": 8},
        "pairs_per_step": 8,
    }  # fmt: skip
    if recipe == "grpo":
        base |= {"update": {"kl": {"coef": 0.0}}, "sampling": {"max_new_tokens": 6}, "group_size": 2}
    (world / "config.yaml").write_text(yaml.safe_dump(base))
    return world / "config.yaml"


def trained(world, recipe, folder, **run):
    path = config_of(world, recipe, folder, **run)
    if recipe == "sft":
        return sft.main(load(SFTConfig, path))
    with pytest.raises(LearntNothing):  # no judgement of random weights can be read
        grpo.main(load(GRPOConfig, path))
    return True


def metrics_of(folder):
    """All but what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "step_time")) and "memory" not in k}
        for line in lines
    ]


def export_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".safetensors"}


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_a_run_that_lost_a_checkpoint_ends_like_one_that_did_not(recipe, world, capsys, tmp_path):
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    assert trained(world, recipe, whole)
    shutil.copytree(whole, lost)
    shutil.rmtree(lost / "export")
    shutil.rmtree(lost / "checkpoints" / "3")
    for file in (lost / "checkpoints" / "2" / "state" / "d").iterdir():
        HOW["cut to half"](file)
    capsys.readouterr()
    assert main([recipe, str(config_of(world, recipe, lost))]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"patarm: cannot restore the checkpoint {lost}/checkpoints/2: ")
    assert main(["export", str(lost), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"Name another checkpoint of the run, such as {lost}/checkpoints/1." in said
    assert main(["export", f"{lost}/checkpoints/1", str(tmp_path / "one")]) == 0
    settings = yaml.safe_load((lost / "config.yaml").read_text())
    settings["run"]["on_damaged"] = "previous"
    (lost / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["export", str(lost), str(tmp_path / "two")]) == 0
    assert export_of(tmp_path / "one") == export_of(tmp_path / "two") != {}
    assert f"step 1 of {lost}: {tmp_path / 'two'}" in capsys.readouterr().err

    assert trained(world, recipe, lost, on_damaged="previous")
    said = capsys.readouterr().err
    assert "run.on_damaged is previous: the checkpoint of step 1 is taken" in said
    assert f"{lost}: 1 of 3 steps are done" in said
    assert metrics_of(lost) == metrics_of(whole)
    assert export_of(lost / "export") == export_of(whole / "export")
    one, other = (weights.load(folder / "export")[0]["norm"] for folder in (whole, lost))
    np.testing.assert_array_equal(one, other)
    assert sorted(path.name for path in (lost / "checkpoints").iterdir()) == ["1", "2", "3"]
    assert [path.name for path in (lost / "checkpoints-damaged").iterdir()] == ["2"]
