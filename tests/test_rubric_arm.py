"""A run of Rubric-ARM from end to end, in processes of its own: two models, their phases, and what they leave."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from patarm_jax.cli import main
from patarm_jax.config.load import load
from patarm_jax.config.rubric_arm import RubricArmConfig
from patarm_jax.data.ruled import place_of
from patarm_jax.judge.criteria import parse_rubric, parse_rubric_judge
from patarm_jax.recipes.arms import open_arms
from patarm_jax.recipes.programs import grpo_learner
from patarm_jax.recipes.rubric_arm import _load_reference
from patarm_jax.run.open_model import load_parts
from patarm_jax.types import Status
from tests.arms import arms_config, write_arms_world
from tests.runs import (
    CUBE,
    assert_nearly_equal,
    exported,
    judgements,
    lines_of,
    run_as_two,
    run_whole_and_killed,
    timeless,
)

PHASES = [("generator warm-up", 0)] * 60 + [("judge warm-up", 0)] * 60
PHASES += [(role, number) for number in (1, 2) for role in ("judge", "generator") for _ in range(3)]

OPTIMISED = {"XLA_FLAGS": ""}  # a hundred steps and more take longer than what it takes to optimise them


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_arms_world(tmp_path_factory.mktemp("arms"))


@pytest.fixture(scope="module")
def whole(world, started):
    """A run that was never stopped."""
    started("rubric-arm", arms_config(world, "whole"), **OPTIMISED).end()
    return world / "whole"


def rubrics_of(run, number):
    return [json.loads(line) for line in (run / "rubrics" / f"round-{number}.jsonl").read_text().splitlines()]


def test_the_phases_are_taken_in_turns(whole):
    lines = lines_of(whole)
    assert [(line["phase"], line["round"]) for line in lines] == PHASES
    assert [line["step"] for line in lines] == list(range(1, len(PHASES) + 1))
    judged = [line for line in lines if line["round"]]
    assert all("judge/accuracy_half" in line for line in judged)
    measured = [line for line in judged if "eval/accuracy_half" in line]
    assert {(line["phase"], line["round"]) for line in measured} == set(PHASES[120:])
    assert all("eval/chose_first" in line and "eval/rubrics/valid" in line for line in measured)


def test_each_round_has_pairs_of_its_own(whole):
    first, second = ({row["prompt_id"] for row in rubrics_of(whole, number)} for number in (1, 2))
    assert len(first) == len(second) == 12 and not first & second
    for number, ids in ((1, first), (2, second)):
        steps = range(121 + 6 * (number - 1), 127 + 6 * (number - 1))
        rows = [row for step in steps for row in judgements(whole)[f"step_{step:06}.parquet"]]
        assert {row["pair_id"] for row in rows} <= ids


def test_the_kept_rubric_is_the_one_judged_by(whole):
    for number in (1, 2):
        kept = {row["prompt_id"]: row for row in rubrics_of(whole, number)}
        assert all(hashlib.sha256(row["text"].encode()).hexdigest() == row["sha256"] for row in kept.values())
        for step in range(121 + 6 * (number - 1), 124 + 6 * (number - 1)):
            for row in judgements(whole)[f"step_{step:06}.parquet"]:
                assert row["rubric_sha256"] == kept[row["pair_id"]]["sha256"]


def test_rewards_equal_a_plain_loop(whole):
    config = load(RubricArmConfig, whole / "config.yaml")
    seen = {"judge": 0, "generator": 0}
    for step, (role, number) in enumerate(PHASES[120:], 121):
        for row in judgements(whole)[f"step_{step:06}.parquet"]:
            place = place_of(config.run.seed, number, row["pair_id"])
            assert row["side"] == ("chosen first", "rejected first")[place]
            rubric = {one["prompt_id"]: one["text"] for one in rubrics_of(whole, number)}[row["pair_id"]]
            if role == "judge":
                criteria = rubric.count("\n") + 1 if parse_rubric(rubric).status is Status.OK else None
                verdict = parse_rubric_judge(row["text"], criteria)
                form = 1.0 * (verdict.status is Status.OK)
            else:
                written = parse_rubric(row["text"])
                verdict = parse_rubric_judge(row["judgement"])
                form = 0.5 * (written.status is Status.OK)
            right = verdict.choice == "AB"[place]
            assert row["choice"] == verdict.choice
            assert row["reward"] == right + form
            seen[role] += bool(row["reward"])
    assert all(seen.values()), "nothing was rewarded, so nothing was compared"


def test_each_model_is_exported_after_its_last_phase(whole):
    notes = {role: json.loads((whole / role / "export" / "judge.json").read_text()) for role in ("judge", "generator")}
    assert {role: note["step"] for role, note in notes.items()} == {"judge": 129, "generator": 132}
    assert {role: note["judge"] for role, note in notes.items()} == {"judge": "rubric_judge", "generator": "rubric"}


@pytest.mark.long
def test_killed_in_any_phase_it_ends_as_if_it_had_not_been(world, whole, started):
    config = arms_config(world, "killed")
    for step in (30, 75, 121, 125, 128, 131):
        killed = started("rubric-arm", config, **OPTIMISED)
        killed.until(lambda least=step: len(lines_of(world / "killed")) >= least)
        killed.process.kill()
        killed.end(-signal.SIGKILL)
    started("rubric-arm", config, **OPTIMISED).end()
    assert timeless(world / "killed") == timeless(whole)
    assert judgements(world / "killed") == judgements(whole)
    for role in ("generator", "judge"):
        assert exported(world / "killed" / role) == exported(whole / role)
    for number in (1, 2):
        assert rubrics_of(world / "killed", number) == rubrics_of(whole, number)


# ------------------------------------------------------------------------------------------- from what it has warmed up


# A temperature at which the rubrics of every prompt differ in what they earn, and in whether they are in form.
VARIED = {"sampling": {"max_new_tokens": 24, "temperature": 1.6}}


def from_warmup(world, whole, name, **sections):
    """A run that begins with what another's warm-up has made: one round, two steps of each model."""
    sections = {
        "warmup": {"epochs": 0, "steps": 0},
        "generator": {
            "path": str(whole / "generator" / "warmup"),
            "steps": 2,
            **VARIED,
            **sections.pop("generator", {}),
        },
        "judge": {"path": str(whole / "judge" / "warmup"), "steps": 2, **sections.pop("judge", {})},
        "model": {"path": ""},
        "rounds": 1,
        **sections,
    }
    return arms_config(world, name, **sections)


