"""The jitted programs of each recipe, which can be compiled without data, weights or their hardware.

Nothing here reads a file or a text, so that benchmarks and compilation ahead of time need neither.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from patarm_jax.arrays import (
    ComparedPairs,
    ComparedShape,
    Params,
    PreferredPairs,
    PreferredShape,
    Rollouts,
    ScoredPairs,
    ScoredShape,
    SFTBatch,
    SFTShape,
    Tree,
    abstract,
)
from patarm_jax.config.policy import DPOConfig
from patarm_jax.config.presets import WEIGHS_SEQUENCES
from patarm_jax.config.recipes import RewardModelConfig
from patarm_jax.config.rubric_arm import ROLES, RubricArmConfig
from patarm_jax.config.training import ReinforcedConfig, RunConfig, SupervisedConfig, TrainConfig
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.kernels import Form, kernel_for
from patarm_jax.model.lora import abstract_parts, joined
from patarm_jax.model.sharding import OnMesh, Program, batch_sharding, batch_shards
from patarm_jax.model.transformer import Output, abstract_params, forward
from patarm_jax.padding import bucket
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import Engine, abstract_programs, make_engine, network_for
from patarm_jax.run.learner import Learner, make_learner, rollout_rules, weight_sync
from patarm_jax.train.algorithms import ALGORITHMS, Algorithm
from patarm_jax.train.losses import mask_from_lengths
from patarm_jax.train.penalties import KLPenalty
from patarm_jax.train.policy_losses import Aggregation, SampledTokens, sampled_tokens
from patarm_jax.train.steps import (
    Forward,
    LossFn,
    completion_logprobs,
    dpo_loss,
    map_micro_batches,
    ordinal_loss,
    policy_loss,
    reward_loss,
    rollout_logprobs,
    sft_loss,
)
from patarm_jax.types import SCORES

Batch = TypeVar("Batch")


def programs(config: RunConfig, arch: Architecture, mesh: Mesh) -> dict[str, Program]:
    """Every jitted program of a recipe with abstract arguments, at the largest shapes that its settings allow.

    Args:
        config: of a recipe of this package.
        arch: of the network that is trained.
        mesh: its devices may be absent, as those of `jax.experimental.topologies` are.
    """
    return _OF_RECIPE[config.recipe](config, arch, mesh)


def update_of(config: TrainConfig, arch: Architecture, mesh: Mesh) -> Program:
    """The update of a config that trains one model, or of one phase of a run, with arguments as of `programs`."""
    if isinstance(config, ReinforcedConfig):
        return _grpo(config, arch, mesh)["update"]
    if isinstance(config, SupervisedConfig):
        return _sft(config, arch, mesh)["update"]
    return _OF_RECIPE[config.recipe](config, arch, mesh)["update"]


def _sft(config: SupervisedConfig, arch: Architecture, mesh: Mesh) -> dict[str, Program]:
    width = bucket(config.data.max_prompt_tokens + config.data.max_completion_tokens)
    shape = SFTShape(config.prompts_per_pair * config.pairs_per_step, width, bucket(config.data.max_completion_tokens))
    return sft_programs(sft_learner(config, arch, mesh), shape)


def _grpo(config: ReinforcedConfig, arch: Architecture, mesh: Mesh) -> dict[str, Program]:
    sampling = config.sampling
    network = network_for(config.model, arch, mesh, sampling.batch_invariant)
    # Which token ends a judgement changes no shape.
    params = SamplingParams((arch.eos_token_id or 0,), sampling.max_new_tokens)
    engine = make_engine(network, mesh, config.rollouts_per_prompt, params, sampling.rows)
    learner, rollout = grpo_learner(config, arch, mesh), make_rollout_programs(config, arch, mesh)
    return grpo_programs(config, arch, learner, rollout, engine, bucket(config.data.max_prompt_tokens))


def _reward_model(config: RewardModelConfig, arch: Architecture, mesh: Mesh) -> dict[str, Program]:
    if config.head == "ordinal":
        # With Qwen3's vocabulary 10 is two tokens, and what closes it three.
        scored = ScoredShape(config.pairs_per_step, bucket(config.data.max_prompt_tokens), 5)
        return ordinal_programs(ordinal_learner(config, arch, mesh), scored)
    compared = ComparedShape(config.pairs_per_step, bucket(2 * config.data.max_prompt_tokens), 1)
    return reward_programs(reward_learner(config, arch, mesh), compared)


def _rubric_arm(config: RubricArmConfig, arch: Architecture, mesh: Mesh) -> dict[str, Program]:
    """Those of both models, which are taken to be of one network."""
    found: dict[str, Program] = {}
    for role in ROLES:
        phases = {f"{role}: ": _grpo(config.turn_of(role), arch, mesh)}
        if config.is_warmed_up:
            phases[f"{role}, warm-up: "] = _sft(config.warmup_of(role), arch, mesh)
        found |= {f"{which}{name}": program for which, every in phases.items() for name, program in every.items()}
    return found


_OF_RECIPE: dict[str, Callable[..., dict[str, Program]]] = {
    "sft": _sft,
    "grpo": _grpo,
    "reward_model": _reward_model,
    "rubric_arm": _rubric_arm,
    "policy": _grpo,
    "dpo": lambda config, arch, mesh: _dpo(config, arch, mesh),
}


def _learner(config: TrainConfig, arch: Architecture, mesh: Mesh, loss: LossFn[Batch], updates: int) -> Learner[Batch]:
    """A learner of all weights or, where the config has adapters, of these."""
    trained, frozen = abstract_parts(arch, mesh, config.lora, config.model.dtype)
    return make_learner(config, trained, mesh, loss, updates, frozen)


def _forward(config: TrainConfig, arch: Architecture, mesh: Mesh, form: Form) -> Callable[..., Output]:
    """The network as it is trained, for rows of a form."""
    kernel, model = kernel_for(config.model, arch, mesh, form), config.model
    how = partial(forward, dtype=model.dtype, remat=model.remat, kernel=kernel, lora_scale=config.lora.scale)
    return partial(how, arch=arch)


# ---------------------------------------------------------------------------------------------------------------- sft


def sft_learner(config: SupervisedConfig, arch: Architecture, mesh: Mesh, updates: int = 1) -> Learner[SFTBatch]:
    """All weights or adapters, by the cross-entropy of judgements."""
    run = _forward(config, arch, mesh, sft_form(config))

    def read(trained: Params, frozen: Tree, tokens: jax.Array, starts: jax.Array) -> Output:
        return run(joined(trained, frozen), prompt=tokens, starts=starts if config.packing else None)

    return _learner(config, arch, mesh, sft_loss(read, batch_shards(mesh)), updates)


def sft_form(config: SupervisedConfig) -> Form:
    """What rows look like to attention."""
    return "packed" if config.packing else "causal"


def sft_programs(learner: Learner[SFTBatch], shape: SFTShape) -> dict[str, Program]:
    """The update on a batch of a shape that every process has."""
    rows, sharding = shape.rows * jax.process_count(), batch_sharding(learner.mesh)
    wide, judged = (abstract((rows, width), jnp.int32, sharding) for width in (shape.width, shape.targets))
    counts = abstract((rows,), jnp.int32, sharding)
    batch = SFTBatch(tokens=wide, starts=wide, read=judged, targets=judged, counts=counts)
    return {"update": (learner.update, (learner.shape, learner.frozen, batch))}


# ------------------------------------------------------------------------------------------------------- reward model


def reward_learner(
    config: RewardModelConfig, arch: Architecture, mesh: Mesh, updates: int = 1
) -> Learner[ComparedPairs]:
    """All weights or adapters, and a scalar head, by the loss of Bradley and Terry."""
    loss = reward_loss(pair_forward(config, arch, mesh), config.centring)
    return _learner(config, arch, mesh, loss, updates)


def ordinal_learner(
    config: RewardModelConfig, arch: Architecture, mesh: Mesh, updates: int = 1
) -> Learner[ScoredPairs]:
    """All weights or adapters, by the loss of ordinal scores."""
    loss = ordinal_loss(two_streams(config, arch, mesh), batch_shards(mesh))
    return _learner(config, arch, mesh, loss, updates)


def pair_forward(config: RewardModelConfig, arch: Architecture, mesh: Mesh) -> Forward:
    """Rows of whole conversations through the network."""
    run = _forward(config, arch, mesh, "packed")

    def read(trained: Params, frozen: Tree, tokens: jax.Array, starts: jax.Array) -> Output:
        return run(joined(trained, frozen), prompt=tokens, starts=starts)

    return read


def reward_programs(learner: Learner[ComparedPairs], shape: ComparedShape) -> dict[str, Program]:
    """The update on a batch of a shape that every process has."""
    rows, sharding = shape.rows * jax.process_count(), batch_sharding(learner.mesh)
    wide, counts = (abstract(of, jnp.int32, sharding) for of in ((rows, shape.width), (rows,)))
    last = abstract((rows, shape.pairs, 2), jnp.int32, sharding)
    margins = abstract((rows, shape.pairs), jnp.float32, sharding)
    batch = ComparedPairs(tokens=wide, starts=wide, last=last, margins=margins, counts=counts)
    return {"update": (learner.update, (learner.shape, learner.frozen, batch))}


def ordinal_programs(learner: Learner[ScoredPairs], shape: ScoredShape) -> dict[str, Program]:
    """The update on a batch of a shape that every process has."""
    pairs, sharding = shape.pairs * jax.process_count(), batch_sharding(learner.mesh)
    prompts, lengths, scores, counts = (
        abstract((pairs, *of), jnp.int32, sharding)
        for of in ((2, shape.width), (2,), (len(SCORES), shape.continuation), (len(SCORES),))
    )
    batch = ScoredPairs(prompt_tokens=prompts, prompt_lengths=lengths, score_tokens=scores, score_lengths=counts)
    return {"update": (learner.update, (learner.shape, learner.frozen, batch))}


# ---------------------------------------------------------------------------------------------------------------- dpo


def dpo_learner(config: DPOConfig, arch: Architecture, mesh: Mesh, updates: int = 1) -> Learner[PreferredPairs]:
    """All weights or adapters, by the loss of direct preference optimisation."""
    settings = config.beta, config.smoothing, config.sft_coef
    loss = dpo_loss(two_streams(config, arch, mesh), *settings, shards=batch_shards(mesh))
    return _learner(config, arch, mesh, loss, updates)


def make_response_logprobs(
    config: DPOConfig, arch: Architecture, mesh: Mesh
) -> OnMesh[[Params, Tree, PreferredPairs], jax.Array]:
    """The jitted sums of both responses' log-probs, [P, 2]."""
    run, shards = two_streams(config, arch, mesh), batch_shards(mesh)

    def sums(params: Params, frozen: Tree, batch: PreferredPairs) -> jax.Array:
        given = batch.prompt_tokens, batch.prompt_lengths, batch.completion_tokens
        logprobs = completion_logprobs(run, params, frozen, *given, shards=shards)
        mask = mask_from_lengths(batch.completion_lengths, batch.completion_tokens.shape[-1])
        return jnp.where(mask, logprobs, 0.0).sum(axis=-1)

    return OnMesh(mesh, map_micro_batches(sums, config.micro_batches))


