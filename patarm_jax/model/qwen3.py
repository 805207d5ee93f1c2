"""Qwen3 as pure functions: `init_params`, `abstract_params`, `forward` and `init_cache`.

flax.linen lives in this file and does not leave it: parameters are a plain nested dict with Hugging Face's names, the
layers stacked along a leading axis. Nothing here samples, computes a loss or reads a file.

Axis letters: R rows · S tokens in a row · Tp prompt tokens · G completions per prompt · Tc completion tokens
              D width · N query heads · K key-value heads · H head width · F MLP width · V vocabulary · L layers
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from patarm_jax.model import attention
from patarm_jax.model.config import Qwen3Config
from patarm_jax.model.sharding import BATCH_AXES, TRAIN_RULES, Rules, constrain, named_sharding

Params = dict[str, Any]
NO_MESH = jax.sharding.AbstractMesh((), ())
Remat = Literal["none", "dots", "full"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of R prompts and of the G completions that share each of them."""

    prompt_keys: jax.Array  # [L, R, Tp, K, H]
    prompt_values: jax.Array  # [L, R, Tp, K, H]
    prompt_lengths: jax.Array  # [R] int32
    keys: jax.Array  # [L, R, G, Tc, K, H]
    values: jax.Array  # [L, R, G, Tc, K, H]
    filled: jax.Array  # [] int32, completion positions written so far


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What the network says before the vocabulary; logits are `hidden @ head.T`, taken in parts by the caller."""

    prompt: jax.Array | None  # [R, Tp, D], final hidden states of the prompt stream
    completion: jax.Array | None  # [R, G, Tc, D], of the completion streams
    head: jax.Array  # [V, D]; the embedding itself when the head is tied
    cache: KVCache | None


@dataclass(frozen=True)
class _Layout:
    """How a row of S tokens is made up; static."""

    prompt: int  # Tp, tokens of the prompt stream in the row
    group: int  # G, completion streams behind it


def init_params(config: Qwen3Config, key: jax.Array, mesh: Mesh | None = None, rules: Rules = TRAIN_RULES) -> Params:
    """Random float32 parameters, N(0, initializer_range²) and unit norms, born in their shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(config, mesh, rules)) if mesh else None
    return jax.jit(lambda key: nn.meta.unbox(_boxed_params(config, key)), out_shardings=shardings)(key)


def abstract_params(
    config: Qwen3Config, mesh: Mesh | None = None, rules: Rules = TRAIN_RULES, dtype: Any = jnp.float32
) -> Params:
    """Shape, dtype and, given a mesh, sharding of every parameter, without a single weight."""
    boxed = jax.eval_shape(lambda: _boxed_params(config, jax.random.key(0)))

    def leaf(box: nn.Partitioned) -> jax.ShapeDtypeStruct:
        shape = box.value.shape
        sharding = named_sharding(mesh, rules, box.names, shape) if mesh else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def init_cache(config: Qwen3Config, rows: int, prompt: int, group: int, completion: int, dtype: Any) -> KVCache:
    """An empty cache for R = `rows` prompts of Tp = `prompt` tokens, each with G × Tc completion positions."""
    layers, heads = config.num_hidden_layers, (config.num_key_value_heads, config.head_dim)
    shared = _constrain_cache(jnp.zeros((layers, rows, prompt, *heads), dtype))
    own = _constrain_cache(jnp.zeros((layers, rows, group, completion, *heads), dtype))
    return KVCache(shared, shared, jnp.zeros(rows, jnp.int32), own, own, jnp.int32(0))


def forward(
    params: Params,
    config: Qwen3Config,
    prompt: jax.Array | None = None,
    prompt_lengths: jax.Array | None = None,
    completion: jax.Array | None = None,
    cache: KVCache | None = None,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
) -> Output:
    """Hidden states of plain sequences, of prompts with the G completions that share them, or of a cached step.

    What is given decides what is computed:

        prompt                       plain sequences, causal
        prompt, completion           two streams: each completion reads all of its prompt and its own past
        prompt, cache                prefill: the prompt's keys and values are written into the cache
        completion, cache            decode: T new tokens of every completion, at positions cache.filled …

    Args:
        params: from `init_params` or `weights.load`, any float dtype; cast to `dtype` where used.
        config: the network's shape.
        prompt: [R, Tp] int32, right-padded.
        prompt_lengths: [R] int32; needed with a completion or a cache, otherwise padding needs no mask.
        completion: [R, G, Tc] int32, right-padded.
        cache: from `init_cache` or an earlier call.
        dtype: of the computation; norms, softmax and rotary embedding are float32 regardless.
        remat: what the backward pass recomputes.

    Returns:
        Output; hidden states at padded positions mean nothing.
    """
    if prompt is None and (completion is None or cache is None):
        raise ValueError("forward needs a prompt, or a completion with a cache")
    if prompt is not None and completion is not None and cache is not None:
        raise ValueError("with a cache, give the prompt (prefill) or the completion (decode), not both")
    if prompt_lengths is None and prompt is not None and (completion is not None or cache is not None):
        raise ValueError("prompt_lengths is needed when completions or a cache follow the prompt")
    if cache is not None and prompt_lengths is not None:
        cache = replace(cache, prompt_lengths=prompt_lengths)
    if cache is not None:
        prompt_lengths = cache.prompt_lengths
    elif prompt_lengths is None and prompt is not None:
        prompt_lengths = jnp.full(prompt.shape[0], prompt.shape[1], jnp.int32)

    width, group = 0 if prompt is None else prompt.shape[1], 0 if completion is None else completion.shape[1]
    layout = _Layout(width, group)
    tokens, positions = _in_one_row(prompt, completion, prompt_lengths, cache)
    network = _Qwen3(config, layout, dtype, remat)
    result: Any = network.apply({"params": params}, tokens, positions, prompt_lengths, cache)
    hidden, written = result
    completed = None if completion is None else hidden[:, width:].reshape(*completion.shape, -1)
    head = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    return Output(None if prompt is None else hidden[:, :width], completed, head.astype(dtype), written)


