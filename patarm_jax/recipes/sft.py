"""Supervised fine-tuning: the judge learns the form of a judgement, and what its teacher thinks.

The loss is on the judgement alone, its end token included. The same command resumes a run that was stopped.
"""

import itertools
from collections.abc import Mapping
from functools import partial

import jax

from patarm_jax.arrays import SFTBatch
from patarm_jax.config.load import to_yaml
from patarm_jax.config.recipes import SFTConfig
from patarm_jax.data.pipeline import PairBatch, sft_batch, sft_shape
from patarm_jax.data.preferences import read_judged_preferences
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import batch_shards, place_batch
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.recipes.programs import sft_form, sft_learner, sft_programs
from patarm_jax.recipes.ready import Ready, make_ready
from patarm_jax.run.claim import claimed
from patarm_jax.run.export import card_of
from patarm_jax.run.folder import open_run
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.run.programs import describe
from patarm_jax.run.progress import Shown, percent


def main(config: SFTConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        return _train(_ready(config))


def _ready(config: SFTConfig) -> Ready[SFTConfig]:
    return make_ready(config, partial(read_judged_preferences, form=FORMS[config.judge]))


def _train(ready: Ready[SFTConfig]) -> bool:
    config, mesh, model, records, length = ready.config, ready.mesh, ready.model, ready.records, ready.length
    learner = sft_learner(config, model.arch, mesh, updates=length.steps)
    say(kernels_in_use(config.model, model.arch, mesh, sft_form(config)))

    def prepare(pairs: PairBatch) -> SFTBatch:
        shape = sft_shape(pairs, WIDTH_MULTIPLE, _rows_multiple(config, mesh), config.packing)
        batch: SFTBatch = place_batch(mesh, sft_batch(pairs, shape, model.tokenizer.pad_id, config.packing))
        return batch

    with open_run(config, model, records, length, learner, ready.heldout) as run:
        if run is None:
            return True
        for step in run.steps(
            prepare, lambda batch: {"update": (learner.update, (run.state, learner.frozen, batch))}, _shown
        ):
            step.update(step.batch)
            step.tokens = sum(map(sum, step.pairs.lengths))
        return run.finish(card_of(config, model, len(records)))


def dry_run(config: SFTConfig) -> None:
    """Shows the config, the first batch, and what the update needs at the largest batch of an epoch."""
    start_processes(config, dry_run=True)
    ready = _ready(config)
    config, mesh, model, length = ready.config, ready.mesh, ready.model, ready.length
    say(kernels_in_use(config.model, model.arch, mesh, sft_form(config)))
    epoch = list(itertools.islice(ready.batches(), length.per_epoch))
    multiple = _rows_multiple(config, mesh)
    shapes = [sft_shape(pairs, WIDTH_MULTIPLE, multiple, config.packing) for pairs in epoch]
    largest = max(shapes, key=lambda shape: shape.rows * shape.width)
    programs = sft_programs(sft_learner(config, model.arch, mesh, length.steps), largest)
    describe(to_yaml(config), mesh, programs, epoch[0], model.tokenizer, length.steps)


def _rows_multiple(config: SFTConfig, mesh: jax.sharding.Mesh) -> int:
    """What the number of a process's rows must be a multiple of."""
    return config.micro_batches * max(1, batch_shards(mesh) // jax.process_count())


def _shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    return {"loss": values["loss"], "tokens right": percent(values["mean_token_accuracy"])}
