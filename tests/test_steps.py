"""Steps equal torch's, and do not depend on micro-batches or devices."""

import copy
import dataclasses
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from patarm_jax.arrays import Rollouts
from patarm_jax.config.sections import MeshSection, OptimizerSection
from patarm_jax.data.packing import sft_batch, sft_shape
from patarm_jax.data.pipeline import EncodedPair, PairBatch
from patarm_jax.model import weights
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import batch_sharding, make_mesh, place_batch
from patarm_jax.model.transformer import abstract_params, forward, init_params
from patarm_jax.train import steps
from patarm_jax.train.algorithms import grpo
from patarm_jax.train.optimizer import make_optimizer, make_schedule
from patarm_jax.train.penalties import KLPenalty
from patarm_jax.train.policy_losses import sampled_tokens
from patarm_jax.train.steps import (
    LARGEST_WEIGHT,
    abstract_state,
    are_sound,
    init_state,
    make_step,
    map_micro_batches,
    policy_loss,
    rollout_logprobs,
    sft_loss,
)
from tests.toys import TINY, hf_model

CONFIG = Architecture(**TINY)
SECTION = OptimizerSection(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
CLIP_LOW, CLIP_HIGH, KL_COEF = 0.05, 0.1, 0.3
GRPO = grpo(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, kl=KLPenalty(KL_COEF))
TEMPERATURE = 0.8
TOKEN_MEAN, SEQUENCE_MEAN = (partial(sampled_tokens, aggregation=how) for how in ("token_mean", "sequence_mean"))
SHARDS = 2  # parts of a batch; with one device they are worked through all the same


def run(params, frozen, prompt, prompt_lengths=None, completion=None, remat="none"):
    return forward(params, CONFIG, prompt, prompt_lengths, completion, remat=remat)


def run_packed(params, frozen, tokens, starts, remat="none"):
    return forward(params, CONFIG, tokens, starts=starts, remat=remat)


@pytest.fixture(scope="module")
def model():
    return hf_model(seed=5)


@pytest.fixture(scope="module")
def model_params(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    model.save_pretrained(folder)
    return weights.load(folder)[0]


@pytest.fixture(scope="module")
def params():
    """Weights of a size that makes every gradient matter, norms that are not all ones."""
    leaves, tree = jax.tree.flatten(abstract_params(CONFIG))
    rng = np.random.default_rng(0)
    names = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(CONFIG))]
    values = [
        1 + 0.1 * rng.normal(size=leaf.shape) if "norm" in name else 0.2 * rng.normal(size=leaf.shape)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, [jnp.asarray(value, jnp.float32) for value in values])


def sft_rows(rows=8, width=17):
    """Tokens, lengths and prompt lengths of sequences one to a row."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(4, width + 1, rows)
    return rng.integers(0, 96, (rows, width)), lengths, np.array([rng.integers(1, n) for n in lengths])


def sft_case(packed=False, rows=8):
    """The sequences of `sft_rows` as a batch, by the loader that recipes use."""
    tokens, lengths, prompts = sft_rows(rows)
    sides = [
        (row[:p].astype(np.int32), row[p:n].astype(np.int32))
        for row, n, p in zip(tokens, lengths, prompts, strict=True)
    ]
    pairs = zip(sides[::2], sides[1::2], strict=True)
    records = tuple(EncodedPair(i, None, *zip(*pair, strict=True)) for i, pair in enumerate(pairs))
    batch = PairBatch(records, ("",) * len(records), tuple(side for record in records for side in record.lengths))
    return jax.tree.map(jnp.asarray, sft_batch(batch, sft_shape(batch, 17, packed=packed), 0, packed))


def grpo_case(prompts=16, prompt=9, group=3, width=7):
    rng = np.random.default_rng(2)
    shape = (prompts, group, width)
    noise = [rng.normal(size=shape).astype(np.float32) * 0.3 - 4 for _ in range(2)]
    return Rollouts(
        jnp.asarray(rng.integers(0, 96, (prompts, prompt)), jnp.int32),
        jnp.asarray(rng.integers(1, prompt + 1, prompts), jnp.int32),
        jnp.asarray(rng.integers(0, 96, shape), jnp.int32),
        jnp.asarray(rng.integers(1, width + 1, shape[:2]), jnp.int32),
        *map(jnp.asarray, noise),
        jnp.asarray(rng.normal(size=shape[:2]), jnp.float32),
    )


def gradient_as_params(model, folder):
    """Torch's gradient, in our layout: a model whose weights are the gradient, read as any other."""
    torch = pytest.importorskip("torch")
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, source in zip(holder.parameters(), model.parameters(), strict=True):
            parameter.copy_(source.grad)
    holder.save_pretrained(folder)
    return weights.load(folder)[0]


