"""Qwen3 as pure functions: `init_params`, `abstract_params`, `forward`, and `prefill` and `decode` over a cache.

flax.linen lives in this file and does not leave it: parameters are a plain nested dict with Hugging Face's names, the
layers stacked along a leading axis. Nothing here samples, computes a loss or reads a file.

Axis letters: R prompts · S tokens in a row · Tp prompt tokens · G completions per prompt · Tc completion tokens
              B rows being written · W devices that share them · D width · N query heads · K key-value heads
              H head width · F MLP width · V vocabulary · L layers
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from patarm_jax.model import attention, kernels
from patarm_jax.model.attention import Streams
from patarm_jax.model.config import Qwen3Config
from patarm_jax.model.kernels import PORTABLE, Kernel
from patarm_jax.model.sharding import BATCH_AXES, TRAIN_RULES, Rules, constrain, named_sharding
from patarm_jax.types import Seats

Params = dict[str, Any]
NO_MESH = jax.sharding.AbstractMesh((), ())
Remat = Literal["none", "dots", "full"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptCache:
    """Keys and values of R prompts."""

    keys: jax.Array  # [L, R, K, Tp, H]
    values: jax.Array  # [L, R, K, Tp, H]
    lengths: jax.Array  # [R] int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What B rows that are being written have read: R prompts, each shared by up to G rows, and their own past.

    A row's own keys stand in a ring of Tc places that all rows write at the same place: the newest at `clock` mod Tc,
    the ones before it behind. So a row may begin at any time, and writing is one slice whatever the rows' ages are.
    """

    prompt: PromptCache
    keys: jax.Array  # [L, B, K, Tc, H]
    values: jax.Array  # [L, B, K, Tc, H]
    clock: jax.Array  # [] int32, tokens written since the cache was made


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What the network says before the vocabulary; logits are `hidden @ head.T`, taken in parts by the caller."""

    prompt: jax.Array  # [R, Tp, D], final hidden states of the prompt stream
    completion: jax.Array | None  # [R, G, Tc, D], of the completion streams
    head: jax.Array  # [V, D]; the embedding itself when the head is tied


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Step:
    """A token of every row, over a cache."""

    cache: KVCache
    seats: Seats


@dataclass(frozen=True)
class _Pass:
    """How one pass through the network is computed."""

    dtype: Any
    kernel: Kernel = PORTABLE  # of attention to prompts and completions as wholes
    remat: Remat = "none"
    keep: bool = False  # the keys and values of a prompt


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


def init_cache(
    config: Qwen3Config, prompts: int, prompt_width: int, rows: int, completion_width: int, dtype: Any
) -> KVCache:
    """An empty cache for R prompts of Tp tokens and for B rows of Tc."""
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    shared = _constrain_cache(jnp.zeros((layers, prompts, heads, prompt_width, size), dtype))
    own = _constrain_cache(jnp.zeros((layers, rows, heads, completion_width, size), dtype))
    return KVCache(PromptCache(shared, shared, jnp.ones(prompts, jnp.int32)), own, own, jnp.int32(0))


def forward(
    params: Params,
    config: Qwen3Config,
    prompt: jax.Array,
    prompt_lengths: jax.Array | None = None,
    completion: jax.Array | None = None,
    *,
    starts: jax.Array | None = None,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    kernel: Kernel = PORTABLE,
) -> Output:
    """Hidden states of plain or packed sequences, or of prompts with the G completions that share them.

    What is given decides what is computed:

        prompt                       plain sequences, causal
        prompt, starts               packed: a token reads its own sequence up to itself, positions count from its start
        prompt, completion           two streams: each completion reads all of its prompt and its own past

    Args:
        params: from `init_params` or `weights.load`, any float dtype; cast to `dtype` where used.
        config: the network's shape.
        prompt: [R, Tp] int32, right-padded.
        prompt_lengths: [R] int32; needed with a completion, otherwise padding needs no mask.
        completion: [R, G, Tc] int32, right-padded.
        starts: [R, Tp] int32, where in its row the sequence of a token begins.
        dtype: of the computation; norms, softmax and rotary embedding are float32 regardless.
        remat: what the backward pass recomputes.
        kernel: of attention, from `kernels.choose` for rows of this form.

    Returns:
        Output; hidden states at padded positions mean nothing.
    """
    rows, width = prompt.shape
    if completion is not None and (prompt_lengths is None or starts is not None):
        raise ValueError("completions need the prompt_lengths of their prompts, and prompts that are not packed")
    lengths = jnp.full(rows, width, jnp.int32) if prompt_lengths is None else prompt_lengths
    streams = Streams(lengths, starts, width, 0 if completion is None else completion.shape[1])
    tokens, positions = prompt, jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompt.shape)
    if starts is not None:
        positions = positions - starts
    if completion is not None:  # in one row behind the prompt, so that each weight is used once
        behind = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(completion.shape[2]), completion.shape)
        tokens = jnp.concatenate([tokens, completion.reshape(rows, -1)], axis=1)
        positions = jnp.concatenate([positions, behind.reshape(rows, -1)], axis=1)
    hidden, _ = _apply(params, config, tokens, positions, streams, _Pass(dtype, kernel, remat))
    completed = None if completion is None else hidden[:, width:].reshape(*completion.shape, -1)
    return Output(hidden[:, :width], completed, _head(params, config, dtype))


def prefill(
    params: Params,
    config: Qwen3Config,
    prompt: jax.Array,
    lengths: jax.Array,
    *,
    dtype: Any = jnp.float32,
    kernel: Kernel = PORTABLE,
) -> tuple[jax.Array, PromptCache]:
    """The last state [R, D] of prompts [R, Tp] of these lengths [R], and their keys and values."""
    width = prompt.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompt.shape)
    streams = Streams(lengths, None, width, 0)
    hidden, kept = _apply(params, config, prompt, positions, streams, _Pass(dtype, kernel, keep=True))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    keys, values = kept
    return last, PromptCache(_constrain_cache(keys), _constrain_cache(values), lengths)


def place_prompts(cache: PromptCache, new: PromptCache, place: jax.Array) -> PromptCache:
    """The cache with new prompts, no wider than its own, at places [W, n] within each device; r: nowhere."""
    ways = place.shape[0]

    def all_ways(mine: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        def one(mine: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
            part = (slice(None), slice(new.shape[-2])) if new.ndim > 1 else ()
            index = (slice(None),) * axis + (place, *part)
            return mine.at[index].set(new.astype(mine.dtype), mode="drop")

        mine_apart, new_apart = (x.reshape(*x.shape[:axis], ways, -1, *x.shape[axis + 1 :]) for x in (mine, new))
        put = jax.vmap(one, in_axes=(axis, axis, 0), out_axes=axis)
        return put(mine_apart, new_apart, place).reshape(mine.shape)

    keys, values = all_ways(cache.keys, new.keys, 1), all_ways(cache.values, new.values, 1)
    return PromptCache(_constrain_cache(keys), _constrain_cache(values), all_ways(cache.lengths, new.lengths, 0))


def resize_cache(cache: KVCache, rows: jax.Array, prompts: jax.Array, prompt_width: int) -> KVCache:
    """The cache with the rows [W, b] and prompts [W, r] named, counted within each device, and narrower prompts."""

    def take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
        ways = index.shape[0]
        apart = x.reshape(*x.shape[:axis], ways, -1, *x.shape[axis + 1 :])
        taken = jax.vmap(partial(jnp.take, axis=axis, mode="clip"), in_axes=(axis, 0), out_axes=axis)(apart, index)
        return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    prompt = PromptCache(
        _constrain_cache(take(cache.prompt.keys[..., :prompt_width, :], prompts, 1)),
        _constrain_cache(take(cache.prompt.values[..., :prompt_width, :], prompts, 1)),
        take(cache.prompt.lengths, prompts, 0),
    )
    keys, values = (_constrain_cache(take(x, rows, 1)) for x in (cache.keys, cache.values))
    return KVCache(prompt, keys, values, cache.clock)


def decode(
    params: Params, config: Qwen3Config, tokens: jax.Array, cache: KVCache, seats: Seats, *, dtype: Any = jnp.float32
) -> tuple[jax.Array, KVCache]:
    """The states [B, D] behind one more token [B] of every row, and the cache with its keys and values."""
    ways, per_way = seats.seat.shape
    prompts = cache.prompt.lengths.reshape(ways, -1)
    seats_of_one = seats.row.shape[1] // prompts.shape[1]
    lengths = jnp.take_along_axis(prompts, seats.seat // seats_of_one, axis=1)
    positions = (lengths + seats.age).reshape(ways * per_way, 1)
    hidden, own = _apply(params, config, tokens[:, None], positions, _Step(cache, seats), _Pass(dtype))
    return hidden[:, 0], replace(cache, keys=own[0], values=own[1], clock=cache.clock + 1)


def logits(params: Params, config: Qwen3Config, hidden: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Hidden states [..., D] → [..., V] float32."""
    return jnp.einsum("...d,vd->...v", hidden, _head(params, config, dtype), preferred_element_type=jnp.float32)


