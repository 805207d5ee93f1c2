"""What a run's folder says of it is what was done, when its length is changed from start to start."""

import json

import pytest
import yaml

from patarm_jax.cli import main
from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.config.sections import OptimizerSection, RunSection, UpdateSection
from patarm_jax.run.records import schedule_change
from patarm_jax.train.optimizer import make_schedule
from tests.toys import tiny_model_folder, write_preferences

LINEAR = OptimizerSection(learning_rate=0.01, decay="linear")


def written(path, **run):
    path.write_text(to_yaml(SFTConfig(optimizer=LINEAR, run=RunSection(**run))))
    return path


@pytest.mark.parametrize(("before", "now", "planned", "steps"), [
    ({"steps": 6}, {"steps": 10}, 6, 10),
    ({"steps": 10}, {"steps": 6}, 10, 6),
    ({"epochs": 2}, {"epochs": 3}, 8, 12),
    ({"epochs": 2}, {"steps": 9}, 8, 9),
])  # fmt: skip
def test_another_length_is_another_schedule(tmp_path, before, now, planned, steps):
    config = SFTConfig(optimizer=LINEAR, run=RunSection(**now))
    said = schedule_change(config, written(tmp_path / "config.yaml", **before), 3, steps, per_epoch=4)
    was, is_ = (float(make_schedule(LINEAR, length)(3)) for length in (planned, steps))
    assert said == (
        f"the run was to have {planned} steps and is now to have {steps}: the linear decay of the learning rate "
        f"follows the new length from here on, {is_:.3g} at step 4 instead of {was:.3g}"
    )


def test_what_changes_no_rate_is_not_said(tmp_path):
    config = SFTConfig(optimizer=LINEAR, run=RunSection(steps=8))
    path = written(tmp_path / "config.yaml", epochs=2)
    assert schedule_change(config, path, 3, 8, per_epoch=4) == ""  # as long as before
    path = written(tmp_path / "config.yaml", steps=6)
    assert schedule_change(config, path, 0, 8, per_epoch=4) == ""  # nothing is done
    assert schedule_change(config, path, 8, 8, per_epoch=4) == ""  # nothing is left
    assert schedule_change(config, tmp_path / "none.yaml", 3, 8, per_epoch=4) == ""
    constant = SFTConfig(optimizer=OptimizerSection(learning_rate=0.01), run=RunSection(steps=8))
    assert schedule_change(constant, path, 3, 8, per_epoch=4) == ""


def test_several_updates_of_a_step_count_each(tmp_path):
    config = GRPOConfig(optimizer=LINEAR, run=RunSection(steps=8), update=UpdateSection(updates_per_rollout=2))
    said = schedule_change(config, written(tmp_path / "config.yaml", steps=4), 2, 8, per_epoch=4)
    assert said.endswith("0.0075 at step 3 instead of 0.005")


@pytest.mark.long
def test_a_run_whose_steps_are_lowered_keeps_what_is_written_of_it(tmp_path, capsys):
    tiny_model_folder(tmp_path / "model")
    write_preferences(tmp_path / "pairs.jsonl", 8)
    run = tmp_path / "run"

    def sft(steps):
        config = {
            "model": {"path": str(tmp_path / "model"), "weights": "random", "dtype": "float32", "remat": "none"},
            "data": {"path": str(tmp_path / "pairs.jsonl"), "missing_judgements": "template"},
            "optimizer": {"learning_rate": 0.01, "decay": "linear"},
            "run": {"folder": str(run), "steps": steps, "tensorboard": False},
            "pairs_per_step": 8,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        capsys.readouterr()
        assert main(["sft", str(tmp_path / "config.yaml")]) == 0
        return capsys.readouterr().err

    sft(4)
    before = {path: path.read_bytes() for path in (run / "export", run) for path in path.iterdir() if path.is_file()}
    assert "is complete with 4 steps, more than the 2 asked for" in sft(2)
    assert {path: path.read_bytes() for path in before} == before
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["steps"] == 4

    # Without the export it is written anew, of the weights there are.
    for path in (run / "export").iterdir():
        path.unlink()
    (run / "export").rmdir()
    sft(2)
    assert "| optimiser updates | 4 |" in (run / "export" / "README.md").read_text()
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["steps"] == 4

    # More steps go on, and say what becomes of the rate.
    assert "the run was to have 4 steps and is now to have 5: the linear decay of the learning rate follows" in sft(5)
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["steps"] == 5
    assert "| optimiser updates | 5 |" in (run / "export" / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["num_tokens"] for line in lines] == [lines[0]["num_tokens"] * step for step in range(1, 6)]
