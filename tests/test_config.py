"""The config is the whole truth: what is written is read back, and what is not known is refused."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from patarm_jax.config.building import BuildConfig
from patarm_jax.config.flags import dotted_keys
from patarm_jax.config.help import comments_of, settings_in_words
from patarm_jax.config.load import TRAINING, from_mapping, load, load_run, override, read_yaml, to_yaml
from patarm_jax.config.policy import DPOConfig
from patarm_jax.config.presets import CHOSEN_BY_ALGORITHM, PRESETS, WEIGHS_SEQUENCES, value_at
from patarm_jax.config.recipes import BenchConfig, EvalConfig, GRPOConfig, JudgeConfig, RewardModelConfig, SFTConfig
from patarm_jax.config.rubric_arm import RubricArmConfig
from patarm_jax.config.sections import limits_of
from patarm_jax.recipes.programs import algorithm_of
from patarm_jax.train.penalties import KLPenalty
from patarm_jax.types import UsageError, UserError

EVERY = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SETS = [path for path in EVERY if path.stem in ("data_paper", "tiny_data")]  # of `patarm data build`
CONFIGS = [path for path in EVERY if path not in SETS]


@pytest.mark.parametrize("cls", [SFTConfig, GRPOConfig, RewardModelConfig, RubricArmConfig, DPOConfig, JudgeConfig])
def test_what_is_written_is_read_back(cls):
    config = override(cls(), ["--data.drop_sources", "a", "b", "--model.path", "somewhere", "--mesh.tensor", "2"])
    assert config.data.drop_sources == ("a", "b") and config.mesh.tensor == 2
    assert from_mapping(cls, yaml.safe_load(to_yaml(config)), "there") == config


def recipe_of(path):
    return next(config for name, config in TRAINING.items() if path.stem.endswith(name))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads_and_says_what_it_is(path):
    config = load(recipe_of(path), path)
    assert config.run.folder and config.data.path and config.model.path
    head = path.read_text().split("\n\n")[0]
    for word in ("command", "hardware", "time", "out", f"patarm {config.recipe.replace('_', '-')} configs/{path.name}"):
        assert word in head


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_every_config_of_a_set_loads_and_says_what_it_is(path):
    config = load(BuildConfig, path)
    head, last = path.read_text().split("\n\n")[0], len(config.stages)
    for word in (
        "command",
        "hardware",
        "time",
        f"patarm data build configs/{path.name}",
        f"{config.folder}/{last:02}-write",
    ):
        assert word in head
    assert from_mapping(BuildConfig, yaml.safe_load(to_yaml(config)), "there") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_resolved_config_says_every_setting(path):
    """What the file leaves out too, which the next version may have another default for."""
    config = load(recipe_of(path), path, ["--run.seed", "3"])
    written = yaml.safe_load(to_yaml(config))
    for key in dotted_keys(type(config)):
        value = written
        for part in key.split("."):
            value = value[part]
    assert written["run"]["seed"] == 3 and from_mapping(type(config), written, "there") == config


def test_there_is_a_config_for_every_size():
    kinds = ("tiny", "tiny_pairwise", "qwen3_8b", "qwen3_8b_pairwise", "qwen3_14b")
    found = {path.stem for path in CONFIGS}
    further = {"tiny_dapo_grpo", "tiny_reward_model", "qwen3_8b_reward_model", "tiny_lora_grpo", "qwen3_8b_lora_grpo"}
    further |= {"tiny_policy", "qwen3_8b_policy", "tiny_dpo", "qwen3_8b_dpo"}
    further |= {"tiny_iterative_dpo", "qwen3_8b_iterative_dpo", "qwen2_7b_rlcf_dpo"}
    further |= {"tiny_rubric_arm", "qwen3_8b_rubric_arm", "qwen3_8b_checklist_rubric_arm"}
    assert found == {f"{kind}_{recipe}" for kind in kinds for recipe in ("sft", "grpo")} | further


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
    "infinite": ({"optimizer": {"weight_decay": "inf"}}, "weight_decay is inf; allowed is 0 or more, and finite"),
    "an integer past all floats": ({"optimizer": {"weight_decay": 10**400}}, "optimizer.weight_decay"),
    "no rate": ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate is inf; allowed is 0 or more, and fi"),
    "no epsilon": ({"optimizer": {"epsilon": 0}}, "optimizer.epsilon is 0.0; allowed is above 0."),
    "no norm": ({"optimizer": {"clip_norm": 0}}, "optimizer.clip_norm is 0.0; allowed is above 0."),
    "a frozen mean": ({"optimizer": {"beta1": 1}}, "optimizer.beta1 is 1.0; allowed is 0 to below 1."),
    "a frozen square": ({"optimizer": {"beta2": 1}}, "optimizer.beta2 is 1.0; allowed is 0 to below 1."),
    "a negative seed": ({"run": {"seed": -1}}, "run.seed is -1; allowed is 0 to below 4294967296."),
    "a long seed": ({"run": {"seed": 2**32}}, "run.seed is 4294967296; allowed is 0 to below 4294967296."),
}


@pytest.mark.parametrize(("mapping", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_meant_is_refused_by_name(mapping, says):
    with pytest.raises(UsageError) as error:
        from_mapping(SFTConfig, mapping, "there.yaml")
    assert str(error.value).startswith("there.yaml: ") and says in str(error.value)


def test_the_ends_of_a_range_are_where_it_says():
    optimizer = {"beta1": 0, "beta2": 0.999999, "epsilon": 1e-30, "clip_norm": 1e9, "learning_rate": 0}
    config = from_mapping(GRPOConfig, {"optimizer": optimizer, "run": {"seed": 2**32 - 1}}, "there")
    assert (config.optimizer.beta1, config.run.seed) == (0.0, 2**32 - 1)
    assert override(JudgeConfig(), ["--sampling.top_p", "1", "--sampling.temperature", "0"]).sampling.top_p == 1
    for value, says in (
        ("0", "top_p is 0.0; allowed is above 0 up to 1."),
        ("nan", "top_p is nan; allowed is above 0"),
    ):
        with pytest.raises(UsageError, match=says):
            override(JudgeConfig(), ["--sampling.top_p", value])
    with pytest.raises(UsageError, match=r"temperature is inf; allowed is 0 or more, and finite"):
        override(JudgeConfig(), ["--sampling.temperature", "inf"])


@pytest.mark.parametrize("cls", [SFTConfig, GRPOConfig, JudgeConfig])
def test_every_number_has_a_range(cls):
    def numbers(cls):
        for name, kind in get_type_hints(cls, include_extras=True).items():
            if dataclasses.is_dataclass(kind):
                yield from numbers(kind)
            elif {int, float} & {kind, *get_args(kind), *(part for each in get_args(kind) for part in get_args(each))}:
                yield f"{cls.__name__}.{name}", kind

    found = dict(numbers(cls))
    assert "MeshSection.fsdp" in found and not [name for name, kind in found.items() if limits_of(kind) is None]


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"group_size": 1}, "group_size is 1 where reward.group_by is response; allowed is 2 or more"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature is 0; allowed for grpo is above 0"),
        ({"sampling": {"top_k": 1}}, "sampling.top_k is 1; allowed for grpo is 0, for all, or 2 or more"),
    ],
)
def test_a_grpo_run_that_could_learn_nothing_is_refused(mapping, says):
    with pytest.raises(UsageError) as error:
        from_mapping(GRPOConfig, mapping, "there.yaml")
    assert str(error.value).startswith(f"there.yaml: {says}")
    [(key, value)] = mapping.items()
    key, value = (f"{key}.{next(iter(value))}", next(iter(value.values()))) if isinstance(value, dict) else (key, value)
    with pytest.raises(UsageError) as error:
        override(GRPOConfig(), [f"--{key}", str(value)])
    assert str(error.value).startswith(says)


def test_one_judgement_of_each_response_is_a_group_where_the_pair_is():
    assert from_mapping(GRPOConfig, {"group_size": 1, "reward": {"group_by": "pair"}}, "there").group_size == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--run.sed", "1"], "unknown option --run.sed. Did you mean --run.seed?"),
        (["--zzz", "1"], "unknown option --zzz. Known are: --recipe, --model.path,"),
        (["--run.seed.more", "1"], "unknown option --run.seed.more."),
        (["--run.seed", "x"], "--run.seed is 'x'; allowed is a whole number"),
        (["--run.seed"], "--run.seed has no value; allowed is a whole number"),
        (["--run.seed", "1", "2"], "--run.seed has 2 values, 1 2; allowed is a whole number"),
        (["--run.seed", "1", "--run.seed", "2"], "--run.seed is given twice"),
        (["--run", "1"], "--run is a section. Give one of its settings: --run.folder, --run.seed,"),
        (["--packing", "yes"], "--packing is 'yes'; allowed is true or false"),
        (["--no-packing"], "unknown option --no-packing. Say --packing false."),
        (["--optimizer.decay", "square"], "'constant', 'linear', 'cosine'"),
        (["--pairs_per_step", "0"], "pairs_per_step is 0; allowed is 1 or more"),
        (["-v", "8"], "unknown argument -v. Give settings as --section.key value"),
        (["word"], "unknown argument word"),
        (["--data.columns", "prompt", "input"], "key by key, such as --data.columns.chosen accepted"),
        (["--data.source_domains", "a", "math"], "key by key, such as --data.source_domains.NAME VALUE"),
    ],
)
def test_overrides_are_refused_by_name(arguments, says):
    with pytest.raises(UsageError) as error:
        override(SFTConfig(), arguments)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_columns_are_renamed_key_by_key():
    """Two of them, and one that is joined of two; what the file says of others stays."""
    before = from_mapping(SFTConfig, {"data": {"columns": {"id": "key"}}}, "there")
    renamed = [
        "--data.columns.chosen",
        "accepted",
        "--data.columns.rejected",
        "a",
        "b",
        "--data.columns.prompt=the input",
    ]
    assert override(before, renamed).data.columns == {
        "id": ("key",), "chosen": ("accepted",), "rejected": ("a", "b"), "prompt": ("the input",),
    }  # fmt: skip
    domains = override(EvalConfig(), ["--data.source_domains.v1.2", "math", "--data.source_domains.x", "chat"])
    assert domains.data.source_domains == {"v1.2": "math", "x": "chat"}


def test_values_are_read_by_the_type_of_their_setting():
    words = "--packing false --optimizer.learning_rate 1e-6 --mesh.fsdp -1 --run.folder 1e-6 --heldout.path="
    config = override(SFTConfig(), [*words.split(), "--data.drop_sources"])
    assert (config.packing, config.optimizer.learning_rate, config.mesh.fsdp) == (False, 1e-6, -1)
    assert (config.run.folder, config.heldout.path, config.data.drop_sources) == ("1e-6", "", ())


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "just words"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"c\.yaml"):
        load(SFTConfig, path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: {seed: 1}\nmodel: {}\nrun: {seed: 2}", "the key run stands in line 1 and again in line 3. Keep one"),
        ("run: {seed: 1, seed: 1}", "the key seed stands in line 1 and again in line 1. Keep one"),
        ("run:\n  folder: 2024-99-99", "c.yaml:2: 2024-99-99 cannot be read: month must be in 1..12. Put it in quotes"),
        ("run: {seed: " + "9" * 5000 + "}", "c.yaml:1: 9999"),
        ("run: !!timestamp soon", "c.yaml:1: soon cannot be read"),
        ("[" * 100_000, "c.yaml is nested too deeply"),
        ("a: [", "c.yaml is not YAML"),
    ],
)
def test_what_yaml_lets_pass_or_trips_over_is_one_sentence(tmp_path, text, says):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_yaml(path)
    assert says in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_key_may_overrule_what_is_merged(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a: {b: &b {x: 1, y: 1}}\nc: &c {<<: *b, x: 2}\nd: {<<: *c, x: 3}")
    assert read_yaml(path)["d"] == {"x": 3, "y": 1}


def test_a_section_of_another_name_is_said_and_a_run_of_an_earlier_version_is_read(tmp_path):
    mapping = {"recipe": "grpo", "policy": {"kl_coef": 0.5}}
    with pytest.raises(UsageError, match=r"there: the section policy is called update now. Rename it."):
        from_mapping(GRPOConfig, mapping, "there")
    with pytest.raises(UsageError, match=r"--policy.kl_coef is called --update.kl.coef now. Say so."):
        override(GRPOConfig(), ["--policy.kl_coef", "1"])
    with pytest.raises(UsageError, match=r"there: update.kl_coef is called update.kl.coef now. Rename it."):
        from_mapping(GRPOConfig, {"update": {"kl_coef": 0.5}}, "there")
    for name in ("policy", "update"):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"recipe": "grpo", name: {"kl_coef": 0.5}}))
        assert load_run(tmp_path).update.kl.coef == 0.5
    gspo = {"algorithm": "gspo", "aggregation": "token_mean", "kl_coef": 0.5}
    domains = {"v1.5": "chat"}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"recipe": "grpo", "update": gspo, "data": {"domains": domains}})
    )
    assert load_run(tmp_path).update.aggregation is None and load_run(tmp_path).data.domains == domains
    with pytest.raises(UsageError, match=r"unknown key policy\."):
        from_mapping(SFTConfig, {"policy": {}}, "there")
    (tmp_path / "config.yaml").write_text("recipe: other")
    with pytest.raises(UserError, match="is of the recipe 'other'; known are sft, grpo"):
        load_run(tmp_path)


@pytest.mark.parametrize("cls", [SFTConfig, GRPOConfig, JudgeConfig, EvalConfig, BenchConfig])
def test_help_says_every_setting_with_its_default_its_limits_and_what_it_does(cls):
    said = settings_in_words(cls())
    names = [line.split()[0].removeprefix("--").removesuffix(".NAME") for line in said.splitlines() if "  --" in line]
    assert sorted(names) == sorted(dotted_keys(cls))

    def silent(cls, prefix=""):
        for name, kind in get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                yield from silent(kind, f"{prefix}{name}.")
            elif not comments_of(cls)[name]:
                yield prefix + name

    assert set(silent(cls)) <= {"recipe"}
    assert max(map(len, said.splitlines())) <= 120


def test_help_reads_comments_beside_a_setting_and_above_it():
    said = settings_in_words(GRPOConfig())
    assert "  --update.clip_low null\n      how far a ratio may fall below 1 (0 to 1 or null)\n" in said
    assert "(token_mean,\n      sequence_mean, sequence_sum, constant_length or null)\n" in said
    assert "  --run.on_damaged stop\n      What resuming and export do where a file" in said
    assert "update: How rollouts become an update; a setting that is null is as the algorithm has it.\n" in said


def test_dotted_keys_name_every_setting():
    keys = dotted_keys(GRPOConfig)
    assert "update.clip_high" in keys and "group_size" in keys and "update" not in keys


# ---------------------------------------------------------------------------------------------------------- algorithms


@pytest.mark.parametrize("algorithm", PRESETS)
def test_an_algorithm_has_values_of_its_own_for_what_is_unset(algorithm):
    config = override(GRPOConfig(), ["--update.algorithm", algorithm]).complete()
    for name, value in (PRESETS[algorithm] | {"dapo.overlong_buffer": 1024 // 5}).items():
        assert name not in PRESETS[algorithm] or value_at(config, name) == value
    unused = set(CHOSEN_BY_ALGORITHM) - PRESETS[algorithm].keys()
    assert all(value_at(config, name) is None for name in unused)
    assert config.complete() == config == from_mapping(GRPOConfig, yaml.safe_load(to_yaml(config)), "there")
    assert algorithm_of(config).adds_up == (algorithm not in WEIGHS_SEQUENCES)


def test_what_is_set_reaches_the_algorithm():
    arguments = ["grpo", "--update.clip_low", "0.1", "--update.clip_high", "0.3", "--update.dual_clip", "2"]
    kl = [
        "--update.kl.coef",
        "0.5",
        "--update.kl.kind",
        "k2",
        "--update.kl.place",
        "loss",
        "--update.kl.by_ratio",
        "true",
    ]
    group = ["--reward.group_by", "pair", "--reward.normalise_std", "false"]
    algorithm = algorithm_of(override(GRPOConfig(), ["--update.algorithm", *arguments, *kl, *group]))
    charged = KLPenalty(coef=0.5, kind="k2", place="loss", by_ratio=True)
    assert algorithm.advantages.keywords == {"prompts_per_group": 2, "normalise_std": False, "kl": charged}
    assert algorithm.loss.keywords == {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0, "kl": charged}
    none = algorithm_of(override(GRPOConfig(), ["--update.algorithm", "cispo"])).loss.keywords
    assert none == {"clip_low": None, "clip_high": 4.0, "kl": KLPenalty(coef=0.0)}


def test_what_is_set_stays():
    arguments = ["--update.algorithm", "dapo", "--update.clip_high", "0.3", "--update.kl.coef", "0.5"]
    config = override(GRPOConfig(), arguments).complete()
    assert (config.update.clip_low, config.update.clip_high, config.update.kl.coef) == (0.2, 0.3, 0.5)
    assert config.kl_reference is not None and override(GRPOConfig(), arguments[:2]).kl_reference is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gspo", "--update.dual_clip", "3"], "update.dual_clip is 3.0, and update.algorithm gspo does not use it"),
        (["rloo", "--reward.normalise_std", "true"], "reward.normalise_std is True, and update.algorithm rloo does"),
        (["reinforce_pp", "--reward.group_by", "pair"], "reward.group_by is pair, and update.algorithm reinforce_pp"),
        (["gspo", "--update.aggregation", "token_mean"], "update.aggregation is token_mean, and update.algorithm gspo"),
        (["grpo", "--update.importance_cap", "2"], "update.importance_cap is 2.0, and update.old_logprobs is sampler"),
        (["reinforce_pp", "--update.kl.by_ratio", "true"], "update.kl.by_ratio is true, and update.kl.place is reward"),
        (["grpo", "--update.dual_clip", "1"], "update.dual_clip is 1.0; allowed is above 1"),
        (
            ["gspo", "--update.kl.by_ratio", "true"],
            "update.kl.by_ratio is True, and update.algorithm gspo does",
        ),
        (["rloo", "--update.importance_cap", "2"], "update.importance_cap is 2.0, and update.algorithm rloo does not"),
        (["grpo", "--update.clip_low", "1.5"], "update.clip_low is 1.5; allowed is 0 to 1"),
        (["grpo", "--update.aggregation", "sum"], "'constant_length', or null\\.$"),
        (["grop"], "--update.algorithm is 'grop'; allowed is one of 'grpo', .* Did you mean grpo?"),
    ],
)
def test_what_an_algorithm_does_not_use_is_refused_by_name(arguments, says):
    with pytest.raises(UsageError, match=says):
        override(GRPOConfig(), ["--update.algorithm", *arguments])


@pytest.mark.parametrize("said", [["kl.kind", "k2"], ["kl.place", "reward"], ["reference", "somewhere"]])
def test_nothing_is_said_of_a_kl_that_is_not_charged(said):
    name, value = said
    config = override(GRPOConfig(), ["--update.algorithm", "dapo", f"--update.{name}", value])
    with pytest.raises(UsageError, match=f"update.{name} is {value}, and update.kl.coef is 0, which it is with dapo"):
        config.complete()
    override(config, ["--update.kl.coef", "0.1"]).complete()


def test_an_algorithm_in_a_file_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"there: .*'dapoo'.* for update.algorithm. Did you mean dapo\?"):
        from_mapping(GRPOConfig, {"update": {"algorithm": "dapoo"}}, "there")


def test_a_judgement_alone_may_be_its_whole_group_where_there_are_no_groups():
    override(GRPOConfig(), ["--update.algorithm", "reinforce_pp", "--group_size", "1"])
    for algorithm in PRESETS.keys() - {"reinforce_pp"}:
        with pytest.raises(UsageError, match="group_size is 1"):
            override(GRPOConfig(), ["--update.algorithm", algorithm, "--group_size", "1"])
