"""Weights as sampling reads them say what they said, and lie where they are told to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.config.sections import MeshSection, ModelSection
from patarm_jax.model import weights
from patarm_jax.model.architecture import Architecture, read_architecture
from patarm_jax.model.for_sampling import GATE_UP, QKV, for_sampling, fuse_projections, unstack_layers
from patarm_jax.model.lora import abstract_adapters, init_adapters, joined, merged
from patarm_jax.model.sharding import REPLICATED_RULES, ROLLOUT_RULES, TRAIN_RULES, make_mesh
from patarm_jax.model.transformer import abstract_params, forward, init_params, prefill
from patarm_jax.run.open_model import load_params, open_model
from tests.toys import TINY, tiny_model_folder

SHAPES = {
    "qwen3": Architecture(**TINY),
    "qwen2": Architecture(**{**TINY, "model_type": "qwen2"}),
    "one query a head": Architecture(**{**TINY, "num_key_value_heads": TINY["num_attention_heads"]}),
}


@pytest.fixture(params=SHAPES)
def case(request):
    """A network whose weights, biases among them, all tell in what it says; and tokens."""
    arch = SHAPES[request.param]
    params = init_params(arch, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy), arch, jax.random.randint(jax.random.key(2), (2, 7), 0, arch.vocab_size)


def test_the_network_says_the_same(case):
    params, arch, tokens = case
    stacked, apart, fused = (
        forward(each, arch, tokens).prompt for each in (params, unstack_layers(params), for_sampling(params))
    )
    np.testing.assert_allclose(stacked, apart, atol=1e-5)
    np.testing.assert_allclose(apart, fused, atol=1e-5)
    lengths = jnp.array([7, 4])
    one, other = (prefill(each, arch, tokens, lengths) for each in (unstack_layers(params), for_sampling(params)))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), one, other)


def test_nothing_is_lost_and_nothing_is_there_twice(case):
    params, arch, _ = case
    fused = for_sampling(params)
    counts = (sum(leaf.size for leaf in jax.tree.leaves(each)) for each in (params, fused))
    assert len(set(counts)) == 1
    assert QKV in fused["layers_0"]["self_attn"] and GATE_UP in fused["layers_0"]["mlp"]
    again = fuse_projections(fused)
    jax.tree.map(np.testing.assert_array_equal, again, fused)
    shapes = abstract_params(arch, sampling=True)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(lambda leaf: leaf.shape, fused)


@pytest.mark.parametrize("target", ["v_proj", "gate_proj"])
def test_adapters_are_not_left_out(case, target):
    params, arch, _ = case
    adapters = init_adapters(abstract_adapters(abstract_params(arch), 2, [target]), jax.random.key(0))
    with pytest.raises(ValueError, match=f"{target}_lora_A stands beside a projection: merge adapters first"):
        for_sampling(joined(adapters, params))
    for_sampling(merged(joined(adapters, params), 1.0, jnp.float32))


@pytest.mark.parametrize("source", ["load", "random"])
@pytest.mark.parametrize("rules", [TRAIN_RULES, ROLLOUT_RULES, REPLICATED_RULES], ids=["train", "rollout", "whole"])
def test_a_model_is_read_into_its_places_fused(rules, source, tmp_path):
    """Eight devices hold of it what is told of abstract weights, and together what one holds."""
    folder = tiny_model_folder(tmp_path / "model")
    arch = read_architecture(folder)
    weights.save(init_params(arch, jax.random.key(3)), arch, tmp_path / "weights", dtype="float32")
    for file in (tmp_path / "weights").iterdir():
        file.rename(folder / file.name)
    section = ModelSection(path=str(folder), weights=source, dtype="float32")
    model, mesh = open_model(section), make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    whole = load_params(section, model, mesh, 0, rules, jnp.float32)
    fused = load_params(section, model, mesh, 0, rules, jnp.float32, sampling=True)
    shapes = abstract_params(model.arch, mesh, rules, sampling=True)
    jax.tree.map(np.testing.assert_array_equal, fused, for_sampling(whole))
    same = jax.tree.map(lambda one, told: one.sharding.is_equivalent_to(told.sharding, one.ndim), fused, shapes)
    assert all(jax.tree.leaves(same))
