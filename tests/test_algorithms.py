"""Algorithms against loops, the exact way round the head against autodiff, and units that are never cut."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from patarm_jax.arrays import Rollouts
from patarm_jax.config.sections import MeshSection, OptimizerSection
from patarm_jax.model.sharding import MESH_AXES, OnMesh, batch_sharding, batch_shards, make_mesh, place_batch
from patarm_jax.train import losses
from patarm_jax.train.algorithms import ALGORITHMS
from patarm_jax.train.losses import Loss, mask_from_lengths
from patarm_jax.train.optimizer import make_optimizer
from patarm_jax.train.penalties import KLPenalty, estimated_kl
from patarm_jax.train.policy_losses import clipped_surrogate, sampled_tokens, token_weights
from patarm_jax.train.steps import init_state, make_step, policy_loss

RNG = np.random.default_rng(0)
SETTINGS = {"clip_low": 0.05, "clip_high": 0.1, "kl": KLPenalty(0.3)}
ALONE = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])
LOSSES = ("grpo", "rloo", "gspo", "cispo")  # one algorithm for each kind of loss
TEMPERATURE, VOCAB, WIDTH = 0.8, 23, 6
SEQUENCES = partial(sampled_tokens, aggregation="sequence_mean", importance_cap=1.1)


class Output:
    """Of a network whose states are its embedding of the tokens alone; the head is a weight of its own."""

    def __init__(self, prompt, completion, head):
        self.prompt, self.completion, self.head = prompt, completion, head


def forward(params, frozen, prompt, lengths, completion):
    table = params["table"] + frozen
    return Output(table[prompt], table[completion], params["head"])


def toy():
    """Its parameters, and what is only read beside them."""
    table, head, frozen = (RNG.normal(size=(VOCAB, WIDTH)).astype(np.float32) for _ in range(3))
    return {"table": jnp.asarray(table), "head": jnp.asarray(head)}, jnp.asarray(0.1 * frozen)


def rollouts(prompts=8, group=3, width=5, tokens_of_their_own=False):
    """Sequences of all lengths, none of them included."""
    rng = np.random.default_rng(2)
    shape = (prompts, group, width)
    old, ref = (rng.normal(size=shape).astype(np.float32) * 0.3 - 4 for _ in range(2))
    advantages = rng.normal(size=shape if tokens_of_their_own else shape[:2])
    return Rollouts(
        jnp.asarray(rng.integers(0, VOCAB, (prompts, 4)), jnp.int32),
        jnp.asarray(rng.integers(1, 5, prompts), jnp.int32),
        jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32),
        jnp.asarray(rng.integers(0, width + 1, shape[:2]), jnp.int32),
        jnp.asarray(old),
        jnp.asarray(ref),
        jnp.asarray(advantages, jnp.float32),
        jnp.asarray(old + rng.normal(size=shape).astype(np.float32) * 0.4),
    )


def full_logprobs(params, frozen, batch):
    """[R, G, Tc], over the whole vocabulary at once."""
    table = params["table"] + frozen
    last = table[batch.prompt_tokens[jnp.arange(len(batch.prompt_lengths)), batch.prompt_lengths - 1]]
    states = jnp.concatenate(
        [
            jnp.broadcast_to(last[:, None, None], (*batch.completion_tokens.shape[:2], 1, WIDTH)),
            table[batch.completion_tokens[:, :, :-1]],
        ],
        axis=2,
    )
    log_softmax = jax.nn.log_softmax(states @ params["head"].T / TEMPERATURE)
    return jnp.take_along_axis(log_softmax, batch.completion_tokens[..., None], axis=-1)[..., 0]


@pytest.fixture(params=[(4, 1), (512, 2)], ids=["4 at a time", "in 2 parts"])
def shards(request, monkeypatch):
    """Into how many parts the batch is shared, each so many tokens at a time."""
    tokens, shards = request.param
    monkeypatch.setattr(losses, "HEAD_TOKENS", tokens)
    return shards


def assert_close(ours, theirs, relative=1e-5):
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        other = np.asarray(dict(jax.tree_util.tree_leaves_with_path(theirs))[path])
        assert np.abs(np.asarray(leaf) - other).max() <= relative * np.abs(other).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_metrics_and_gradient_equal_autodiff_over_all_logits(name, aggregation, own, shards):
    (params, frozen), batch, algorithm = toy(), rollouts(tokens_of_their_own=own), ALGORITHMS[name](**SETTINGS)
    tokens_of = partial(sampled_tokens, aggregation=aggregation, importance_cap=1.1)

    def plain(params):
        found = algorithm.loss(full_logprobs(params, frozen, batch), tokens_of(batch))
        return found.loss[0], found

    def ours(params):
        found = policy_loss(forward, algorithm, tokens_of, TEMPERATURE, shards)(params, frozen, batch)
        return found.loss[0], found

    (value, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (expected, wanted), theirs = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, theirs)
    assert found.metrics.keys() == wanted.metrics.keys() | {"entropy"}
    for metric, (total, count) in wanted.metrics.items():
        assert float(found.metrics[metric][0]) == pytest.approx(float(total), rel=1e-5, abs=1e-5), metric
        assert float(found.metrics[metric][1]) == float(count), metric
    bit, number = map(float, found.metrics["clip_ratio/region_mean"])
    assert 0 < bit < number or (name == "cispo" and bit == number)  # which counts every ratio out of its bounds


# ------------------------------------------------------------------------------------------------ against plain loops


def kl_of(new, ref, kind="k3"):
    d = ref - new
    return {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[kind]


def surrogate(ratio, advantage, low, high, most=None):
    loss = -min(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)
    return min(loss, -most * advantage) if most and advantage < 0 else loss


def loop_loss(name, logprobs, batch, aggregation, longest, cap):
    """The mean loss in float64, sequence by sequence and token by token."""
    low, high = SETTINGS["clip_low"], SETTINGS["clip_high"]
    sequences = []
    for r, g in np.ndindex(*batch.completion_lengths.shape):
        length = int(batch.completion_lengths[r, g])
        new, old, ref, sampler = (
            np.asarray(x[r, g, :length], np.float64)
            for x in (logprobs, batch.old_logprobs, batch.ref_logprobs, batch.sampler_logprobs)
        )
        advantage = np.broadcast_to(np.asarray(batch.advantages, np.float64)[r, g], ())
        importance = np.minimum(np.exp(old - sampler), cap) if cap else np.ones(length)
        ratio = np.exp(new - old)
        if name == "gspo":
            losses = importance * surrogate(np.exp((new - old).mean()) if length else 1.0, advantage, low, high)
        elif name == "rloo":
            losses = importance * surrogate(np.exp((new - old).sum()), advantage, low, high)
        elif name == "cispo":
            losses = -importance * np.clip(ratio, 1 - low, 1 + high) * advantage * new
        else:
            losses = importance * np.array([surrogate(one, advantage, low, high, 1.05) for one in ratio])
        sequences.append(losses + 0.3 * kl_of(new, ref))
    there = [each for each in sequences if len(each)]
    if aggregation == "token_mean":
        return np.concatenate(there).mean()
    if aggregation == "sequence_mean":
        return np.mean([each.mean() for each in there])
    return sum(each.sum() for each in there) / (len(there) * (longest if aggregation == "constant_length" else 1))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant_length"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_loops(name, aggregation):
    """The gradient by differences of the loop; GSPO's has another form under importance weights."""
    batch = rollouts()
    logprobs = np.asarray(batch.old_logprobs) + RNG.normal(size=batch.old_logprobs.shape).astype(np.float32) * 0.08
    more = {"dual_clip": 1.05} if name not in ("gspo", "rloo", "cispo") else {}
    algorithm = ALGORITHMS[name](**SETTINGS, **more)
    cap = None if name == "gspo" else 1.1
    tokens = sampled_tokens(batch, aggregation, longest=9, importance_cap=cap)
    loop = partial(loop_loss, name, batch=batch, aggregation=aggregation, longest=9, cap=cap)

    def mean(logprobs):
        total, denominator = algorithm.loss(logprobs, tokens).loss
        return total / denominator

    value, gradient = jax.jit(jax.value_and_grad(mean))(jnp.asarray(logprobs))
    assert float(value) == pytest.approx(loop(logprobs), rel=1e-4)
    if name == "cispo":
        return  # its gradient is no difference of its value; that of autodiff over all logits stands above
    for r, g, t in ((0, 0, 0), (3, 1, 2), (5, 2, 1), (6, 0, 3)):
        step = np.zeros(logprobs.shape)
        step[r, g, t] = 1e-5
        up, down = (loop(logprobs.astype(np.float64) + sign * step) for sign in (1, -1))
        assert float(gradient[r, g, t]) == pytest.approx((up - down) / 2e-5, rel=2e-3, abs=2e-6)


