"""Algorithms against loops, the exact way round the head against autodiff, and units that are never cut."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.arrays import Rollouts
from patarm_jax.config.sections import OptimizerSection
from patarm_jax.train import losses
from patarm_jax.train.algorithms import (
    ALGORITHMS,
    clipped_surrogate,
    group_advantages,
    kl_k3,
    sampled_tokens,
    token_weights,
)
from patarm_jax.train.losses import Loss, mask_from_lengths
from patarm_jax.train.optimizer import make_optimizer
from patarm_jax.train.steps import init_state, make_step, policy_loss

RNG = np.random.default_rng(0)
SETTINGS = {"clip_low": 0.05, "clip_high": 0.1, "kl_coef": 0.3}
TEMPERATURE, VOCAB, WIDTH = 0.8, 23, 6


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


@pytest.fixture(params=[4, 512])
def chunk(request, monkeypatch):
    """So many tokens at a time."""
    monkeypatch.setattr(losses, "HEAD_TOKENS", request.param)


def assert_close(ours, theirs, relative=1e-5):
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        other = np.asarray(dict(jax.tree_util.tree_leaves_with_path(theirs))[path])
        assert np.abs(np.asarray(leaf) - other).max() <= relative * np.abs(other).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_value_metrics_and_gradient_equal_autodiff_over_all_logits(chunk, name, aggregation, own, shards):
    (params, frozen), batch, algorithm = toy(), rollouts(tokens_of_their_own=own), ALGORITHMS[name](**SETTINGS)

    def plain(params):
        found = algorithm.loss(full_logprobs(params, frozen, batch), sampled_tokens(batch, aggregation))
        return found.loss[0], found

    def ours(params):
        found = policy_loss(forward, algorithm, aggregation, TEMPERATURE, shards)(params, frozen, batch)
        return found.loss[0], found

    (value, found), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (expected, wanted), theirs = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert_close(gradient, theirs)
    assert found.metrics.keys() == wanted.metrics.keys() | {"entropy"}
    for metric, (total, count) in wanted.metrics.items():
        assert float(found.metrics[metric][0]) == pytest.approx(float(total), rel=1e-5, abs=1e-5), metric
        assert float(found.metrics[metric][1]) == float(count), metric
    assert 0 < float(found.metrics["clip_ratio/region_mean"][0]) < float(found.metrics["clip_ratio/region_mean"][1])


def test_gspo_equals_a_loop():
    (params, frozen), batch = toy(), rollouts()
    logprobs = np.asarray(full_logprobs(params, frozen, batch), np.float64)
    (got, sequences), _ = ALGORITHMS["gspo"](**SETTINGS).loss(
        jnp.asarray(logprobs), sampled_tokens(batch, "sequence_mean")
    )
    expected, count = 0.0, 0
    for r, g in np.ndindex(*batch.completion_lengths.shape):
        length = int(batch.completion_lengths[r, g])
        if not length:
            continue
        new, old, ref = (
            np.asarray(x[r, g, :length], np.float64) for x in (logprobs, batch.old_logprobs, batch.ref_logprobs)
        )
        ratio, advantage = np.exp((new - old).mean()), float(batch.advantages[r, g])
        surrogate = -min(ratio * advantage, np.clip(ratio, 0.95, 1.1) * advantage)
        kl = (np.exp(ref - new) - 1 - (ref - new)).mean()
        expected, count = expected + surrogate + 0.3 * kl, count + 1
    assert int(sequences) == count and float(got) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- the unit


def coupled(params, frozen, batch):
    """Of pairs [P, 2, T] a loss that knows both sides: what DPO, or a Bradley-Terry model, is made of."""
    sides = (params["table"] + frozen)[batch].sum(axis=(2, 3))
    margin = sides[:, 0] - sides[:, 1]
    total, count = jnp.logaddexp(0.0, -margin).sum(), jnp.float32(batch.shape[0])
    return Loss((total, count), {"loss": (total, count), "margin": (margin.sum(), count)})


CASES = {
    "coupled": (coupled, lambda: jnp.asarray(RNG.integers(0, VOCAB, (8, 2, 5)))),
    **{
        name: (policy_loss(forward, make(**SETTINGS), "sequence_mean", TEMPERATURE), rollouts)
        for name, make in ALGORITHMS.items()
    },
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


# -------------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("prompts_per_group", [1, 2])
def test_group_advantages_equal_a_loop(prompts_per_group):
    rewards = RNG.normal(size=(6, 4)).astype(np.float32)
    rewards[2] = 8.1  # whose mean rounds, so that what is left of it must not count
    advantages = partial(group_advantages, prompts_per_group=prompts_per_group)
    got = np.asarray(jax.jit(advantages)(rewards, rewards > 0, rollouts(6, 4)))
    for group, ours in zip(
        rewards.reshape(-1, 4 * prompts_per_group), got.reshape(-1, 4 * prompts_per_group), strict=True
    ):
        spread = group.std(ddof=1)
        np.testing.assert_allclose(
            ours, (group - group.mean()) / (spread + 1e-6) if spread > 1e-5 else 0 * group, rtol=1e-4, atol=1e-6
        )
    if prompts_per_group == 1:
        assert (got[2] == 0).all()


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
    estimates = np.asarray(kl_k3(jnp.log(p), jnp.log(q)))
    assert (estimates >= 0).all()
    assert float((p * estimates).sum()) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-4)