def _head(params: Params, config: Qwen3Config, dtype: Any) -> jax.Array:
    head = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    # Whole along the width before it is used in chunks, which would otherwise gather it one by one.
    return constrain(head.astype(dtype), "tensor", None)


def _apply(
    params: Params,
    config: Qwen3Config,
    tokens: jax.Array,
    positions: jax.Array,
    context: Streams | _Step,
    how: _Pass,
) -> tuple[jax.Array, Any]:
    """Final states [R, S, D]; and the keys and values of a prompt to keep, or of a cache that was written to."""
    result: Any = _Qwen3(config, how).apply({"params": params}, tokens, positions, context)
    return result


class _Qwen3(nn.Module):
    config: Qwen3Config
    how: _Pass

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, context: Streams | _Step) -> tuple[jax.Array, Any]:
        c = self.config
        embedding = _weight(self, "embed_tokens", (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        if not c.tie_word_embeddings:
            _weight(self, "lm_head", (c.vocab_size, c.hidden_size), ("vocab", "embed"))  # applied by the caller
        # Gathered over `fsdp` first: a lookup in a table split along the width would be repeated on every device.
        table = constrain(embedding.astype(self.how.dtype), "tensor", None)
        x = constrain(jnp.take(table, tokens, axis=0), BATCH_AXES, None, None)

        own = prompt = None
        if isinstance(context, _Step):
            cache = context.cache
            own, prompt = (cache.keys, cache.values), (cache.prompt.keys, cache.prompt.values)
        layers = nn.scan(
            _rematerialised(self.how.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_hidden_layers,
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.how, name="layers")
        index = jnp.arange(c.num_hidden_layers)
        (x, own), kept = layers((x, own), index, prompt, _rotary(positions, c), context)
        return _norm(self, "norm", x, c.rms_norm_eps), kept if own is None else own


class _Block(nn.Module):
    config: Qwen3Config
    how: _Pass

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Any],
        layer: jax.Array,
        prompt: Any,
        rotary: tuple[jax.Array, jax.Array],
        context: Streams | _Step,
    ) -> tuple[tuple[jax.Array, Any], Any]:
        x, own = carry
        eps = self.config.rms_norm_eps
        attend = _Attention(self.config, self.how, name="self_attn")
        mixed, new = attend(_norm(self, "input_layernorm", x, eps), layer, own, prompt, rotary, context)
        x = constrain(x + mixed, BATCH_AXES, None, None)
        x = x + _MLP(self.config, self.how.dtype, name="mlp")(_norm(self, "post_attention_layernorm", x, eps))
        x = constrain(x, BATCH_AXES, None, None)
        if isinstance(context, _Step):
            return (x, new), None
        return (x, None), tuple(y.swapaxes(1, 2) for y in new) if self.how.keep else None


class _Attention(nn.Module):
    config: Qwen3Config
    how: _Pass

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [R, S, D]
        layer: jax.Array,
        own: Any,
        prompt: Any,
        rotary: tuple[jax.Array, jax.Array],
        context: Streams | _Step,
    ) -> tuple[jax.Array, Any]:
        """What is added to x; and the new keys and values [R, S, K, H], or the rows' own with them written."""
        c, dtype = self.config, self.how.dtype
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        q_proj = _weight(self, "q_proj", (d, n, h), ("embed", "heads", "head_dim")).astype(dtype)
        k_proj = _weight(self, "k_proj", (d, k, h), ("embed", "kv_heads", "head_dim")).astype(dtype)
        v_proj = _weight(self, "v_proj", (d, k, h), ("embed", "kv_heads", "head_dim")).astype(dtype)
        o_proj = _weight(self, "o_proj", (n, h, d), ("heads", "head_dim", "embed")).astype(dtype)

        q = _norm(self, "q_norm", jnp.einsum("rsd,dnh->rsnh", x, q_proj), c.rms_norm_eps)
        keys = _norm(self, "k_norm", jnp.einsum("rsd,dkh->rskh", x, k_proj), c.rms_norm_eps)
        values = jnp.einsum("rsd,dkh->rskh", x, v_proj)
        q, keys, values = (constrain(y, BATCH_AXES, None, "tensor", None) for y in (q, keys, values))
        q, keys = _rotate(q, *rotary), _rotate(keys, *rotary)

        new: Any = keys, values
        if isinstance(context, _Step):
            place = context.cache.clock % context.cache.keys.shape[3]
            new = tuple(_write(into, y, layer, place) for into, y in zip(own, new, strict=True))
            mine = (jax.lax.dynamic_index_in_dim(y, layer, keepdims=False) for y in new)
            out = _read_seated(q[:, 0], prompt, tuple(mine), context)[:, None]
        else:
            out = kernels.attend(q, keys, values, context, self.how.kernel)
        return jnp.einsum("rsnh,nhd->rsd", out.astype(dtype), o_proj), new


