"""Supervised fine-tuning: the judge learns the form of a judgement, and what its teacher thinks.

The loss is on the judgement alone, its end token included. The same command resumes a run that was stopped.
"""

import contextlib
import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from patarm_jax.arrays import SFTBatch
from patarm_jax.config import SFTConfig, to_yaml
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import PairBatch, SFTShape, batches, batches_per_epoch, encode_pairs, sft_batch, sft_shape
from patarm_jax.data.preferences import read_judged_preferences
from patarm_jax.evaluate.heldout import evaluate_heldout, open_heldout
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.kernels import Form, kernel_for, kernels_in_use
from patarm_jax.model.sharding import batch_sharding, batch_shards, fetch, make_mesh, place_batch
from patarm_jax.model.transformer import forward
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.run.drawing import exported_drawing, heldout_in_words, with_heldout_sampling
from patarm_jax.run.export import ModelCardFacts
from patarm_jax.run.folder import (
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
from patarm_jax.run.metrics import Timer, compilations
from patarm_jax.run.open_model import open_model
from patarm_jax.run.peers import arrive, start_processes
from patarm_jax.run.process import say
from patarm_jax.run.programs import describe
from patarm_jax.run.progress import percent, progress
from patarm_jax.run.stopping import stop_after_steps
from patarm_jax.run.watch import open_watch
from patarm_jax.train.optimizer import make_optimizer, make_schedule
from patarm_jax.train.steps import make_step, sft_loss


def main(config: SFTConfig, dry_run: bool = False) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config, dry_run=dry_run)
    if not dry_run:
        check_folder(config.run)
    with contextlib.nullcontext() if dry_run else hold_run(config.run):
        return _train(config, dry_run)


def _train(config: SFTConfig, dry_run: bool) -> bool:
    mesh = make_mesh(config.mesh)
    check_batch(mesh, 2 * config.pairs_per_step, config.micro_batches, f"pairs_per_step {config.pairs_per_step}")

    # ------------------------------------------------------------------------------------------------ model and data
    model = open_model(config.model)
    config = with_heldout_sampling(config, model)
    preferences, read = read_judged_preferences(config.data)
    records, encoded = encode_pairs(
        model.tokenizer, preferences, config.rubrics, config.data, Room(model.arch.max_position_embeddings)
    )
    say(f"{config.data.path}: {read}. Encoded: {encoded}.")
    steps, epochs = number_of_steps(config.run, records, config.pairs_per_step)
    shares = (jax.process_index(), jax.process_count())
    iterator = batches(records, config.pairs_per_step, epochs, config.run.seed, *shares)

    # ----------------------------------------------------------------------------------------------------- the step
    optimizer = make_optimizer(config.optimizer, steps)
    schedule = make_schedule(config.optimizer, steps)
    step_fn = make_update(config, model.arch, mesh, optimizer)
    heldout = open_heldout(config, model, mesh, [one.preference for one in preferences])
    say(kernels_in_use(config.model, model.arch, mesh, _form(config)))
    rows_multiple = config.micro_batches * max(1, batch_shards(mesh) // jax.process_count())

    def shape_of(pairs: PairBatch) -> SFTShape:
        return sft_shape(pairs, WIDTH_MULTIPLE, rows_multiple, config.packing)

    if dry_run:
        first, *others = itertools.islice(iterator, batches_per_epoch(len(records), config.pairs_per_step))
        largest = max(map(shape_of, (first, *others)), key=lambda shape: shape.rows * shape.width)
        programs = {"update": (step_fn, (state_shape(model.arch, mesh, optimizer), _abstract_batch(largest, mesh)))}
        describe(to_yaml(config), mesh, programs, first, model.tokenizer, steps)
        return True

    # ---------------------------------------------------------------------------------------------------------- train
    if is_complete(config, model, records, steps):
        return True
    run, state = begin_or_resume(config, model, records, iterator, mesh, optimizer, steps)
    watch = open_watch(config, run.folder, run.done, batches_per_epoch(len(records), config.pairs_per_step))
    step = run.done

    def next_batch() -> tuple[SFTBatch, int]:
        """The batch, and how many tokens all its sequences have."""
        pairs = next(iterator)
        arrays = sft_batch(pairs, shape_of(pairs), model.tokenizer.pad_id, config.packing)
        return place_batch(mesh, arrays), sum(map(sum, pairs.lengths))

    with stop_after_steps() as stop_asked, jax.set_mesh(mesh):
        batch, tokens = next_batch() if step < steps else (None, 0)
        compilations().since_last()  # what was compiled before belongs to no step
        if batch is not None:
            compile_ahead(mesh, {"update": (step_fn, (state, batch))})
        with progress(steps, run.done) as report:
            for step in range(run.done + 1, steps + 1):
                timer, data_state, done_tokens = Timer(arrive, step), iterator.get_state(), tokens
                with timer.phase("update"):
                    state, metrics = step_fn(state, batch)  # returns while the devices compute
                with timer.phase("data"):  # beside the devices' work: "update" is the rest of it
                    batch, tokens = next_batch() if step < steps else (None, 0)
                with timer.phase("update"):
                    values = {name: float(value) for name, value in fetch(metrics).items()}
                values["learning_rate"] = float(schedule(max(step - 1 - int(values["skipped_updates"]), 0)))
                quality: dict[str, float] = {}
                if heldout is not None and heldout.due(step, steps):
                    with timer.phase("eval"):
                        quality = evaluate_heldout(heldout, state.params)
                line = watch.line(step, values | quality, done_tokens, timer)
                arrive(f"step {step}: writing what it gave")
                run.writer.write(step, line | compilations().since_last())
                shown: dict[str, float | str] = {
                    "loss": values["loss"],
                    "tokens right": percent(values["mean_token_accuracy"]),
                }
                report(step, shown, watch.new_tokens)
                arrive(f"step {step}: saving")
                stopping = stop_asked() or bool(watch.stop)
                run.save_when_due(step, state, data_state, stopping, quality)
                if stopping:
                    break

    card = ModelCardFacts(config.model.path, "sft", config.data.path, len(records), steps, "", config.rubrics)
    card = replace(card, drawing=exported_drawing(config, model), measured_on=heldout_in_words(config, model))
    return finish(run, step, state, model, card, config.model.dtype, watch)


def make_update(config: SFTConfig, arch: Architecture, mesh: Mesh, optimizer: optax.GradientTransformation) -> Any:
    """The jitted step, (state, SFTBatch) → (state, metrics); the state is donated."""
    kernel = kernel_for(config.model, arch, mesh, _form(config))
    run_forward = partial(forward, arch=arch, dtype=config.model.dtype, remat=config.model.remat, kernel=kernel)

    def read(params: Any, tokens: jax.Array, starts: jax.Array) -> Any:
        return run_forward(params, prompt=tokens, starts=starts if config.packing else None)

    loss = sft_loss(read, batch_shards(mesh))
    shardings = state_shardings(arch, mesh, optimizer)
    return jax.jit(
        make_step(loss, optimizer, config.micro_batches),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )


def _form(config: SFTConfig) -> Form:
    return "packed" if config.packing else "causal"


def _abstract_batch(shape: SFTShape, mesh: Mesh) -> SFTBatch:
    """The shapes of a batch of all processes, for compiling ahead of time."""
    rows, sharding = shape.rows * jax.process_count(), batch_sharding(mesh)
    wide, judged = (rows, shape.width), (rows, shape.targets)
    leaves: list[Any] = [
        jax.ShapeDtypeStruct(each, jnp.int32, sharding=sharding) for each in (wide, wide, judged, judged, (rows,))
    ]
    return SFTBatch(*leaves)
