"""Where each weight lies is written down and reviewed; a mesh that cannot be is refused with the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from patarm_jax.config.sections import MeshSection
from patarm_jax.model import sharding
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import REPLICATED_RULES, ROLLOUT_RULES, TRAIN_RULES, make_mesh
from patarm_jax.model.transformer import abstract_params, init_params
from patarm_jax.types import UserError

QWEN3_8B = Architecture(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip
TINY = Architecture(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def leaves(tree):
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def spec_text(leaf):
    return "(" + ", ".join(axis or "-" for axis in leaf.sharding.spec) + ")"


def test_every_parameter_lies_where_the_golden_file_says(golden):
    mesh = AbstractMesh((2, 2, 2), sharding.MESH_AXES)
    train, rollout = (leaves(abstract_params(QWEN3_8B, mesh, rules)) for rules in (TRAIN_RULES, ROLLOUT_RULES))
    lines = ["parameter  shape  train  rollout; one mesh axis, or -, for each axis of the shape"]
    lines += [
        f"{path}  {'x'.join(map(str, leaf.shape))}  {spec_text(leaf)}  {spec_text(rollout[path])}"
        for path, leaf in train.items()
    ]
    golden("shardings.txt", "\n".join(lines) + "\n")


def test_training_leaves_a_device_its_share_of_all_matrices():
    mesh = AbstractMesh((1, 4, 2), sharding.MESH_AXES)
    for path, leaf in leaves(abstract_params(QWEN3_8B, mesh, TRAIN_RULES)).items():
        part = np.prod(leaf.sharding.shard_shape(leaf.shape))
        assert leaf.size == part * (1 if "norm" in path else 8), path


def test_replicated_rules_split_nothing():
    mesh = AbstractMesh((2, 2, 2), sharding.MESH_AXES)
    for leaf in leaves(abstract_params(QWEN3_8B, mesh, REPLICATED_RULES)).values():
        assert leaf.sharding.shard_shape(leaf.shape) == leaf.shape


def test_parameters_are_the_same_on_one_device_and_on_eight():
    one = init_params(TINY, jax.random.key(0))
    eight = init_params(TINY, jax.random.key(0), make_mesh(MeshSection(data=2, fsdp=2, tensor=2)))
    for path, leaf in leaves(eight).items():
        np.testing.assert_array_equal(leaf, leaves(one)[path], err_msg=path)
        assert len(leaf.sharding.device_set) == 8


# --------------------------------------------------------------------------------------------------------------- mesh


@pytest.mark.parametrize(
    ("section", "shape"),
    [
        (MeshSection(), (1, 8, 1)),
        (MeshSection(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshSection(data=2, fsdp=2, tensor=-1), (2, 2, 2)),
        (MeshSection(data=8, fsdp=1, tensor=1), (8, 1, 1)),
    ],
)
def test_a_mesh_has_all_devices(section, shape):
    mesh = make_mesh(section)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (MeshSection(2, 2, 1), "mesh data 2, fsdp 2, tensor 1 asks for 4 devices and there are 8. Set one axis to -1."),
        (MeshSection(2, 2, 4), "asks for 16 devices and there are 8"),
        (MeshSection(0, 8, 1), "mesh data 0, fsdp 8, tensor 1: sizes must be positive, or -1 for all"),
        (MeshSection(-1, -1, 1), "at most one axis may be -1"),
        (MeshSection(3, -1, 1), "mesh data 3, fsdp -1, tensor 1 does not fit 8 devices"),
        (MeshSection(-2, -4, 1), "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(section, says):
    with pytest.raises(UserError) as caught:
        make_mesh(section)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "says"),
    [
        ((1, 1, 4), "2 kv_heads cannot be split over 4 devices of mesh axis 'tensor'. Choose mesh.tensor so that"),
        ((1, 5, 1), "32 embed cannot be split over 5 devices of mesh axis 'fsdp'. Choose mesh.fsdp so that it divides"),
    ],
)
def test_weights_that_cannot_be_split_evenly_are_refused(mesh, says):
    with pytest.raises(UserError) as caught:
        abstract_params(TINY, AbstractMesh(mesh, sharding.MESH_AXES), TRAIN_RULES)
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- arrays


def test_a_batch_is_split_along_its_rows_and_comes_back_whole():
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "lengths": np.arange(8)}
    placed = sharding.place_batch(mesh, batch)
    assert placed["tokens"].sharding == sharding.batch_sharding(mesh)
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(2, 3)}
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(placed), batch)
    whole = jax.device_put(batch, sharding.replicated(mesh))
    jax.tree.map(np.testing.assert_array_equal, sharding.fetch(whole), batch)


def test_a_constraint_pins_inside_a_mesh_and_does_nothing_outside():
    run = jax.jit(lambda x: sharding.constrain(x, sharding.BATCH_AXES, "tensor"))
    x = jnp.arange(16.0).reshape(8, 2)
    assert run(x).sharding.device_set == {jax.devices()[0]}
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        pinned = run(jax.device_put(x, sharding.replicated(mesh)))
    assert pinned.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
    np.testing.assert_array_equal(pinned, x)
