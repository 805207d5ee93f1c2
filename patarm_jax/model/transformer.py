"""Qwen3 and Qwen2 as pure functions: `init_params`, `abstract_params`, `forward`, `prefill` and `decode` over a cache.

flax.linen lives in this file and does not leave it: parameters are a plain nested dict with Hugging Face's names, the
layers stacked along a leading axis for training and unstacked for sampling. Nothing here samples, computes a loss or
reads a file.

Axis letters: R prompts · S tokens in a row · Tp prompt tokens · G completions per prompt · Tc completion tokens
              B rows being written · W devices that share them · D width · N query heads · K key-value heads
              H head width · F MLP width · V vocabulary · L layers
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import jax
import jax.extend
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike

from patarm_jax.arrays import Params, Seats, Tree
from patarm_jax.model import kernels
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.attention import KEPT, Streams, attend_behind
from patarm_jax.model.cache import KVCache, PromptCache, by_head, with_rest, with_token
from patarm_jax.model.for_sampling import GATE_UP, QKV, shapes_for_sampling
from patarm_jax.model.kernels import PORTABLE, Kernel
from patarm_jax.model.pages import Held, assigned, held, places
from patarm_jax.model.seated import seated_attention
from patarm_jax.model.sharding import (
    BATCH_AXES,
    TRAIN_RULES,
    Rules,
    between_blocks,
    constrain,
    gathered,
    named_sharding,
)

LORA_A, LORA_B = "_lora_A", "_lora_B"  # behind the name of a weight: its adapters; see `model.lora`
NO_MESH = jax.sharding.AbstractMesh((), ())
Remat: TypeAlias = Literal["none", "dots", "attention", "full"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """What the network says before the vocabulary; logits are `hidden @ head.T`, taken in parts by the caller."""

    prompt: jax.Array  # [R, Tp, D], final hidden states of the prompt stream
    completion: jax.Array | None  # [R, G, Tc, D], of the completion streams
    head: jax.Array  # [V, D]; the embedding itself when the head is tied; [1, D] of a network that gives a score


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Step:
    """A token of every row, over a cache."""

    cache: KVCache
    seats: Seats
    places: tuple[jax.Array, jax.Array]  # [W, b] each, the page and the place on it of the new key of each row
    held: Held  # with the new keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Behind:
    """Tokens that stand behind others, whose keys and values were kept."""

    before: PromptCache  # R of them, of which the lengths say how much is there


_Context: TypeAlias = Streams | _Step | _Behind


@dataclass(frozen=True)
class _Pass:
    """How one pass through the network is computed."""

    dtype: DTypeLike
    kernel: Kernel = PORTABLE  # computes attention: to prompts and completions as wholes, or of a step
    remat: Remat = "none"
    keep: bool = False  # the keys and values of a prompt
    lora_scale: float = 1.0  # of what adapters give, where weights have any

    def handed_on(self, x: jax.Array) -> jax.Array:
        """What a layer gives to the next, [R, S, D], placed: it is what training keeps of each, and split for that."""
        return constrain(x, BATCH_AXES, None, None) if self.keep else between_blocks(x)


def init_params(arch: Architecture, key: jax.Array, mesh: Mesh | None = None, rules: Rules = TRAIN_RULES) -> Params:
    """Random float32 parameters, N(0, initializer_range²) and unit norms, born in their shardings."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(arch, mesh, rules)) if mesh else None
    return jax.jit(lambda key: nn.meta.unbox(_boxed_params(arch, key)), out_shardings=shardings)(key)


