"""What a recipe compiles, without data or weights, on a mesh of eight devices."""

from dataclasses import replace
from typing import get_args, get_type_hints

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from patarm_jax.config.recipes import GRPOConfig, SFTConfig
from patarm_jax.config.sections import (
    DataSection,
    KLSection,
    LoRASection,
    MeshSection,
    ModelSection,
    SamplingSection,
    UpdateSection,
)
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import make_mesh
from patarm_jax.recipes.programs import programs
from patarm_jax.run.programs import per_device
from tests.toys import TINY

MODEL = ModelSection(dtype="float32")
CONFIGS = {
    "sft": SFTConfig(model=MODEL, data=DataSection(max_prompt_tokens=100, max_completion_tokens=20), pairs_per_step=8),
    "grpo": GRPOConfig(
        model=MODEL,
        data=DataSection(max_prompt_tokens=100),
        sampling=SamplingSection(max_new_tokens=8),
        pairs_per_step=8,
    ),
}
NAMES = {
    "sft": {"update"},
    "grpo": {
        "copy for sampling", "prefill", "prefill behind", "decode", "resize", "reference log-probs", "advantages",
        "update",
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", CONFIGS)
def test_every_program_of_a_recipe_is_there_and_takes_its_arguments(recipe):
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    found = programs(CONFIGS[recipe], Architecture(**TINY), mesh)
    assert found.keys() == NAMES[recipe]
    for name, (program, arguments) in found.items():
        lowered = program.lower(*arguments)
        assert lowered.out_info is not None, name
    update, (state, _, batch) = found["update"]
    new, metrics = update.lower(state, None, batch).out_info
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state.params, new.params)]
    assert shapes[0] == shapes[1] and {"loss", "grad_norm", "entropy"} <= metrics.keys()


def test_without_a_kl_there_is_no_reference():
    config = replace(CONFIGS["grpo"], update=UpdateSection(algorithm="gspo", kl=KLSection(coef=0.0)))
    found = programs(config, Architecture(**TINY), make_mesh(MeshSection()))
    assert found.keys() == NAMES["grpo"] - {"reference log-probs"}
    update, arguments = found["update"]
    assert "kl" not in update.lower(*arguments).out_info[1]


def test_adapters_are_trained_beside_weights_that_are_the_reference_too():
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    found = programs(replace(CONFIGS["grpo"], lora=LoRASection(rank=2)), Architecture(**TINY), mesh)
    assert found.keys() == NAMES["grpo"]
    for name, (program, arguments) in found.items():
        assert program.lower(*arguments).out_info is not None, name
    (state, frozen, _), (trained, reference, _) = found["update"][1], found["reference log-probs"][1]
    assert trained == {} and reference is frozen
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert len(names) == 14 and all(name.endswith(("_lora_A", "_lora_B")) for name in names)


@pytest.mark.parametrize("name", get_args(get_type_hints(UpdateSection)["algorithm"]))
def test_every_algorithm_has_its_programs(name):
    update = UpdateSection(algorithm=name, old_logprobs="trainer", kl=KLSection(coef=0.1))
    found = programs(replace(CONFIGS["grpo"], update=update), Architecture(**TINY), make_mesh(MeshSection()))
    assert found.keys() == NAMES["grpo"] | {"old log-probs"}
    program, arguments = found["advantages"]
    earned = program.lower(*arguments).out_info
    program, arguments = found["update"]
    assert arguments[2].advantages.shape == earned.shape and earned.shape[:2] == (16, 8)
    assert {"kl", "sampling/ratio_outside"} <= program.lower(*arguments).out_info[1].keys()


def test_what_a_device_holds_of_a_tree():
    mesh = make_mesh(MeshSection(data=1, fsdp=4, tensor=2))
    cut, whole = NamedSharding(mesh, PartitionSpec("fsdp", "tensor")), NamedSharding(mesh, PartitionSpec())
    counters = [jax.ShapeDtypeStruct((3,), "bfloat16", sharding=whole)]
    tree = {"cut": jax.ShapeDtypeStruct((8, 6), "float32", sharding=cut), "whole": counters}
    assert per_device(tree) == (8 // 4) * (6 // 2) * 4 + 3 * 2
