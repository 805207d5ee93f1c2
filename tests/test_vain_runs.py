"""Runs that learn nothing, or would ruin their weights, through the command line: what they say, save and export."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from patarm_jax.cli import main
from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from patarm_jax.model.transformer import init_params
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.types import UserError
from tests.toys import tiny_model_folder, write_preferences


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny_model_folder(root / "model")
    write_preferences(root / "pairs.jsonl", 8)
    text = (root / "pairs.jsonl").read_text()
    (root / "heldout.jsonl").write_text(text.replace("pair-", "held-").replace("I like", "I love"))
    return root


def started(world, recipe, name, *, code, **sections):
    """What a run says, which must end with this exit code."""
    base = {
        "model": {"path": str(world / "model"), "weights": "random", "dtype": "float32", "remat": "none"},
        "data": {"path": str(world / "pairs.jsonl"), **({"missing_judgements": "template"} if recipe == "sft" else {})},
        "optimizer": {"learning_rate": 0.001},
        "run": {"folder": str(world / name), "steps": 2, "show_every": 0, "tensorboard": False},
        "pairs_per_step": 8,
    }
    if recipe == "grpo":
        base |= {"update": {"kl": {"coef": 0.0}}, "sampling": {"max_new_tokens": 1}, "group_size": 2}
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(base))
    assert main([recipe, str(path)]) == code


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints_of(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.long
def test_a_rate_that_ruins_every_weight_changes_and_exports_none(world, capsys):
    wild = {"optimizer": {"learning_rate": 1e30}}
    started(world, "sft", "wild", code=1, **wild)
    said = last_line(capsys)
    assert said.startswith(f"patarm: {world / 'wild'}: nothing was learnt: 2 of 2 updates were skipped, because the")
    assert "optimizer.learning_rate, 1e+30, is too high: lower it. Nothing is exported" in said
    assert not (world / "wild" / "export").exists()
    assert [line["skipped_updates"] for line in steps_of(world / "wild")] == [1, 2]
    # A longer run counts on; the same command says the same again.
    started(world, "sft", "wild", code=1, run={"steps": 3}, **wild)
    assert "nothing was learnt: 3 of 3 updates were skipped" in last_line(capsys)
    started(world, "sft", "wild", code=1, run={"steps": 3}, **wild)
    assert "nothing was learnt: 3 of 3 updates were skipped" in last_line(capsys)
    # The remedy: the same at a lower rate.
    started(world, "sft", "tame", code=0)
    assert "done: " in last_line(capsys)


@pytest.mark.long
def test_too_many_skipped_updates_end_a_run(world, capsys):
    """And what is saved then is sound, and can be exported, as the sentence says."""
    started(world, "sft", "ending", code=1, optimizer={"learning_rate": 1e30}, run={"steps": 9, "max_skipped": 3})
    said = last_line(capsys)
    assert said.startswith(
        "patarm: stopped at step 3 of 9: 3 updates in a row were skipped, and run.max_skipped is 3: "
    )
    assert f"saved as {world / 'ending' / 'checkpoints' / '3'}, which `patarm export` takes" in said
    assert checkpoints_of(world / "ending") == [3]
    assert main(["export", str(world / "ending" / "checkpoints" / "3"), str(world / "saved")]) == 0
    saved = weights.load(world / "saved")[0]
    at_first = init_params(read_architecture(world / "model"), jax.random.key(0))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), saved, at_first)


@pytest.mark.long
def test_the_first_skipped_update_ends_a_run_where_it_is_to(world, capsys):
    sections = {"optimizer": {"learning_rate": 1e30}, "run": {"steps": 9, "on_nonfinite": "stop"}}
    started(world, "sft", "strict", code=1, **sections)
    assert "stopped at step 1 of 9: run.on_nonfinite is stop, and 1 of 1 updates were skipped" in last_line(capsys)
    sections["run"]["steps"] = 1  # where nothing is left to do, the same command ends as it did
    started(world, "sft", "strict", code=1, **sections)
    assert "stopped at step 1 of 1: run.on_nonfinite is stop, and 1 of 1 updates were skipped" in last_line(capsys)


@pytest.mark.long
def test_judgements_that_are_all_cut_off_teach_nothing(world, capsys):
    started(world, "grpo", "short", code=1)
    said = capsys.readouterr().err.splitlines()
    cut = "step 1: in 1 of 1 steps all that was written was cut off at the limit."
    assert any(line.startswith(cut) for line in said)
    assert any(line.startswith("step 2/2  reward -1.5  readable 0 %  cut off 100 %") for line in said)
    assert said[-1].startswith(f"patarm: {world / 'short'}: nothing but the format penalty was learnt: in 2 of 2 steps")
    assert "All cut off: raise sampling.max_new_tokens, which is 1." in said[-1]
    assert (world / "short" / "export" / "model.safetensors").exists()
    assert main(["report", str(world / "short")]) == 0


@pytest.mark.long
def test_held_out_judgements_that_cannot_be_read_are_said_while_it_goes(world, capsys):
    heldout = {"path": str(world / "heldout.jsonl"), "eval_every": 1, "sampling": {"max_new_tokens": 1}}
    started(world, "sft", "mute", code=0, heldout=heldout, run={"steps": 1})
    said = capsys.readouterr().err.splitlines()
    [warning] = [line for line in said if line.startswith("step 1: ")]
    assert "in 1 of 1 evaluations every judgement of the held-out pairs was cut off at the limit" in warning
    assert "raise heldout.sampling.max_new_tokens, which is 1" in warning
    # The only evaluation is the best, though its checkpoint is saved as the last thing of all.
    assert f"best on the held-out pairs: {world / 'mute'}/checkpoints/1, which `patarm export` takes" in said


@pytest.mark.long
def test_a_rate_of_zero_learns_nothing(world, capsys):
    started(world, "sft", "still", code=1, run={"steps": 1}, optimizer={"warmup_steps": 5})
    assert "nothing was learnt: the learning rate was 0 in each of the 1 steps." in last_line(capsys)


@pytest.fixture
def ruined(world):
    """A model of which one weight is no number."""
    params = init_params(read_architecture(world / "model"), jax.random.key(0))
    params["norm"] = params["norm"].at[2].set(jnp.nan)
    if not (folder := world / "ruined").exists():
        tiny_model_folder(folder)
        weights.save(params, read_architecture(world / "model"), world / "nan", dtype="float32")
        (world / "nan" / "model.safetensors").rename(folder / "model.safetensors")
    return params


def test_ruined_weights_are_refused_by_name(ruined):
    with pytest.raises(UserError, match=r"^here: the weights norm hold numbers that are not finite or beyond 65,504"):
        refuse_ruined(ruined, "here", "Mend")
    refuse_ruined({"norm": jnp.ones(3)}, "here", "Mend")
    with pytest.raises(UserError, match=r"the weights a\.b and 1 more hold"):
        refuse_ruined({"a": {"b": jnp.array([1e30])}, "c": jnp.array([jnp.inf])}, "here", "Mend")


def test_a_model_with_ruined_weights_is_not_trained(world, ruined, capsys):
    started(world, "sft", "hopeless", code=1, model={"path": str(world / "ruined"), "weights": "load"})
    assert f"the model {world / 'ruined'}: the weights norm hold numbers that are not finite" in last_line(capsys)
    assert not (world / "hopeless" / "config.yaml").exists()