def abstract_params(
    arch: Architecture,
    mesh: Mesh | None = None,
    rules: Rules = TRAIN_RULES,
    dtype: DTypeLike = jnp.float32,
    sampling: bool = False,
) -> Params:
    """Shape, dtype and, given a mesh, sharding of every parameter, without a weight; or of those for sampling."""
    boxed = jax.eval_shape(lambda: _boxed_params(arch, jax.random.key(0)))

    def leaf(box: nn.Partitioned) -> jax.ShapeDtypeStruct:
        shape = box.value.shape
        sharding = named_sharding(mesh, rules, box.names, shape) if mesh else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    stacked = jax.tree.map(leaf, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    return shapes_for_sampling(stacked) if sampling else stacked


def forward(
    params: Params,
    arch: Architecture,
    prompt: jax.Array,
    prompt_lengths: jax.Array | None = None,
    completion: jax.Array | None = None,
    *,
    starts: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    kernel: Kernel = PORTABLE,
    lora_scale: float = 1.0,
) -> Output:
    """Hidden states of plain or packed sequences, or of prompts with the G completions that share them.

    What is given decides what is computed:

        prompt                       plain sequences, causal
        prompt, starts               packed: a token reads its own sequence up to itself, positions count from its start
        prompt, completion           two streams: each completion reads all of its prompt and its own past

    Args:
        params: from `init_params`, `weights.load` or `for_sampling`, any float dtype; cast to `dtype` where used.
        arch: the network's shape.
        prompt: [R, Tp] int32, right-padded.
        prompt_lengths: [R] int32; needed with a completion, otherwise padding needs no mask.
        completion: [R, G, Tc] int32, right-padded.
        starts: [R, Tp] int32, where in its row the sequence of a token begins.
        dtype: of the computation; norms, softmax and rotary embedding are float32 regardless.
        remat: what the backward pass recomputes.
        kernel: of attention, from `kernels.choose` for rows of this form.
        lora_scale: alpha / rank of the adapters, where the parameters have any: see `model.lora`.

    Returns:
        Output; hidden states at padded positions mean nothing.
    """
    rows, width = prompt.shape
    if completion is not None and (prompt_lengths is None or starts is not None):
        raise ValueError("completions need the prompt_lengths of their prompts, and prompts that are not packed")
    lengths = jnp.full(rows, width, jnp.int32) if prompt_lengths is None else prompt_lengths
    streams = Streams(
        lengths=lengths, starts=starts, width=width, group=0 if completion is None else completion.shape[1]
    )
    tokens, positions = prompt, jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompt.shape)
    if starts is not None:
        positions = positions - starts
    if completion is not None:  # in one row behind the prompt, so that each weight is used once
        behind = jnp.broadcast_to(lengths[:, None, None] + jnp.arange(completion.shape[2]), completion.shape)
        tokens = jnp.concatenate([tokens, completion.reshape(rows, -1)], axis=1)
        positions = jnp.concatenate([positions, behind.reshape(rows, -1)], axis=1)
    hidden, _ = _apply(params, arch, tokens, positions, streams, _Pass(dtype, kernel, remat, lora_scale=lora_scale))
    completed = None if completion is None else hidden[:, width:].reshape(*completion.shape, -1)
    return Output(hidden[:, :width], completed, _head(params, arch, dtype))


def prefill(
    params: Params,
    arch: Architecture,
    prompt: jax.Array,
    lengths: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    kernel: Kernel = PORTABLE,
) -> tuple[jax.Array, PromptCache]:
    """The last state [R, D] of prompts [R, Tp] of these lengths [R], and their keys and values.

    Its parameters, and those of `decode`, lie as `for_sampling` lays them; fused or not, they give the same.
    """
    width = prompt.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompt.shape)
    streams = Streams(lengths=lengths, starts=None, width=width, group=0)
    hidden, kept = _apply(params, arch, prompt, positions, streams, _Pass(dtype, kernel, keep=True))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    keys, values = zip(*kept, strict=True)
    return last, PromptCache(keys, values, lengths)


def prefill_behind(
    params: Params,
    arch: Architecture,
    tokens: jax.Array,
    lengths: jax.Array,
    before: PromptCache,
    most: int,
    *,
    dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, PromptCache]:
    """As `prefill` of whole prompts, of which only the tokens [R, S] behind their beginnings are read.

    Args:
        params: as of `prefill`.
        arch: the network's shape.
        tokens: [R, S] int32, right-padded.
        lengths: [R] int32, ≥ 1.
        before: keys and values of the beginnings, with their lengths.
        most: tokens that a whole prompt has at most.
        dtype: of the computation.
    """
    positions = before.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden, kept = _apply(params, arch, tokens, positions, _Behind(before), _Pass(dtype, keep=True))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    keys, values = zip(*kept, strict=True)
    return last, with_rest(before, PromptCache(keys, values, lengths), most)


