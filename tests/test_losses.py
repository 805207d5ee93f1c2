"""Losses against the formulas written out in NumPy, and the vocabulary that is never whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.train.losses import clipped_policy_loss, kl_k3, mask_from_lengths, masked_mean, token_logprobs

RNG = np.random.default_rng(0)


def plain_logprobs(hidden, head, targets, temperature):
    z = hidden.astype(np.float64) @ head.astype(np.float64).T / temperature
    log_softmax = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    taken = np.take_along_axis(log_softmax, targets[..., None], -1)[..., 0]
    return taken, -(np.exp(log_softmax) * log_softmax).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_the_formula(chunk, temperature):
    hidden, head = RNG.normal(size=(3, 13, 8)).astype(np.float32), RNG.normal(size=(29, 8)).astype(np.float32)
    targets = RNG.integers(0, 29, (3, 13))
    got = token_logprobs(hidden, head, targets, temperature=temperature, chunk=chunk)
    for ours, plain in zip(got, plain_logprobs(hidden, head, targets, temperature), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_chunked_gradient_equals_unchunked():
    hidden, head = RNG.normal(size=(2, 12, 8)).astype(np.float32), RNG.normal(size=(29, 8)).astype(np.float32)
    targets = RNG.integers(0, 29, (2, 12))

    def total(chunk):
        return jax.grad(lambda h, w: jnp.sin(token_logprobs(h, w, targets, chunk=chunk)[0]).sum(), argnums=(0, 1))

    for ours, whole in zip(total(5)(hidden, head), total(12)(hidden, head), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


def test_no_gradient_flows_through_the_entropy():
    hidden, head = RNG.normal(size=(2, 4, 8)).astype(np.float32), RNG.normal(size=(9, 8)).astype(np.float32)
    gradient = jax.grad(lambda h: token_logprobs(h, head, np.zeros((2, 4), int), chunk=2)[1].sum())(hidden)
    assert (gradient == 0).all()


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    vocab, width = 4096, 8

    def temporary(tokens):
        def loss(hidden, head, targets):
            return token_logprobs(hidden, head, targets, chunk=16)[0].sum()

        shapes = [
            jax.ShapeDtypeStruct(s, d)
            for s, d in (((4, tokens, width), jnp.float32), ((vocab, width), jnp.float32), ((4, tokens), jnp.int32))
        ]
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(64), temporary(1024)
    assert large - small < 4 * (1024 - 64) * vocab * 4 / 50


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_masked_means_equal_loops(aggregation):
    values, lengths = RNG.normal(size=(3, 2, 4, 6)), RNG.integers(0, 7, (3, 2, 4))
    lengths[0, 0, 0] = 0
    sequences = [v[:n] for v, n in zip(values.reshape(-1, 6), lengths.ravel(), strict=True) if n]
    expected = (
        np.concatenate(sequences).mean() if aggregation == "token_mean" else np.mean([s.mean() for s in sequences])
    )
    total, count = masked_mean(jnp.asarray(values), mask_from_lengths(jnp.asarray(lengths), 6), aggregation)
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)


def test_the_two_aggregations_differ():
    values, mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [3.0, 0, 0, 0]]), jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    means = {how: float(np.divide(*masked_mean(values, mask, how))) for how in ("token_mean", "sequence_mean")}
    assert means == {"token_mean": pytest.approx(7 / 5), "sequence_mean": pytest.approx(2.0)}


def test_clipped_loss_equals_a_loop():
    new, old = RNG.normal(size=(5, 7)) * 0.4, RNG.normal(size=(5, 7)) * 0.4
    advantages = np.array([1.5, -0.7, 0.0, 2.0, -2.0])
    loss, clipped = clipped_policy_loss(jnp.asarray(new), jnp.asarray(old), jnp.asarray(advantages), 0.2, 0.28)
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
