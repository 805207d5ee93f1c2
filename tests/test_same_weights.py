"""A run knows the weights it began with, and those its KL is measured from, by a digest and not by their path."""

import copy
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy
import yaml

from patarm_jax.cli import main
from patarm_jax.config.recipes import GRPOConfig, RewardModelConfig, SFTConfig
from patarm_jax.config.sections import KLSection, LoRASection, ModelSection, UpdateSection
from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from patarm_jax.model.transformer import init_params
from patarm_jax.model.weight_files import HEAD, digest, read_stored
from patarm_jax.run.open_model import judge_digest, open_model, weights_digest
from patarm_jax.run.whose import fingerprint, refuse_another_run, with_known_start
from patarm_jax.types import UserError
from tests.runs import VAIN
from tests.toys import tiny_model_folder, write_preferences


def model_folder(path, seed=0, shard="5GB", scale=1.0, **changes):
    """A tiny Qwen3 with random weights, in one file or in shards."""
    tiny_model_folder(path, **changes)
    config = read_architecture(path)
    params = jax.tree.map(lambda x: x * scale, init_params(config, jax.random.key(seed)))
    (path / "config.json").unlink()
    weights.save(params, config, path.with_name("fresh"), dtype="float32", max_shard_size=shard)
    for file in path.with_name("fresh").iterdir():
        if file.name != "generation_config.json":
            file.rename(path / file.name)
    shutil.rmtree(path.with_name("fresh"))
    return path


def test_a_digest_is_of_the_weights_and_of_nothing_else(tmp_path):
    folder = model_folder(tmp_path / "one")
    known = digest(read_stored(folder))
    assert len(known) == 16
    assert digest(read_stored(model_folder(tmp_path / "shards", shard="20KB"))) == known
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shutil.copytree(folder, tmp_path / "copied")
    assert digest(read_stored(tmp_path / "copied")) == known
    assert digest(read_stored(model_folder(tmp_path / "other", seed=1))) != known
    for place in (0, -1):  # one number, wherever it stands
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        name = "model.embed_tokens.weight"
        tensors[name].reshape(-1)[place] += 1
        safetensors.numpy.save_file(tensors, tmp_path / "copied" / "model.safetensors", {"format": "pt"})
        assert digest(read_stored(tmp_path / "copied")) != known


def test_a_copy_of_the_embedding_that_is_not_read_does_not_count(tmp_path):
    folder = model_folder(tmp_path / "one")
    known = digest(read_stored(folder))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert digest(read_stored(folder)) == known


def test_a_large_model_is_known_by_a_part_of_every_tensor(tmp_path):
    folder = model_folder(tmp_path / "large", intermediate_size=3 << 16, num_hidden_layers=1)
    known = digest(read_stored(folder))
    assert (folder / "model.safetensors").stat().st_size > 1 << 26
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        changed = tensors | {name: np.nextafter(tensors[name], np.inf)}
        safetensors.numpy.save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert digest(read_stored(folder)) != known, name


def test_a_judge_is_its_weights_and_its_tokenizer(tmp_path):
    model_folder(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "copied")
    one, copied = (open_model(ModelSection(path=str(tmp_path / name))) for name in ("one", "copied"))
    assert judge_digest(one) == judge_digest(copied)
    (tmp_path / "copied" / "chat_template.jinja").write_text(
        (tmp_path / "one" / "chat_template.jinja").read_text() + " "
    )
    copied = open_model(ModelSection(path=str(tmp_path / "copied")))
    assert judge_digest(one) != judge_digest(copied) and weights_digest(one) == weights_digest(copied)


# ---- What a run is known by ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    model_folder(root / "start")
    shutil.copytree(root / "start", root / "copied")
    model_folder(root / "other", seed=1)
    shutil.copytree(root / "start", root / "bare")
    (root / "bare" / "model.safetensors").unlink()
    return root


def whose(models, start="start", reference="", kl=0.1, random=False):
    section = ModelSection(path=str(models / start), weights="random" if random else "load")
    path = str(models / reference) if reference else ""
    config = GRPOConfig(model=section, update=UpdateSection(kl=KLSection(coef=kl), reference=path))
    config = config.complete()
    model = open_model(section)
    other = open_model(replace(section, path=path, weights="load")) if reference else model
    return json.loads(json.dumps(fingerprint(config, model, [], other if kl else None)))


