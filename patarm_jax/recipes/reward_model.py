"""A scalar reward model, from the same preference pairs: what a judge that writes is compared with.

The network that writes gets a head of one number in place of the vocabulary; the loss is that of Bradley and Terry. The
same command resumes a run that was stopped.
"""

from collections.abc import Mapping
from functools import partial

from jax.sharding import Mesh

from patarm_jax.arrays import ComparedPairs, ComparedShape
from patarm_jax.config.recipes import RewardModelConfig
from patarm_jax.data.packing import compared_batch, compared_shape
from patarm_jax.data.pipeline import PairBatch
from patarm_jax.data.preferences import read_preferences, read_preferences_with_margins
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import place_batch
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.recipes.programs import reward_learner, reward_programs
from patarm_jax.recipes.ready import Ready, describe_update, learn, make_ready
from patarm_jax.run.claim import claimed
from patarm_jax.run.learner import rows_multiple
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.run.progress import Shown, percent


def main(config: RewardModelConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        return _train(_ready(config))


def _ready(config: RewardModelConfig) -> Ready[RewardModelConfig]:
    return make_ready(config, read_preferences_with_margins if config.margins else read_preferences)


def _train(ready: Ready[RewardModelConfig]) -> bool:
    config, mesh, model = ready.config, ready.mesh, ready.model
    learner = reward_learner(config, model.arch, mesh, updates=ready.length.steps)
    say(kernels_in_use(config.model, model.arch, mesh, "packed"))

    def prepare(pairs: PairBatch) -> ComparedPairs:
        rows = compared_batch(pairs, _shape(config, mesh, pairs), model.tokenizer.pad_id, config.packing)
        batch: ComparedPairs = place_batch(mesh, rows)
        return batch

    return learn(ready, learner, prepare, _shown)


def dry_run(config: RewardModelConfig) -> None:
    """Shows the config, the first batch, and what the update needs at the largest batch of an epoch."""
    start_processes(config, dry_run=True)
    ready = _ready(config)
    config, mesh, arch = ready.config, ready.mesh, ready.model.arch
    say(kernels_in_use(config.model, arch, mesh, "packed"))
    learner = reward_learner(config, arch, mesh, ready.length.steps)
    describe_update(ready, partial(_shape, config, mesh), partial(reward_programs, learner))


def _shape(config: RewardModelConfig, mesh: Mesh, pairs: PairBatch) -> ComparedShape:
    return compared_shape(pairs, WIDTH_MULTIPLE, rows_multiple(mesh, config.micro_batches), config.packing)


def _shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    return {"loss": values["loss"], "right": percent(values["accuracy"])}