def loop_advantages(name, rewards, valid, batch, prompts_per_group, kl):
    """In float64, group by group; NaN where tokens are padding."""
    mask = np.arange(batch.completion_tokens.shape[-1]) < np.asarray(batch.completion_lengths)[..., None]
    old, ref = (np.asarray(x, np.float64) for x in (batch.old_logprobs, batch.ref_logprobs))
    charged = np.where(mask, kl_of(old, ref, kl.kind), 0.0) * (kl.coef if kl.place == "reward" else 0.0)
    if name == "reinforce_pp":
        values = rewards[..., None] - charged[..., ::-1].cumsum(axis=-1)[..., ::-1]
        return whitened_by_loop(values, mask & valid[..., None])
    rewards = rewards - charged.sum(axis=-1)
    found = np.zeros(rewards.shape)
    for first in range(0, len(rewards), prompts_per_group):
        group = slice(first, first + prompts_per_group)
        members = rewards[group][valid[group]]
        if len(members) < 2 or (members == members[0]).all():
            continue
        centred = rewards[group] - members.mean()
        if name == "rloo":
            centred = centred * len(members) / (len(members) - 1)
        elif name in ("grpo", "dapo", "gspo", "cispo"):
            centred = centred / (members.std(ddof=1) + 1e-6)
        found[group] = np.where(valid[group], centred, 0.0)
    if name != "reinforce_pp_baseline":
        return found
    return whitened_by_loop(np.broadcast_to(found[..., None], mask.shape), mask & valid[..., None])