def decode(
    params: Params,
    arch: Architecture,
    tokens: jax.Array,
    cache: KVCache,
    seats: Seats,
    *,
    dtype: DTypeLike = jnp.float32,
    kernel: Kernel = PORTABLE,
) -> tuple[jax.Array, KVCache]:
    """The states [B, D] behind one more token [B] of every row, and the cache with its keys and values.

    The kernel is one for written rows.
    """
    shards, per_shard = seats.seat.shape
    prompts = cache.prompt.lengths.reshape(shards, -1)
    seats_of_one = seats.row.shape[1] // prompts.shape[1]
    lengths = jnp.take_along_axis(prompts, seats.seat // seats_of_one, axis=1)
    positions = (lengths + seats.age).reshape(shards * per_shard, 1)
    size = cache.page_size
    given = None if cache.pages is None else assigned(cache.pages, seats.age, size)
    where = places(given, seats.age, size, cache.pages_in_all // shards)
    step = _Step(cache, seats, where, held(given, seats.age))
    hidden, own = _apply(params, arch, tokens[:, None], positions, step, _Pass(dtype, kernel))
    keys, values = zip(*own, strict=True)
    return hidden[:, 0], replace(cache, keys=keys, values=values, pages=given)


def logits(params: Params, arch: Architecture, hidden: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Hidden states [..., D] → [..., V] float32."""
    return jnp.einsum("...d,vd->...v", hidden, _head(params, arch, dtype), preferred_element_type=jnp.float32)


def new_score_head(arch: Architecture, key: jax.Array) -> jax.Array:
    """A head [1, D] that gives scores, before it has learnt: N(0, 1/(D + 1)²), as OpenRLHF draws it."""
    return jax.random.normal(key, (1, arch.hidden_size)) / (arch.hidden_size + 1)


def scalar_scores(params: Params, hidden: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Hidden states [..., D] → scores [...] float32, of a network with a scalar head."""
    return jnp.einsum("...d,od->...o", hidden, params["score"].astype(dtype), preferred_element_type=jnp.float32)[
        ..., 0
    ]


def _head(params: Params, arch: Architecture, dtype: DTypeLike) -> jax.Array:
    if arch.scalar_head:
        return jnp.asarray(params["score"], dtype)
    head = params["embed_tokens"] if arch.tie_word_embeddings else params["lm_head"]
    return gathered(head.astype(dtype))


def _apply(
    params: Params,
    arch: Architecture,
    tokens: jax.Array,
    positions: jax.Array,
    context: _Context,
    how: _Pass,
) -> tuple[jax.Array, Tree]:
    """Final states [R, S, D]; and of unstacked layers, what each keeps: see `_Block`."""
    stacked = "layers" in params
    if stacked and (how.keep or isinstance(context, _Step)):
        raise ValueError(
            "the layers of these parameters are stacked, and `prefill` and `decode` read them unstacked: see "
            "`for_sampling`."
        )
    result: tuple[jax.Array, Tree] = _Qwen(arch, how, stacked).apply({"params": params}, tokens, positions, context)
    return result


class _Qwen(nn.Module):
    config: Architecture
    how: _Pass
    stacked: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array, positions: jax.Array, context: _Context) -> tuple[jax.Array, Tree]:
        c = self.config
        embedding = _weight(self, "embed_tokens", (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        if c.scalar_head:
            init = nn.with_partitioning(lambda key, *_: new_score_head(c, key), ("score", "embed"))
            _param(self, "score", init, (1, c.hidden_size))  # applied by the caller
        elif not c.tie_word_embeddings:
            _weight(self, "lm_head", (c.vocab_size, c.hidden_size), ("vocab", "embed"))  # applied by the caller
        # A lookup in a table that is split along the width would be repeated on every device.
        x = self.how.handed_on(jnp.take(gathered(embedding.astype(self.how.dtype)), tokens, axis=0))

        block, rotary, kept = _rematerialised(self.how.remat), _rotary(positions, c), []
        if self.stacked:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=c.num_hidden_layers,
                in_axes=(nn.broadcast, nn.broadcast),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, self.how, name="layers")
            x, _ = layers(x, rotary, context)
        else:
            for layer in range(c.num_hidden_layers):
                x, new = block(c, self.how, layer, name=f"layers_{layer}")(x, rotary, context)
                kept.append(new)
        return _norm(self, "norm", x, c.rms_norm_eps), kept


class _Block(nn.Module):
    config: Architecture
    how: _Pass
    layer: int = 0  # the index of this layer's cache

    @nn.compact
    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array], context: _Context) -> tuple[jax.Array, Tree]:
        """The next states; and of a step, the layer's own cache with it; of prompts to keep, their keys and values."""
        eps = self.config.rms_norm_eps
        attend = _Attention(self.config, self.how, self.layer, name="self_attn")
        mixed, kept = attend(_norm(self, "input_layernorm", x, eps), rotary, context)
        x = self.how.handed_on(x + mixed)
        x = x + _MLP(self.config, self.how, name="mlp")(_norm(self, "post_attention_layernorm", x, eps))
        return self.how.handed_on(x), kept


class _Attention(nn.Module):
    config: Architecture
    how: _Pass
    layer: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [R, S, D]
        rotary: tuple[jax.Array, jax.Array],
        context: _Context,
    ) -> tuple[jax.Array, Tree]:
        """What is added to x, and what `_Block` says."""
        c, dtype = self.config, self.how.dtype
        d, n, k, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if self.has_variable("params", QKV):
            fused = jnp.einsum("rsd,dkgh->rskgh", x, self.get_variable("params", QKV).astype(dtype))
            q, keys, values = fused[..., :-2, :].reshape(*x.shape[:2], n, h), fused[..., -2, :], fused[..., -1, :]
        else:
            q_proj = _weight(self, "q_proj", (d, n, h), ("embed", "heads", "head_dim")).astype(dtype)
            k_proj = _weight(self, "k_proj", (d, k, h), ("embed", "kv_heads", "head_dim")).astype(dtype)
            v_proj = _weight(self, "v_proj", (d, k, h), ("embed", "kv_heads", "head_dim")).astype(dtype)
            q = _adapted(self, "q_proj", x, jnp.einsum("rsd,dnh->rsnh", x, q_proj))
            keys = _adapted(self, "k_proj", x, jnp.einsum("rsd,dkh->rskh", x, k_proj))
            values = _adapted(self, "v_proj", x, jnp.einsum("rsd,dkh->rskh", x, v_proj))
        # Behind those: what a weight is at first depends on how many were named before it.
        o_proj = _weight(self, "o_proj", (n, h, d), ("heads", "head_dim", "embed")).astype(dtype)
        if c.model_type == "qwen2":
            q, keys = _biased(self, "q_bias", "heads", q), _biased(self, "k_bias", "kv_heads", keys)
            values = _biased(self, "v_bias", "kv_heads", values)
        else:
            q, keys = _norm(self, "q_norm", q, c.rms_norm_eps), _norm(self, "k_norm", keys, c.rms_norm_eps)
        q, keys, values = (constrain(y, BATCH_AXES, None, "tensor", None) for y in (q, keys, values))
        q, keys = _rotate(q, *rotary), _rotate(keys, *rotary)

        if isinstance(context, _Step):
            cache, prompt = context.cache, context.cache.prompt
            own = cache.keys[self.layer], cache.values[self.layer]
            kept: Tree = with_token(*own, keys[:, 0], values[:, 0], *context.places)
            shared = prompt.keys[self.layer], prompt.values[self.layer]
            out = seated_attention(q[:, 0], shared, prompt.lengths, kept, context.held, context.seats, self.how.kernel)
            out = out[:, None]
        else:
            kept = by_head(keys, values) if self.how.keep else None
            if isinstance(context, _Behind):
                before = context.before.keys[self.layer], context.before.values[self.layer]
                out = attend_behind(q, keys, values, before, context.before.lengths)
            else:
                out = kernels.attend(q, keys, values, context, self.how.kernel)
        # One contracted axis: XLA would lay the weight anew, each time, to contract two.
        out = out.astype(dtype).reshape(*x.shape[:2], n * h)
        return _adapted(self, "o_proj", out, out @ o_proj.reshape(n * h, d)), kept


