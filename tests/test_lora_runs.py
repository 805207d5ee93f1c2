"""Runs that train adapters: they resume, learn on any mesh alike, and leave what others load."""

import contextlib
import io
import itertools
import json
import re
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.numpy
import yaml

from patarm_jax.cli import main
from tests.runs import (
    CUBE,
    VAIN,
    assert_nearly_equal,
    config_file,
    exported,
    judged_texts,
    lines_of,
    run_as_two,
    run_whole_and_killed,
    timeless,
)

# PEFT asks transformers by a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"rank": 4, "alpha": 8.0}
NONE_HELD_OUT = {"path": ""}
KINDS = {
    "sft": ("sft", {}),
    # The KL is measured from the weights without their adapters, where it begins with nothing, and no judgement of
    # random weights can be read: only lengths make rewards differ, which DAPO's sampling looks for.
    "grpo": (
        "grpo",
        {
            "update": {"algorithm": "dapo", "reference": "", "updates_per_rollout": 1},
            "dapo": {"overlong_buffer": 8, "max_rounds": 3},
        },
    ),
    "moments": ("sft", {"optimizer": {"moments": "bfloat16"}}),
    "scalar": ("reward_model", {}),
    "ordinal": ("reward_model", {"head": "ordinal"}),
}


def of(world, kind, fate, **sections):
    recipe, own = KINDS[kind]
    start = {"model": {"path": str(world / "reference"), "weights": "load"}}
    name = f"lora_{kind}_{fate}"
    config = config_file(world, name, recipe, **{"lora": LORA} | start | own | sections)
    # What is held out is drawn, which a reward model does not do: none of it stays.
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"heldout": NONE_HELD_OUT}))
    return recipe.replace("_", "-"), config, world / name


@pytest.fixture(scope="module")
def adapters(world):
    """A run that has exported its adapters alone, and the whole model exported from it."""
    _, config, run = of(world, "sft", "adapter", run={"steps": 3}, lora=LORA | {"export": "adapter"})
    assert main(["sft", str(config), "--mesh.fsdp", "8", "--pairs_per_step", "8"]) == 0
    assert lines_of(run)[-1]["loss"] < lines_of(run)[0]["loss"]
    assert main(["export", str(run), str(world / "merged"), "--lora", "merged"]) == 0
    return run


def test_adapters_that_a_run_exports_are_the_model_that_it_exports(world, adapters, capsys):
    """Nothing but the targets is another than in the model it began with, and PEFT's loader finds the same model."""
    export, base = adapters / "export", world / "reference"
    there = {path.name for path in export.iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md", "judge.json"} <= there - {"config.json"}
    whole = safetensors.numpy.load_file(world / "merged" / "model.safetensors")
    before = safetensors.numpy.load_file(base / "model.safetensors")
    changed = {name.split(".")[-2] for name in whole if not np.array_equal(whole[name], before[name])}
    assert changed == set(TARGETS)
    card = (export / "README.md").read_text()
    assert f'LLM("{base}", enable_lora=True, max_lora_rank=8)' in card and "library_name: peft" in card
    assert "with peft installed" in card and "| LoRA adapters | rank 4, alpha 8, of q_proj, " in card
    assert "rank 4, alpha 8, of q_proj, " in (world / "merged" / "README.md").read_text()

    torch = pytest.importorskip("torch", reason="PEFT needs torch")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tokens = torch.arange(12)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, export)(tokens).logits
        merged = transformers.AutoModelForCausalLM.from_pretrained(world / "merged", dtype=torch.float32)(tokens).logits
    np.testing.assert_allclose(theirs, merged, rtol=1e-4, atol=1e-4)


def test_adapters_are_put_on_no_other_weights(world, adapters, capsys):
    """Of the same shapes: neither when they are named beside them, nor when their run is exported once more."""
    base = world / "reference"
    shutil.copytree(base, world / "other", dirs_exist_ok=True)
    doubled = {name: 2 * value for name, value in safetensors.numpy.load_file(base / "model.safetensors").items()}
    safetensors.numpy.save_file(doubled, world / "other" / "model.safetensors", metadata={"format": "pt"})
    named = ["--model.adapter", str(adapters / "export")]
    assert main(["judge", str(world / "other"), "--input", "x", "--output", "y", *named]) == 1
    assert "were trained beside other weights" in capsys.readouterr().err

    shutil.copytree(adapters, world / "moved", dirs_exist_ok=True)
    config = (world / "moved" / "config.yaml").read_text().replace(str(base), str(world / "other"))
    (world / "moved" / "config.yaml").write_text(config)
    assert main(["export", str(world / "moved"), str(world / "again")]) == 1
    said = capsys.readouterr().err
    assert "its adapters were trained beside" in said and "lies there now" in said and not (world / "again").exists()