def _in_one_row(
    prompt: jax.Array | None, completion: jax.Array | None, prompt_lengths: Any, cache: KVCache | None
) -> tuple[jax.Array, jax.Array]:
    """Tokens and positions [R, S]: the prompt, then its completions one after another, so each weight is used once."""
    tokens, positions = [], []
    if prompt is not None:
        tokens.append(prompt)
        positions.append(jnp.broadcast_to(jnp.arange(prompt.shape[1]), prompt.shape))
    if completion is not None:
        rows = completion.shape[0]
        start = prompt_lengths + (0 if cache is None else cache.filled)
        steps = start[:, None, None] + jnp.arange(completion.shape[2])
        tokens.append(completion.reshape(rows, -1))
        positions.append(jnp.broadcast_to(steps, completion.shape).reshape(rows, -1))
    return jnp.concatenate(tokens, axis=1), jnp.concatenate(positions, axis=1)


class _Qwen3(nn.Module):
    config: Qwen3Config
    layout: _Layout
    dtype: Any = jnp.float32
    remat: Remat = "none"

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        prompt_lengths: jax.Array,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        c, layout = self.config, self.layout
        embedding = _weight(self, "embed_tokens", (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        if not c.tie_word_embeddings:
            _weight(self, "lm_head", (c.vocab_size, c.hidden_size), ("vocab", "embed"))  # applied by the caller
        # Gathered over `fsdp` first: a lookup in a table split along the width would be repeated on every device.
        table = constrain(embedding.astype(self.dtype), "tensor", None)
        x = constrain(jnp.take(table, tokens, axis=0), BATCH_AXES, None, None)
        rotary = _rotary(positions, c)

        layers = nn.scan(
            _rematerialised(self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, layout, name="layers")
        index = jnp.arange(c.num_hidden_layers)
        (x, cache), _ = layers((x, cache), index, rotary[0], rotary[1], prompt_lengths)
        if cache is not None and not layout.prompt:
            cache = replace(cache, filled=cache.filled + tokens.shape[1] // layout.group)
        return _norm(self, "norm", x, c.rms_norm_eps), cache


class _Block(nn.Module):
    config: Qwen3Config
    dtype: Any
    layout: _Layout

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, KVCache | None],
        layer: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        prompt_lengths: jax.Array,
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        x, cache = carry
        eps = self.config.rms_norm_eps
        attend = _Attention(self.config, self.dtype, self.layout, name="self_attn")
        mixed, cache = attend(_norm(self, "input_layernorm", x, eps), layer, cos, sin, prompt_lengths, cache)
        x = constrain(x + mixed, BATCH_AXES, None, None)
        x = x + _MLP(self.config, self.dtype, name="mlp")(_norm(self, "post_attention_layernorm", x, eps))
        return (constrain(x, BATCH_AXES, None, None), cache), None


class _Attention(nn.Module):
    config: Qwen3Config
    dtype: Any
    layout: _Layout

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [R, S, D]
        layer: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        prompt_lengths: jax.Array,
        cache: KVCache | None,
    ) -> tuple[jax.Array, KVCache | None]:
        c = self.config
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q_proj = _weight(self, "q_proj", (d, n, h), ("embed", "heads", "head_dim")).astype(self.dtype)
        k_proj = _weight(self, "k_proj", (d, k, h), ("embed", "kv_heads", "head_dim")).astype(self.dtype)
        v_proj = _weight(self, "v_proj", (d, k, h), ("embed", "kv_heads", "head_dim")).astype(self.dtype)
        o_proj = _weight(self, "o_proj", (n, h, d), ("heads", "head_dim", "embed")).astype(self.dtype)

        q = _norm(self, "q_norm", jnp.einsum("rsd,dnh->rsnh", x, q_proj), c.rms_norm_eps)
        keys = _norm(self, "k_norm", jnp.einsum("rsd,dkh->rskh", x, k_proj), c.rms_norm_eps)
        values = jnp.einsum("rsd,dkh->rskh", x, v_proj)
        q, keys, values = (constrain(y, BATCH_AXES, None, "tensor", None) for y in (q, keys, values))
        q, keys = _rotate(q, cos, sin), _rotate(keys, cos, sin)

        if cache is not None and not self.layout.prompt:
            out, cache = _decode(q, keys, values, layer, cache, self.layout.group)
        else:
            width, group = self.layout.prompt, self.layout.group
            out = attention.shared_prompt_attention(q, keys, values, prompt_lengths, width, group)
            if cache is not None:
                cache = replace(
                    cache,
                    prompt_keys=_write(cache.prompt_keys, keys, layer),
                    prompt_values=_write(cache.prompt_values, values, layer),
                )
        return jnp.einsum("rsnh,nhd->rsd", out.astype(self.dtype), o_proj), cache


class _MLP(nn.Module):
    config: Qwen3Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        gate = _weight(self, "gate_proj", (d, f), ("embed", "mlp")).astype(self.dtype)
        up = _weight(self, "up_proj", (d, f), ("embed", "mlp")).astype(self.dtype)
        down = _weight(self, "down_proj", (f, d), ("mlp", "embed")).astype(self.dtype)
        hidden = constrain(nn.silu(x @ gate) * (x @ up), BATCH_AXES, None, "tensor")
        return hidden @ down


def _decode(
    q: jax.Array, keys: jax.Array, values: jax.Array, layer: jax.Array, cache: KVCache, group: int
) -> tuple[jax.Array, KVCache]:
    """Writes T new keys of every completion into the cache and attends; the prompt's part is only read."""
    q, keys, values = (_by_completion(x, group) for x in (q, keys, values))
    cache = replace(
        cache,
        keys=_write(cache.keys, keys, layer, cache.filled),
        values=_write(cache.values, values, layer, cache.filled),
    )
    prompt_k, prompt_v, own_k, own_v = (
        jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        for x in (cache.prompt_keys, cache.prompt_values, cache.keys, cache.values)
    )
    out = attention.cached_attention(q, prompt_k, prompt_v, own_k, own_v, cache.prompt_lengths, cache.filled)
    return out.reshape(out.shape[0], -1, *out.shape[3:]), cache


def _by_completion(x: jax.Array, group: int) -> jax.Array:
    """[R, G·T, …] → [R, G, T, …]."""
    return x.reshape(x.shape[0], group, -1, *x.shape[2:])


def _write(into: jax.Array, new: jax.Array, layer: jax.Array, position: jax.Array | None = None) -> jax.Array:
    """`into[layer, …, position : position + T, :, :] = new`; without a position the whole layer."""
    start = [layer, *[jnp.zeros_like(layer)] * (into.ndim - 1)]
    if position is not None:
        start[-3] = position
    return jax.lax.dynamic_update_slice(into, new[None].astype(into.dtype), start)


def _constrain_cache(x: jax.Array) -> jax.Array:
    """[L, R, …, K, H]: rows over the batch axes, heads over `tensor`."""
    return constrain(x, None, BATCH_AXES, *[None] * (x.ndim - 4), "tensor", None)


def _weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    init = nn.initializers.normal(module.config.initializer_range)
    return module.param(name, nn.with_partitioning(init, axes), shape, jnp.float32)


def _norm(module: nn.Module, name: str, x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm in float32: x / √(mean(x²) + ε) · weight. Norm weights are tiny and stay whole on every device."""
    weight: Any = module.param(name, nn.with_partitioning(nn.initializers.ones, (None,)), (x.shape[-1],), jnp.float32)
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32)).astype(x.dtype)


def _rotary(positions: jax.Array, config: Qwen3Config) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position · θ^(−2i/H), [R, S, 1, H/2] float32."""
    half = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) * config.rope_theta**-half
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}), as Hugging Face lays them out."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rematerialised(remat: Remat) -> Any:
    if remat == "none":
        return _Block
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
    return nn.remat(_Block, policy=policy, prevent_cse=False)  # the scan already keeps passes apart


def _boxed_params(config: Qwen3Config, key: jax.Array) -> Any:
    """Random parameters, each in a box that carries its logical axes."""
    one = jnp.zeros((1, 1), jnp.int32)
    with jax.sharding.use_abstract_mesh(NO_MESH):  # the one-token input could not be split
        return _Qwen3(config, _Layout(1, 0)).init(key, one, one, jnp.ones(1, jnp.int32), None)["params"]
