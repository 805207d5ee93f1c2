"""A run of phases: one folder in which several models are trained, one after the other and in turns.

Steps are counted through all phases, so that metrics, rollouts and checkpoints stand in one row, and the last
checkpoint says where the run goes on. A checkpoint holds the model of its phase alone; the last one of each model's
last phase is kept until another phase of that model has ended.

A model that rests lies on disk: its checkpoint, from which it is trained on, and its export, by which others ask it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from patarm_jax.arrays import Tree
from patarm_jax.config.training import RunConfig, TrainConfig
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.files import read_json_object, writing
from patarm_jax.run.card import ModelCardFacts
from patarm_jax.run.checkpoint import Checkpoints, open_checkpoints
from patarm_jax.run.claim import CHECKPOINTS, MARK, folder_of, refuse_another_begun, write_mark
from patarm_jax.run.export import export_trained
from patarm_jax.run.folder import Evaluator, Length, Run, batches_of, open_metrics_of, stopped
from patarm_jax.run.learner import Learner
from patarm_jax.run.metrics import MetricsWriter
from patarm_jax.run.open_model import EXPORT, JUDGE, Model, load_parts
from patarm_jax.run.peers import agree, told
from patarm_jax.run.process import say
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.run.watch import open_watch
from patarm_jax.run.whose import WEIGHTS, refuse_another_run, with_known_start
from patarm_jax.train.steps import TrainState
from patarm_jax.types import UserError

STEP = "step"  # in judge.json of an export: the step of the run after which it was made


@dataclass(frozen=True)
class Phase:
    """Some consecutive steps, in which one model is trained."""

    role: str  # the model
    name: str  # for people
    round: int  # from 1; 0 before the rounds
    first: int  # the step before its first one
    last: int
    per_epoch: int  # steps

    @property
    def labels(self) -> dict[str, object]:
        """What every line of its metrics says."""
        return {"phase": self.role if self.round else f"{self.role} warm-up", "round": self.round}


@dataclass
class Phases:
    """The folder of a run of phases, and how far it has come."""

    config: RunConfig
    folder: Path
    phases: Sequence[Phase]
    checkpoints: Checkpoints
    writer: MetricsWriter
    done: int  # steps

    def before(self, phase: Phase) -> Phase | None:
        """The phase in which its model was trained last."""
        earlier = [one for one in self.phases if one.role == phase.role and one.last <= phase.first]
        return earlier[-1] if earlier else None

    def is_over(self, phase: Phase, export: Path) -> bool:
        """Whether a phase has come to its end, its export included."""
        is_made = told(f"whether {phase.name} is exported", str(step_of(export) == phase.last)) == "True"
        return self.done > phase.last or (self.done == phase.last and is_made)

    def run(
        self,
        phase: Phase,
        config: TrainConfig,
        model: Model,
        records: Sequence[EncodedPair],
        learner: Learner[Tree],
        evaluation: Evaluator | None,
        keeps_optimizer: bool = False,
    ) -> Run:
        """The steps of a phase, those that are done behind it.

        Args:
            phase: of these.
            config: of its model.
            model: what that one began the whole run with.
            records: the pairs that it is trained on.
            learner: of it.
            evaluation: judges the weights now and then; None where nothing does.
            keeps_optimizer: whether it goes on with the optimizer of its last phase.
        """
        iterator = batches_of(config, records)
        load = partial(load_parts, config, model, learner.mesh, learner.shape.params)
        state: TrainState
        if self.done > phase.first:
            state, data_state = self.checkpoints.restore_step(learner.shape, self.done)
            iterator.set_state(data_state)
            _, frozen = load(begins=False)
            say(f"{phase.name}: {self.done - phase.first} of {phase.last - phase.first} steps are done")
        elif before := self.before(phase):
            state = self._begun(learner, before.last, keeps_optimizer)
            _, frozen = load(begins=False)
        else:
            params, frozen = load()
            state = learner.new_state(params)
        agree("the checkpoint they go on from", {"step": self.done})
        where = f"{self.folder / CHECKPOINTS / str(self.done)}"
        refuse_ruined(state.params, where, "Remove that checkpoint, or give another run.folder")
        return Run(
            config=config,
            folder=self.folder,
            length=Length(phase.last, phase.per_epoch),
            done=self.done,
            learner=learner,
            state=state,
            frozen=frozen,
            model=model,
            iterator=iterator,
            pairs=next(iterator) if self.done < phase.last else None,
            checkpoints=self.checkpoints,
            writer=self.writer,
            watch=open_watch(config, self.folder, self.done, phase.per_epoch, phase.first),
            evaluation=evaluation,
            began_at=self.done,
            labels=phase.labels,
        )

    def _begun(self, learner: Learner[Tree], step: int, keeps_optimizer: bool) -> TrainState:
        """What a model's last phase has left."""
        if keeps_optimizer:
            state, _ = self.checkpoints.restore_step(learner.shape, step)
            return state
        params, _ = self.checkpoints.restore_params(learner.shape.params, step)
        return learner.new_state(params)

    def end(self, run: Run, export: Path, card: ModelCardFacts, updates_before: int) -> bool:
        """Ends a phase and exports what it has trained; False when the run was asked to stop before.

        Args:
            run: of the phase.
            export: the folder.
            card: what the model card says; the number of updates is filled in.
            updates_before: those that the model has had before, which its optimizer has not counted.

        Raises:
            UserError: when too many updates were skipped.
        """
        self.checkpoints.wait()
        self.done = run.done
        if not run.came_to_its_end():
            return False
        updates = updates_before + int(run.state.step) - int(run.state.skipped)
        parts = run.learner.mesh, run.state.params, run.frozen
        card = dataclasses.replace(card, steps=updates)
        export_trained(export, run.config, run.model, *parts, card, replace=True, noted={STEP: run.done})
        if run.asked_to_stop and run.done < self.phases[-1].last:
            say(stopped(run.done, self.phases[-1].last, self.folder))
            return False
        return True