@pytest.mark.long
def test_a_judge_is_the_same_merged_or_beside_its_adapters(world, adapters):
    (world / "five.jsonl").write_text("".join((world / "heldout.jsonl").read_text().splitlines(keepends=True)[:5]))

    def asked(name, *model):
        out = world / name
        command = ["eval", "pairs", "--data", str(world / "five.jsonl"), "--output", str(out), *map(str, model)]
        assert main([*command, "--model.dtype", "float32", "--sampling.max_new_tokens", "8", "--seed", "3"]) == 0
        return [row["text"] for row in pyarrow.parquet.read_table(out / "judgements.parquet").to_pylist()]

    base = world / "reference"
    of_merged = asked("of merged", "--model", world / "merged")
    assert of_merged == asked("of the run", "--model", adapters)
    of_both = asked("of both", "--model", base, "--model.adapter", adapters / "export")
    assert of_merged == of_both != asked("of the base", "--model", base)


@pytest.mark.long
def test_the_reference_is_the_weights_without_adapters(world, monkeypatch):
    """The same numbers as with the base loaded once more; no KL before the first update, and some after it."""
    two = {"run": {"steps": 2}, "optimizer": {"warmup_steps": 0}}
    # Every judgement counts, not only those of groups with a spread.
    update = {"algorithm": "grpo", "updates_per_rollout": 1}
    once = of(world, "grpo", "once", **two, update=update | {"reference": ""}, dapo={})
    _, again, loaded = of(
        world, "grpo", "loaded", **two, update=update | {"reference": str(world / "reference")}, dapo={}
    )
    assert main(["grpo", str(once[1])]) == VAIN["grpo"]
    calls = itertools.count()  # no two weights are the same, so that the reference is loaded once more
    monkeypatch.setattr("patarm_jax.recipes.reinforce.weights_digest", lambda model: next(calls))
    assert main(["grpo", str(again)]) == VAIN["grpo"]
    assert next(calls) == 2
    assert timeless(once[2]) == timeless(loaded)
    first, second = lines_of(loaded)
    assert abs(first["kl"]) < 1e-9 and second["kl"] > 1e-6


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_like_a_whole_one(world, started, kind):
    recipe, config, whole = of(world, kind, "whole")
    _, stopped, folder = of(world, kind, "killed")
    run_whole_and_killed(started, recipe, config, stopped, folder, VAIN.get(recipe, 0))
    assert len(timeless(folder)) == 7 and timeless(folder) == timeless(whole)
    assert exported(folder) == exported(whole)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_and_slices_learn_as_one(world, started, kind):
    two = {"run": {"steps": 2}, "optimizer": KINDS[kind][1].get("optimizer", {}) | {"learning_rate": 1e-3}}
    two["pairs_per_step"] = 8  # two slices on four devices: a reward model's pairs are never cut
    recipe, config, one = of(world, kind, "one", **two)
    started(recipe, config).end(VAIN.get(recipe, 0))
    _, config, eight = of(world, kind, "eight", **two, mesh=CUBE, micro_batches=2)
    assert main([recipe, str(config)]) == VAIN.get(recipe, 0)
    assert lines_of(one)[0]["grad_norm"] > 1e-3  # or rounding alone would be compared
    assert_nearly_equal(eight, one)
    assert judged_texts(one) == judged_texts(eight) if recipe == "grpo" else True


@pytest.mark.long
@pytest.mark.parametrize("kind", ["grpo", "scalar"])
def test_two_processes_learn_as_one(world, started, kind):
    """Weights beside adapters, merged weights and a head are each on both, and one of the two writes them."""
    two = {"run": {"steps": 2}, "optimizer": {"learning_rate": 1e-3}, "pairs_per_step": 8}
    recipe, config, one = of(world, kind, "alone", **two, mesh=CUBE)
    assert main([recipe, str(config)]) == VAIN.get(recipe, 0)
    assert lines_of(one)[0]["grad_norm"] > 1e-3
    _, config, pod = of(world, kind, "pod", **two, mesh={**CUBE, "distributed": "auto"})
    run_as_two(started, recipe, config, VAIN.get(recipe, 0))
    assert_nearly_equal(pod, one)
    assert judged_texts(one) == judged_texts(pod) if recipe == "grpo" else True
    ours, theirs = (safetensors.numpy.load_file(folder / "export" / "model.safetensors") for folder in (pod, one))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "scalar", "ordinal"])