SAME = {
    "as it was": ({}, {}),
    "another spelling of the path": ({}, {"start": "../{}/start"}),
    "a copy": ({}, {"start": "copied"}),
    "the reference named, which is what training starts from": ({}, {"reference": "start"}),
    "the reference by another path": ({"reference": "start"}, {"reference": "copied"}),
    "no weights any more": ({"kl": 0.0}, {"kl": 0.0, "start": "bare"}),
    "no weights any more, and a reference": ({"reference": "other"}, {"start": "bare", "reference": "other"}),
    "random weights": ({"random": True}, {"random": True}),
}


@pytest.mark.parametrize(("then", "now"), SAME.values(), ids=SAME.keys())
def test_the_same_weights_are_the_same_run(models, then, now):
    now = {k: v.format(models.name) if isinstance(v, str) else v for k, v in now.items()}
    refuse_another_run("it", whose(models, **now), whose(models, **then))


@pytest.mark.parametrize("cls", [SFTConfig, GRPOConfig, RewardModelConfig])
def test_a_run_of_an_earlier_version_goes_on(models, cls):
    """It knew of no adapters, of one kind of network and of moments, and of one head of a reward model."""
    section = ModelSection(path=str(models / "start"))
    model, config = open_model(section), cls(model=section)
    now = json.loads(json.dumps(fingerprint(config, model, [])))
    then = copy.deepcopy({name: value for name, value in now.items() if name not in ("lora", "head")})
    del then["optimizer"]["moments"], then["model"]["model_type"]
    refuse_another_run("it", now, then)
    of_two = {"judge network": now["model"]}  # as Rubric-ARM has them
    refuse_another_run("it", of_two, {"judge network": then["model"]})
    turned = replace(config, lora=LoRASection(targets=config.lora.targets[::-1]))
    refuse_another_run("it", json.loads(json.dumps(fingerprint(turned, model, []))), now)
    adapted = json.loads(json.dumps(fingerprint(replace(config, lora=LoRASection(rank=4)), model, [])))
    with pytest.raises(UserError, match=r"lora.rank is 0 there and 4 here"):
        refuse_another_run("it", adapted, then)


OTHER = {
    "another reference": ({}, {"start": "other"}, "its KL is measured from other weights, "),
    "another one named": (
        {"reference": "other"},
        {"reference": "copied"},
        "that holds them as update.reference",
    ),
    "another start": ({"reference": "copied"}, {"start": "other", "reference": "start"}, "it began with other weights"),
    "another start without KL": ({"kl": 0.0}, {"kl": 0.0, "start": "other"}, "it began with other weights"),
    "random, then loaded": ({"random": True, "kl": 0.0}, {"kl": 0.0}, "random ones for "),
}


@pytest.mark.parametrize(("then", "now", "said"), OTHER.values(), ids=OTHER.keys())
def test_other_weights_are_another_run(models, then, now, said):
    with pytest.raises(UserError) as refused:
        refuse_another_run("it", whose(models, **now), whose(models, **then))
    assert said in str(refused.value) and " there and " in str(refused.value)


def test_a_run_without_its_first_weights_remembers_them(models):
    then, now = whose(models, kl=0.0), whose(models, "bare", kl=0.0)
    assert with_known_start(now, then)["weights"] == then["weights"]
    assert with_known_start(whose(models, "other", kl=0.0), then) == whose(models, "other", kl=0.0)
    with pytest.raises(UserError, match="it began with other weights"):
        refuse_another_run("it", whose(models, "other", kl=0.0), with_known_start(now, then))


def test_a_run_of_an_earlier_version_knows_its_reference_by_path(models):
    now = whose(models)
    then = {name: value for name, value in now.items() if name != "weights"} | {"reference": str(models / "start")}
    refuse_another_run("it", now, then)
    with pytest.raises(UserError, match=r"the KL reference is '.*start' there and '.*copied' here"):
        refuse_another_run("it", whose(models, "copied"), then)