def dpo_programs(learner: Learner[PreferredPairs], shape: PreferredShape) -> dict[str, Program]:
    """The update on a batch of a shape that every process has."""
    pairs, sharding = shape.pairs * jax.process_count(), batch_sharding(learner.mesh)
    new = partial(abstract, sharding=sharding)
    batch = PreferredPairs(
        prompt_tokens=new((pairs, shape.width), jnp.int32),
        prompt_lengths=new((pairs,), jnp.int32),
        completion_tokens=new((pairs, 2, shape.completion), jnp.int32),
        completion_lengths=new((pairs, 2), jnp.int32),
        reference=new((pairs, 2), jnp.float32),
        sft_weights=new((pairs,), jnp.float32),
    )
    return {"update": (learner.update, (learner.shape, learner.frozen, batch))}


def _dpo(config: DPOConfig, arch: Architecture, mesh: Mesh) -> dict[str, Program]:
    widths = bucket(config.data.max_prompt_tokens), bucket(config.data.max_completion_tokens)
    return dpo_programs(dpo_learner(config, arch, mesh), PreferredShape(config.pairs_per_step, *widths))


# --------------------------------------------------------------------------------------------------------------- grpo


@dataclass(frozen=True)
class RolloutPrograms:
    """What reinforcement learning computes beside sampling and updating."""

    to_rollout: OnMesh[[Params, Tree], Params]  # to the copy for sampling
    logprobs: OnMesh[[Params, Tree, Rollouts], jax.Array]  # [R, G, Tc]
    advantages: OnMesh[[jax.Array, jax.Array, Rollouts], jax.Array]  # rewards and valid [R, G] to [R, G] or [R, G, Tc]


