"""GRPO on preference pairs: judgements are sampled, rewarded by comparing the two sides, and reinforced.

No score is labelled anywhere. The same command resumes a run that was stopped.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from patarm_jax.arrays import GRPOBatch
from patarm_jax.config import GRPOConfig, ModelSection, to_yaml
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import batches, batches_per_epoch, encode_pairs
from patarm_jax.data.preferences import read_preferences
from patarm_jax.evaluate.heldout import evaluate_heldout, open_heldout
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.kernels import kernel_for, kernels_in_use
from patarm_jax.model.sharding import (
    TRAIN_RULES,
    batch_sharding,
    batch_shards,
    fetch,
    make_mesh,
)
from patarm_jax.model.transformer import abstract_params, forward
from patarm_jax.padding import bucket
from patarm_jax.recipes.rollouts import rewards_of, rollout_metrics, rollout_rows
from patarm_jax.rollout.engine import abstract_programs
from patarm_jax.rollout.judging import (
    Judge,
    Sampled,
    make_judge,
    read_judgements,
    requests_of,
    sample_judgements,
    score_arrays,
)
from patarm_jax.run.drawing import exported_drawing, heldout_in_words, with_heldout_sampling
from patarm_jax.run.export import ModelCardFacts
from patarm_jax.run.folder import (
    ROLLOUTS,
    begin_or_resume,
    check_batch,
    check_folder,
    compile_ahead,
    finish,
    hold_run,
    is_complete,
    number_of_steps,
    state_shape,
    state_shardings,
)
from patarm_jax.run.metrics import Timer, compilations, show_judgements, write_rollouts
from patarm_jax.run.open_model import Model, load_params, open_model, rollout_rules, weight_sync
from patarm_jax.run.peers import arrive, start_processes
from patarm_jax.run.process import say
from patarm_jax.run.programs import Program, describe
from patarm_jax.run.progress import percent, progress
from patarm_jax.run.stopping import stop_after_steps
from patarm_jax.run.watch import open_watch
from patarm_jax.train.optimizer import make_optimizer, make_schedule
from patarm_jax.train.steps import completion_logprobs, grpo_loss, make_step, map_micro_batches
from patarm_jax.types import UserError


def main(config: GRPOConfig, dry_run: bool = False) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config, dry_run=dry_run)
    if not dry_run:
        check_folder(config.run)
    with contextlib.nullcontext() if dry_run else hold_run(config.run):
        return _train(config, dry_run)


def _train(config: GRPOConfig, dry_run: bool) -> bool:
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.pairs_per_step, config.micro_batches, f"pairs_per_step {config.pairs_per_step}")

    # ------------------------------------------------------------------------------------------------ model and data
    model = open_model(config.model)
    config = with_heldout_sampling(config, model)
    ref_section, reference = _open_reference(config, model)
    preferences, read = read_preferences(config.data)
    room = Room(model.arch.max_position_embeddings, config.sampling.max_new_tokens)
    records, encoded = encode_pairs(model.tokenizer, preferences, config.rubrics, config.data, room)
    say(f"{config.data.path}: {read}. Encoded: {encoded}.")
    steps, epochs = number_of_steps(config.run, records, config.pairs_per_step)
    shares = (jax.process_index(), jax.process_count())
    iterator = batches(records, config.pairs_per_step, epochs, config.run.seed, *shares)

    # --------------------------------------------------------------------------------------------- the jitted programs
    updates = steps * config.policy.updates_per_rollout
    optimizer, schedule = make_optimizer(config.optimizer, updates), make_schedule(config.optimizer, updates)
    programs = make_programs(config, model.arch, mesh, optimizer)
    judge = make_judge(model.arch, model.tokenizer, mesh, config.model, config.sampling, config.group_size)
    heldout = open_heldout(config, model, mesh, preferences)
    say(kernels_in_use(config.model, model.arch, mesh, "causal", "shared"))
    if dry_run:
        widest = bucket(max(record.longest_prompt for record in records))
        shown = abstract_step(config, model.arch, mesh, optimizer, judge, programs, widest)
        describe(to_yaml(config), mesh, shown, next(iterator), model.tokenizer, steps)
        return True

    # ---------------------------------------------------------------------------------------------------------- train
    held_to = reference if config.policy.kl_coef else None
    if is_complete(config, model, records, steps, held_to):
        return True
    run, state = begin_or_resume(config, model, records, iterator, mesh, optimizer, steps, held_to)
    watch = open_watch(config, run.folder, run.done, batches_per_epoch(len(records), config.pairs_per_step))
    # Loaded, never taken from the state: a resumed run would have lost it, and the update donates those buffers.
    ref_params = None
    if config.policy.kl_coef:
        ref_params = load_params(ref_section, reference, mesh, config.run.seed, TRAIN_RULES, config.model.dtype)
    run_key, step = jax.random.key(config.run.seed), run.done
    if step < steps:
        width = _next_width(iterator)
        compile_ahead(mesh, abstract_step(config, model.arch, mesh, optimizer, judge, programs, width))
    compilations().since_last()  # what was compiled before belongs to no step
    with stop_after_steps() as stop_asked, progress(steps, run.done) as report:
        for step in range(run.done + 1, steps + 1):
            timer = Timer(arrive, step)
            with timer.phase("data"):
                pairs = next(iterator)
            with timer.phase("sample"):
                key, width = jax.random.fold_in(run_key, step), bucket(pairs.longest_prompt)
                sampled = sample_judgements(
                    judge, programs.to_rollout(state.params), requests_of(pairs.records), key, width
                )
            with timer.phase("parse"):
                judgements = read_judgements(judge, sampled)
                scores, status = (x.reshape(-1, 2, config.group_size) for x in score_arrays(judgements))
            with timer.phase("reward"):
                rewards = fetch(rewards_of(scores, status, config.reward))
                written = fetch((sampled.completions.lengths, sampled.completions.truncated))
                longest = completion_width(int(written[0].max()), config.sampling.max_new_tokens)
                batch = assemble(sampled, jax.device_put(rewards.advantages, batch_sharding(mesh)), longest)
            with timer.phase("logprobs"), jax.set_mesh(mesh):
                if ref_params is not None:
                    batch = replace(batch, ref_logprobs=programs.logprobs(ref_params, batch))
                    jax.block_until_ready(batch)
            with timer.phase("update"), jax.set_mesh(mesh):
                passes = []
                for _ in range(config.policy.updates_per_rollout):
                    state, metrics = programs.update(state, batch)
                    passes.append(metrics)
                values = {name: float(np.mean([one[name] for one in fetch(passes)])) for name in metrics}
                values["skipped_updates"] = float(fetch(state.skipped))

            quality: dict[str, float] = {}
            if heldout is not None and heldout.due(step, steps):
                with timer.phase("eval"):
                    quality = evaluate_heldout(heldout, state.params)
            values |= rollout_metrics(scores, status, rewards, *written) | quality
            values["learning_rate"] = float(schedule(max(int(state.step) - 1 - int(state.skipped), 0)))
            tokens = config.group_size * sum(prompt for prompt, _ in pairs.lengths) + int(written[0].sum())
            line = watch.line(step, values, tokens, timer)
            arrive(f"step {step}: writing what it gave")
            run.writer.write(step, line | compilations().since_last())
            report(step, _shown(values), watch.new_tokens)
            rows = rollout_rows(pairs.ids, judgements, rewards)
            if jax.process_index() == 0:
                write_rollouts(run.folder / ROLLOUTS, step, rows)
            if config.run.show_every and step % config.run.show_every == 0:
                show_judgements(step, [rows[0], rows[config.group_size]])
            arrive(f"step {step}: saving")
            stopping = stop_asked() or bool(watch.stop)
            run.save_when_due(step, state, iterator.get_state(), stopping, quality)
            if stopping:
                break

    reward = f"PAR with the {config.reward.margin} margin, {config.group_size} judgements of each response"
    card = ModelCardFacts(config.model.path, "grpo", config.data.path, len(records), updates, reward, config.rubrics)
    card = replace(card, drawing=exported_drawing(config, model), measured_on=heldout_in_words(config, model))
    return finish(run, step, state, model, card, config.model.dtype, watch)


@dataclass(frozen=True)
class Programs:
    """The jitted programs of GRPO beside the sampler's."""

    update: Any  # (state, GRPOBatch) → (state, metrics); the state is donated
    logprobs: Any  # (params, GRPOBatch) → log-probs [P, 2, G, Tc]
    to_rollout: Any  # params → their copy for sampling