def whitened_by_loop(values, mask):
    chosen = values[mask]
    return np.where(mask, (values - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8), 0.0)


@pytest.mark.parametrize("place", ["loss", "reward"])
@pytest.mark.parametrize("prompts_per_group", [1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_equal_loops_on_ragged_groups(name, prompts_per_group, place):
    rng = np.random.default_rng(5)
    rewards = rng.normal(size=(6, 4)).round(2)
    rewards[2] = 8.1  # whose float32 mean rounds, so that what is left of it must not count
    valid = rng.random((6, 4)) > 0.25
    valid[4:] = [[False] * 4, [True, False, False, False]]  # none, and one alone
    batch, kl = rollouts(6, 4), KLPenalty(0.2, "k2", place)
    settings = {} if name == "reinforce_pp" else {"prompts_per_group": prompts_per_group}
    algorithm = ALGORITHMS[name](clip_low=0.2, clip_high=0.2, kl=kl, **settings)
    got = jax.jit(algorithm.advantages)(jnp.asarray(np.where(valid, rewards, np.nan), jnp.float32), valid, batch)
    expected = loop_advantages(name, rewards, valid, batch, prompts_per_group, kl)
    assert got.shape == expected.shape and (np.asarray(got)[~valid] == 0).all()
    np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-4, atol=2e-5)
    if place == "loss" and prompts_per_group == 1 and expected.ndim == 2:
        assert (np.asarray(got)[2] == 0).all()


def test_rewards_that_are_all_equal_teach_nothing():
    rewards, batch = jnp.full((6, 4), 8.1), rollouts(6, 4)
    for name, make in ALGORITHMS.items():
        algorithm = make(clip_low=0.2, clip_high=0.2, kl=KLPenalty(0.0))
        assert (np.asarray(algorithm.advantages(rewards, rewards > 0, batch)) == 0).all(), name


def test_numerics_of_sampler_and_trainer_are_compared():
    """Where the old log-probs are the trainer's, with these; else the update's own are compared with the sampler's."""
    batch = rollouts()
    mask = np.arange(5) < np.asarray(batch.completion_lengths)[..., None]
    loss = ALGORITHMS["grpo"](**SETTINGS).loss
    new = jnp.asarray(batch.old_logprobs) + 0.5
    alone = replace(batch, sampler_logprobs=None)
    for given, d in ((batch, batch.old_logprobs - batch.sampler_logprobs), (alone, 0.5)):
        d = np.broadcast_to(np.asarray(d, np.float64), mask.shape)[mask]
        metrics = loss(new, sampled_tokens(given, "token_mean")).metrics
        found = {name: float(total / count) for name, (total, count) in metrics.items() if name.startswith("sampling")}
        assert found == {
            "sampling/logprob_gap_mean": pytest.approx(np.abs(d).mean(), rel=1e-4),
            "sampling/logprob_gap_k3": pytest.approx((np.exp(d) - 1 - d).mean(), rel=1e-4),
            "sampling/ratio_outside": pytest.approx((np.abs(d) > np.log(2)).mean(), rel=1e-4),
        }
    with pytest.raises(ValueError, match="need the trainer's old log-probs"):
        sampled_tokens(alone, "token_mean", importance_cap=2.0)


# ---------------------------------------------------------------------------------------------------------- the unit


def coupled(params, frozen, batch):
    """Of pairs [P, 2, T] a loss that knows both sides: what DPO, or a Bradley-Terry model, is made of."""
    sides = (params["table"] + frozen)[batch].sum(axis=(2, 3))
    margin = sides[:, 0] - sides[:, 1]
    total, count = jnp.logaddexp(0.0, -margin).sum(), jnp.float32(batch.shape[0])
    return Loss((total, count), {"loss": (total, count), "margin": (margin.sum(), count)})


def own_advantages():
    return rollouts(tokens_of_their_own=True)


CONSTANT = partial(sampled_tokens, aggregation="constant_length", longest=9)
CASES = {
    "constant length": (policy_loss(forward, ALGORITHMS["dr_grpo"](**SETTINGS), CONSTANT, TEMPERATURE), rollouts),
    "of tokens": (policy_loss(forward, ALGORITHMS["reinforce_pp"](**SETTINGS), SEQUENCES, TEMPERATURE), own_advantages),
    "coupled": (coupled, lambda: jnp.asarray(RNG.integers(0, VOCAB, (8, 2, 5)))),
    **{name: (policy_loss(forward, ALGORITHMS[name](**SETTINGS), SEQUENCES, TEMPERATURE), rollouts) for name in LOSSES},
}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_never_cut_a_unit(name):
    loss, case = CASES[name]
    (params, frozen), batch = toy(), case()
    optimizer = make_optimizer(OptimizerSection(learning_rate=1e-2), 10)
    results = [
        jax.jit(make_step(loss, optimizer, parts))(init_state(params, optimizer), frozen, batch) for parts in (1, 2, 4)
    ]
    (whole, metrics), *others = results
    assert float(metrics["grad_norm"]) > 1e-3
    for state, found in others:
        assert_close(state.opt_state, whole.opt_state)  # the gradient itself, by its moments
        assert {key: float(found[key]) for key in metrics} == {
            key: pytest.approx(float(value), rel=1e-5, abs=1e-6) for key, value in metrics.items()
        }


# ------------------------------------------------------------------------------------------------------------ pieces


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_weighted_means_equal_loops(aggregation):
    values, lengths = RNG.normal(size=(3, 2, 4, 6)), RNG.integers(0, 7, (3, 2, 4))
    lengths[0, 0, 0] = 0
    sequences = [v[:n] for v, n in zip(values.reshape(-1, 6), lengths.ravel(), strict=True) if n]
    expected = (
        np.concatenate(sequences).mean() if aggregation == "token_mean" else np.mean([s.mean() for s in sequences])
    )
    weights, counts = token_weights(mask_from_lengths(jnp.asarray(lengths), 6), aggregation)
    np.testing.assert_allclose((values * weights).sum() / counts.sum(), expected, rtol=1e-5)


def test_the_two_aggregations_differ():
    values, mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [3.0, 0, 0, 0]]), jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    weighed = {how: token_weights(mask, how) for how in ("token_mean", "sequence_mean")}
    means = {how: float((values * weights).sum() / counts.sum()) for how, (weights, counts) in weighed.items()}
    assert means == {"token_mean": pytest.approx(7 / 5), "sequence_mean": pytest.approx(2.0)}