class _MLP(nn.Module):
    config: Architecture
    how: _Pass

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        d, f = self.config.hidden_size, self.config.intermediate_size
        if self.has_variable("params", GATE_UP):
            fused = jnp.einsum("rsd,dcf->rscf", x, self.get_variable("params", GATE_UP).astype(self.how.dtype))
            gated, raised = fused[:, :, 0], fused[:, :, 1]
        else:
            gate = _weight(self, "gate_proj", (d, f), ("embed", "mlp")).astype(self.how.dtype)
            up = _weight(self, "up_proj", (d, f), ("embed", "mlp")).astype(self.how.dtype)
            gated, raised = _adapted(self, "gate_proj", x, x @ gate), _adapted(self, "up_proj", x, x @ up)
        down = _weight(self, "down_proj", (f, d), ("mlp", "embed")).astype(self.how.dtype)
        hidden = constrain(nn.silu(gated) * raised, BATCH_AXES, None, "tensor")
        return _adapted(self, "down_proj", hidden, hidden @ down)


def _adapted(module: nn.Module, name: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """What a weight makes of x, with what its adapters add where it has any: y + scale · x·A·B."""
    if not module.has_variable("params", name + LORA_A):
        return y
    a: jax.Array = module.get_variable("params", name + LORA_A).astype(y.dtype)
    b: jax.Array = module.get_variable("params", name + LORA_B).astype(y.dtype)
    rank = a.shape[-1]
    added = x @ a.reshape(x.shape[-1], rank) @ b.reshape(rank, -1)
    return y + module.how.lora_scale * added.reshape(y.shape)


def _weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
    init = nn.initializers.normal(module.config.initializer_range)
    return _param(module, name, nn.with_partitioning(init, axes), shape)


def _param(module: nn.Module, name: str, init: Callable[..., nn.Partitioned[jax.Array]], shape: Sequence[int]) -> Tree:
    """The weight itself: flax takes it out of the box that `init` makes."""
    return module.param(name, init, shape, jnp.float32)


def _norm(module: nn.Module, name: str, x: jax.Array, eps: float) -> jax.Array:
    """RMSNorm in float32: x / √(mean(x²) + ε) · weight. Norm weights are tiny and stay whole on every device."""
    weight = _param(module, name, nn.with_partitioning(nn.initializers.ones, (None,)), x.shape[-1:])
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scaled * weight.astype(jnp.float32)).astype(x.dtype)


