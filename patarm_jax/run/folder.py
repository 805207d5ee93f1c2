"""A run and its folder: opened or resumed, taken step by step, finished.

    with open_run(…) as run:
        for step in run.steps(prepare, programs, shown):
            with step.phase("sample"):
                …
            step.update(batch)
    return run.finish(card)

What stands between the steps is here: drawing the pairs, held-out evaluation, metrics, rollouts, checkpoints, requests
to stop. All processes go through it together.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

import jax
import numpy as np

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.sections import RunSection
from patarm_jax.config.training import RunConfig, TrainConfig
from patarm_jax.data.pipeline import Batches, EncodedPair, PairBatch, batches, batches_drawn, batches_per_epoch
from patarm_jax.files import read_json_object, writing
from patarm_jax.model.adapter_files import is_adapter
from patarm_jax.model.sharding import Program, fetch
from patarm_jax.run.card import ModelCardFacts
from patarm_jax.run.checkpoint import Checkpoints, open_checkpoints
from patarm_jax.run.checkpoint_files import metrics_of, steps_in
from patarm_jax.run.claim import (
    CHECKPOINTS,
    CONFIG,
    MARK,
    ROLLOUTS,
    folder_of,
    is_complete,
    refuse_another_begun,
    write_mark,
)
from patarm_jax.run.export import export_trained, exports_adapters
from patarm_jax.run.learner import Learner
from patarm_jax.run.metrics import MetricsWriter, open_metrics
from patarm_jax.run.open_model import EXPORT, Model, load_parts
from patarm_jax.run.peers import agree, arrive, told
from patarm_jax.run.process import say
from patarm_jax.run.programs import compile_ahead
from patarm_jax.run.progress import Shown, progress
from patarm_jax.run.records import schedule_change
from patarm_jax.run.rollouts import RolloutRow, show_judgements, write_rollouts
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.run.stopping import stop_after_steps
from patarm_jax.run.timing import Timer, compilations
from patarm_jax.run.watch import Watch, open_watch
from patarm_jax.run.whose import WEIGHTS, fingerprint, notes_no_digests, with_known_start
from patarm_jax.train.steps import TrainState
from patarm_jax.types import LearntNothing, UserError

Prepared = TypeVar("Prepared")
Found = TypeVar("Found")


class Evaluator(Protocol):
    """What judges the weights of a run now and then."""

    def due(self, step: int, steps: int) -> bool:
        """Whether a step is followed by an evaluation."""

    def __call__(self, params: Params, frozen: Tree) -> dict[str, float]:
        """Metrics `eval/…` of the weights: what is trained, beside what is only read."""


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    steps: int
    per_epoch: int  # steps


def batches_of(config: TrainConfig, records: Sequence[EncodedPair], turns: int = 1) -> Batches:
    """This process's part of a run's batches, from the first one on and without end.

    Args:
        config: of the run.
        records: all of them.
        turns: how often each batch comes, one time after the other.
    """
    shares = (jax.process_index(), jax.process_count())
    return batches(records, config.pairs_per_step, None, config.run.seed, *shares, config.alternates, turns)


def length_of(section: RunSection, records: Sequence[EncodedPair], pairs_per_step: int) -> Length:
    """So many steps as are asked for, or as make whole epochs."""
    per_epoch = batches_per_epoch(len(records), pairs_per_step)
    return Length(section.steps or per_epoch * section.epochs, per_epoch)


# -------------------------------------------------------------------------------------------------------------- steps


@dataclass
class Step(Generic[Prepared]):
    """One step of a run, as the recipe that takes it sees it."""

    run: "Run"
    number: int  # from 1
    pairs: PairBatch  # this process's part of the step's pairs
    batch: Prepared  # what the recipe has prepared of them
    timer: Timer
    metrics: dict[str, float] = field(default_factory=dict)  # the step's own, beside those of the update
    rows: Sequence[RolloutRow] = ()  # its rollouts
    tokens: int = 0  # all its sequences have, the prompts of all rollouts included, as TRL counts them
    updates: list[dict[str, jax.Array]] = field(default_factory=list)  # metrics of each, on the devices

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Times a part of the step. Arrays are computed in the background: wait for them inside."""
        return self.timer.phase(name)

    def draw(self) -> PairBatch:
        """Further pairs for this step, as many as it has: those that follow in the data, and in the next epoch."""
        return next(self.run.iterator)

    def update(self, batch: Tree, times: int = 1) -> None:
        """Updates the weights on a batch; returns while the devices compute."""
        trained = self.run.trained
        with self.phase("update"):
            for _ in range(times):
                trained.state, metrics = trained.learner.update(trained.state, trained.frozen, batch)
                self.updates.append(metrics)