@pytest.fixture(scope="module")
def short(world, whole, started):
    """One round on one device."""
    started("rubric-arm", from_warmup(world, whole, "short")).end()
    return world / "short"


def test_both_begin_with_what_they_are_given(short, whole):
    """The first round is the one behind the warm-up, but for what its steps are called."""
    assert [(line["phase"], line["round"]) for line in lines_of(short)] == [("judge", 1)] * 2 + [("generator", 1)] * 2
    assert not (short / "judge" / "warmup").exists()
    # Where nothing is won or lost a gradient is rounding alone, of which Adam makes a whole step: on another number of
    # devices another one.
    assert all(line["advantages/abs_mean"] > 0 for line in lines_of(short))
    assert exported(short / "judge") != exported(whole / "judge")


@pytest.mark.long
def test_eight_devices_learn_as_one(world, whole, short):
    assert main(["rubric-arm", str(from_warmup(world, whole, "eight", mesh=CUBE, micro_batches=1))]) == 0
    assert_nearly_equal(world / "eight", short)
    ours, theirs = (
        [[(row["text"], row["judgement"]) for row in rows] for _, rows in sorted(judgements(run).items())]
        for run in (world / "eight", short)
    )
    assert ours == theirs


@pytest.mark.long
def test_killed_among_rubrics_it_ends_as_if_it_had_not_been(world, whole, short, started):
    """Killed as soon as the rubrics of the round are kept, and again in the generator's phase."""
    config = from_warmup(world, whole, "short_killed")
    for happened in (
        lambda: (world / "short_killed" / "rubrics" / "round-1.jsonl").exists(),
        lambda: len(lines_of(world / "short_killed")) >= 3,
    ):
        killed = started("rubric-arm", config)
        killed.until(happened)
        killed.process.kill()
        killed.end(-signal.SIGKILL)
    started("rubric-arm", config).end()
    assert timeless(world / "short_killed") == timeless(short)
    assert judgements(world / "short_killed") == judgements(short)


