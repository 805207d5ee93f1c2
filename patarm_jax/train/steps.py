"""Steps as pure functions, (state, frozen, batch) → (state, metrics); the network comes in as `forward`.

`state.params` is whatever is trained, `frozen` whatever is only read: both are trees of arrays, and `forward` puts them
together. A loss gives sums and denominators; gradients of the sums are added over micro-batches and divided once, so
the number of micro-batches never changes a result. The first axis of a batch is the unit that is never cut: prompts, or
pairs where a loss couples the sides of a pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from patarm_jax.arrays import (
    Array,
    ComparedPairs,
    Params,
    PreferredPairs,
    Rollouts,
    ScoredPairs,
    SFTBatch,
    Tree,
    abstract,
)
from patarm_jax.train.algorithms import Algorithm
from patarm_jax.train.losses import Loss, Mean, mask_from_lengths, sum_over_tokens, token_logprobs
from patarm_jax.train.pair_losses import bradley_terry, dpo, ordinal
from patarm_jax.train.policy_losses import SampledTokens

Batch = TypeVar("Batch")


class Hidden(Protocol):
    """What a network says before the vocabulary."""

    @property
    def prompt(self) -> jax.Array:
        """[R, Tp, D], final hidden states."""

    @property
    def completion(self) -> jax.Array | None:
        """[R, G, Tc, D], those of completions; None where there are none."""

    @property
    def head(self) -> jax.Array:
        """[V, D]; of a network that gives a score, [1, D]."""


Forward: TypeAlias = Callable[..., Hidden]  # from (params, frozen, arrays …)


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


LossFn: TypeAlias = Callable[[Params, Tree, Batch], Loss]  # from what is trained, what is only read, a (micro-)batch
Step: TypeAlias = Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, jax.Array]]]


class _Sums(NamedTuple):
    gradient: Params
    loss: Mean
    metrics: dict[str, Mean]


# ------------------------------------------------------------------------------------------------------------- state


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), skipped=jnp.int32(0))


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
    counter = abstract((), jnp.int32, whole)
    return TrainState(step=counter, params=params, opt_state=moments, skipped=counter)


def are_sound(params: Params) -> jax.Array:
    """Whether every weight is finite and not beyond `LARGEST_WEIGHT`, [] bool; False with a NaN among them."""
    return jnp.stack([jnp.max(jnp.abs(leaf)) <= LARGEST_WEIGHT for leaf in jax.tree.leaves(params)]).all()


# ------------------------------------------------------------------------------------------------------------ losses


def sft_loss(forward: Forward, shards: int = 1) -> LossFn[SFTBatch]:
    """Mean cross-entropy of the judgements' tokens, end tokens included; prompts are only read.

    Args:
        forward: (params, frozen, tokens [B, T], starts [B, T]) → Output.
        shards: into how many parts the devices share the batch.
    """

    def loss(params: Params, frozen: Tree, batch: SFTBatch) -> Loss:
        out = forward(params, frozen, batch.tokens, batch.starts)
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


def rollout_logprobs(
    forward: Forward, params: Params, frozen: Tree, rollouts: Rollouts, temperature: float, shards: int = 1
) -> jax.Array:
    """Log-probs of sampled tokens, [R, G, Tc]; see `completion_logprobs`."""
    given = rollouts.prompt_tokens, rollouts.prompt_lengths, rollouts.completion_tokens
    return completion_logprobs(forward, params, frozen, *given, temperature, shards)


def completion_logprobs(
    forward: Forward,
    params: Params,
    frozen: Tree,
    prompt: Array,
    lengths: Array,
    completion: Array,
    temperature: float = 1.0,
    shards: int = 1,
) -> jax.Array:
    """Log-probs of completions' tokens, [R, G, Tc]; each prompt is computed once for its group. Has no gradient."""
    predicted = _predicted(forward, params, frozen, prompt, lengths, completion)
    logprobs, _ = token_logprobs(*predicted, temperature=temperature, shards=shards)
    return logprobs.reshape(completion.shape)