def assert_close(ours, theirs, relative):
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        other = np.asarray(dict(jax.tree_util.tree_leaves_with_path(theirs))[path])
        assert np.abs(np.asarray(leaf) - other).max() <= relative * np.abs(other).max(), jax.tree_util.keystr(path)


def mean_gradient(loss_fn, params, batch):
    def value(params):
        (total, count), _ = loss_fn(params, None, batch)
        return total / count

    return jax.jit(jax.value_and_grad(value))(params)


def test_sft_gradient_equals_torch(model, model_params, tmp_path):
    torch = pytest.importorskip("torch")
    batch, (tokens, lengths, prompt_lengths) = sft_case(), sft_rows()
    model.zero_grad()
    labels = torch.tensor(tokens).long()
    position = torch.arange(labels.shape[1])
    judged = (position >= torch.tensor(prompt_lengths)[:, None]) & (position < torch.tensor(lengths)[:, None])
    mask = (position < torch.tensor(lengths)[:, None]).long()
    out = model(labels, attention_mask=mask, labels=labels.masked_fill(~judged, -100))
    out.loss.backward()
    loss, gradient = mean_gradient(sft_loss(run_packed), model_params, batch)
    assert float(loss) == pytest.approx(float(out.loss.detach()), rel=1e-5)
    assert_close(gradient, gradient_as_params(model, tmp_path / "g"), 1e-4)
    # The share of judged tokens that are the argmax of the logits before them, as TRL has it.
    right = (out.logits[:, :-1].argmax(-1) == labels[:, 1:])[judged[:, 1:]]
    hits, count = sft_loss(run_packed)(model_params, None, batch).metrics["mean_token_accuracy"]
    assert (int(hits), int(count)) == (int(right.sum()), len(right))


def torch_grpo(model, batch, aggregation):
    """GRPO by the papers: every completion behind its own prompt, one sequence at a time, double loop."""
    torch = pytest.importorskip("torch")
    totals, tokens, sequences = 0.0, 0, []
    arrays = {name: torch.tensor(np.asarray(array)) for name, array in vars(batch).items() if array is not None}
    prompts, group, _ = batch.completion_tokens.shape
    for r in range(prompts):
        prompt = arrays["prompt_tokens"][r, : int(arrays["prompt_lengths"][r])].long()
        for g in range(group):
            length = int(arrays["completion_lengths"][r, g])
            completion = arrays["completion_tokens"][r, g, :length].long()
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
            logprobs = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
            old, ref = (arrays[name][r, g, :length] for name in ("old_logprobs", "ref_logprobs"))
            ratio, advantage = (logprobs - old).exp(), arrays["advantages"][r, g]
            bound = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
            loss = -torch.minimum(ratio * advantage, bound * advantage)
            loss = loss + KL_COEF * ((ref - logprobs).exp() - 1 - (ref - logprobs))
            totals, tokens = totals + loss.sum(), tokens + length
            sequences.append(loss.mean())
    return totals / tokens if aggregation == "token_mean" else sum(sequences) / len(sequences)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_grpo_loss_and_gradient_equal_torch(model, model_params, tmp_path, aggregation):
    batch = grpo_case(prompts=4)
    model.zero_grad()
    expected = torch_grpo(model, batch, aggregation)
    expected.backward()
    loss, gradient = mean_gradient(
        policy_loss(run, GRPO, partial(sampled_tokens, aggregation=aggregation), TEMPERATURE), model_params, batch
    )
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_close(gradient, gradient_as_params(model, tmp_path / "g"), 1e-4)