@pytest.mark.long
def test_asked_to_stop_in_the_last_step_of_a_phase_it_begins_no_other(world, whole, started):
    config = from_warmup(world, whole, "stopped", judge={"steps": 1}, generator={"steps": 1})
    stopping = started("rubric-arm", config)
    stopping.until(lambda: (world / "stopped" / "rubrics" / "round-1.jsonl").exists())
    stopping.until(lambda: "compiled in" in stopping.so_far())
    stopping.process.send_signal(signal.SIGTERM)
    assert f"stopped after step 1 of 2, saved in {world / 'stopped'}" in stopping.end()
    assert not (world / "stopped" / "generator").exists()
    assert "done: " in started("rubric-arm", config).end()


@pytest.mark.long
def test_two_processes_learn_as_one(world, whole, short, started):
    config = from_warmup(world, whole, "pod", mesh={**CUBE, "distributed": "auto"})
    run_as_two(started, "rubric-arm", config)
    assert_nearly_equal(world / "pod", short)
    assert (world / "pod" / "rubrics" / "round-1.jsonl").read_text() == (
        short / "rubrics" / "round-1.jsonl"
    ).read_text()


@pytest.mark.long
def test_the_generator_first_and_optimizers_that_are_kept(world, whole, started):
    settings = {"order": "generator_first", "optimizer_per_phase": "kept", "rounds": 2}
    settings["lora"] = {"rank": 4, "alpha": 8.0}
    configs = [from_warmup(world, whole, name, **settings) for name in ("kept", "kept_killed")]
    run_whole_and_killed(started, "rubric-arm", *configs, world / "kept_killed")
    assert [(line["phase"], line["round"]) for line in lines_of(world / "kept")] == [
        (role, number) for number in (1, 2) for role in ("generator", "judge") for _ in range(2)
    ]
    assert timeless(world / "kept_killed") == timeless(world / "kept")
    started("rubric-arm", from_warmup(world, whole, "fresh", **settings | {"optimizer_per_phase": "fresh"})).end()
    kept, fresh = (timeless(world / name) for name in ("kept", "fresh"))
    assert kept[:4] == fresh[:4]
    assert kept[4:] != fresh[4:]
    for role in ("generator", "judge"):
        assert exported(world / "kept_killed" / role) == exported(world / "kept" / role)