@dataclass
class Trained:
    """A model that a run trains, with all that is its alone."""

    name: str  # among the models of its run; empty where it is the only one of its folder
    config: TrainConfig
    model: Model  # what training started from
    learner: Learner[Tree]
    state: TrainState
    frozen: Tree  # what is only read, such as the weights beside adapters
    watch: Watch
    evaluation: Evaluator | None
    labels: Mapping[str, object] = field(default_factory=dict)  # said in every line of metrics, such as the phase


@dataclass
class Run:
    """A run folder that is being written, and what is being trained: one model, or several, step by step in turn."""

    folder: Path
    models: Sequence[Trained]
    length: Length
    done: int  # steps, those of earlier starts included
    iterator: Batches  # stands behind `pairs`
    pairs: PairBatch | None  # the next step's; None where none is left
    checkpoints: Checkpoints
    writer: MetricsWriter
    began_at: int  # steps that were done when this process began
    first: int = 0  # the step before that in which the first of the models has its first turn
    asked_to_stop: bool = False  # by a signal, in its last step
    under_way: Generator[Step[Tree], None, None] | None = None
    trained: Trained = field(init=False)  # whose turn it is

    def __post_init__(self) -> None:
        self._give_turn(self.done)

    def _give_turn(self, step: int) -> None:
        """Lets the model of a step be trained; tokens are counted through the turns of all."""
        before = self.models[(step - 2 - self.first) % len(self.models)].watch
        self.trained = self.models[(step - 1 - self.first) % len(self.models)]
        self.trained.watch.counts_on(before)

    def _turn(self, step: int) -> int:
        """A step as settings count it that say every how many: of several models, those of each."""
        return step if len(self.models) == 1 else (step - 1 - self.first) // len(self.models) + 1

    @property
    def config(self) -> TrainConfig:
        """Of the model whose turn it is."""
        return self.trained.config

    def steps(
        self,
        prepare: Callable[[PairBatch], Prepared],
        programs: Callable[[Prepared], Mapping[str, Program]],
        shown: Callable[[Mapping[str, float]], Shown],
    ) -> Iterator[Step[Prepared]]:
        """The steps that are left, one after another, until the run is done or asked to stop; taken once.

        Args:
            prepare: what becomes of the pairs of a step before it is taken; those of the next step are prepared while
                the devices compute.
            programs: what is compiled before the first step, by what was prepared for it.
            shown: what of a step's metrics is printed.
        """
        self.under_way = self._steps(prepare, programs, shown)
        return self.under_way

    def _steps(
        self,
        prepare: Callable[[PairBatch], Prepared],
        programs: Callable[[Prepared], Mapping[str, Program]],
        shown: Callable[[Mapping[str, float]], Shown],
    ) -> Generator[Step[Prepared], None, None]:
        with stop_after_steps() as stop_asked, progress(self.length.steps, self.done) as report:
            batch = None if self.pairs is None else prepare(self.pairs)
            if batch is not None:
                compile_ahead(programs(batch))
            compilations().since_last()  # what was compiled before belongs to no step
            for number in range(self.done + 1, self.length.steps + 1):
                assert self.pairs is not None and batch is not None
                self._give_turn(number)
                step = Step(run=self, number=number, pairs=self.pairs, batch=batch, timer=Timer(arrive, number))
                yield step
                data_state = self.iterator.get_state()  # it may have drawn further pairs
                with step.phase("data"):  # beside the devices' work: "update" is the rest of it
                    self.pairs = next(self.iterator) if number < self.length.steps else None
                    batch = None if self.pairs is None else prepare(self.pairs)
                with step.phase("update"):
                    values = self._values(step)
                measured = self._evaluated(step)
                watch = self.trained.watch
                line = watch.line(number, values | measured, batches_drawn(data_state), step.tokens, step.timer)
                arrive(f"step {number}: writing what it gave")
                self.writer.write(number, line | compilations().since_last(), self.trained.labels)
                report(number, shown(values), watch.new_tokens)
                self._write_rollouts(step)
                arrive(f"step {number}: saving")
                self.asked_to_stop = stop_asked()
                stopping = self.asked_to_stop or bool(watch.stop)
                self._save(number, data_state, stopping, measured)
                self.done = number
                if stopping:
                    return

    def _values(self, step: Step[Tree]) -> dict[str, float]:
        """The step's metrics, those of its updates in the mean; waits for the devices.

        What compares the sampler with the trainer is of the first update alone: later ones have other weights.
        """
        state = self.trained.state
        updates, counters = fetch((step.updates, (state.step, state.skipped)))
        tried, skipped = map(int, counters)
        means = {
            name: float(first if name.startswith("sampling/") else np.mean([one[name] for one in updates]))
            for name, first in (updates[0] if updates else {}).items()
        }
        rate = float(self.trained.learner.schedule(max(tried - 1 - skipped, 0)))
        return step.metrics | means | {"skipped_updates": float(skipped), "learning_rate": rate}

    def _evaluated(self, step: Step[Tree]) -> dict[str, float]:
        trained = self.trained
        if trained.evaluation is None or not trained.evaluation.due(
            self._turn(step.number), self._turn(self.length.steps)
        ):
            return {}
        with step.phase("eval"):
            return trained.evaluation(trained.state.params, trained.frozen)

    def _write_rollouts(self, step: Step[Tree]) -> None:
        if not step.rows:
            return
        if jax.process_index() == 0:
            write_rollouts(self.folder / ROLLOUTS, step.number, step.rows)
        if self.config.run.show_every and self._turn(step.number) % self.config.run.show_every == 0:
            first = {row.side: row for row in reversed(step.rows)}
            show_judgements(step.number, [first[side] for side in sorted(first)])  # the chosen response's first

    def _save(self, step: int, data_state: dict[str, object], stopping: bool, measured: Mapping[str, float]) -> None:
        """A checkpoint every so many steps, when it was evaluated, at the end, and when the run is to stop."""
        if stopping or measured or step == self.length.steps or step % self.config.run.checkpoint_every == 0:
            states = together({one.name: one.state for one in self.models})
            self.checkpoints.save(step, states, data_state, measured or None)
        else:
            self.checkpoints.check()

    # ---------------------------------------------------------------------------------------------------------- end

    def finish(self, card: ModelCardFacts, dtype: str = "") -> bool:
        """Exports a run that has done all its steps; False when it was stopped before.

        Args:
            card: what its model card says; the number of updates and what was measured are filled in.
            dtype: of the exported weights; empty: that of the config.

        Raises:
            UserError: when the run stopped because too many updates were skipped.
            LearntNothing: when the run came to its end in vain.
        """
        self.checkpoints.wait()  # the last evaluation may be the best, and its checkpoint on its way to disk
        best = self.checkpoints.best()
        self.checkpoints.close()
        self.writer.close()
        if best is not None:
            say(f"best on the held-out pairs: {self._checkpoint(best)}, which `patarm export` takes")
        if not self.came_to_its_end():
            return False
        self._export(card, dtype)
        return True

    def came_to_its_end(self) -> bool:
        """Whether all steps are done; says so where the run was asked to stop before.

        Raises:
            UserError: when the run stopped because too many updates were skipped.
        """
        if reason := self.trained.watch.stop:
            raise UserError(
                f"stopped at step {self.done} of {self.length.steps}: {reason} A changed setting needs a "
                f"run.folder of its own. The last sound weights are saved as {self._checkpoint(self.done)}, which "
                "`patarm export` takes."
            )
        if self.done < self.length.steps:
            say(stopped(self.done, self.length.steps, self.folder))
            return False
        return True

    def _export(self, card: ModelCardFacts, dtype: str) -> None:
        export, trained = self.folder / EXPORT, self.trained
        arrive("writing the export")
        if trained.watch.untouched:
            raise LearntNothing(
                f"{self.folder}: {trained.watch.verdict} Nothing is exported: the weights are those that the run began "
                "with."
            )
        is_whole = self.began_at >= self.length.steps
        there = export.is_dir() and is_adapter(export) == exports_adapters(self.config)
        complete = is_whole and told("whether there is an export", str(there)) == "True"
        if not complete:
            # Counted by the state: it may have done more steps than are asked for now, and skipped updates.
            updates = int(trained.state.step) - int(trained.state.skipped)
            card = dataclasses.replace(card, steps=updates, measured=metrics_of(self._checkpoint(self.done)))
            # What is there is of this run when it was shorter.
            parts = trained.learner.mesh, trained.state.params, trained.frozen
            export_trained(export, trained.config, trained.model, *parts, card, replace=True, dtype=dtype)
        if verdict := trained.watch.verdict:
            raise LearntNothing(f"{self.folder}: {verdict} {export} may be no better than what it began with.")
        more = f" with {self.done} steps, more than the {self.length.steps} asked for"
        more = more if self.done > self.length.steps else ""
        say(
            f"{self.folder} is complete{more}. Raise run.steps or run.epochs to train on."
            if complete
            else f"done: {export}"
        )

    def _checkpoint(self, step: int) -> Path:
        return self.folder / CHECKPOINTS / str(step)