def pair_rewards(forward: Forward, params: Params, frozen: Tree, batch: ComparedPairs) -> jax.Array:
    """What a network with a scalar head gives both responses of each pair, [B, P, 2] float32: at its last token."""
    out = forward(params, frozen, batch.tokens, batch.starts)
    rows, pairs, _ = batch.last.shape
    states = jnp.take_along_axis(out.prompt, batch.last.reshape(rows, -1, 1), axis=1)
    rewards = jnp.einsum("btd,od->bto", states, out.head, preferred_element_type=jnp.float32)
    return rewards.reshape(rows, pairs, 2)


def reward_loss(forward: Forward, centring: float = 0.0) -> LossFn[ComparedPairs]:
    """Bradley-Terry's loss of the pairs.

    Args:
        forward: (params, frozen, tokens [B, T], starts [B, T]) → Output, of a network with a scalar head.
        centring: see `bradley_terry`.
    """

    def loss(params: Params, frozen: Tree, batch: ComparedPairs) -> Loss:
        there = mask_from_lengths(batch.counts, batch.last.shape[1])
        return bradley_terry(pair_rewards(forward, params, frozen, batch), batch.margins, there, centring)

    return loss


def ordinal_loss(forward: Forward, shards: int = 1) -> LossFn[ScoredPairs]:
    """The ordinal loss of the pairs: see `pair_losses.ordinal`.

    Args:
        forward: (params, frozen, prompt [R, Tp], prompt_lengths [R], completion [R, G, Tc]) → Output.
        shards: into how many parts the devices share the batch.
    """

    def loss(params: Params, frozen: Tree, batch: ScoredPairs) -> Loss:
        pairs, sides, width = batch.prompt_tokens.shape
        scores, longest = batch.score_tokens.shape[1:]
        behind = jnp.repeat(batch.score_tokens, sides, axis=0)  # [2P, S, Tc]: of both sides, one behind the other
        there = mask_from_lengths(jnp.repeat(batch.score_lengths, sides, axis=0), longest)
        prompts, lengths = batch.prompt_tokens.reshape(-1, width), batch.prompt_lengths.reshape(-1)
        predicted = _predicted(forward, params, frozen, prompts, lengths, behind)

        def of_logprobs(logprobs: jax.Array) -> Loss:
            whole = jnp.where(there, logprobs.reshape(behind.shape), 0.0).sum(axis=-1)
            return ordinal(whole.reshape(pairs, sides, scores))

        return _by_logprobs(of_logprobs, 1.0, shards, predicted)[0]

    return loss


def dpo_loss(
    forward: Forward, beta: float, smoothing: float = 0.0, sft: float = 0.0, shards: int = 1
) -> LossFn[PreferredPairs]:
    """The loss of direct preference optimisation: see `pair_losses.dpo`. A prompt is computed once for both responses.

    Args:
        forward: (params, frozen, prompt [R, Tp], prompt_lengths [R], completion [R, G, Tc]) → Output.
        beta: see there.
        smoothing: see there.
        sft: see there.
        shards: into how many parts the devices share the batch.
    """

    def loss(params: Params, frozen: Tree, batch: PreferredPairs) -> Loss:
        completions = batch.completion_tokens
        mask = mask_from_lengths(batch.completion_lengths, completions.shape[-1])
        predicted = _predicted(forward, params, frozen, batch.prompt_tokens, batch.prompt_lengths, completions)

        def of_logprobs(logprobs: jax.Array) -> Loss:
            of_both = logprobs.reshape(completions.shape)
            return dpo(of_both, mask, batch.reference, batch.sft_weights, beta, smoothing, sft)

        return _by_logprobs(of_logprobs, 1.0, shards, predicted)[0]

    return loss


class _Predicted(NamedTuple):
    """Sampled tokens, and what predicts them; a head that reads states in chunks sees no groups."""

    states: jax.Array  # [R, G·Tc, D]
    head: jax.Array  # [V, D]
    targets: Array  # [R, G·Tc] int32


