"""Steps as pure functions, (state, batch) → (state, metrics). The network comes in as `forward`; nothing is logged.

A loss gives sums and denominators; gradients of the sums are added over micro-batches and divided once, so the number
of micro-batches never changes a result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patarm_jax.arrays import GRPOBatch, SFTBatch
from patarm_jax.config import PolicySection
from patarm_jax.train.losses import (
    clipped_policy_loss,
    kl_k3,
    mask_from_lengths,
    sum_over_tokens,
    token_logprobs,
    token_weights,
)

Params = Any
Batch = TypeVar("Batch")
Forward = Callable[..., Any]  # (params, arrays …) → hidden states .prompt and .completion, and the .head

# A sum and what it is to be divided by, both [] float32.
Mean = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint holds of it."""

    step: jax.Array  # [] int32, optimiser updates tried
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array  # [] int32, updates left out because gradient or weights would not have been sound


# The largest float16: engines that serve in half precision have no number beyond it, and no trained weight comes near.
LARGEST_WEIGHT = 65504.0


class Loss(NamedTuple):
    """What a loss function gives for a (micro-)batch."""

    loss: Mean  # what is minimised
    metrics: dict[str, Mean]  # reported, by name


LossFn = Callable[[Params, Batch], Loss]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


class _Sums(NamedTuple):
    gradient: Params
    loss: Mean
    metrics: dict[str, Mean]


# ------------------------------------------------------------------------------------------------------------- state


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def abstract_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state for abstract `params`: moments lie where their parameters lie."""
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    moments = optax.tree.map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        shapes.opt_state,
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )
    counter: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(counter, params, moments, counter)


def are_sound(params: Params) -> jax.Array:
    """Whether every weight is finite and not beyond `LARGEST_WEIGHT`, [] bool; False with a NaN among them."""
    return jnp.stack([jnp.max(jnp.abs(leaf)) <= LARGEST_WEIGHT for leaf in jax.tree.leaves(params)]).all()


# ------------------------------------------------------------------------------------------------------------ losses


def sft_loss(forward: Forward, shards: int = 1) -> LossFn[SFTBatch]:
    """Mean cross-entropy of the judgements' tokens, end tokens included; prompts are only read.

    Args:
        forward: (params, tokens [B, T], starts [B, T]) → Output.
        shards: into how many parts the devices share the batch.
    """

    def loss(params: Params, batch: SFTBatch) -> Loss:
        out = forward(params, batch.tokens, batch.starts)
        states = jnp.take_along_axis(out.prompt, batch.read[..., None], axis=1)
        mask = mask_from_lengths(batch.counts, batch.read.shape[1])
        total, sums = sum_over_tokens(_cross_entropy, 1.0, shards, states, out.head, batch.targets, mask)
        count = mask.sum().astype(jnp.float32)
        return Loss((total, count), {"loss": (total, count)} | {name: (value, count) for name, value in sums.items()})

    return loss


def _cross_entropy(
    logprobs: jax.Array, entropy: jax.Array, hit: jax.Array, mask: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    return -jnp.where(mask, logprobs, 0.0).sum(), {
        "entropy": jnp.where(mask, entropy, 0.0).sum(),
        "mean_token_accuracy": (hit & mask).sum().astype(jnp.float32),
    }


def completion_logprobs(
    forward: Forward, params: Params, batch: GRPOBatch, temperature: float, shards: int = 1
) -> jax.Array:
    """Log-probs of sampled tokens, [P, 2, G, Tc]; each prompt is computed once for its group. Has no gradient."""
    states, head, targets = _predicting(forward, params, batch)
    logprobs, _ = token_logprobs(states, head, targets, temperature=temperature, shards=shards)
    return logprobs.reshape(batch.completion_tokens.shape)


def _predicting(forward: Forward, params: Params, batch: GRPOBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The states [R, G·Tc, D] that predict the sampled tokens, the head, and those tokens [R, G·Tc]."""
    pairs, sides, group, width = batch.completion_tokens.shape
    rows = pairs * sides
    completion = batch.completion_tokens.reshape(rows, group, width)
    lengths = batch.prompt_lengths.reshape(rows)
    out = forward(params, batch.prompt_tokens.reshape(rows, -1), lengths, completion)
    # The first token is predicted by the prompt's last state, the others by the token before them.
    last = jnp.take_along_axis(out.prompt, (lengths - 1)[:, None, None], axis=1)[:, None]
    last = jnp.broadcast_to(last, (rows, group, 1, last.shape[-1]))
    hidden = jnp.concatenate([last, out.completion[:, :, :-1]], axis=2)
    return hidden.reshape(rows, group * width, -1), out.head, completion.reshape(rows, group * width)


class _Known(NamedTuple):
    """Of every sampled token, arrays of one shape."""

    mask: jax.Array  # bool, False on padding
    weights: jax.Array  # in the mean that is minimised
    advantages: jax.Array
    old_logprobs: jax.Array
    ref_logprobs: jax.Array | None