def test_clipped_loss_equals_a_loop():
    new, old = RNG.normal(size=(5, 7)) * 0.4, RNG.normal(size=(5, 7)) * 0.4
    advantages = np.array([1.5, -0.7, 0.0, 2.0, -2.0])
    loss, clipped = clipped_surrogate(
        jnp.asarray(new - old), jnp.asarray(advantages)[:, None], clip_low=0.2, clip_high=0.28
    )
    for i in range(5):
        for t in range(7):
            ratio = np.exp(new[i, t] - old[i, t])
            bound = min(max(ratio, 0.8), 1.28)
            assert float(loss[i, t]) == pytest.approx(
                -min(ratio * advantages[i], bound * advantages[i]), rel=1e-4, abs=1e-6
            )
            bit = (advantages[i] > 0 and ratio > 1.28) or (advantages[i] < 0 and ratio < 0.8)
            assert bool(clipped[i, t]) == bit
    assert 0 < int(clipped.sum()) < 35


def test_k3_is_the_kl_on_average_and_never_negative():
    p, q = (np.exp(x) / np.exp(x).sum() for x in RNG.normal(size=(2, 6)))
    estimates = np.asarray(estimated_kl(jnp.log(p), jnp.log(q), "k3"))
    assert (estimates >= 0).all()
    assert float((p * estimates).sum()) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_eight_devices_equal_one(name):
    """Advantages over groups and over the batch's tokens, and the update by them."""
    rng = np.random.default_rng(8)
    rewards, valid = rng.normal(size=(8, 3)).astype(np.float32), rng.random((8, 3)) > 0.2
    (params, frozen), batch = toy(), rollouts()
    settings = {"clip_low": 0.05, "clip_high": 0.1, "kl": KLPenalty(0.3, "k1", "reward")}
    algorithm, optimizer = ALGORITHMS[name](**settings), make_optimizer(OptimizerSection(learning_rate=1e-2), 10)
    found = []
    for mesh in (ALONE, make_mesh(MeshSection(data=8, fsdp=1))):
        here = place_batch(mesh, jax.tree.map(np.asarray, (rewards, valid, batch)))
        advantages = OnMesh(mesh, algorithm.advantages, out_shardings=batch_sharding(mesh))(*here)
        loss = policy_loss(forward, algorithm, SEQUENCES, TEMPERATURE, batch_shards(mesh))
        step = OnMesh(mesh, make_step(loss, optimizer, 1))
        state, metrics = step(init_state(params, optimizer), frozen, replace(here[2], advantages=advantages))
        found.append((np.asarray(advantages), state.opt_state, float(metrics["loss"])))
    (one, moments, value), (eight, others, other) = found
    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-6)
    assert_close(others, moments)
    assert other == pytest.approx(value, rel=1e-5)