def grpo_learner(config: ReinforcedConfig, arch: Architecture, mesh: Mesh, updates: int = 1) -> Learner[Rollouts]:
    """All weights or adapters, by the loss of the config's algorithm."""
    read, temperature = two_streams(config, arch, mesh), config.sampling.temperature
    loss = policy_loss(read, algorithm_of(config), partial(_tokens_of, config), temperature, batch_shards(mesh))
    return _learner(config, arch, mesh, loss, updates)


def algorithm_of(config: ReinforcedConfig) -> Algorithm:
    """The algorithm with the settings of a config."""
    own = {name.removeprefix("update."): value for name, value in config.algorithm_settings.items()}
    settings: dict[str, Any] = {name: own[name] for name in ("clip_low", "clip_high", "dual_clip") if name in own}
    settings["kl"] = KLPenalty(**{field: own[f"kl.{field}"] for field in KLPenalty._fields if f"kl.{field}" in own})
    if "reward.group_by" in own:
        settings["prompts_per_group"] = config.prompts_per_group
    if "reward.normalise_std" in own:
        settings["normalise_std"] = own["reward.normalise_std"]
    return ALGORITHMS[config.update.algorithm](**settings)


def _tokens_of(config: ReinforcedConfig, rollouts: Rollouts) -> SampledTokens:
    """The batch as the config's algorithm weighs its tokens."""
    aggregation: Aggregation = "sequence_mean"
    if config.update.algorithm not in WEIGHS_SEQUENCES:
        aggregation = config.algorithm_settings["update.aggregation"]
    return sampled_tokens(rollouts, aggregation, config.sampling.max_new_tokens, config.update.importance_cap)