def test_without_kl_there_is_no_reference(params):
    bare = dataclasses.replace(grpo_case(prompts=2), ref_logprobs=None)
    result = policy_loss(run, GRPO, TOKEN_MEAN, TEMPERATURE)(params, None, bare)
    assert "kl" not in result.metrics


CASES = {
    "sft": (sft_loss(partial(run_packed, remat="full"), SHARDS), sft_case),
    "grpo": (policy_loss(run, GRPO, TOKEN_MEAN, TEMPERATURE, SHARDS), grpo_case),
    "grpo, sequence mean": (policy_loss(run, GRPO, SEQUENCE_MEAN, TEMPERATURE, SHARDS), grpo_case),
}


QUICK = (("sft", 4), ("grpo", 2))  # of what any number of micro-batches is tried with


def test_packed_rows_equal_rows_of_their_own(params):
    alone, packed = sft_case(), sft_case(packed=True)
    assert packed.tokens.shape[0] < alone.tokens.shape[0]
    loss_fn = sft_loss(run_packed)
    loss, gradient = mean_gradient(loss_fn, params, alone)
    packed_loss, packed_gradient = mean_gradient(loss_fn, params, packed)
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_close(packed_gradient, gradient, 1e-5)


def advance(loss_fn, params, batch, micro_batches=1, steps=2):
    optimizer = make_optimizer(SECTION, 10)
    step = jax.jit(make_step(loss_fn, optimizer, micro_batches))
    state = init_state(params, optimizer)
    for _ in range(steps):
        state, metrics = step(state, None, batch)
    return state, metrics


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        *QUICK,
        *(pytest.param(*one, marks=pytest.mark.long) for one in product(CASES, (2, 4)) if one not in QUICK),
    ],
)
def test_micro_batches_equal_one_batch(params, name, micro_batches):
    loss_fn, case = CASES[name]
    whole, whole_metrics = advance(loss_fn, params, case())
    parts, part_metrics = advance(loss_fn, params, case(), micro_batches)
    assert whole_metrics.keys() == part_metrics.keys()
    for key, value in whole_metrics.items():
        assert float(part_metrics[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key
    assert_close(parts.params, whole.params, 1e-4)


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        ("grpo", 1),
        *(pytest.param(*one, marks=pytest.mark.long) for one in (("sft", 1), ("sft", 2), ("grpo", 2))),
    ],
)
def test_eight_devices_equal_one(params, name, micro_batches):
    loss_fn, case = CASES[name]
    alone, alone_metrics = advance(loss_fn, params, case())
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(SECTION, 10)
    abstract = abstract_state(abstract_params(CONFIG, mesh), optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.device_put(init_state(jax.tree.map(jnp.copy, params), optimizer), shardings)
    with jax.set_mesh(mesh):
        step = jax.jit(
            make_step(loss_fn, optimizer, micro_batches),
            in_shardings=(shardings, None, batch_sharding(mesh)),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        for _ in range(2):
            state, metrics = step(state, None, place_batch(mesh, case()))
    for key, value in alone_metrics.items():
        assert float(metrics[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), key
    assert_close(state.params, alone.params, 1e-4)
    embedding = state.params["layers"]["mlp"]["gate_proj"]
    assert tuple(embedding.sharding.spec) == (None, "fsdp", "tensor")
    moment = state.opt_state[1][0].mu["layers"]["mlp"]["gate_proj"]
    assert moment.sharding == embedding.sharding


def test_gradients_of_micro_batches_are_added_up_in_place():
    """Beside what one slice needs, four need a layer's gradient or two, and not another gradient of them all."""
    wide = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=512, num_hidden_layers=6)
    params, batch = init_params(wide, jax.random.key(0)), sft_case()

    def read(params, frozen, tokens, starts):
        return forward(params, wide, tokens, starts=starts, remat="full")

    def needed(batch, slices):
        program = jax.jit(lambda params, batch: steps._accumulate(sft_loss(read), params, None, batch, slices))
        return program.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    quarter = jax.tree.map(lambda x: x[: len(x) // 4], batch)
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert needed(batch, 4) - needed(quarter, 1) < gradient / 2


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_logprobs_in_micro_batches_keep_their_rows(params, micro_batches):
    def logprobs(params, frozen, batch):
        return rollout_logprobs(run, params, frozen, batch, TEMPERATURE)

    whole = jax.jit(logprobs)(params, None, grpo_case())
    parts = jax.jit(map_micro_batches(logprobs, micro_batches))(params, None, grpo_case())
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_a_gradient_that_is_not_finite_changes_no_weight(params):
    batch = grpo_case(prompts=4)
    poisoned = dataclasses.replace(batch, advantages=batch.advantages.at[0, 0].set(jnp.nan))
    optimizer = make_optimizer(SECTION, 10)
    step = jax.jit(make_step(CASES["grpo"][0], optimizer, 1))
    start, _ = step(init_state(params, optimizer), None, batch)
    state, metrics = step(start, None, poisoned)
    assert int(state.step) == 2 and int(state.skipped) == 1 and int(metrics["skipped_updates"]) == 1
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (start.params, start.opt_state))
    state, _ = step(state, None, batch)
    assert not np.array_equal(state.params["embed_tokens"], start.params["embed_tokens"])


@pytest.mark.parametrize(("rate", "skipped"), [(1e30, 2), (1e5, 2), (1e2, 0)])
def test_an_update_that_would_ruin_a_weight_changes_none(params, rate, skipped):
    """Its gradient is finite; what it would make of the weights is nothing that an engine could load."""
    optimizer = make_optimizer(OptimizerSection(learning_rate=rate), 10)
    step = jax.jit(make_step(sft_loss(run_packed), optimizer, 1))
    start = init_state(params, optimizer)
    state, _ = step(step(start, None, sft_case())[0], None, sft_case())
    assert (int(state.step), int(state.skipped)) == (2, skipped)
    assert all(np.abs(leaf).max() <= LARGEST_WEIGHT for leaf in jax.tree.leaves(state.params))
    if skipped:
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (start.params, start.opt_state))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -65536.0])
def test_weights_that_are_ruined_are_told(params, value):
    assert bool(are_sound(params))
    assert bool(are_sound(params | {"norm": params["norm"].at[3].set(-LARGEST_WEIGHT)}))
    assert not bool(are_sound(params | {"norm": params["norm"].at[3].set(value)}))


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_step_does_not_talk_to_the_host(params, name):
    loss_fn, case = CASES[name]
    optimizer = make_optimizer(SECTION, 10)
    step = jax.jit(make_step(loss_fn, optimizer, 2), donate_argnums=0)
    state, batch = init_state(jax.tree.map(jnp.copy, params), optimizer), case()
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, _ = step(state, None, batch)
    assert int(state.step) == 2


def test_schedule_warms_up_and_decays():
    section = OptimizerSection(learning_rate=2.0, warmup_steps=4, decay="linear", final_fraction=0.25)
    schedule = make_schedule(section, 12)
    assert [float(schedule(s)) for s in (0, 2, 4, 8, 12, 20)] == pytest.approx([0, 1, 2, 1.25, 0.5, 0.5])
    assert float(make_schedule(OptimizerSection(learning_rate=2.0), 12)(0)) == 2.0


def test_norms_are_not_decayed(params):
    optimizer = make_optimizer(SECTION, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["layers"]["self_attn"]["q_norm"], params["layers"]["self_attn"]["q_norm"])
    np.testing.assert_array_equal(moved["norm"], params["norm"])
    np.testing.assert_allclose(moved["embed_tokens"], params["embed_tokens"] * (1 - 1e-3), rtol=1e-5)
