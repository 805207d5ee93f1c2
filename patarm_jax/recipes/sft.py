"""Supervised fine-tuning: a judge learns the form of a judgement and what its teacher thinks, a policy how to answer.

The loss is on the judgement or response alone, its end token included. The same command resumes a run that was stopped.
"""

from collections.abc import Mapping
from functools import partial

from jax.sharding import Mesh

from patarm_jax.arrays import SFTBatch, SFTShape
from patarm_jax.config.recipes import SFTConfig
from patarm_jax.config.training import SupervisedConfig
from patarm_jax.data.judged import read_judged_preferences
from patarm_jax.data.packing import sft_batch, sft_shape
from patarm_jax.data.pipeline import PairBatch
from patarm_jax.data.prompts import read_answered_prompts
from patarm_jax.data.tokenizer import Tokenizer
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import place_batch
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.recipes.programs import sft_form, sft_learner, sft_programs
from patarm_jax.recipes.ready import Ready, describe_update, learn, make_ready
from patarm_jax.run.claim import claimed
from patarm_jax.run.learner import rows_multiple
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.run.progress import Shown, percent


def main(config: SFTConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        return _train(_ready(config))


def _ready(config: SFTConfig) -> Ready[SFTConfig]:
    read = read_answered_prompts if config.answers else partial(read_judged_preferences, form=FORMS[config.judge])
    return make_ready(config, read)


def _train(ready: Ready[SFTConfig]) -> bool:
    config, mesh, model = ready.config, ready.mesh, ready.model
    learner = sft_learner(config, model.arch, mesh, updates=ready.length.steps)
    say(kernels_in_use(config.model, model.arch, mesh, sft_form(config)))
    return learn(ready, learner, partial(prepare, config, mesh, model.tokenizer), shown)


def prepare(config: SupervisedConfig, mesh: Mesh, tokenizer: Tokenizer, pairs: PairBatch) -> SFTBatch:
    """A batch of pairs as rows on the devices."""
    rows = sft_batch(pairs, _shape(config, mesh, pairs), tokenizer.pad_id, config.packing)
    batch: SFTBatch = place_batch(mesh, rows)
    return batch


def dry_run(config: SFTConfig) -> None:
    """Shows the config, the first batch, and what the update needs at the largest batch of an epoch."""
    start_processes(config, dry_run=True)
    ready = _ready(config)
    config, mesh, arch = ready.config, ready.mesh, ready.model.arch
    say(kernels_in_use(config.model, arch, mesh, sft_form(config)))
    learner = sft_learner(config, arch, mesh, ready.length.steps)
    describe_update(ready, partial(_shape, config, mesh), partial(sft_programs, learner))


def _shape(config: SupervisedConfig, mesh: Mesh, pairs: PairBatch) -> SFTShape:
    return sft_shape(pairs, WIDTH_MULTIPLE, rows_multiple(mesh, config.micro_batches), config.packing)


def shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    return {"loss": values["loss"], "tokens right": percent(values["mean_token_accuracy"])}
