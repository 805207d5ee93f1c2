"""A shortened demo through the command line, and every command and line of code in the README."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from patarm_jax.config.load import from_mapping, load
from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.config.sections import DataSection
from patarm_jax.demo.settings import DemoSizes, PolicySizes, demo_configs, dpo_config, policy_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def patarm(folder, *arguments, code=0):
    """What a patarm started in a folder says on (stdout, stderr)."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "patarm_jax", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder a shortened demo was started in, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, patarm(folder, "demo", "--short")[0]


@pytest.mark.long
def test_the_demo_writes_what_it_should(demo):
    folder, shown = demo
    out = folder / "runs" / "demo"
    summary = json.loads((out / "summary.json").read_text())
    for stage in ("untrained", "sft", "grpo", "swapped"):
        assert {"valid", "accuracy_strict", "accuracy_half", "gap", "interval"} <= summary[stage].keys()
        low, high = summary[stage]["interval"]
        assert 0 <= low <= summary[stage]["accuracy_half"] <= high <= 1
    assert summary["untrained"]["valid"] == 0
    assert all((out / stage / "report.html").read_text().startswith("<!doctype html>") for stage in ("sft", "grpo"))
    assert (out / "grpo" / "export" / "model.safetensors").exists()
    assert "tie = wrong" in shown and shown.count("╭─ heldout-") == 5
    assert len(list((out / "grpo" / "rollouts").iterdir())) == DemoSizes.short().grpo_steps


@pytest.mark.long
def test_the_pairwise_demo_writes_what_it_should(tmp_path):
    shown, _ = patarm(tmp_path, "demo", "--short", "--system", "pairwise", "--out", "pairs")
    out = tmp_path / "pairs"
    summary = json.loads((out / "summary.json").read_text())
    for stage in ("untrained", "sft", "grpo", "swapped"):
        assert {"valid", "accuracy_strict", "accuracy_half", "position", "interval"} <= summary[stage].keys()
        assert json.loads((out / "choices" / stage / "results.json").read_text())["judge"] == "pairwise"
    assert "one judgement per order" in shown and shown.count("╭─ heldout-") == 5
    assert json.loads((out / "grpo" / "export" / "judge.json").read_text())["judge"] == "pairwise"
    assert "holds a demo with other arguments" in patarm(tmp_path, "demo", "--short", "--out", "pairs", code=1)[1]


@pytest.mark.long
def test_a_demo_folder_is_not_taken_for_another(demo):
    folder, _ = demo
    assert "holds a demo with other arguments" in patarm(folder, "demo", "--short", "--seed", "1", code=1)[1]
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("")
    assert "is not empty" in patarm(folder, "demo", "--short", "--out", "full", code=1)[1]


@pytest.mark.long
def test_the_readmes_commands_on_a_judge_work(demo):
    folder, _ = demo
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("patarm")]
    judge, export = (next(line for line in commands if f"patarm {verb}" in line) for verb in ("judge", "export"))
    patarm(folder, *shlex.split(judge, comments=True)[1:], "--sampling.max_new_tokens", "8")
    assert len((folder / "scores.jsonl").read_text().splitlines()) == DemoSizes.short().heldout_pairs
    steps = str(DemoSizes().grpo_steps)
    assert f"checkpoints/{steps}" in export
    export = export.replace(steps, str(DemoSizes.short().grpo_steps))
    patarm(folder, *shlex.split(export, comments=True)[1:])
    assert (folder / "judge" / "config.json").exists()


def test_the_readmes_training_commands_name_configs_and_settings_that_exist():
    found = 0
    for line in (line for block in blocks("sh") for line in block.splitlines() if re.match(r"patarm (sft|grpo)", line)):
        _, recipe, path, *rest = line.split("#")[0].split()
        load(SFTConfig if recipe == "sft" else GRPOConfig, ROOT / path, [word for word in rest if word != "--dry-run"])
        found += 1
    assert found == 3


def test_the_readmes_data_sections_are_understood():
    lines = [line for block in blocks("yaml") for line in block.splitlines()]
    for line in lines:
        from_mapping(DataSection, yaml.safe_load(line)["data"], "README")
    assert len(lines) == 3


@pytest.mark.parametrize("code", blocks("python"))
def test_the_readmes_python_runs(code, capsys):
    names = {}
    exec(code, names)
    if "rewards" in names:
        assert names["rewards"].tolist() == [[[pytest.approx(1.2), 0], [pytest.approx(1.2), 0]]]
    else:
        assert capsys.readouterr().out == "OK 9.0\n"


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
@pytest.mark.parametrize(("system", "out"), [("pointwise", "runs/demo"), ("pairwise", "runs/pairwise")])
def test_the_tiny_configs_are_the_demos(system, out, recipe):
    """`configs/tiny_*` repeat the demo's two runs by hand; what they say is what it does."""
    sft, grpo = demo_configs(Path(out), 0, DemoSizes.of(system), system)
    expected = sft if recipe == "sft" else grpo
    name = f"tiny_{recipe}.yaml" if system == "pointwise" else f"tiny_{system}_{recipe}.yaml"
    assert load(type(expected), ROOT / "configs" / name) == expected


def test_the_tiny_configs_of_policies_are_the_demos():
    folder, sizes = Path("runs/policy"), PolicySizes()
    expected = {
        "policy": policy_config(folder, 0, sizes, folder / "grpo"),
        "dpo": dpo_config(folder, folder / "dpo", 0, sizes, 0.2),
    }
    for recipe, config in expected.items():
        assert load(type(config), ROOT / "configs" / f"tiny_{recipe}.yaml") == config


@pytest.mark.long
def test_the_policys_demo_writes_what_it_should(tmp_path):
    shown, _ = patarm(tmp_path, "demo", "--short", "--system", "policy", "--out", "policy")
    out = tmp_path / "policy"
    summary = json.loads((out / "summary.json").read_text())
    for stage in ("untrained", "sft", "grpo"):
        assert {"gold/right/mean", "gold/right/error", "eval/mean_length"} <= summary[stage].keys()
    assert "held-out prompts, one response to each" in shown and "judge: none" in shown
    assert json.loads((out / "policy-grpo" / "export" / "judge.json").read_text()) == {"judge": "policy"}
    page = (out / "policy-grpo" / "report.html").read_text()
    assert "data-bundle" in page