def together(parts: Mapping[str, Found]) -> Found | dict[str, Found]:
    """What a checkpoint holds of the models of a run: of a single one its part itself, of several each by its name.

    >>> together({"": 1}), together({"judge": 1, "generator": 2})
    (1, {'judge': 1, 'generator': 2})
    """
    return dict(parts) if len(parts) > 1 else next(iter(parts.values()))


def open_metrics_of(config: RunConfig, folder: Path, done: int) -> MetricsWriter:
    """The metrics of a run that has done so many steps."""
    board, project = config.run.tensorboard, config.run.wandb_project
    return open_metrics(folder, done, tensorboard=board, wandb_project=project, config=dataclasses.asdict(config))


def stopped(done: int, steps: int, folder: Path) -> str:
    """What is said of a run that was asked to stop."""
    return f"stopped after step {done} of {steps}, saved in {folder}; run the command again to resume"


# --------------------------------------------------------------------------------------------------------------- open


@contextlib.contextmanager
def open_run(
    config: TrainConfig,
    model: Model,
    records: Sequence[EncodedPair],
    length: Length,
    learner: Learner[Tree],
    evaluation: Evaluator | None = None,
    reference: Model | None = None,
    further: Mapping[str, object] = MappingProxyType({}),
) -> Iterator["Run | None"]:
    """Begins a run, or resumes it: the state is the last checkpoint's, and the pairs go on from there.

    None of a run that was finished and put away, of which nothing is left to do.

    Args:
        config: of the run.
        model: what training starts from.
        records: the pairs that are trained on.
        length: of the whole run.
        learner: what is trained.
        evaluation: judges the weights now and then; None where nothing does.
        reference: what the KL is measured from; None where there is no KL.
        further: what else must not change when the run is resumed, by name.

    Raises:
        UserError: when the folder holds another run, or a checkpoint is damaged.
    """
    iterator = batches_of(config, records)
    identity = fingerprint(config, model, records, reference, further)
    if is_complete(config.run, identity, length.steps):
        yield None
        return
    run = _begin_or_resume(config, model, records, length, learner, evaluation, identity, iterator, further)
    try:
        yield run
    finally:  # after an error too: signals, streams and files are as they were before
        if run.under_way is not None:
            run.under_way.close()
        run.writer.close_files()