def make_programs(
    config: GRPOConfig, arch: Architecture, mesh: Mesh, optimizer: optax.GradientTransformation
) -> Programs:
    """Jits a policy update, log-probs and the weight sync with their shardings."""
    kernel = kernel_for(config.model, arch, mesh, "shared")
    run_forward = partial(forward, arch=arch, dtype=config.model.dtype, remat=config.model.remat, kernel=kernel)
    temperature, shards = config.sampling.temperature or 1.0, batch_shards(mesh)

    def two_streams(params: Any, prompt: jax.Array, lengths: jax.Array, completion: jax.Array) -> Any:
        return run_forward(params, prompt=prompt, prompt_lengths=lengths, completion=completion)

    def logprobs(params: Any, batch: GRPOBatch) -> jax.Array:
        return completion_logprobs(two_streams, params, batch, temperature, shards)

    shardings = state_shardings(arch, mesh, optimizer)
    update = make_step(grpo_loss(two_streams, config.policy, temperature, shards), optimizer, config.micro_batches)
    return Programs(
        update=jax.jit(
            update,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, None),
            donate_argnums=0,
        ),
        logprobs=jax.jit(map_micro_batches(logprobs, config.micro_batches)),
        to_rollout=weight_sync(arch, mesh, config.mesh, config.model.dtype),
    )