def test_under_adapters_the_reference_is_there_already(world):
    """Without a warm-up it is the weights that they stand beside; with one, or without adapters, it is loaded."""
    eight = {"generator": {"pairs_per_step": 8}, "judge": {"pairs_per_step": 8}}  # devices
    given = {"lora": {"rank": 4}, "warmup": {"epochs": 0, "steps": 0}, **eight}
    arms = open_arms(load(RubricArmConfig, arms_config(world, "lora", **given)))
    arm = arms.arms["judge"]
    learner = grpo_learner(arm.turn, arm.model.arch, arms.mesh)
    _, weights = load_parts(arm.turn, arm.model, arms.mesh, learner.shape.params)
    found, beside = _load_reference(arms, arm, weights)
    assert found == {} and beside is weights
    loaded, beside = _load_reference(arms, arm, None)
    assert beside is None
    for ours, theirs in zip(jax.tree.leaves(weights), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
def test_one_of_the_two_may_stay_as_it_is(world, whole, started):
    config = from_warmup(world, whole, "judge_only", order="judge_only", judge={"rubric_dropout": 0.5})
    said = started("rubric-arm", config).end()
    assert f"done: {world / 'judge_only' / 'judge' / 'export'}" in said
    assert {line["phase"] for line in lines_of(world / "judge_only")} == {"judge"}
    assert not (world / "judge_only" / "generator").exists()


# ------------------------------------------------------------------------------------------------------- step by step


TOGETHER = {"order": "joint", "optimizer_per_phase": "kept", "rounds": 2}
IN_TURN = [(role, number) for number in (1, 2) for _ in range(2) for role in ("judge", "generator")]


@pytest.fixture(scope="module")
def together(world, whole, started):
    """Both models trained in turn."""
    started("rubric-arm", from_warmup(world, whole, "together", **TOGETHER)).end()
    return world / "together"


def test_both_models_take_turns_on_the_same_pairs(together):
    assert [(line["phase"], line["round"]) for line in lines_of(together)] == IN_TURN
    pairs = [{row["pair_id"] for row in rows} for _, rows in sorted(judgements(together).items())]
    assert pairs[::2] == pairs[1::2] and len({frozenset(one) for one in pairs}) == 4
    assert [line["epoch"] for line in lines_of(together)[:4]] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(line["num_tokens"] > 0 for line in lines_of(together))
    tokens = [line["num_tokens"] for line in lines_of(together)]
    assert tokens == sorted(set(tokens))


def test_the_judge_reads_rubrics_of_the_step_itself(together, started):
    kept = {}
    for step in (1, 3, 5, 7):
        lines = (together / "rubrics" / f"step-{step}.jsonl").read_text().splitlines()
        kept[step] = {row["prompt_id"]: row for row in map(json.loads, lines)}
        rows = judgements(together)[f"step_{step:06}.parquet"]
        assert {row["pair_id"]: row["rubric_sha256"] for row in rows} == {
            pair: row["sha256"] for pair, row in kept[step].items()
        }
    started("report", together).end()
    packed = re.findall(r'data-bundle="(\d+)">([^<]*)<', (together / "report.html").read_text())
    steps = {int(step): json.loads(gzip.decompress(base64.b64decode(data))) for step, data in packed}
    assert all(pair["rubric"] == kept[3][pair["id"]]["text"] for pair in steps[3]["pairs"])


@pytest.mark.long
def test_killed_between_two_turns_it_ends_as_if_it_had_not_been(world, whole, together, started):
    """After three steps of the first round, of which the judge has had two."""
    killed, config = world / "together_killed", from_warmup(world, whole, "together_killed", **TOGETHER)
    stopped = started("rubric-arm", config)
    stopped.until(lambda: len(lines_of(killed)) >= 3)
    stopped.process.kill()
    stopped.end(-signal.SIGKILL)
    started("rubric-arm", config).end()
    assert timeless(killed) == timeless(together)
    assert judgements(killed) == judgements(together)
    for role in ("generator", "judge"):
        assert exported(killed / role) == exported(together / role)


@pytest.mark.long
def test_each_learns_from_the_other_as_it_is_by_then(world, whole):
    """Updates that destroy a model are seen at the other one's next turn, and not before."""
    wild = {"optimizer": {"learning_rate": 0.3}}
    calm = {"sampling": {"max_new_tokens": 24, "temperature": 1.0}}
    config = from_warmup(world, whole, "wild", order="joint", judge=wild, generator=wild | calm, mesh=CUBE)
    main(["rubric-arm", str(config)])
    lines = lines_of(world / "wild")
    assert lines[0]["judge/valid"] > 0.5 > lines[1]["judge/valid"]
    assert lines[0]["rubrics/valid"] > 0 and lines[1]["rubrics/valid"] > 0 == lines[2]["rubrics/valid"]


def test_a_checkpoint_of_both_is_exported_as_either(together, started, tmp_path):
    said = started("export", together, tmp_path / "out").end(2)
    assert "holds both models. Say which of them with --role judge or --role generator" in said
    for role in ("judge", "generator"):
        started("export", together, tmp_path / role, "--role", role).end()
        ours, theirs = (folder / "model.safetensors" for folder in (tmp_path / role, together / role / "export"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.long
def test_eight_devices_train_both_as_one(world, whole, started):
    """With optimizers that begin anew in each round.

    Adam's first update is nearly the sign of the gradient: with its own epsilon a gradient of almost 0 goes either way
    by rounding, by the whole learning rate, and now and then a draw of the second round goes with it.
    """
    smooth = {"optimizer": {"learning_rate": 3e-4, "beta2": 0.95, "epsilon": 1e-4}}
    settings = TOGETHER | {"optimizer_per_phase": "fresh", "generator": smooth, "judge": smooth}
    started("rubric-arm", from_warmup(world, whole, "anew", **settings)).end()
    assert main(["rubric-arm", str(from_warmup(world, whole, "anew_eight", mesh=CUBE, **settings))]) == 0
    assert_nearly_equal(world / "anew_eight", world / "anew")


# ------------------------------------------------------------------------------------------------------ what comes out


def test_others_take_the_two_by_their_folders(world, whole, started, tmp_path):
    arguments = ["--judge", "rubric_judge", "--data", world / "heldout.jsonl", "--output", tmp_path / "eval"]
    settings = ["--model.dtype", "float32", "--sampling.max_new_tokens", "96", "--generator.max_new_tokens", "24"]
    models = ["--model", whole / "judge", "--generator", whole / "generator"]
    started("eval", "pairs", *models, *arguments, *settings, "--generator.model.dtype", "float32").end()
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["generator"]["prompts"] == 10
    said = started("eval", "pairs", "--model", whole, "--generator", whole / "generator", *arguments).end(1)
    assert f"is a run of two models. Give {whole / 'judge'} or {whole / 'generator'} instead" in said


def test_a_checkpoint_is_exported_as_the_model_of_its_phase(whole, started, tmp_path):
    step = max(int(path.name) for path in (whole / "checkpoints").iterdir())
    started("export", whole / "checkpoints" / str(step), tmp_path / "out").end()
    kind = json.loads((tmp_path / "out" / "judge.json").read_text())["judge"]
    assert kind == "rubric"
    names = ("model.safetensors", "config.json", "tokenizer.json")
    for name in names:
        ours, theirs = (folder / name for folder in (tmp_path / "out", whole / "generator" / "export"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_only_what_the_run_goes_on_from_is_kept(whole):
    """The last two checkpoints, and the last one of the judge's last phase."""
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [129, 130, 132]


def test_a_finished_run_is_left_as_it_is(world, whole, started):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and "export" in path.parts}
    said = started("rubric-arm", arms_config(world, "whole")).end()
    assert "132 of 132 steps are done" in said
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_finished_run_on_a_read_only_disk_is_left_as_it_is(world, whole, short, small_disk, capsys):
    disk, remount = small_disk
    remount("96m")
    shutil.copytree(short, disk / "short")
    remount("96m,ro")
    config = from_warmup(world, whole, "put_away", run={"folder": str(disk / "short")}, mesh=CUBE)
    assert main(["rubric-arm", str(config)]) == 0
    assert f"{disk / 'short'} is complete, all 4 steps, and is left as it is" in capsys.readouterr().err
    assert main(["rubric-arm", str(config), "--judge.optimizer.learning_rate", "0.5"]) == 1
    assert f"{disk / 'short'} holds another run" in capsys.readouterr().err


def test_a_model_whose_last_checkpoint_is_gone_is_told_of_before_another_is_trained(world, whole, capsys):
    """In the judge's phase of the second round: the generator would go on from the end of its first one."""
    again = world / "damaged"
    shutil.copytree(whole, again)
    for step in (130, 132):
        shutil.rmtree(again / "checkpoints" / str(step))
    before = (again / "metrics.jsonl").read_bytes()
    assert main(["rubric-arm", str(arms_config(world, "damaged", mesh=CUBE))]) == 1
    said = capsys.readouterr().err
    assert f"{again / 'checkpoints' / '126'} is damaged: it is missing. The generator was to be trained on" in said
    assert (again / "metrics.jsonl").read_bytes() == before


@pytest.mark.long
def test_what_was_learnt_in_vain_is_known_after_a_stop(world, whole, started):
    still = {"steps": 1, "optimizer": {"learning_rate": 0.0}}
    config = from_warmup(world, whole, "in_vain", judge=still, generator=still)
    stopping = started("rubric-arm", config)
    stopping.until(lambda: "compiled in" in stopping.so_far())
    stopping.process.send_signal(signal.SIGTERM)
    stopping.end()
    assert len(lines_of(world / "in_vain")) == 1
    said = started("rubric-arm", config).end(1)
    assert "nothing was learnt in any phase of the rounds" in said
    assert "Raise generator.optimizer.learning_rate, or have fewer generator.optimizer.warmup_steps" in said


REFUSED = {
    "a generator as judge": (
        lambda whole: {"judge": {"path": str(whole / "generator" / "warmup")}},
        "is a generator of the kind rubric, which writes a rubric for a prompt and judges nothing",
    ),
    "a judge as generator": (
        lambda whole: {"generator": {"path": str(whole / "judge" / "warmup")}},
        "is a judge of the kind rubric_judge",
    ),
    "more rounds than pairs": (
        lambda whole: {"rounds": 20},
        "rounds is 20, and its part of the 40 usable pairs, 2, does not fill one batch of judge.pairs_per_step 4",
    ),
    "both in turn on other pairs": (
        lambda whole: {"order": "joint", "judge": {"pairs_per_step": 8}},
        "judge.pairs_per_step is 8 and generator.pairs_per_step 4. Set both to one number",
    ),
    "both in turn on further pairs": (
        lambda whole: {"order": "joint", "judge": {"update": {"algorithm": "dapo"}}},
        "order is joint and judge.update.algorithm is dapo",
    ),
    "no model": (lambda whole: {"judge": {"path": ""}}, "model.path is empty"),
    "prompts that do not fit": (lambda whole: {"data": {"max_prompt_tokens": 20}}, "no preference is short enough"),
}


@pytest.mark.parametrize("changed, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_trained(world, whole, capsys, changed, message):
    assert main(["rubric-arm", str(from_warmup(world, whole, "refused", mesh=CUBE, **changed(whole)))]) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (world / "refused").exists()


def test_another_run_is_not_gone_on_with(world, whole, started):
    said = started("rubric-arm", arms_config(world, "whole", judge={"format_reward": 0.5})).end(1)
    assert "holds another run: judge.format_reward is 1.0 there and 0.5 here" in said


def test_other_responses_are_another_run(world, whole, short, started):
    """With the prompts and ids as they were, which is all that the generator reads."""
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    rows[3]["chosen"], rows[3]["rejected"] = rows[3]["rejected"], rows[3]["chosen"]
    (world / "exchanged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = from_warmup(world, whole, "short", data={"path": str(world / "exchanged.jsonl")})
    assert "holds another run: data is" in started("rubric-arm", config).end(1)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(world, whole, short, started):
    (short / "checkpoints").rename(world / "elsewhere")
    try:
        lines = lines_of(short)
        said = started("rubric-arm", from_warmup(world, whole, "short")).end(1)
        assert "holds a run whose checkpoints are gone" in said and lines_of(short) == lines
    finally:
        shutil.rmtree(short / "checkpoints", ignore_errors=True)
        (world / "elsewhere").rename(short / "checkpoints")


def test_the_report_shows_rubrics_and_what_was_judged_by_them(whole, started):
    started("report", whole).end()
    page = (whole / "report.html").read_text()
    packed = re.findall(r'data-bundle="(\d+)">([^<]*)<', page)
    steps = {int(step): json.loads(gzip.decompress(base64.b64decode(data))) for step, data in packed}
    kept = {row["prompt_id"]: row["text"] for row in rubrics_of(whole, 1)}
    assert all(pair["rubric"] == kept[pair["id"]] for pair in steps[121]["pairs"])
    told = [one for pair in steps[126]["pairs"] for one in (*pair["chosen"], *pair["rejected"])]
    assert len(told) == 16 and all(one["judgement"] for one in told)


def test_a_dry_run_describes_both_models(world, whole, capsys):
    assert main(["rubric-arm", str(from_warmup(world, whole, "dry", mesh=CUBE)), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "generator: update" in out and "judge: update" in out and not (world / "dry").exists()
    assert main(["rubric-arm", str(from_warmup(world, whole, "dry", mesh=CUBE, order="joint")), "--dry-run"]) == 0
    assert "order is joint: beside the programs of one model stay the other's weights" in capsys.readouterr().err
