"""Moments kept in bfloat16: the same updates within a bound, nothing lost on average, on any devices alike."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from patarm_jax.config.sections import MeshSection, OptimizerSection
from patarm_jax.model.sharding import make_mesh
from patarm_jax.rounding import round_at_random
from patarm_jax.train.optimizer import make_optimizer

SECTION = OptimizerSection(learning_rate=1e-2, weight_decay=0.1)
PARAMS = {"matrix": jnp.ones((64, 64)), "norm": jnp.ones(64)}


def gradients(steps, scale=lambda step: 1.0):
    rng = np.random.default_rng(0)
    for step in range(steps):
        yield jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * scale(step), jnp.float32), PARAMS)  # noqa: B023


def taken(section, steps, scale=lambda step: 1.0):
    """The updates, and the state at the end."""
    optimizer = make_optimizer(section, steps)
    state, updates = optimizer.init(PARAMS), []
    step = jax.jit(optimizer.update)
    for gradient in gradients(steps, scale):
        update, state = step(gradient, state, PARAMS)
        updates.append(update)
    return updates, state


def test_updates_stay_within_the_bound_of_what_is_rounded():
    """By 2^-7·b1·|m before| and 2^-7·b2·v before, first update apart: nothing was rounded before it."""
    (ours, state), (theirs, _) = (taken(replace(SECTION, moments=kind), 40) for kind in ("bfloat16", "float32"))
    moments = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32]
    assert moments == [jnp.bfloat16] * 4
    jax.tree.map(np.testing.assert_array_equal, ours[0], theirs[0])
    # |Δu| ≤ lr·(|Δm| + |m|·|Δv|/2v)/√v: of a second update at most 2^-7 of each moment's share of it.
    second = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), ours[1], theirs[1])
    assert 0 < second["matrix"] <= SECTION.learning_rate * 2**-7 * 1.6


def test_updates_stay_near_however_many_there_are():
    """Roundings add up like a random walk that the decay draws back, to some 2 % of an update's norm."""
    ours, theirs = (taken(replace(SECTION, moments=kind), 1500)[0] for kind in ("bfloat16", "float32"))
    apart = [
        float(optax.tree.norm(jax.tree.map(jnp.subtract, one, other)) / optax.tree.norm(other))
        for one, other in zip(ours, theirs, strict=True)
    ]
    assert max(apart[:40]) < 0.01 and 0.005 < np.mean(apart[-100:]) < 0.03


def test_the_second_moment_does_not_stand_still():
    """Gradients ten times smaller: to the nearest, b2 0.999 would never bring the second moment down."""
    section = replace(SECTION, clip_norm=1e9)
    scale = lambda step: 1.0 if step < 100 else 0.1  # noqa: E731
    ours, theirs = (
        optax.tree.get(taken(replace(section, moments=kind), 1500, scale)[1], "nu")["matrix"].astype(jnp.float32)
        for kind in ("bfloat16", "float32")
    )
    at_the_change = optax.tree.get(taken(section, 100, scale)[1], "nu")["matrix"]
    assert theirs.mean() < 0.5 * at_the_change.mean()
    assert ours.mean() == pytest.approx(float(theirs.mean()), rel=0.01)


def test_rounding_keeps_the_mean_and_what_is_exact():
    exact = jnp.asarray([0.0, 1.0, -2.5, np.inf, -np.inf, 2.0**-100], jnp.float32)
    np.testing.assert_array_equal(round_at_random(exact, jax.random.key(0)).astype(jnp.float32), exact)
    for value in (1.001, -3.0017, 1e-20):
        found = round_at_random(jnp.full(200_000, value, jnp.float32), jax.random.key(1)).astype(jnp.float32)
        assert len(np.unique(found)) == 2
        assert found.mean() == pytest.approx(value, rel=1e-4)


def test_devices_draw_alike():
    mesh = make_mesh(MeshSection())
    section = replace(SECTION, moments="bfloat16")
    optimizer = make_optimizer(section, 2)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))

    def two(place):
        params = jax.tree.map(place, PARAMS)
        state = jax.jit(optimizer.init)(params)
        for gradient in gradients(2):
            _, state = jax.jit(optimizer.update)(jax.tree.map(place, gradient), state, params)
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(state)]

    for one, eight in zip(two(lambda x: x), two(partial(jax.device_put, device=split)), strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-6)
