"""What recipes that train share: devices, model and pairs, all checked, the loop of one update a step, the dry run."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from jax.sharding import Mesh

from patarm_jax.arrays import (
    ComparedPairs,
    ComparedShape,
    PreferredPairs,
    PreferredShape,
    ScoredPairs,
    ScoredShape,
    SFTBatch,
    SFTShape,
    Tree,
)
from patarm_jax.config.load import to_yaml
from patarm_jax.config.sections import DataSection
from patarm_jax.config.training import TrainConfig
from patarm_jax.data.pipeline import Batches, EncodedPair, PairBatch, encode_pairs
from patarm_jax.data.preferences import Report
from patarm_jax.data.scores import room_for
from patarm_jax.data.sft import JudgedPreference
from patarm_jax.evaluate.heldout import open_heldout
from patarm_jax.judge.forms import FORMS
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import Program, make_mesh
from patarm_jax.recipes.fitting import as_long_as, fitted, stays_beside
from patarm_jax.run.card import card_of
from patarm_jax.run.devices import tell_devices
from patarm_jax.run.drawing import with_heldout_sampling
from patarm_jax.run.export import refuse_adapters_of_no_model
from patarm_jax.run.folder import Evaluator, Length, Run, batches_of, length_of, open_run
from patarm_jax.run.learner import Learner, check_batch
from patarm_jax.run.open_model import Model, open_model
from patarm_jax.run.process import say
from patarm_jax.run.programs import describe
from patarm_jax.run.progress import Shown
from patarm_jax.types import Preference

Config = TypeVar("Config", bound=TrainConfig)
Shape = TypeVar("Shape", SFTShape, ComparedShape, ScoredShape, PreferredShape)
Prepared = TypeVar("Prepared", SFTBatch, ComparedPairs, ScoredPairs, PreferredPairs)
# From the config, complete, the model, its devices and what is trained on; None where nothing is held out.
OpenEvaluation = Callable[[Any, Model, Mesh, Sequence[Preference]], Evaluator | None]
ReadPairs = Callable[[DataSection], tuple[Sequence[Preference | JudgedPreference], Report]]


@dataclass(frozen=True)
class Ready(Generic[Config]):
    """What a run, or a dry run, begins with."""

    config: Config  # complete: with what the model's own files say
    mesh: Mesh
    model: Model
    reference: Model | None  # what the KL is measured from; None where there is no KL
    records: list[EncodedPair]
    length: Length
    heldout: Evaluator | None  # the evaluation of the weights while they train; None where there are no held-out pairs

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of all."""
        return max(record.longest_prompt for record in self.records)

    def batches(self) -> Batches:
        """This process's part of the run's batches, from the first one on."""
        return batches_of(self.config, self.records)


def make_ready(
    config: Config,
    read_pairs: ReadPairs,
    open_reference: Callable[[Model], Model] | None = None,
    open_evaluation: OpenEvaluation = open_heldout,
    beside: Callable[[Config, Mesh], Sequence[Tree]] = lambda config, mesh: (),
) -> Ready[Config]:
    """Opens all that a run needs, the cheapest to refuse first.

    Args:
        config: of the run.
        read_pairs: reads what the recipe learns from.
        open_reference: opens the model that the KL is measured from; None where there is no KL.
        open_evaluation: opens what the weights are measured on while they train.
        beside: the abstract weights of other models that stay on the devices meanwhile.
    """
    config = config.complete()
    mesh = make_mesh(config.mesh)
    tell_devices()
    check_batch(
        mesh,
        config.units_per_step,
        config.micro_batches,
        f"pairs_per_step {config.pairs_per_step}",
    )
    form = FORMS[config.judge]
    model = open_model(config.model, config.judge, new_head=form.has_score_head)
    refuse_adapters_of_no_model(config, model)
    config = with_heldout_sampling(config, model) if form.writes else config
    reference = open_reference(model) if open_reference else None
    pairs, read = read_pairs(config.data)
    written = config.rollout_sampling.max_new_tokens if config.rollout_sampling else 0
    room = room_for(model.arch.max_position_embeddings, model.tokenizer, form, written)
    records, encoded = encode_pairs(model.tokenizer, pairs, config.rubrics, config.data, room, form)
    say(f"{config.data.path}: {read}. Encoded: {encoded}.")
    config = _fitted(config, model.arch, mesh, records, beside(config, mesh))
    preferences = [pair.preference if isinstance(pair, JudgedPreference) else pair for pair in pairs]
    return Ready(
        config=config,
        mesh=mesh,
        model=model,
        reference=reference,
        records=records,
        length=length_of(config.run, records, config.pairs_per_step),
        heldout=open_evaluation(config, model, mesh, preferences),
    )


def _fitted(
    config: Config, arch: Architecture, mesh: Mesh, records: Sequence[EncodedPair], beside: Sequence[Tree]
) -> Config:
    """The config with as many micro-batches as these records need, where it leaves that open."""
    if config.micro_batches:
        return config
    tight = replace(config, data=as_long_as(config.data, records))
    chosen = fitted(tight, arch, mesh, [*stays_beside(config, arch, mesh), *beside])
    return replace(config, micro_batches=chosen.micro_batches)


def learn(
    ready: Ready[Config],
    learner: Learner[Prepared],
    prepare: Callable[[PairBatch], Prepared],
    shown: Callable[[Mapping[str, float]], Shown],
) -> bool:
    """Trains by one update on the pairs of each step as they come, and exports; False when it was asked to stop."""
    with open_run(ready.config, ready.model, ready.records, ready.length, learner, ready.heldout) as run:
        if run is None:
            return True
        take_updates(run, prepare, shown)
        return run.finish(card_of(ready.config, ready.model, len(ready.records)))


def take_updates(
    run: Run, prepare: Callable[[PairBatch], Prepared], shown: Callable[[Mapping[str, float]], Shown]
) -> None:
    """Takes the steps of a run, one update each."""
    trained = run.trained
    learner = trained.learner
    for step in run.steps(
        prepare, lambda batch: {"update": (learner.update, (trained.state, learner.frozen, batch))}, shown
    ):
        step.update(step.batch)
        step.tokens = sum(map(sum, step.pairs.lengths))


def describe_update(
    ready: Ready[Config], shape_of: Callable[[PairBatch], Shape], programs: Callable[[Shape], Mapping[str, Program]]
) -> None:
    """Shows the config, the first batch, and what the programs need at the largest batch of an epoch."""
    epoch = list(itertools.islice(ready.batches(), ready.length.per_epoch))
    largest = max(map(shape_of, epoch), key=lambda shape: shape.tokens)
    steps, tokenizer = ready.length.steps, ready.model.tokenizer
    describe(to_yaml(ready.config), ready.mesh, programs(largest), epoch[0], tokenizer, steps)
