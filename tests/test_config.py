"""The config is the whole truth: what is written is read back, and what is not known is refused."""

from pathlib import Path

import pytest
import yaml

from patarm_jax.config import GRPOConfig, JudgeConfig, SFTConfig, dotted_keys, from_mapping, load, override, to_yaml
from patarm_jax.types import UsageError, UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("cls", [SFTConfig, GRPOConfig, JudgeConfig])
def test_what_is_written_is_read_back(cls):
    config = override(cls(), ["--data.drop_sources", "a", "b", "--model.path", "somewhere", "--mesh.tensor", "2"])
    assert config.data.drop_sources == ("a", "b") and config.mesh.tensor == 2
    assert from_mapping(cls, yaml.safe_load(to_yaml(config)), "there") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads_and_says_what_it_is(path):
    config = load(GRPOConfig if "grpo" in path.stem else SFTConfig, path)
    assert config.run.folder and config.data.path and config.model.path
    head = path.read_text().split("\n\n")[0]
    for word in ("command", "hardware", "time", "out", f"patarm {config.recipe} configs/{path.name}"):
        assert word in head


def test_there_is_a_config_for_every_size():
    sizes = ("tiny", "qwen3_8b", "qwen3_14b")
    assert {path.stem for path in CONFIGS} == {f"{size}_{recipe}" for size in sizes for recipe in ("sft", "grpo")}


def test_numbers_as_yaml_and_people_write_them():
    config = from_mapping(SFTConfig, yaml.safe_load("optimizer: {learning_rate: 1e-6, clip_norm: 1}"), "there")
    assert (config.optimizer.learning_rate, config.optimizer.clip_norm) == (1e-6, 1.0)


def test_one_column_or_several():
    config = from_mapping(SFTConfig, {"data": {"columns": {"prompt": "input", "chosen": ["a", "b"]}}}, "there")
    assert config.data.columns == {"prompt": ("input",), "chosen": ("a", "b")}


REFUSED = {
    "unknown section": ({"optimiser": {}}, "unknown key optimiser. Did you mean optimizer?"),
    "unknown key": ({"run": {"sede": 1}}, "unknown key run.sede. Did you mean run.seed?"),
    "nothing near": ({"run": {"zzz": 1}}, "unknown key run.zzz. Known are: folder, seed"),
    "wrong type": ({"run": {"seed": "x"}}, "Expected `int`, got `str` for run.seed"),
    "wrong choice": ({"model": {"dtype": "float8"}}, "Invalid enum value 'float8' for model.dtype"),
    "a section that is none": ({"run": 3}, "run is a section of keys, got 3"),
    "another recipe's config": ({"recipe": "grpo"}, "Invalid enum value 'grpo' for recipe"),
    "zero": ({"pairs_per_step": 0}, "pairs_per_step is 0; allowed is 1 or more"),
    "negative": ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate is -1.0; allowed is 0 or more"),
    "a share above one": ({"optimizer": {"final_fraction": 1.5}}, "optimizer.final_fraction is 1.5; allowed is 0 to 1"),
    "not a number": ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate is nan"),
}


@pytest.mark.parametrize(("mapping", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_meant_is_refused_by_name(mapping, says):
    with pytest.raises(UsageError) as error:
        from_mapping(SFTConfig, mapping, "there.yaml")
    assert str(error.value).startswith("there.yaml: ") and says in str(error.value)


def test_overrides_are_refused_by_name():
    for arguments, says in [
        (["--run.sed", "1"], "unknown option --run.sed. Did you mean --run.seed?"),
        (["--run.seed", "x"], "run.seed"),
        (["--optimizer.decay", "square"], "'constant', 'linear', 'cosine'"),
        (["--pairs_per_step", "0"], "pairs_per_step is 0; allowed is 1 or more"),
    ]:
        with pytest.raises(UsageError) as error:
            override(SFTConfig(), arguments)
        assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "just words"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load(SFTConfig, path)


def test_dotted_keys_name_every_setting():
    keys = dotted_keys(GRPOConfig)
    assert "policy.clip_high" in keys and "group_size" in keys and "policy" not in keys
