"""Steps as pure functions, (state, batch) → (state, metrics). The network comes in as `forward`; nothing is logged.

A loss gives sums and denominators; gradients of the sums are added over micro-batches and divided once, so the number
of micro-batches never changes a result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patarm_jax.config import PolicySection
from patarm_jax.train.losses import (
    Mean,
    clipped_policy_loss,
    kl_k3,
    mask_from_lengths,
    masked_mean,
    token_logprobs,
)
from patarm_jax.types import GRPOBatch, SFTBatch

Params = Any
Batch = TypeVar("Batch")
Forward = Callable[..., Any]  # (params, prompt, prompt_lengths, completion) -> .prompt, .completion, .head

# Of float32 logits that exist at a time on a device. At 151,936 tokens of vocabulary these are 441 rows: enough for the
# matmul to be bound by arithmetic, and little beside the weights.
LOGIT_BYTES = 2**28


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint holds of it."""

    step: jax.Array  # [] int32, optimiser updates tried
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array  # [] int32, updates left out because the gradient was not finite


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


# ------------------------------------------------------------------------------------------------------------ losses


def head_tokens_for(vocab_size: int, batch_ways: int) -> int:
    """Tokens of a batch, split over so many devices, whose logits may exist at a time."""
    return max(1, LOGIT_BYTES // (4 * vocab_size)) * batch_ways


def sft_loss(forward: Forward, head_tokens: int) -> LossFn[SFTBatch]:
    """Mean cross-entropy of the judgement's tokens, its end token included; the prompt is only read."""

    def loss(params: Params, batch: SFTBatch) -> Loss:
        out = forward(params, batch.tokens)
        rows, width = batch.tokens.shape
        predicted = jnp.roll(batch.tokens, -1, axis=1)
        chunk = max(1, head_tokens // rows)
        logprobs, entropy = token_logprobs(out.prompt, out.head, predicted, chunk=chunk)
        position = jnp.arange(1, width + 1)  # of the token that is predicted
        mask = (position >= batch.prompt_lengths[:, None]) & (position < batch.lengths[:, None])
        cross_entropy = masked_mean(-logprobs, mask)
        return Loss(cross_entropy, {"loss": cross_entropy, "entropy": masked_mean(entropy, mask)})

    return loss


def completion_logprobs(
    forward: Forward, params: Params, batch: GRPOBatch, temperature: float, head_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies of sampled tokens, both [P, 2, G, Tc]; each prompt is computed once for its group."""
    pairs, sides, group, width = batch.completion_tokens.shape
    rows = pairs * sides
    completion = batch.completion_tokens.reshape(rows, group, width)
    lengths = batch.prompt_lengths.reshape(rows)
    out = forward(params, batch.prompt_tokens.reshape(rows, -1), lengths, completion)
    # The first token is predicted by the prompt's last state, the others by the token before them.
    last = jnp.take_along_axis(out.prompt, (lengths - 1)[:, None, None], axis=1)[:, None]
    last = jnp.broadcast_to(last, (rows, group, 1, last.shape[-1]))
    hidden = jnp.concatenate([last, out.completion[:, :, :-1]], axis=2)
    logprobs, entropy = token_logprobs(
        hidden.reshape(rows, group * width, -1),
        out.head,
        completion.reshape(rows, group * width),
        temperature=temperature,
        chunk=max(1, head_tokens // rows),
    )
    shape = batch.completion_tokens.shape
    return logprobs.reshape(shape), entropy.reshape(shape)


def grpo_loss(forward: Forward, policy: PolicySection, temperature: float, head_tokens: int) -> LossFn[GRPOBatch]:
    """Clipped policy loss plus kl_coef times the k3 KL to the reference, over sampled tokens."""

    def loss(params: Params, batch: GRPOBatch) -> Loss:
        logprobs, entropy = completion_logprobs(forward, params, batch, temperature, head_tokens)
        mask = mask_from_lengths(batch.completion_lengths, batch.completion_tokens.shape[-1])
        per_token, clipped = clipped_policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, policy.clip_low, policy.clip_high
        )
        gap = jnp.abs(jax.lax.stop_gradient(logprobs) - batch.old_logprobs)
        metrics = {
            "policy_loss": masked_mean(per_token, mask, policy.aggregation),
            "entropy": masked_mean(entropy, mask),
            "clip_ratio/region_mean": masked_mean(clipped.astype(jnp.float32), mask),
            "sampling/logprob_gap_mean": masked_mean(gap, mask),
        }
        if batch.ref_logprobs is not None:
            kl = kl_k3(logprobs, batch.ref_logprobs)
            per_token = per_token + policy.kl_coef * kl
            metrics["kl"] = masked_mean(kl, mask)
        total = masked_mean(per_token, mask, policy.aggregation)
        return Loss(total, {"loss": total} | metrics)

    return loss


# -------------------------------------------------------------------------------------------------------------- step


def make_step(loss_fn: LossFn[Batch], optimizer: optax.GradientTransformation, micro_batches: int) -> Step[Batch]:
    """One optimiser update over a batch. A gradient that is not finite changes nothing but `step` and `skipped`."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        sums = _accumulate(loss_fn, state.params, batch, micro_batches)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums.loss[1], 1.0), sums.gradient)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        skipped = state.skipped + ~finite
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