def grpo_loss(forward: Forward, policy: PolicySection, temperature: float, shards: int = 1) -> LossFn[GRPOBatch]:
    """Clipped policy loss plus kl_coef times the k3 KL to the reference, over sampled tokens.

    Args:
        forward: (params, prompt [R, Tp], prompt_lengths [R], completion [R, G, Tc]) → Output.
        policy: clipping, KL, aggregation.
        temperature: of sampling.
        shards: into how many parts the devices share the batch.
    """

    def loss(params: Params, batch: GRPOBatch) -> Loss:
        mask = mask_from_lengths(batch.completion_lengths, batch.completion_tokens.shape[-1])
        weights, denominator = token_weights(mask, policy.aggregation)
        advantages = jnp.broadcast_to(batch.advantages[..., None], mask.shape)
        states, head, targets = _predicting(forward, params, batch)
        known = _Known(mask, weights, advantages, batch.old_logprobs, batch.ref_logprobs)
        known = jax.tree.map(lambda x: x.reshape(targets.shape), known)
        total, sums = sum_over_tokens(partial(_policy_loss, policy), temperature, shards, states, head, targets, known)
        count = mask.sum().astype(jnp.float32)
        metrics = {name: (value, count) for name, value in sums.items()}
        return Loss(
            (total, denominator),
            metrics | {"loss": (total, denominator), "policy_loss": (sums["policy_loss"], denominator)},
        )

    return loss


def _policy_loss(
    policy: PolicySection, logprobs: jax.Array, entropy: jax.Array, _hit: jax.Array, known: _Known
) -> tuple[jax.Array, dict[str, jax.Array]]:
    mask, weights, advantages, old_logprobs, ref_logprobs = known
    logprobs = jnp.where(mask, logprobs, 0.0)  # of padding, whose exponentials might not be finite
    per_token, clipped = clipped_policy_loss(logprobs, old_logprobs, advantages, policy.clip_low, policy.clip_high)
    total = (per_token * weights).sum()
    sums = {
        "policy_loss": total,
        "entropy": (entropy * mask).sum(),
        "clip_ratio/region_mean": (clipped & mask).sum().astype(jnp.float32),
        "sampling/logprob_gap_mean": (jnp.abs(logprobs - old_logprobs) * mask).sum(),
    }
    if ref_logprobs is not None:
        kl = kl_k3(logprobs, ref_logprobs)
        total += policy.kl_coef * (kl * weights).sum()
        sums["kl"] = (kl * mask).sum()
    return total, sums


# -------------------------------------------------------------------------------------------------------------- step


def make_step(loss_fn: LossFn[Batch], optimizer: optax.GradientTransformation, micro_batches: int) -> Step[Batch]:
    """One optimiser update over a batch.

    An update changes nothing but `step` and `skipped` where the gradient is not finite, or where it would leave a
    weight that is not finite or beyond `LARGEST_WEIGHT`. So weights that were sound stay sound.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        sums = _accumulate(loss_fn, state.params, batch, micro_batches)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums.loss[1], 1.0), sums.gradient)
        norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sound = jnp.isfinite(norm) & are_sound(params)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = state.skipped + ~sound
        metrics = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in sums.metrics.items()}
        metrics |= {"grad_norm": norm, "skipped_updates": skipped}
        return TrainState(state.step + 1, params, opt_state, skipped), metrics

    return step


def _accumulate(loss_fn: LossFn[Batch], params: Params, batch: Batch, micro_batches: int) -> _Sums:
    """Gradient of the loss's sum, and every sum, over all micro-batches."""

    def value(params: Params, micro: Batch) -> tuple[jax.Array, Loss]:
        result = loss_fn(params, micro)
        return result.loss[0], result

    def one(micro: Batch) -> _Sums:
        (_, result), gradient = jax.value_and_grad(value, has_aux=True)(params, micro)
        return _Sums(gradient, *result)

    if micro_batches == 1:
        return one(batch)
    slices = jax.tree.map(lambda x: _interleaved(x, micro_batches), batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], slices))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, micro: (jax.tree.map(jnp.add, sums, one(micro)), None), zero, slices)
    return total


def map_micro_batches(
    fn: Callable[[Params, Batch], jax.Array], micro_batches: int
) -> Callable[[Params, Batch], jax.Array]:
    """The function [B, …] → [B, …] applied to micro-batches one after another, rows back in their places."""

    def mapped(params: Params, batch: Batch) -> jax.Array:
        slices = jax.tree.map(lambda x: _interleaved(x, micro_batches), batch)
        parts = jax.lax.map(lambda micro: fn(params, micro), slices)
        return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])

    return mapped


def _interleaved(x: jax.Array, parts: int) -> jax.Array:
    """[B, …] → [parts, B/parts, …] by taking every parts-th row, so that a batch split over devices stays in place."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