def _biased(module: nn.Module, name: str, heads: str, x: jax.Array) -> jax.Array:
    """Heads [..., N, H] with a bias added to each; it is kept flat [N·H], as Hugging Face has it."""
    bias = _param(module, name, nn.with_partitioning(nn.initializers.zeros, (heads,)), (x.shape[-2] * x.shape[-1],))
    return x + bias.astype(x.dtype).reshape(x.shape[-2:])


def _rotary(positions: jax.Array, arch: Architecture) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position · θ^(−2i/H), [R, S, 1, H/2] float32."""
    half = jnp.arange(0, arch.head_dim, 2, dtype=jnp.float32) / arch.head_dim
    angles = positions[..., None].astype(jnp.float32) * arch.rope_theta**-half
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + H/2}), as Hugging Face lays them out."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _rematerialised(remat: Remat) -> type[nn.Module]:
    if remat == "none":
        return _Block
    policies = jax.checkpoint_policies
    matmuls, nothing = policies.dots_with_no_batch_dims_saveable, policies.nothing_saveable
    kept = {"dots": matmuls, "attention": _is_of_attention, "full": nothing}
    return nn.remat(_Block, policy=kept[remat], prevent_cse=False)  # the scan already keeps passes apart


def _is_of_attention(primitive: jax.extend.core.Primitive, *inputs: Tree, **settings: Tree) -> bool:
    """Whether it gives what attention's backward pass needs of the forward one; cuDNN's gives it without our name."""
    named = jax.checkpoint_policies.save_only_these_names(KEPT)
    is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return is_cudnn or bool(named(primitive, *inputs, **settings))


def _boxed_params(arch: Architecture, key: jax.Array) -> Tree:
    """Random parameters, each in a box that carries its logical axes."""
    one = jnp.zeros((1, 1), jnp.int32)
    with jax.sharding.use_abstract_mesh(NO_MESH):  # the one-token input could not be split
        context = Streams(lengths=jnp.ones(1, jnp.int32), starts=None, width=1, group=0)
        return _Qwen(arch, _Pass(jnp.float32)).init(key, one, one, context)["params"]