def test_the_code_of_an_adapters_card_gives_what_the_merged_models_gives(world, kind):
    pytest.importorskip("torch", reason="the card's code needs torch")
    pytest.importorskip("peft")
    half = {"model": {"path": str(world / "reference"), "weights": "load"}, "optimizer": {"warmup_steps": 0}}
    verb, config, run = of(world, kind, "carded", **half, run={"steps": 2}, lora=LORA | {"export": "adapter"})
    assert main([verb, str(config), "--mesh.fsdp", "8", "--pairs_per_step", "8"]) == 0
    assert main(["export", str(run), str(world / f"{kind}_merged"), "--lora", "merged"]) == 0

    def given(folder):
        card = (folder / "README.md").read_text()
        name = re.search(r"^# (.+)$", card, re.MULTILINE)[1]
        code = re.search(r"```python\n(import torch.*?)```", card, re.DOTALL)[1].replace(f'"{name}"', repr(str(folder)))
        known = {}
        code = code.replace("output = ", "torch.manual_seed(0)\noutput = ")  # loading adapters draws, too
        code = code.replace('dtype="auto"', 'dtype="float32"').replace("max_new_tokens=2048", "max_new_tokens=24")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "card", "exec"), known)
        return known.get("text"), printed.getvalue()

    (text, printed), (merged_text, merged_printed) = given(run / "export"), given(world / f"{kind}_merged")
    assert text == merged_text
    if kind == "sft":
        assert text and printed == merged_printed == "None\n"  # this model writes nothing that could be read
    else:
        assert float(printed) == pytest.approx(float(merged_printed), rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_dry_run_shows_the_batch_and_no_weights(world, capsys, kind):
    recipe, config, folder = of(world, kind, "dry")
    assert main([recipe, str(config), "--dry-run", "--pairs_per_step", "8"]) == 0
    shown = capsys.readouterr().out
    assert "GiB of temporary memory" in shown and "the weights beside adapters" in shown and not folder.exists()
    assert "[2, 32, 4, 8]" not in shown  # q_proj of both layers


FAULTS = {
    "scale without rank": (["--lora.rank", "0", "--lora.alpha", "3"], "lora.alpha is set, and lora.rank is 0"),
    "no such weight": (["--lora.targets", "lm_head"], "Invalid enum value 'lm_head'"),
    "twice": (["--lora.targets", "q_proj", "q_proj"], "one or more of q_proj"),
    "of random weights": (["--lora.export", "adapter", "--model.weights", "random"], "Set lora.export to merged."),
    "no adapter": (["--model.adapter", "."], "holds no adapter_config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_makes_no_sense_is_refused(world, capsys, fault):
    flags, said = FAULTS[fault]
    _, config, _ = of(world, "sft", "refused")
    assert main(["sft", str(config), *flags]) in (1, 2)
    assert said in capsys.readouterr().err


def test_adapters_of_another_kind_are_refused_by_name(world, tmp_path, capsys):
    """DoRA, other tensors, other shapes: the file and what is wrong with it are said."""
    _, config, _ = of(world, "sft", "foreign")

    def refused(tensors, **changes):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | changes
        (folder / "adapter_config.json").write_text(json.dumps(about))
        safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
        assert main(["sft", str(config), "--model.adapter", str(folder)]) == 1
        return capsys.readouterr().err

    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    good = {}
    for layer in range(2):
        good[name.format(layer, "A")] = np.zeros((2, 32), np.float32)
        good[name.format(layer, "B")] = np.zeros((32, 2), np.float32)
    assert "use_dora is True" in refused(good, use_dora=True)
    assert "peft_type is 'LOHA'" in refused(good, peft_type="LOHA")
    assert "init_lora_weights is 'pissa'" in refused(good, init_lora_weights="pissa")
    assert "r is 0" in refused(good, r=0)
    assert "is missing (1 missing in all)" in refused(
        {k: v for k, v in good.items() if "1.self_attn.q_proj.lora_B" not in k}
    )
    assert "belongs to no weight that can have adapters" in refused(
        good | {"base_model.model.lm_head.lora_A.weight": good[name.format(0, "A")]}
    )
    wide = {key: np.zeros((2, 48), np.float32) if "lora_A" in key else value for key, value in good.items()}
    assert "has shape [2, 48] and the model asks for [2, 32]. The adapters are of another model" in refused(wide)