def _predicted(
    forward: Forward, params: Params, frozen: Tree, prompt: Array, lengths: Array, completion: Array
) -> _Predicted:
    """The completions' tokens with the states that predict them; each prompt is computed once for its group."""
    rows, group, width = completion.shape
    out = forward(params, frozen, prompt, lengths, completion)
    assert out.completion is not None, "a forward of rollouts gives their completions' states"
    # The first token is predicted by the prompt's last state, the others by the token before them.
    last = jnp.take_along_axis(out.prompt, (lengths - 1)[:, None, None], axis=1)[:, None]
    last = jnp.broadcast_to(last, (rows, group, 1, last.shape[-1]))
    hidden = jnp.concatenate([last, out.completion[:, :, :-1]], axis=2)
    return _Predicted(
        states=hidden.reshape(rows, group * width, -1),
        head=out.head,
        targets=completion.reshape(rows, group * width),
    )


def policy_loss(
    forward: Forward,
    algorithm: Algorithm,
    tokens_of: Callable[[Rollouts], SampledTokens],
    temperature: float,
    shards: int = 1,
) -> LossFn[Rollouts]:
    """The loss of an algorithm over sampled tokens.

    Args:
        forward: (params, frozen, prompt [R, Tp], prompt_lengths [R], completion [R, G, Tc]) → Output.
        algorithm: whose loss is minimised.
        tokens_of: `policy_losses.sampled_tokens` with its settings.
        temperature: that of sampling.
        shards: into how many parts the devices share the batch.
    """
    of_states = _fused if algorithm.adds_up else _exact

    def loss(params: Params, frozen: Tree, rollouts: Rollouts) -> Loss:
        given = rollouts.prompt_tokens, rollouts.prompt_lengths, rollouts.completion_tokens
        predicted = _predicted(forward, params, frozen, *given)
        return of_states(algorithm, temperature, shards, predicted, tokens_of(rollouts))

    return loss


def _fused(algorithm: Algorithm, temperature: float, shards: int, predicted: _Predicted, tokens: SampledTokens) -> Loss:
    """A loss that adds up over tokens, taken chunk by chunk while the chunk's logits are there: three head matmuls."""

    def of_chunk(
        logprobs: jax.Array, entropy: jax.Array, _hit: jax.Array, tokens: SampledTokens
    ) -> tuple[jax.Array, tuple[jax.Array, dict[str, Mean]]]:
        (total, denominator), metrics = algorithm.loss(logprobs, tokens)
        return total, (denominator, metrics | {"entropy": _mean_entropy(entropy, tokens.mask)})

    flat = jax.tree.map(lambda x: x.reshape(predicted.targets.shape), tokens)
    total, (denominator, metrics) = sum_over_tokens(of_chunk, temperature, shards, *predicted, flat)
    return Loss((total, denominator), metrics)


def _exact(algorithm: Algorithm, temperature: float, shards: int, predicted: _Predicted, tokens: SampledTokens) -> Loss:
    """A loss of whole sequences or pairs, which does not add up over tokens."""

    def of_logprobs(logprobs: jax.Array) -> Loss:
        return algorithm.loss(logprobs.reshape(tokens.mask.shape), tokens)

    found, entropy = _by_logprobs(of_logprobs, temperature, shards, predicted)
    entropy_mean = _mean_entropy(entropy.reshape(tokens.mask.shape), tokens.mask)
    return Loss(found.loss, found.metrics | {"entropy": entropy_mean})