def _read_seated(q: jax.Array, prompt: Any, own: Any, step: _Step) -> jax.Array:
    """Attention [B, N, H] of one token of every row."""
    cache, seats = step.cache, step.seats
    width = cache.keys.shape[3]
    passed = (cache.clock - jnp.arange(width)) % width  # tokens written since a place of the ring was
    readable = passed <= seats.age.reshape(-1, 1)
    return attention.seated_attention(q, prompt, cache.prompt.lengths, own, readable, seats.seat, seats.row)


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


def _write(into: jax.Array, new: jax.Array, layer: jax.Array, place: jax.Array) -> jax.Array:
    """`into[layer, :, :, place] = new`, [B, 1, K, H] into [L, B, K, Tc, H]."""
    zero = jnp.zeros_like(layer)
    return jax.lax.dynamic_update_slice(
        into, new.swapaxes(1, 2)[None].astype(into.dtype), (layer, zero, zero, place, zero)
    )


def _constrain_cache(x: jax.Array) -> jax.Array:
    """[L, R, K, T, H]: rows over the batch axes, heads over `tensor`."""
    return constrain(x, None, BATCH_AXES, "tensor", None, None)


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
        context = Streams(jnp.ones(1, jnp.int32), None, 1, 0)
        return _Qwen3(config, _Pass(jnp.float32)).init(key, one, one, context)["params"]