def make_rollout_programs(config: ReinforcedConfig, arch: Architecture, mesh: Mesh) -> RolloutPrograms:
    """Jits the weight sync, log-probs and advantages."""
    run, temperature, shards = two_streams(config, arch, mesh), config.sampling.temperature, batch_shards(mesh)

    def logprobs(params: Params, frozen: Tree, rollouts: Rollouts) -> jax.Array:
        return rollout_logprobs(run, params, frozen, rollouts, temperature, shards)

    return RolloutPrograms(
        to_rollout=weight_sync(config, arch, mesh),
        logprobs=OnMesh(mesh, map_micro_batches(logprobs, config.micro_batches)),
        advantages=OnMesh(mesh, algorithm_of(config).advantages, out_shardings=batch_sharding(mesh)),
    )


def two_streams(config: TrainConfig, arch: Architecture, mesh: Mesh) -> Forward:
    """Prompts with the completions that share them through the network."""
    run = _forward(config, arch, mesh, "shared")

    def read(trained: Params, frozen: Tree, prompt: jax.Array, lengths: jax.Array, completion: jax.Array) -> Output:
        return run(joined(trained, frozen), prompt=prompt, prompt_lengths=lengths, completion=completion)

    return read


def grpo_programs(
    config: ReinforcedConfig,
    arch: Architecture,
    learner: Learner[Rollouts],
    rollout: RolloutPrograms,
    engine: Engine,
    width: int,
    full: bool = True,
) -> dict[str, Program]:
    """Every program of a step with abstract arguments: prompts of a width, completions at their limit.

    With `full` rows have all the pages that they may take; without, those that they begin with.
    """
    mesh, dtype = learner.mesh, config.model.dtype
    sampled = abstract_params(arch, mesh, rollout_rules(config.mesh), dtype, sampling=True)
    rollouts = _abstract_rollouts(config, mesh, width)
    sampled_alone = replace(rollouts, ref_logprobs=None, sampler_logprobs=None)
    of_rollouts = rollouts.completion_lengths.shape
    rewards, valid = (abstract(of_rollouts, dtype, batch_sharding(mesh)) for dtype in (jnp.float32, jnp.bool))
    # Some algorithms give each token an advantage of its own.
    earned = jax.eval_shape(algorithm_of(config).advantages, rewards, valid, rollouts)
    learnt_from = replace(rollouts, advantages=abstract(earned.shape, earned.dtype, batch_sharding(mesh)))
    shown: dict[str, Program] = {
        "copy for sampling": (rollout.to_rollout, (learner.shape.params, learner.frozen)),
        **abstract_programs(engine, sampled, config.prompts_per_pair * config.pairs_per_step, width, full),
        "advantages": (rollout.advantages, (rewards, valid, rollouts)),
        "update": (learner.update, (learner.shape, learner.frozen, learnt_from)),
    }
    if config.update.old_logprobs == "trainer":
        shown["old log-probs"] = (rollout.logprobs, (learner.shape.params, learner.frozen, sampled_alone))
    if config.charges_kl:
        reference = abstract_params(arch, mesh, dtype=dtype), None
        if learner.frozen is not None and not config.update.reference:  # the weights with their adapters off
            reference = {}, learner.frozen
        shown["reference log-probs"] = (rollout.logprobs, (*reference, sampled_alone))
    return shown


def _abstract_rollouts(config: ReinforcedConfig, mesh: Mesh, width: int) -> Rollouts:
    prompts, group = config.prompts_per_pair * config.pairs_per_step, config.rollouts_per_prompt
    new = config.sampling.max_new_tokens

    new_array = partial(abstract, sharding=batch_sharding(mesh))
    logprobs = new_array((prompts, group, new), jnp.float32)
    return Rollouts(
        prompt_tokens=new_array((prompts, width), jnp.int32),
        prompt_lengths=new_array((prompts,), jnp.int32),
        completion_tokens=new_array((prompts, group, new), jnp.int32),
        completion_lengths=new_array((prompts, group), jnp.int32),
        old_logprobs=logprobs,
        ref_logprobs=logprobs if config.charges_kl else None,
        advantages=new_array((prompts, group), jnp.float32),
        sampler_logprobs=logprobs if config.update.old_logprobs == "trainer" else None,
    )


# What is compiled ahead of a run's first step.
LARGE = ("prefill", "decode", "old log-probs", "reference log-probs", "update")


def large(every: Mapping[str, Program]) -> dict[str, Program]:
    """Those of a step's programs that take long to compile and have one shape throughout."""
    return {name: every[name] for name in LARGE if name in every}
