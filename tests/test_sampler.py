"""Sampling equals transformers where it is greedy, and the exact distribution where it is not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from patarm_jax.config import MeshSection
from patarm_jax.model import weights
from patarm_jax.model.config import Qwen3Config
from patarm_jax.model.qwen3 import abstract_params, forward, init_params
from patarm_jax.model.sharding import ROLLOUT_RULES, TRAIN_RULES, make_mesh, place_batch
from patarm_jax.rollout.judging import _generate
from patarm_jax.rollout.sampler import Settings, draw, keep_top_k, keep_top_p, sample
from patarm_jax.train.steps import completion_logprobs
from patarm_jax.types import GRPOBatch, Prompts
from tests.toys import TINY, hf_model

CONFIG = Qwen3Config(**TINY)
KEY = jax.random.key(7)


def prompts_of(rng, rows, width, vocab=96, ids=None):
    lengths = rng.integers(1, width + 1, rows).astype(np.int32)
    lengths[0] = width
    tokens = rng.integers(3, vocab, (rows, width)).astype(np.int32)
    ids = np.arange(rows) if ids is None else np.asarray(ids)
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(ids, dtype=jnp.int32))


@partial(jax.jit, static_argnames=("group", "settings", "config"))
def generate(params, prompts, key, group, settings, config=CONFIG):
    return _generate(params, prompts, key, config, group, settings, "float32")


def forward_tiny(params, prompt, prompt_lengths=None, completion=None):
    return forward(params, CONFIG, prompt, prompt_lengths, completion)


def lively(config=CONFIG, seed=0):
    """Random weights large enough that the next token depends on what was read."""
    return jax.tree.map(
        lambda x: x * 8 if x.ndim > 1 and x.shape[-1] > 8 else x, init_params(config, jax.random.key(seed))
    )


@pytest.mark.parametrize(
    "changes", [dict(tie_word_embeddings=True), dict(num_key_value_heads=1, tie_word_embeddings=False)]
)
def test_greedy_equals_transformers_generate(changes, tmp_path):
    torch = pytest.importorskip("torch")
    model = hf_model(seed=3, **changes)
    model.save_pretrained(tmp_path / "hf")
    params, config = weights.load(tmp_path / "hf")
    prompts = prompts_of(np.random.default_rng(1), 5, 9)
    stops = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20)  # a tenth of the vocabulary, so that rows end at different times
    got = generate(params, prompts, KEY, 1, Settings(stops, 24, temperature=0.0), config)
    ended = 0
    for row in range(5):
        length = int(prompts.lengths[row])
        ids = torch.tensor(np.asarray(prompts.tokens[row : row + 1, :length]))
        theirs = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=list(stops), pad_token_id=0)
        expected = theirs[0, length:].tolist()
        ours = got.tokens[row, 0, : int(got.lengths[row, 0])].tolist()
        assert ours == expected
        assert bool(got.truncated[row, 0]) == (expected[-1] not in stops)
        ended += expected[-1] in stops
    assert 0 < ended


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 0.9), (0.0, 0, 1.0)])
def test_sampled_logprobs_equal_teacher_forced_ones(temperature, top_k, top_p):
    params = lively()
    prompts = prompts_of(np.random.default_rng(2), 6, 11)
    settings = Settings((5, 6, 7, 8), 12, temperature, top_k, top_p)
    got = generate(params, prompts, KEY, 4, settings)
    batch = GRPOBatch(
        prompts.tokens.reshape(3, 2, 11), prompts.lengths.reshape(3, 2), got.tokens.reshape(3, 2, 4, 12),
        got.lengths.reshape(3, 2, 4), got.logprobs.reshape(3, 2, 4, 12), None, jnp.zeros((3, 2, 4)),
    )  # fmt: skip
    forced, _ = jax.jit(partial(completion_logprobs, forward_tiny, temperature=temperature or 1.0, head_tokens=64))(
        params, batch
    )
    mask = np.arange(12) < np.asarray(batch.completion_lengths)[..., None]
    assert mask.sum() < mask.size, "some row must end early"
    np.testing.assert_allclose(np.asarray(forced)[mask], np.asarray(batch.old_logprobs)[mask], atol=1e-4)
    assert (np.asarray(batch.old_logprobs)[~mask] == 0).all()
    assert (np.asarray(batch.completion_tokens)[~mask] == 0).all()


@pytest.mark.parametrize(
    "section", [MeshSection(data=2, fsdp=2, tensor=2), MeshSection(data=1, fsdp=8, tensor=1)], ids=str
)
@pytest.mark.parametrize("rules", [ROLLOUT_RULES, TRAIN_RULES], ids=["rollout", "train"])
def test_the_same_draws_on_one_and_on_eight_devices(section, rules):
    params = lively()
    prompts = prompts_of(np.random.default_rng(3), 8, 10, ids=[4, 9, 1, 0, 77, 5, 6, 2])
    settings = Settings((5, 6), 10)
    alone = generate(params, prompts, KEY, 4, settings)
    mesh = make_mesh(section)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(CONFIG, mesh, rules))
    with jax.set_mesh(mesh):
        spread = generate(jax.device_put(params, shardings), place_batch(mesh, prompts), KEY, 4, settings)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    np.testing.assert_allclose(alone.logprobs, spread.logprobs, atol=1e-5)


def test_a_row_draws_the_same_in_any_batch_and_fillers_draw_nothing():
    params, settings = lively(), Settings((5, 6), 10)
    prompts = prompts_of(np.random.default_rng(4), 6, 10, ids=[3, 8, 1, 0, 5, 9])
    whole = generate(params, prompts, KEY, 2, settings)
    order = np.array([4, 1, 0])
    some = Prompts(prompts.tokens[order], prompts.lengths[order], prompts.rows[order].at[2].set(-1))
    part = generate(params, some, KEY, 2, settings)
    np.testing.assert_array_equal(part.tokens[:2], whole.tokens[order[:2]])
    assert (part.lengths[2] == 0).all() and (part.tokens[2] == 0).all() and not part.truncated[2].any()


def test_draws_of_rows_positions_and_steps_are_independent():
    """All logits equal: any two draws agree once in V times. A reused key would make them agree always."""
    vocab, rows, group, width = 64, 20, 5, 12

    def prefill(tokens, lengths):
        return jnp.zeros((rows, vocab)), 0

    def decode(tokens, cache):
        return jnp.zeros((rows, group, vocab)), cache

    prompts = prompts_of(np.random.default_rng(5), rows, 4)
    settings = Settings((-1,), width)
    steps = np.stack(
        [sample(prefill, decode, prompts, jax.random.fold_in(KEY, s), group, settings).tokens for s in range(4)]
    )
    flat = {
        "rows": (steps[:, 1:], steps[:, :-1]),
        "rollouts": (steps[:, :, 1:], steps[:, :, :-1]),
        "positions": (steps[..., 1:], steps[..., :-1]),
        "steps": (steps[1:], steps[:-1]),
        "next row's first rollout": (steps[:, 1:, 0], steps[:, :-1, -1]),
    }
    for name, (a, b) in flat.items():
        agreements = int((a == b).sum())
        assert scipy.stats.binomtest(agreements, a.size, 1 / vocab).pvalue > 1e-4, name
    counts = np.bincount(steps.ravel(), minlength=vocab)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def exact_distribution(logits, temperature, top_k, top_p):
    """The truncated softmax by the book: sort, cut, renormalise."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    inside = p[kept] / p[kept].sum()
    reach = int(np.searchsorted(np.cumsum(inside), top_p)) + 1 if top_p < 1 else len(kept)
    result = np.zeros_like(p)
    result[kept[:reach]] = p[kept[:reach]]
    return result / result.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 4, 1.0), (1.0, 0, 0.8), (0.8, 6, 0.7), (1.0, 1, 1.0), (1.0, 0, 1e-6)],
)
def test_frequencies_equal_the_exact_distribution(temperature, top_k, top_p):
    logits = np.random.default_rng(6).normal(size=12).astype(np.float32) * 1.5
    number = 40_000
    settings = Settings((), 1, temperature, top_k, top_p)
    keys = jax.random.split(KEY, number)
    tokens, logprobs = jax.jit(lambda k: draw(jnp.broadcast_to(logits, (number, 12)), k, settings))(keys)
    expected = exact_distribution(logits.astype(float), temperature, top_k, top_p)
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert counts[expected == 0].sum() == 0
    if (expected > 0).sum() > 1:
        inside = expected > 0
        assert scipy.stats.chisquare(counts[inside], expected[inside] * number).pvalue > 1e-4
    untruncated = np.log(exact_distribution(logits.astype(float), temperature, 0, 1.0))
    np.testing.assert_allclose(logprobs, untruncated[np.asarray(tokens)], atol=1e-5)


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
    assert (keep_top_k(logits, 2) > -jnp.inf).tolist() == [False, True, False, True]
    assert (keep_top_p(logits, 0.5) > -jnp.inf).tolist() == [False, True, False, True]
    assert (keep_top_p(logits, 0.39) > -jnp.inf).tolist() == [False, True, False, False]


def test_the_loop_ends_when_every_row_has_ended():
    """The fourth decode would be counted; all rows stop at the third token."""

    def prefill(tokens, lengths):
        return jnp.eye(8)[jnp.full(2, 3)] * 50, jnp.int32(0)

    def decode(tokens, count):
        return jnp.broadcast_to(jnp.where(count == 1, jnp.eye(8)[5], jnp.eye(8)[3]) * 50, (2, 3, 8)), count + 1

    calls = []

    def counted(tokens, count):
        jax.debug.callback(lambda: calls.append(1))
        return decode(tokens, count)

    got = jax.jit(lambda p: sample(prefill, counted, p, KEY, 3, Settings((5,), 100)))(
        prompts_of(np.random.default_rng(0), 2, 3)
    )
    jax.effects_barrier()
    assert got.lengths.tolist() == [[3, 3, 3]] * 2
    assert len(calls) == 2