def step_of(export: Path) -> int | None:
    """The step of its run after which an export was made; None where there is none."""
    step = (read_json_object(export / JUDGE) or {}).get(STEP)
    return step if isinstance(step, int) else None


@contextlib.contextmanager
def open_phases(config: RunConfig, phases: Sequence[Phase], identity: Mapping[str, object]) -> Iterator[Phases]:
    """Begins a run of phases, or goes on with it.

    Args:
        config: of the run.
        phases: all of them, in order.
        identity: what must not change when the run is resumed, as of `fingerprint`.

    Raises:
        UserError: when the folder holds another run, or a checkpoint is damaged.
    """
    folder = folder_of(config.run)
    noted = read_json_object(folder / MARK)
    whose = with_known_start(identity, noted)
    weights = {f"weights ({role})": one["digest"] for role, one in whose[WEIGHTS].items()}  # whatever their paths
    agree("what they read", {name: value for name, value in whose.items() if name != WEIGHTS} | weights)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    refuse_another_begun(folder, whose)
    if noted is not None:
        refuse_another_run(str(folder), expected=whose, got=noted, what="holds another run")
    checkpoints = open_checkpoints(
        folder / CHECKPOINTS,
        config.run.keep_checkpoints,
        whose,
        on_damaged=config.run.on_damaged,
        say=say,
        kept_besides=partial(last_of_each, phases),
    )
    done = checkpoints.last_whole() or 0
    if not done:
        _refuse_to_begin_anew(folder, phases)
    write_mark(folder, config, whose, keep_config=done >= phases[-1].last)
    writer = open_metrics_of(config, folder, done)
    if done:
        say(f"{folder}: {done} of {phases[-1].last} steps are done")
    try:
        yield Phases(config, folder, phases, checkpoints, writer, done)
        checkpoints.close()
        writer.close()
    finally:
        writer.close_files()


def _refuse_to_begin_anew(folder: Path, phases: Sequence[Phase]) -> None:
    """Refuses to train over models that a run has made whose checkpoints are gone."""
    made = [folder / role / EXPORT for role in dict.fromkeys(phase.role for phase in phases)]
    made = [export for export in made if step_of(export) is not None]
    if told("whether the run has made models", str(bool(made))) == "True":
        raise UserError(
            f"{folder} holds a run whose checkpoints are gone, so that it cannot go on; what it has made is left as it "
            f"is: {' and '.join(map(str, made))}. Give another run folder."
        )


def last_of_each(phases: Sequence[Phase], steps: Sequence[int]) -> Set[int]:
    """Of saved steps, the last one at which a phase of each model ended.

    >>> turns = [Phase("a", "", 1, 0, 4, 4), Phase("b", "", 1, 4, 8, 4), Phase("a", "", 2, 8, 12, 4)]
    >>> sorted(last_of_each(turns, [2, 4, 6, 8, 10])), sorted(last_of_each(turns, [4, 8, 12]))
    ([4, 8], [8, 12])
    """
    ends = {phase.role: phase.last for phase in sorted(phases, key=lambda one: one.last) if phase.last in steps}
    return set(ends.values())
