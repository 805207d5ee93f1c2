"""`micro_batches: 0`: the fewest slices that fit are what trying every number finds."""

from dataclasses import replace

import jax
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from patarm_jax.cli import main
from patarm_jax.config.policy import DPOConfig
from patarm_jax.config.recipes import GRPOConfig, RewardModelConfig, SFTConfig
from patarm_jax.config.sections import DataSection, KLSection, ModelSection, SamplingSection, UpdateSection
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import MESH_AXES, batch_shards, replicated
from patarm_jax.recipes import fitting
from patarm_jax.recipes.fitting import allowed_slices, bytes_of, fewest, fitted, stays_beside
from patarm_jax.recipes.programs import programs, update_of
from patarm_jax.run.programs import per_device
from tests.runs import config_file
from tests.toys import TINY

ARCH = Architecture(**TINY)
SCALAR = replace(ARCH, scalar_head=True)
SHAPES = dict(model=ModelSection(dtype="float32"), data=DataSection(max_prompt_tokens=64, max_completion_tokens=64))
CONFIGS = {
    "sft": SFTConfig(**SHAPES, pairs_per_step=8, micro_batches=0),
    "grpo": GRPOConfig(
        **SHAPES, pairs_per_step=8, micro_batches=0, group_size=4, sampling=SamplingSection(max_new_tokens=64),
        update=UpdateSection(kl=KLSection(coef=0.1)),
    ).complete(),
    "dpo": DPOConfig(**SHAPES, pairs_per_step=8, micro_batches=0),
    "reward_model": RewardModelConfig(**SHAPES, pairs_per_step=8, micro_batches=0),
}  # fmt: skip

SLICED = ("sft", "dpo")  # compiled here with one, two and more slices


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.integers(0, 100))
def test_the_first_that_fits_is_found_in_few_tries(needs, offered):
    needs = [needs[0], *sorted(needs[1:], reverse=True)]
    tried = []
    chosen, need = fewest(range(len(needs)), lambda place: tried.append(place) or needs[place], offered)
    fitting = [place for place, need in enumerate(needs) if need <= offered]
    assert chosen == fitting[0] if fitting else need == min(needs)
    assert need == needs[chosen]
    assert len(tried) <= 2 + len(needs).bit_length()


@given(st.integers(1, 48), st.integers(1, 8))
def test_slices_leave_every_device_equally_many(units, shards):
    for slices in range(1, units + 1):
        evenly = units % slices == 0 and (units // slices) % shards == 0
        assert (slices in allowed_slices(units, shards)) == evenly


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def needs(mesh):
    """What the update of each recipe needs with each number of slices."""
    found = {}
    for name in SLICED:
        config = CONFIGS[name]
        allowed = allowed_slices(config.units_per_step, batch_shards(mesh))
        updates = {slices: update_of(replace(config, micro_batches=slices), ARCH, mesh) for slices in allowed[:3]}
        found[name] = {slices: bytes_of(update) for slices, update in updates.items()}
    return found


@pytest.mark.parametrize("recipe", SLICED)
def test_an_update_that_does_not_fit_whole_is_sliced(recipe, needs, mesh, monkeypatch, capsys):
    config = CONFIGS[recipe]
    (_, whole), (two, half), (_, quarter) = needs[recipe].items()
    assert whole > half > quarter
    offered = round(half / fitting.USABLE) + 1
    monkeypatch.setattr(fitting, "_offered", lambda mesh: offered)
    assert fitted(config, ARCH, mesh).micro_batches == two
    assert f"micro_batches {two}: the update needs" in capsys.readouterr().err
    # What lies beside it takes of the same memory.
    other = jax.ShapeDtypeStruct((half - quarter,), "int8", sharding=replicated(mesh))
    assert fitted(config, ARCH, mesh, [other]).micro_batches > two
    monkeypatch.setattr(fitting, "_offered", lambda mesh: 2 * whole)
    assert fitted(config, ARCH, mesh).micro_batches == 1
    given = replace(config, micro_batches=4)
    assert fitted(given, ARCH, mesh) is given


def test_where_nothing_fits_the_most_slices_are_taken_and_it_is_said(mesh, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "_offered", lambda mesh: 1)
    assert fitted(CONFIGS["sft"], ARCH, mesh).micro_batches == 16
    assert "caution: not even micro_batches 16, which needs least, seems to fit" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", CONFIGS)
def test_what_is_compiled_is_the_update_of_the_recipe(recipe, mesh):
    config, arch = replace(CONFIGS[recipe], micro_batches=2), SCALAR if recipe == "reward_model" else ARCH
    ours, theirs = update_of(config, arch, mesh)[1], programs(config, arch, mesh)["update"][1]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.sharding), ours) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.sharding), theirs
    )


def test_what_stays_beside_an_update_is_counted(mesh):
    """The copy for sampling, and what a KL is measured from; of adapters' KL nothing more than is there."""
    config = CONFIGS["grpo"]
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(stays_beside(config, ARCH, mesh)[0]))
    assert sum(map(per_device, stays_beside(config, ARCH, mesh))) == 2 * weights
    without = replace(config, update=replace(config.update, kl=KLSection(coef=0.0)))
    adapters = replace(config, lora=replace(config.lora, rank=4))
    for one in (without, adapters):
        assert sum(map(per_device, stays_beside(one, ARCH, mesh))) == weights
    assert stays_beside(CONFIGS["sft"], ARCH, mesh) == []


@pytest.mark.parametrize("recipe", ["sft", pytest.param("grpo", marks=pytest.mark.long)])
def test_a_run_chooses_for_the_rows_that_it_reads(recipe, world, monkeypatch, capsys):
    """The config that a dry run shows has the number, which is chosen by the longest rows and not by data's limits."""
    asked = []
    kept = fitting.update_of
    monkeypatch.setattr(fitting, "update_of", lambda config, *where: asked.append(config) or kept(config, *where))
    assert main([recipe, str(config_file(world, f"open_{recipe}", recipe, micro_batches=0)), "--dry-run"]) == 0
    said, told = capsys.readouterr()
    shown = yaml.safe_load(said[said.index("recipe:") :].split("first batch:")[0])
    assert shown["micro_batches"] == 1 and "micro_batches 1: the update needs" in told
    assert 0 < asked[0].data.max_prompt_tokens < shown["data"]["max_prompt_tokens"]