def _begin_or_resume(
    config: TrainConfig,
    model: Model,
    records: Sequence[EncodedPair],
    length: Length,
    learner: Learner[Tree],
    evaluation: Evaluator | None,
    identity: Mapping[str, object],
    iterator: Batches,
    further: Mapping[str, object],
) -> Run:
    folder = folder_of(config.run)
    best = config.best_metric if config.heldout.path else ""
    noted = read_json_object(folder / MARK)
    whose = with_known_start(identity, noted)
    weights = {f"weights ({role})": one["digest"] for role, one in whose[WEIGHTS].items()}  # whatever their paths
    read = {"number of pairs": len(records), "pairs": whose["data"], "model": whose["model"]}
    agree("what they read", read | weights | dict(further))
    begun = noted is not None or steps_in(folder / CHECKPOINTS)
    if begun and notes_no_digests(noted or {}):
        say(f"{folder} was begun by a version that did not note which weights it had; they are assumed to be the same")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refuse_another_begun(folder, whose)
    keep, on_damaged = config.run.keep_checkpoints, config.run.on_damaged
    checkpoints = open_checkpoints(folder / CHECKPOINTS, keep, whose, best, on_damaged, say)
    done = 0
    load = partial(load_parts, config, model, learner.mesh, learner.shape.params)
    if checkpoints.latest() is None:
        params, frozen = load()
        state = learner.new_state(params)
    else:
        state, data_state, done = checkpoints.restore(learner.shape)
        iterator.set_state(data_state)
        agree("the checkpoint they go on from", {"step": done})
        where, remedy = f"{folder / CHECKPOINTS / str(done)}", "Remove that checkpoint, or give another run.folder"
        refuse_ruined(state.params, where, remedy)
        _, frozen = load(begins=False)
        say(f"{folder}: {done} of {length.steps} steps are done")
        if change := schedule_change(config, folder / CONFIG, done, length.steps, length.per_epoch):
            say(change)
    # Not before the checkpoint has turned out to be of this run; where nothing is left to do, what was done stands.
    write_mark(folder, config, whose, keep_config=done >= length.steps)
    writer = open_metrics_of(config, folder, done)
    watch = open_watch(config, folder, done, length.per_epoch)
    return Run(
        folder=folder,
        models=[Trained("", config, model, learner, state, frozen, watch, evaluation)],
        length=length,
        done=done,
        iterator=iterator,
        pairs=next(iterator) if done < length.steps else None,
        checkpoints=checkpoints,
        writer=writer,
        began_at=done,
    )