def abstract_step(
    config: GRPOConfig,
    arch: Architecture,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    judge: Judge,
    programs: Programs,
    width: int,
) -> dict[str, Program]:
    """The large programs of a step with abstract arguments: prompts of a width, completions at their limit."""
    rollout_params = abstract_params(arch, mesh, rollout_rules(config.mesh), config.model.dtype, unstacked=True)
    state, batch = state_shape(arch, mesh, optimizer), _abstract_batch(config, mesh, width)
    of_sampler = abstract_programs(judge.engine, rollout_params, 2 * config.pairs_per_step, width)
    shown: dict[str, Program] = {**of_sampler, "update": (programs.update, (state, batch))}
    if config.policy.kl_coef:
        frozen = abstract_params(arch, mesh, dtype=config.model.dtype)
        shown["reference log-probs"] = (programs.logprobs, (frozen, replace(batch, ref_logprobs=None)))
    return shown


def _shown(values: Mapping[str, float]) -> dict[str, float | str]:
    """What of a step's metrics is printed."""
    shares = {"readable": "judge/valid", "cut off": "completions/clipped_ratio"}
    return {"reward": values["reward"], **{words: percent(values[name]) for words, name in shares.items()}}


def _next_width(iterator: Any) -> int:
    """The width of the next batch's prompts; the iterator stands where it stood."""
    state = iterator.get_state()
    longest = next(iterator).longest_prompt
    iterator.set_state(state)
    return bucket(longest)


def _open_reference(config: GRPOConfig, model: Model) -> tuple[ModelSection, Model]:
    """The model that the policy is held to: the one training starts from, unless another is named."""
    if not config.policy.reference or not config.policy.kl_coef:
        return config.model, model
    section = replace(config.model, path=config.policy.reference, weights="load")
    reference = open_model(section)
    if reference.arch != model.arch or reference.tokenizer.control_tokens != model.tokenizer.control_tokens:
        raise UserError(
            f"policy.reference {section.path} is another network than model.path {model.folder}, or has other tokens. "
            "Give the model that training starts from, or leave policy.reference empty."
        )
    return section, reference


@partial(jax.jit, static_argnums=2)
def assemble(sampled: Sampled, advantages: jax.Array, width: int) -> GRPOBatch:
    """What was sampled, [R, …], as P pairs of two sides, [P, 2, …], no wider than the longest completion needs."""
    prompts, completions = sampled.prompts, sampled.completions
    tokens, logprobs = (x[:, :, :width] for x in (completions.tokens, completions.logprobs))
    pairs = advantages.shape[0]
    prompt_tokens, prompt_lengths, tokens, lengths, logprobs = (
        x.reshape(pairs, 2, *x.shape[1:])
        for x in (prompts.tokens, prompts.lengths, tokens, completions.lengths, logprobs)
    )
    return GRPOBatch(prompt_tokens, prompt_lengths, tokens, lengths, logprobs, None, advantages)


def completion_width(longest: int, most: int) -> int:
    """Completions are cut to an eighth, a quarter, … of the limit before they are learnt from: few compiled shapes."""
    return min(bucket(longest, -(-most // 8)), most)


def _abstract_batch(config: GRPOConfig, mesh: Mesh, width: int) -> GRPOBatch:
    """The shapes of what is learnt from, for compiling ahead of time."""
    pairs, group, new = config.pairs_per_step, config.group_size, config.sampling.max_new_tokens

    def leaf(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    logprobs = leaf(jnp.float32, pairs, 2, group, new)
    return GRPOBatch(
        leaf(jnp.int32, pairs, 2, width),
        leaf(jnp.int32, pairs, 2),
        leaf(jnp.int32, pairs, 2, group, new),
        leaf(jnp.int32, pairs, 2, group),
        logprobs,
        logprobs if config.policy.kl_coef else None,
        leaf(jnp.float32, pairs, 2, group),
    )
