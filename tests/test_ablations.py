"""The ablations: every variant is a config that can be run, and a part of them goes on where it was stopped."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from patarm_jax.config.load import override
from patarm_jax.data.preferences import JUDGEMENTS
from patarm_jax.demo import arm_ablations, baselines, data_ablations, given_rubrics, policy_ablations
from patarm_jax.demo.ablations import PARTS, SIZES, STARTS, Variant, main
from patarm_jax.demo.settings import ArmSizes, DemoSizes, PolicySizes, demo_configs
from patarm_jax.judge.parse import parse_pointwise

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("part", PARTS)
def test_every_variant_can_be_run_for_as_many_judgements(part, tmp_path):
    names = set()
    for variant in PARTS[part].values():
        _, base = demo_configs(tmp_path, 0, SIZES, STARTS[variant.start].system)
        config = override(base, [f"--{name}={value}" for name, value in variant.settings.items()]).complete()
        judgements = config.pairs_per_step * config.prompts_per_pair * config.rollouts_per_prompt
        assert judgements == 256 and config.run.steps == SIZES.grpo_steps
        names.add(variant.name)
    assert len(names) == len(PARTS[part])  # none is taken for another
    assert sum(variant == Variant() for variant in PARTS[part].values()) == (part != "algorithms")


def test_the_script_names_the_parts_there_are():
    text = (ROOT / "launch" / "ablations.sh").read_text()
    said = re.search(r"one part of ([\w, \n#]+);", text).group(1)
    assert re.findall(r"\w+", said) == list(PARTS)


@pytest.mark.long
def test_a_part_is_measured_and_goes_on(tmp_path, capsys):
    sizes = DemoSizes(train_pairs=100, heldout_pairs=100, teacher_accuracy=0.6, sft_steps=2, grpo_steps=2)
    rows = main(tmp_path, ["loser", "judge"], 1, sizes)
    assert [(row["part"], row["variant"]) for row in rows] == [
        ("loser", "zero"), ("loser", "minus"), ("judge", "pointwise"), ("judge", "pairwise"),
    ]  # fmt: skip
    assert json.loads((tmp_path / "table.json").read_text()) == rows
    assert all((tmp_path / f"{part}.{kind}").is_file() for part in ("loser", "judge") for kind in ("png", "svg"))
    assert rows[0]["accuracies"] == rows[2]["accuracies"]  # one run, which stands in two parts
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["pairwise-0", "sft-0", "sft_loser-minus-0"]
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert main(tmp_path, ["judge"], 1, sizes) == rows[2:]
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert "held-out accuracy in %" in capsys.readouterr().out


@pytest.mark.long
def test_a_part_that_does_not_exist_is_refused():
    command = [sys.executable, "-m", "patarm_jax.demo.ablations", "--part", "colours"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "invalid choice: 'colours'" in done.stderr


@pytest.mark.long
def test_systems_are_asked_in_every_way_and_go_on(tmp_path):
    sizes = DemoSizes(train_pairs=100, heldout_pairs=20, teacher_accuracy=0.6, sft_steps=2, grpo_steps=2)
    systems = ["Bradley-Terry", "ordinal", "PaTaRM, LoRA"]
    rows = baselines.main(tmp_path, systems, 1, sizes)
    ways = [f"PaTaRM, LoRA, {way}" for way in baselines.EVERY]
    assert [row["variant"] for row in rows] == [*systems[:2], *ways]
    by_name = {row["variant"]: row for row in rows}
    assert all(by_name[name]["valid"] == 1.0 for name in systems[:2])
    assert by_name[ways[0]]["tokens"] == by_name[ways[1]]["tokens"] > 0
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "baselines").rglob("*") if path.is_file()}
    assert baselines.main(tmp_path, systems, 1, sizes) == rows == json.loads((tmp_path / "table.json").read_text())
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "baselines").rglob("*") if path.is_file()}
    assert (tmp_path / "baselines.png").is_file()


@pytest.mark.long
def test_two_models_are_trained_in_every_order_and_one_of_them_writes_for_a_judge_of_single_responses(tmp_path):
    short, orders = ArmSizes.short(), ["judge first", "judge first, other prompts' rubrics"]
    rows = arm_ablations.main(tmp_path, 1, short, orders)
    assert [row["variant"] for row in rows] == orders and rows[0]["seconds"] == rows[1]["seconds"] > 0
    sizes = DemoSizes(train_pairs=102, heldout_pairs=102, teacher_accuracy=0.6, sft_steps=2, grpo_steps=2)
    found = given_rubrics.main(tmp_path, 1, sizes, short)
    assert [row["variant"] for row in found] == list(given_rubrics.VARIANTS)
    assert json.loads((tmp_path / "table.json").read_text()) == rows + found
    for start, given in {"own": False, "given": True, "own-and-given": True}.items():
        pairs = (tmp_path / "starts" / f"{start}-0" / "data" / "train.jsonl").read_text().splitlines()
        assert len(pairs) == 102 and all(("rubric" in json.loads(line)) == given for line in pairs)
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert given_rubrics.main(tmp_path, 1, sizes, short) == found
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}


@pytest.mark.long
def test_policies_are_compared_by_what_rewards_them(tmp_path):
    sizes, arms = PolicySizes.short(), ["SFT", "DPO and SFT", "reward model", "PaTaRM judge"]
    rows = policy_ablations.main(tmp_path, 1, sizes, arms)
    assert [row["variant"] for row in rows] == arms and all(0 <= row["mean"] <= 1 for row in rows)
    assert [row["tokens"] > 0 for row in rows] == [False, True, True, True]
    assert all((tmp_path / f"policy{of}.svg").is_file() for of in ("", "-right-responses", "-mean-reward"))
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "policy").rglob("*") if path.is_file()}
    assert policy_ablations.main(tmp_path, 1, sizes, arms) == rows
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "policy").rglob("*") if path.is_file()}


@pytest.mark.long
def test_what_is_selected_is_what_is_learnt_from(tmp_path):
    """With a judge that has just learnt the form."""
    sizes = DemoSizes(train_pairs=1600, heldout_pairs=40, teacher_accuracy=0.6, sft_steps=250, grpo_steps=2)
    rows = data_ablations.main(tmp_path, 1, sizes, pairs=100)
    assert [row["variant"] for row in rows] == list(data_ablations.VARIANTS)
    folder = tmp_path / "data" / "built-0" / "set" / "04-write"
    parts = {name: (folder / f"{name}_train.jsonl").read_text().splitlines() for name in ("rl", "sft")}
    for name, lines in parts.items():
        assert lines and all((1 / 8 <= json.loads(line)["accuracy"] <= 6 / 8) == (name == "rl") for line in lines)
    learnt = (tmp_path / "data" / "SFT-gap-above-2-0" / "train.jsonl").read_text().splitlines()
    scores = [[parse_pointwise(json.loads(line)[name]).score for name in JUDGEMENTS] for line in learnt]
    assert 0 < len(learnt) < 1600 and all(chosen - rejected > 2 for chosen, rejected in scores)
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert data_ablations.main(tmp_path, 1, sizes, pairs=100) == rows
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*") if path.is_file()}
