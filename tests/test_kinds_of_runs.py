"""Runs of pairwise judges, of other rewards and of DAPO's sampling: each resumes, and learns on any mesh, alike."""

import json
import shutil

import pytest

from patarm_jax.cli import main
from tests.runs import (
    CUBE,
    VAIN,
    assert_nearly_equal,
    config_file,
    exported,
    judged_texts,
    judgements,
    lines_of,
    run_as_two,
    run_whole_and_killed,
    timeless,
)

NONE_HELD_OUT = {"path": ""}
# AdamW's first updates are as large as the learning rate, even where a gradient is rounding alone: at a large one the
# second step's weights would differ enough to draw another token now and then.
SMALL = {"learning_rate": 1e-4}
KINDS = {
    "pairwise sft": ("sft", {"judge": "pairwise"}),
    "pairwise sft in turns": ("sft", {"judge": "pairwise", "pairwise": {"orders": "alternate"}}),
    "pairwise grpo": ("grpo", {"judge": "pairwise", "group_size": 4}),
    "pairwise grpo in turns": ("grpo", {"judge": "pairwise", "pairwise": {"orders": "alternate"}}),
    "one opponent": ("grpo", {"reward": {"opponent": "one", "loser": "minus", "margin": {"name": "tanh"}}}),
    # Random weights write nothing that can be read: only lengths make rewards differ, and batches are seldom full.
    "dapo": ("grpo", {"update": {"algorithm": "dapo"}, "dapo": {"overlong_buffer": 8, "max_rounds": 3}}),
}
SAMPLED = [name for name, (recipe, _) in KINDS.items() if recipe == "grpo"]


def of(world, kind, fate, **sections):
    recipe, own = KINDS[kind]
    name = f"{kind.replace(' ', '_')}_{fate}"
    return recipe, config_file(world, name, recipe, **{"heldout": NONE_HELD_OUT} | own | sections), world / name


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_like_a_whole_one(world, started, kind):
    recipe, config, whole = of(world, kind, "whole")
    _, stopped, folder = of(world, kind, "killed")
    run_whole_and_killed(started, recipe, config, stopped, folder, VAIN[recipe])
    assert len(timeless(folder)) == 7 and timeless(folder) == timeless(whole)
    assert exported(folder) == exported(whole) and judgements(folder) == judgements(whole)


@pytest.mark.long
@pytest.mark.parametrize("kind", SAMPLED)
def test_eight_devices_draw_and_learn_as_one(world, started, kind):
    two = {"run": {"steps": 2}, "pairs_per_step": 4 if "turns" not in kind else 8, "optimizer": SMALL}
    recipe, config, one = of(world, kind, "one", **two)
    started(recipe, config).end(1)
    _, config, eight = of(world, kind, "eight", **two, mesh=CUBE)
    assert main([recipe, str(config)]) == 1
    assert_nearly_equal(eight, one)
    assert judged_texts(one) == judged_texts(eight)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dapo", "pairwise grpo", "one opponent"])
def test_two_processes_draw_and_learn_as_one(world, started, kind):
    """Where a batch is filled from several rounds, a group may be learnt from by another process than its own."""
    two = {"run": {"steps": 2}, "optimizer": SMALL}
    recipe, config, alone = of(world, kind, "alone", **two, mesh=CUBE)
    assert main([recipe, str(config)]) == 1
    _, config, pod = of(world, kind, "pod", **two, mesh={**CUBE, "distributed": "auto"})
    run_as_two(started, recipe, config, 1)
    assert_nearly_equal(pod, alone)
    assert judgements(pod).keys() == judgements(alone).keys() and judged_texts(pod) == judged_texts(alone)


@pytest.mark.long
def test_a_pairwise_judge_is_trained_and_told(world):
    """SFT, then GRPO on what it made, each held out in both orders."""
    short = {"run": {"steps": 1, "show_every": 1}, "heldout": {"eval_every": 1}, "optimizer": {"warmup_steps": 0}}
    sft = config_file(world, "pairwise_sft", "sft", judge="pairwise", **short)
    assert main(["sft", str(sft), "--mesh.fsdp", "8"]) == 0
    made = world / "pairwise_sft"
    assert json.loads((made / "export" / "judge.json").read_text()) == {"judge": "pairwise", "rubrics": "adaptive"}
    card = (made / "export" / "README.md").read_text()
    assert "parse_pairwise(text).choice" in card and "patarm eval pairs --judge pairwise --model pairwise_sft" in card
    line = lines_of(made)[-1]
    orders = {"accuracy_chosen_first", "accuracy_rejected_first", "chose_first", "same_in_both_orders"}
    assert {f"eval/{name}" for name in orders} <= line.keys() and "eval/score_gap" not in line

    start = {"path": str(made), "weights": "load"}
    grpo = config_file(world, "pairwise_grpo", "grpo", judge="pairwise", group_size=4, model=start, **short)
    assert main(["grpo", str(grpo), "--mesh.fsdp", "8"]) == 1
    line, rows = lines_of(world / "pairwise_grpo")[-1], judgements(world / "pairwise_grpo")["step_000001.parquet"]
    assert "rewards/accuracy/mean" in line and "rewards/par/mean" not in line and "judge/score_gap" not in line
    assert [row["side"] for row in rows] == (["chosen first"] * 2 + ["rejected first"] * 2) * 4
    assert main(["report", str(world / "pairwise_grpo")]) == 0


@pytest.mark.parametrize(("kind", "other"), [("pairwise", "pointwise"), ("pointwise", "pairwise")])
def test_a_judge_of_one_kind_is_not_taken_for_another(world, capsys, kind, other):
    made = shutil.copytree(world / "reference", world / f"a {kind} judge")
    (made / "judge.json").write_text(json.dumps({"judge": kind, "rubrics": "adaptive"}))
    pairs = str(world / "pairs.jsonl")
    asked = ["--data", pairs, "--output", str(world / f"not {kind}"), "--judge", other]
    commands = [["eval", "pairs", "--model", str(made), *asked]]
    for recipe in ("sft", "grpo"):
        of_recipe = {"group_size": 4} if recipe == "grpo" else {}
        config = config_file(world, f"not {kind} {recipe}", recipe, judge=other, **of_recipe)
        commands.append([recipe, str(config), "--model.path", str(made), "--model.weights", "load"])
    if kind == "pairwise":
        commands.append(["judge", str(made), "--input", pairs, "--output", str(world / "scores.jsonl")])
    does = {"pairwise": "chooses between two responses", "pointwise": "gives one response a score"}[kind]
    for arguments in commands:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert f"is a judge of the kind {kind}, which {does}, and is to be {other} here" in said