# ---- In a run ----


@pytest.mark.long
def test_weights_that_changed_at_their_path_stop_a_resumed_run(models, tmp_path, capsys):
    write_preferences(tmp_path / "pairs.jsonl")
    shutil.copytree(models / "start", tmp_path / "model")
    config = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32", "remat": "none"},
        "data": {"path": str(tmp_path / "pairs.jsonl")},
        "run": {"folder": str(tmp_path / "run"), "steps": 1, "tensorboard": False},
        "sampling": {"max_new_tokens": 4},
        "pairs_per_step": 8,
        "group_size": 2,
    }
    (tmp_path / "grpo.yaml").write_text(yaml.safe_dump(config))

    def grpo(*more):
        capsys.readouterr()
        return main(["grpo", str(tmp_path / "grpo.yaml"), *map(str, more)])

    assert grpo() == VAIN["grpo"]
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.copy(models / "other" / "model.safetensors", tmp_path / "model")
    assert grpo("--run.steps", 2) == 1
    assert "checkpoints/1 is a checkpoint of another run: its KL is measured from other weights" in (
        capsys.readouterr().err
    )
    # The remedy that was named.
    assert grpo("--run.steps", 2, "--update.reference", tmp_path / "moved") == 1
    assert "it began with other weights" in capsys.readouterr().err
    assert grpo("--run.steps", 2, "--model.path", f"{tmp_path}/./moved") == VAIN["grpo"]
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.long
def test_a_run_that_has_a_checkpoint_needs_its_first_weights_no_more(models, tmp_path, capsys):
    write_preferences(tmp_path / "pairs.jsonl")
    text = yaml.safe_dump(
        {
            "model": {"path": str(models / "start"), "dtype": "float32", "remat": "none"},
            "data": {"path": str(tmp_path / "pairs.jsonl"), "missing_judgements": "template"},
            "run": {"folder": str(tmp_path / "run"), "steps": 1, "tensorboard": False},
            "pairs_per_step": 8,
        }
    )
    (tmp_path / "sft.yaml").write_text(text)
    command = ["sft", str(tmp_path / "sft.yaml"), "--run.steps"]
    assert main([*command, "1"]) == 0
    capsys.readouterr()
    assert main([*command, "2", "--model.path", str(models / "other")]) == 1
    assert "A run that has saved a checkpoint also goes on with a folder" in capsys.readouterr().err
    assert main([*command, "2", "--model.path", str(models / "bare")]) == 0
    assert main([*command, "3", "--model.path", str(models / "other")]) == 1  # what it began with is not forgotten
    # A run of an earlier version, whose folder names no digests.
    mark = tmp_path / "run" / ".patarm_run.json"
    noted = json.loads(mark.read_text())
    weights_of = noted.pop("weights")
    mark.write_text(json.dumps(noted))
    capsys.readouterr()
    assert main([*command, "2", "--model.path", str(models / "start")]) == 0
    assert "did not note which weights it had; they are assumed to be the same" in capsys.readouterr().err
    assert json.loads(mark.read_text())["weights"]["start"]["digest"] == weights_of["start"]["digest"]


def test_a_run_begun_when_the_update_was_called_policy_goes_on(models):
    now = whose(models)
    then = {name: value for name, value in now.items() if name != "update"}
    known = {name: now["update"][name] for name in ("clip_low", "clip_high", "aggregation", "updates_per_rollout")}
    then["policy"] = known | {"kl_coef": now["update"]["kl"]["coef"]}
    refuse_another_run("it", now, then)
    refuse_another_run("it", now, {**now, "update": then["policy"] | {"algorithm": "grpo"}})
    changed = then | {"policy": then["policy"] | {"clip_low": 0.1}}
    with pytest.raises(
        UserError, match=r"it is a checkpoint of another run: update.clip_low is 0.1 there and 0.2 here"
    ):
        refuse_another_run("it", now, changed)
    with pytest.raises(UserError, match=r"update.algorithm is 'grpo' there and 'gspo' here"):
        refuse_another_run("it", now | {"update": now["update"] | {"algorithm": "gspo"}}, then)
