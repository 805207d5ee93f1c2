"""The network equals transformers' Qwen3, and shared prompts equal unshared ones."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from patarm_jax.arrays import Seats
from patarm_jax.model import pages, weights
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.cache import CacheSizes, init_cache, place_prompts
from patarm_jax.model.for_sampling import for_sampling, unstack_layers
from patarm_jax.model.pages import most_pages
from patarm_jax.model.transformer import decode, forward, init_params, logits, prefill
from tests.test_pages import mesh_of
from tests.toys import TINY, hf_model

VARIANTS = {
    "tied, 2 query heads per kv head": dict(tie_word_embeddings=True),
    "untied, 1 query head per kv head": dict(num_key_value_heads=4, tie_word_embeddings=False),
    "4 query heads per kv head, wide heads": dict(num_key_value_heads=1, head_dim=22, tie_word_embeddings=False),
    "another rope, one layer": dict(rope_theta=123456.0, num_hidden_layers=1, tie_word_embeddings=True),
    "published rope, long and narrow": dict(rope_theta=1e6, num_hidden_layers=4, head_dim=6, tie_word_embeddings=False),
}


def logits_of(hidden, head):
    return np.asarray(hidden @ head.T)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(changes, tmp_path):
    model = hf_model(**changes)
    model.save_pretrained(tmp_path / "hf")
    params, config = weights.load(tmp_path / "hf")
    torch = pytest.importorskip("torch")
    lengths = [37, 5, 1, 20]
    tokens = np.random.default_rng(0).integers(0, 96, (4, 37))
    out = jax.jit(forward, static_argnums=1)(params, config, jnp.asarray(tokens))
    ours = logits_of(out.prompt, out.head)
    mask = torch.tensor([[1] * n + [0] * (37 - n) for n in lengths])
    theirs = model(torch.tensor(tokens), attention_mask=mask).logits.detach().numpy()
    assert np.abs(theirs).max() > 1
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(ours[row, :length], theirs[row, :length], atol=1e-4)


def shared_case(seed, config, rows, prompt, group, completion):
    rng = np.random.default_rng(seed)
    params = init_params(config, jax.random.key(seed))
    params = jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, params)
    lengths = rng.integers(1, prompt + 1, rows)
    lengths[0] = prompt
    completion_lengths = rng.integers(1, completion + 1, (rows, group))
    return (
        params,
        rng.integers(0, config.vocab_size, (rows, prompt)).astype(np.int32),
        lengths.astype(np.int32),
        rng.integers(0, config.vocab_size, (rows, group, completion)).astype(np.int32),
        completion_lengths,
    )


@partial(jax.jit, static_argnames=("config", "remat"))
def two_streams(params, config, prompt, lengths, completion, remat="none"):
    out = forward(params, config, prompt, lengths, completion, remat=remat)
    return out.completion @ out.head.T


@partial(jax.jit, static_argnames="config")
def unshared(params, config, prompt, lengths, completion):
    """Each completion behind its own copy of its prompt, as a plain sequence."""
    rows, group, width = completion.shape
    position = jnp.arange(prompt.shape[1] + width)
    own = position - lengths[:, None]  # ≥ 0 where the completion stands
    prompts = jnp.pad(prompt, ((0, 0), (0, width)))[:, None]
    completions = jnp.take_along_axis(completion, jnp.clip(own, 0, width - 1)[:, None], axis=2)
    sequences = jnp.where(own[:, None] >= 0, completions, prompts).reshape(rows * group, -1)
    out = forward(params, config, sequences)
    where = (lengths[:, None, None] + jnp.arange(width)).repeat(group, axis=1).reshape(rows * group, width)
    hidden = jnp.take_along_axis(out.prompt, where[..., None], axis=1)
    return (hidden @ out.head.T).reshape(rows, group, width, -1)


@pytest.mark.parametrize(
    ("seed", "rows", "prompt", "group", "completion", "remat"),
    [
        (0, 3, 11, 4, 6, "full"),
        pytest.param(1, 2, 7, 1, 5, "none", marks=pytest.mark.long),
        (2, 1, 1, 3, 1, "none"),
        pytest.param(3, 2, 5, 8, 9, "dots", marks=pytest.mark.long),
    ],
)
def test_shared_prompt_equals_unshared(seed, rows, prompt, group, completion, remat):
    config = Architecture(**TINY)
    params, tokens, lengths, completions, ends = shared_case(seed, config, rows, prompt, group, completion)
    mask = jnp.arange(completion) < ends[..., None]

    def loss(run):
        def value(params):
            logits = run(params, config, tokens, lengths, completions)
            return (jnp.sin(logits).sum(-1) * mask).sum(), logits

        return jax.jit(jax.value_and_grad(value, has_aux=True))(params)

    (_, ours), our_gradient = loss(lambda *a: two_streams(*a, remat=remat))
    (_, theirs), their_gradient = loss(unshared)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(their_gradient), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("page", [2, 128])
@pytest.mark.parametrize("shards", [1, 2])
def test_decoding_over_a_cache_equals_two_streams(page, shards, monkeypatch):
    """Prompts come in one by one and lie anywhere, rows sit anywhere, and their past lies on one page or several."""
    monkeypatch.setattr(pages, "PAGE", page)
    config = Architecture(**TINY)
    prompts, group, width = 4, 3, 6
    params, tokens, lengths, completions, _ = shared_case(4, config, prompts, 9, group, width)
    expected = np.asarray(two_streams(params, config, tokens, lengths, completions)).reshape(12, width, -1)
    apart = for_sampling(params)
    with jax.set_mesh(mesh_of(shards)):
        read, decoded = decoding(config, apart, tokens, lengths, completions, shards)
    for mine, last in read:
        plain = forward(params, config, tokens[mine]).prompt[jnp.arange(shards), lengths[mine] - 1]
        np.testing.assert_allclose(last, plain, atol=1e-5)
    for t, (who, hidden) in enumerate(decoded):
        np.testing.assert_allclose(logits(params, config, hidden), expected[who, t], rtol=1e-5, atol=1e-5)


def decoding(config, apart, tokens, lengths, completions, shards):
    """Of prompts which they are, and their last states; of each token of the completions whose it is, and its state."""
    (prompts, group, width), read, decoded = completions.shape, [], []
    each = prompts // shards + 1, 11, 12 // shards, width, (12 // shards,) * most_pages(width)
    cache = init_cache(config, CacheSizes(shards, *each), 1, jnp.float32)
    places = [2, 0] if shards == 2 else [4, 0, 2, 1]  # within each device, which has one more than it needs
    per_shard = prompts // shards
    for n in range(per_shard):
        mine = np.array([shard * per_shard + n for shard in range(shards)])
        last, new = jax.jit(prefill, static_argnums=1)(apart, config, tokens[mine], lengths[mine])
        read.append((mine, np.asarray(last)))
        where = jnp.full((shards, 1), places[n], jnp.int32)
        cache = replace(cache, prompt=jax.jit(place_prompts)(cache.prompt, new, where))

    rng = np.random.default_rng(0)
    order = np.stack([rng.permutation(per_shard * group) for _ in range(shards)])
    seat = np.array(places)[order // group] * group + order % group
    row = np.full((shards, (per_shard + 1) * group), per_shard * group)
    for shard in range(shards):
        row[shard, seat[shard]] = np.arange(per_shard * group)
    who = (order + np.arange(shards)[:, None] * per_shard * group).reshape(-1)
    step = jax.jit(decode, static_argnums=1)
    for t in range(width):
        seats = Seats(jnp.asarray(seat), jnp.asarray(row), jnp.full(seat.shape, t))
        hidden, cache = step(apart, config, completions.reshape(12, width)[who, t], cache, seats)
        decoded.append((who, np.asarray(hidden)))
    return read, decoded


def test_long_prompts_in_query_blocks_equal_one_piece(monkeypatch):
    from patarm_jax.model import attention

    config = Architecture(**TINY)
    params, tokens, lengths, completions, _ = shared_case(5, config, 2, 23, 3, 7)
    expected = two_streams(params, config, tokens, lengths, completions)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 5)
    two_streams.clear_cache()
    np.testing.assert_allclose(
        two_streams(params, config, tokens, lengths, completions), expected, rtol=1e-5, atol=1e-5
    )


def test_padding_of_a_prompt_is_never_read():
    config = Architecture(**TINY)
    params, tokens, lengths, completions, _ = shared_case(6, config, 3, 9, 2, 4)
    other = np.where(np.arange(9) < lengths[:, None], tokens, 5)
    assert (other != tokens).any()
    np.testing.assert_array_equal(
        two_streams(params, config, tokens, lengths, completions),
        two_streams(params, config, other, lengths, completions),
    )


def test_a_seed_gives_the_weights_that_it_always_gave():
    """They depend on the order in which the network names its weights."""
    layers = init_params(Architecture(**TINY), jax.random.key(9))["layers"]
    first = {
        name: float(weight.reshape(-1)[0]) for part in ("self_attn", "mlp") for name, weight in layers[part].items()
    }
    expected = {"q_proj": 0.000952, "o_proj": -0.025306, "gate_proj": -0.018787, "down_proj": -0.034172}
    assert {name: first[name] for name in expected} == pytest.approx(expected, abs=2e-6)


def test_layers_are_read_as_they_lie():
    """A pass over whole sequences takes any; one that keeps each layer's keys must find the layers apart."""
    config = Architecture(**TINY)
    params, tokens = init_params(config, jax.random.key(0)), jnp.arange(4, dtype=jnp.int32)[None]
    lying = (params, unstack_layers(params), for_sampling(params))
    stacked, apart, fused = (forward(each, config, tokens).prompt for each in lying)
    np.testing.assert_allclose(stacked, apart, atol=1e-6)
    np.testing.assert_allclose(stacked, fused, atol=1e-6)
    with pytest.raises(ValueError, match=r"are stacked.*for_sampling"):
        prefill(params, config, tokens, jnp.array([4]))