def _by_logprobs(
    of_logprobs: Callable[[jax.Array], Loss], temperature: float, shards: int, predicted: _Predicted
) -> tuple[Loss, jax.Array]:
    """Any loss of log-probs [R, G·Tc], by way of its gradient g by them, and the entropies: four head matmuls.

        L = f(logprobs),   g = ∂f/∂logprobs,   ∂L/∂weights = ∂/∂weights Σ g·logprob   with g held fixed

    The log-probs are computed first, without a gradient; then Σ g·logprob adds up over tokens, and goes the fused way.
    It is exact where f depends on the weights through the log-probs alone.
    """
    logprobs, entropy = token_logprobs(*predicted, temperature=temperature, shards=shards)

    def value(logprobs: jax.Array) -> tuple[jax.Array, Loss]:
        found = of_logprobs(logprobs)
        return found.loss[0], found

    gradient, found = jax.grad(value, has_aux=True)(logprobs)
    linear, _ = sum_over_tokens(_weighted, temperature, shards, *predicted, gradient)
    total, denominator = found.loss
    return Loss((jax.lax.stop_gradient(total - linear) + linear, denominator), found.metrics), entropy


def _weighted(
    logprobs: jax.Array, _entropy: jax.Array, _hit: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[()]]:
    return (logprobs * weights).sum(), ()


def _mean_entropy(entropy: jax.Array, mask: jax.Array) -> Mean:
    return (entropy * mask).sum(), mask.sum().astype(jnp.float32)


# -------------------------------------------------------------------------------------------------------------- step


def make_step(loss_fn: LossFn[Batch], optimizer: optax.GradientTransformation, micro_batches: int) -> Step[Batch]:
    """One optimiser update over a batch.

    An update changes nothing but `step` and `skipped` where the gradient is not finite, or where it would leave a
    weight that is not finite or beyond `LARGEST_WEIGHT`. So weights that were sound stay sound.
    """

    def step(state: TrainState, frozen: Tree, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        sums = _accumulate(loss_fn, state.params, frozen, batch, micro_batches)
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
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, skipped=skipped), metrics

    return step


def _accumulate(loss_fn: LossFn[Batch], params: Params, frozen: Tree, batch: Batch, micro_batches: int) -> _Sums:
    """Gradient of the loss's sum, and every sum, over all micro-batches.

    Of several each adds to the gradient as its backward pass comes by, layer after layer, so that no second gradient
    lies beside the sum.
    """

    def value(params: Params, micro: Batch) -> tuple[jax.Array, Loss]:
        result = loss_fn(params, frozen, micro)
        return result.loss[0], result

    if micro_batches == 1:
        (_, result), gradient = jax.value_and_grad(value, has_aux=True)(params, batch)
        return _Sums(gradient, *result)
    slices = jax.tree.map(lambda x: _interleaved(x, micro_batches), batch)
    shapes = jax.eval_shape(lambda micro: loss_fn(params, frozen, micro), jax.tree.map(lambda x: x[0], slices))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums = jax.tree.map(lambda weight: jax.new_ref(jnp.zeros_like(weight)), params)

    def add(totals: Loss, micro: Batch) -> tuple[Loss, None]:
        backward: Any  # whose type does not tell of `with_refs`
        loss, backward, found = jax.vjp(lambda params: value(params, micro), params, has_aux=True)
        backward.with_refs(sums)(jnp.ones_like(loss))
        return jax.tree.map(jnp.add, totals, found), None

    totals, _ = jax.lax.scan(add, zero, slices)
    return _Sums(jax.tree.map(jax.ref.freeze, sums), *totals)


def map_micro_batches(
    fn: Callable[[Params, Tree, Batch], jax.Array], micro_batches: int
) -> Callable[[Params, Tree, Batch], jax.Array]:
    """The function [B, …] → [B, …] applied to micro-batches one after another, units back in their places."""

    def mapped(params: Params, frozen: Tree, batch: Batch) -> jax.Array:
        slices = jax.tree.map(lambda x: _interleaved(x, micro_batches), batch)
        parts = jax.lax.map(lambda micro: fn(params, frozen, micro), slices)
        return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])

    return mapped


def _interleaved(x: jax.Array, parts: int) -> jax.Array:
    """[B, …] → [parts, B/parts, …] by taking every parts-th unit, so that a batch split over devices stays in place."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
