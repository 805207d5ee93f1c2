"""A reward model that writes nothing, from the same preference pairs: what a judge that reasons is compared with.

Its number for a response comes from a head in place of the vocabulary's, learnt by the loss of Bradley and Terry; or it
is the mean of the scores that the model finds likely when it is asked for one at once. The same command resumes a run
that was stopped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic

from patarm_jax.arrays import ComparedPairs, ComparedShape, ScoredPairs, ScoredShape
from patarm_jax.config.recipes import RewardModelConfig
from patarm_jax.data.packing import compared_batch, compared_shape, scored_batch, scored_shape
from patarm_jax.data.pipeline import PairBatch
from patarm_jax.data.preferences import read_preferences_with_margins, read_preferences_without_margins
from patarm_jax.data.scores import score_tokens
from patarm_jax.model.kernels import Form, kernels_in_use
from patarm_jax.model.sharding import Program, place_batch
from patarm_jax.padding import WIDTH_MULTIPLE
from patarm_jax.recipes.programs import ordinal_learner, ordinal_programs, reward_learner, reward_programs
from patarm_jax.recipes.ready import Prepared, Ready, Shape, describe_update, learn, make_ready
from patarm_jax.run.claim import claimed
from patarm_jax.run.learner import Learner, rows_multiple
from patarm_jax.run.peers import start_processes
from patarm_jax.run.process import say
from patarm_jax.run.progress import Shown, percent


@dataclass(frozen=True)
class _Head(Generic[Shape, Prepared]):
    """What differs between the two kinds of number."""

    rows: Form  # what they look like to attention
    learner: Callable[..., Learner[Prepared]]
    programs: Callable[[Learner[Prepared], Shape], Mapping[str, Program]]
    shape: Callable[[PairBatch], Shape]
    batch: Callable[[PairBatch, Shape], Prepared]


def main(config: RewardModelConfig) -> bool:
    """Trains until done and exports; False when it was asked to stop before."""
    start_processes(config)
    with claimed(config.run):
        ready = _ready(config)
        return _train(ready, _ordinal(ready)) if config.head == "ordinal" else _train(ready, _scalar(ready))


def dry_run(config: RewardModelConfig) -> None:
    """Shows the config, the first batch, and what the update needs at the largest batch of an epoch."""
    start_processes(config, dry_run=True)
    ready = _ready(config)
    _describe(ready, _ordinal(ready)) if config.head == "ordinal" else _describe(ready, _scalar(ready))


def _ready(config: RewardModelConfig) -> Ready[RewardModelConfig]:
    return make_ready(config, read_preferences_with_margins if config.margins else read_preferences_without_margins)


def _train(ready: Ready[RewardModelConfig], head: _Head[Shape, Prepared]) -> bool:
    def prepare(pairs: PairBatch) -> Prepared:
        batch: Prepared = place_batch(ready.mesh, head.batch(pairs, head.shape(pairs)))
        return batch

    return learn(ready, _learner(ready, head), prepare, _shown)


def _describe(ready: Ready[RewardModelConfig], head: _Head[Shape, Prepared]) -> None:
    describe_update(ready, head.shape, partial(head.programs, _learner(ready, head)))


def _learner(ready: Ready[RewardModelConfig], head: _Head[Shape, Prepared]) -> Learner[Prepared]:
    config, mesh, arch = ready.config, ready.mesh, ready.model.arch
    say(kernels_in_use(config.model, arch, mesh, head.rows))
    return head.learner(config, arch, mesh, updates=ready.length.steps)


def _scalar(ready: Ready[RewardModelConfig]) -> _Head[ComparedShape, ComparedPairs]:
    """A head of one number on the last token of a conversation."""
    packing, pad_id = ready.config.packing, ready.model.tokenizer.pad_id
    rows = rows_multiple(ready.mesh, ready.config.micro_batches)
    return _Head(
        rows="packed",
        learner=reward_learner,
        programs=reward_programs,
        shape=lambda pairs: compared_shape(pairs, WIDTH_MULTIPLE, rows, packing),
        batch=lambda pairs, shape: compared_batch(pairs, shape, pad_id, packing),
    )


def _ordinal(ready: Ready[RewardModelConfig]) -> _Head[ScoredShape, ScoredPairs]:
    """The probabilities of the scores behind the question for one."""
    scores, pad_id = score_tokens(ready.model.tokenizer), ready.model.tokenizer.pad_id
    return _Head(
        rows="shared",
        learner=ordinal_learner,
        programs=ordinal_programs,
        shape=lambda pairs: scored_shape(pairs, WIDTH_MULTIPLE, scores),
        batch=lambda pairs, shape: scored_batch(pairs, shape, pad_id, scores),
    )


def _shown(values: Mapping[str, float]) -> Shown:
    """What of a step's metrics is printed."""
    return {"loss": values["loss"], "right": percent(values["accuracy"])}
