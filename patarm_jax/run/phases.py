"""A run of phases: one folder in which several models are trained, one after the other and in turns.

Steps are counted through all phases, so that metrics, rollouts and checkpoints stand in one row, and the last
checkpoint says where the run goes on. A checkpoint holds the model of its phase alone; the last one of each model's
last phase is kept until another phase of that model has ended.

A model that rests lies on disk: its checkpoint, from which it is trained on, and its export, by which others ask it.
Where models are trained together, step by step in turn, none of them rests, and a checkpoint holds them all.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.training import RunConfig, TrainConfig
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.files import check_writable, is_writable, read_json_object, write_text, writing
from patarm_jax.run.card import ModelCardFacts
from patarm_jax.run.checkpoint import Checkpoints, open_checkpoints
from patarm_jax.run.checkpoint_files import damage_of
from patarm_jax.run.claim import CHECKPOINTS, MARK, folder_of, refuse_another_begun, write_mark
from patarm_jax.run.export import export_trained
from patarm_jax.run.folder import Evaluator, Length, Run, Trained, batches_of, open_metrics_of, stopped, together
from patarm_jax.run.learner import Learner
from patarm_jax.run.metrics import MetricsWriter
from patarm_jax.run.open_model import EXPORT, JUDGE, Model, load_parts
from patarm_jax.run.peers import agree, told
from patarm_jax.run.process import say
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.run.watch import Watch, open_watch
from patarm_jax.run.whose import WEIGHTS, refuse_another_run, with_known_start
from patarm_jax.train.steps import TrainState
from patarm_jax.types import UserError

COMPLETE = "complete.json"  # in the run folder, when all phases are over
STEP = "step"  # in judge.json of an export: the step of the run after which it was made


@dataclass(frozen=True)
class Phase:
    """Some consecutive steps, in which one model is trained, or several, one step each in turn."""

    roles: tuple[str, ...]  # the models, in the order of their turns
    name: str  # for people
    round: int  # from 1; 0 before the rounds
    first: int  # the step before its first one
    last: int
    per_epoch: int  # steps

    @property
    def steps_of_each(self) -> int:
        """Steps of each of its models."""
        return (self.last - self.first) // len(self.roles)

    def labels(self, role: str) -> dict[str, object]:
        """What the lines of metrics of a model's steps say."""
        return {"phase": role if self.round else f"{role} warm-up", "round": self.round}


@dataclass(frozen=True)
class Pupil:
    """A model that a phase trains."""

    role: str
    config: TrainConfig
    model: Model  # what it began the whole run with
    learner: Learner[Tree]
    evaluation: Evaluator | None  # judges the weights now and then; None where nothing does
    keeps_optimizer: bool = False  # whether it goes on with the optimizer of its last phase


@dataclass
class Phases:
    """The folder of a run of phases, and how far it has come."""

    config: RunConfig
    folder: Path
    phases: Sequence[Phase]
    checkpoints: Checkpoints
    writer: MetricsWriter
    done: int  # steps

    def before(self, phase: Phase, role: str) -> Phase | None:
        """The last phase before this one in which a model was trained."""
        earlier = [one for one in self.phases if role in one.roles and one.last <= phase.first]
        return earlier[-1] if earlier else None

    def is_over(self, phase: Phase, exports: Sequence[Path]) -> bool:
        """Whether a phase has come to its end, its exports included."""
        made = all(step_of(export) == phase.last for export in exports)
        is_made = told(f"whether {phase.name} is exported", str(made)) == "True"
        return self.done > phase.last or (self.done == phase.last and is_made)

    def run(self, phase: Phase, pupils: Sequence[Pupil], records: Sequence[EncodedPair]) -> Run:
        """The steps of a phase, those that are done behind it.

        Args:
            phase: of these.
            pupils: its models, in the order of their turns.
            records: the pairs that they are trained on; several take the same ones in turn.
        """
        iterator = batches_of(pupils[0].config, records, turns=len(pupils))
        frozen: dict[str, Tree] = {}
        states: Mapping[str, TrainState]
        if self.done > phase.first:
            shapes = {pupil.role: pupil.learner.shape for pupil in pupils}
            found, data_state = self.checkpoints.restore_step(together(shapes), self.done)
            states = {pupils[0].role: found} if isinstance(found, TrainState) else found
            iterator.set_state(data_state)
            frozen = {pupil.role: _load(pupil, begins=False)[1] for pupil in pupils}
            say(f"{phase.name}: {self.done - phase.first} of {phase.last - phase.first} steps are done")
        else:
            begun = {pupil.role: self._begun(phase, pupil) for pupil in pupils}
            states = {role: state for role, (state, _) in begun.items()}
            frozen = {role: beside for role, (_, beside) in begun.items()}
        agree("the checkpoint they go on from", {"step": self.done})
        where = f"{self.folder / CHECKPOINTS / str(self.done)}"
        for state in states.values():
            refuse_ruined(state.params, where, "Remove that checkpoint, or give another run.folder")
        return Run(
            folder=self.folder,
            models=[self._trained(phase, one, states[one.role], frozen[one.role]) for one in pupils],
            length=Length(phase.last, phase.per_epoch),
            done=self.done,
            iterator=iterator,
            pairs=next(iterator) if self.done < phase.last else None,
            checkpoints=self.checkpoints,
            writer=self.writer,
            began_at=self.done,
            first=phase.first,
        )

    def _begun(self, phase: Phase, pupil: Pupil) -> tuple[TrainState, Tree]:
        """A model where a phase begins, as its last phase has left it, and what is only read beside it."""
        learner, before = pupil.learner, self.before(phase, pupil.role)
        if before is None:
            params, frozen = _load(pupil, begins=True)
            return learner.new_state(params), frozen
        _, frozen = _load(pupil, begins=False)
        among = pupil.role if len(before.roles) > 1 else ""
        if pupil.keeps_optimizer:
            return self.checkpoints.restore_step(learner.shape, before.last, among)[0], frozen
        params, _ = self.checkpoints.restore_params(learner.shape.params, before.last, among)
        return learner.new_state(params), frozen

    def note_end(self) -> None:
        """Leaves a mark that all phases are over, for whoever starts the run."""
        if jax.process_index() == 0:
            write_text(self.folder / COMPLETE, json.dumps({"steps": self.done}) + "\n")

    def watch(self, phase: Phase, role: str, config: TrainConfig, keeps_optimizer: bool = False) -> Watch:
        """What is known of a model's steps in a phase, from the metrics of the run.

        Args:
            phase: of these.
            role: the model.
            config: of the model.
            keeps_optimizer: as of `Pupil`.
        """
        labels = phase.labels(role)
        goes_on = {"phase": labels["phase"]} if keeps_optimizer else None
        return open_watch(config, self.folder, self.done, phase.per_epoch, phase.first, labels, goes_on)

    def _trained(self, phase: Phase, pupil: Pupil, state: TrainState, frozen: Tree) -> Trained:
        return Trained(
            name=pupil.role,
            config=pupil.config,
            model=pupil.model,
            learner=pupil.learner,
            state=state,
            frozen=frozen,
            watch=self.watch(phase, pupil.role, pupil.config, pupil.keeps_optimizer),
            evaluation=pupil.evaluation,
            labels=phase.labels(pupil.role),
        )

    def end(self, run: Run, exports: Mapping[str, tuple[Path, ModelCardFacts]]) -> bool:
        """Ends a phase and exports what it has trained; False when the run was asked to stop before.

        Args:
            run: of the phase.
            exports: of each of its models the folder, and what the model card says, whose `steps` are the updates that
                the model has had before and its optimizer has not counted.

        Raises:
            UserError: when too many updates were skipped.
        """
        self.checkpoints.wait()
        self.done = run.done
        if not run.came_to_its_end():
            return False
        for one in run.models:
            export, card = exports[one.name]
            card = dataclasses.replace(card, steps=card.steps + int(one.state.step) - int(one.state.skipped))
            parts = one.learner.mesh, one.state.params, one.frozen
            export_trained(export, one.config, one.model, *parts, card, replace=True, noted={STEP: run.done})
        if run.asked_to_stop and run.done < self.phases[-1].last:
            say(stopped(run.done, self.phases[-1].last, self.folder))
            return False
        return True


def _load(pupil: Pupil, begins: bool) -> tuple[Params, Tree]:
    """What is trained of a model, where it begins, and what is only read."""
    return load_parts(pupil.config, pupil.model, pupil.learner.mesh, pupil.learner.shape.params, begins)


def step_of(export: Path) -> int | None:
    """The step of its run after which an export was made; None where there is none."""
    step = (read_json_object(export / JUDGE) or {}).get(STEP)
    return step if isinstance(step, int) else None


def is_put_away(
    config: RunConfig, phases: Sequence[Phase], identity: Mapping[str, object], exports: Mapping[str, Path]
) -> bool:
    """Whether this run was finished where nothing can be written any more.

    Args:
        config: of the run.
        phases: all of them, in order.
        identity: as of `open_phases`.
        exports: of each model the folder that its last phase leaves.

    Raises:
        UserError: when another run was, or when this one was not finished.
    """
    folder = folder_of(config.run)
    noted = read_json_object(folder / MARK)
    if noted is None or is_writable(folder):
        return False
    whose = with_known_start(identity, noted)
    refuse_another_run(str(folder), expected=whose, got=noted, what="holds another run")
    last = {role: phase.last for phase in phases for role in phase.roles if role in exports}
    if any(step_of(exports[role]) != step for role, step in last.items()):
        check_writable(folder, folder=True)
    where = " and ".join(map(str, exports.values()))
    say(f"{folder} is complete, all {phases[-1].last} steps, and is left as it is: {where}")
    return True


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
    _refuse_damaged_rest(folder, phases, done)
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
    made = [folder / role / EXPORT for role in dict.fromkeys(role for phase in phases for role in phase.roles)]
    made = [export for export in made if step_of(export) is not None]
    if told("whether the run has made models", str(bool(made))) == "True":
        raise UserError(
            f"{folder} holds a run whose checkpoints are gone, so that it cannot go on; what it has made is left as it "
            f"is: {' and '.join(map(str, made))}. Give another run folder."
        )


def _refuse_damaged_rest(folder: Path, phases: Sequence[Phase], done: int) -> None:
    """Refuses to train towards the phase of a model whose last checkpoint, from which it goes on, is damaged."""
    ahead = {role for phase in phases if phase.last > done for role in phase.roles}
    for role in sorted(ahead):
        ended = [phase for phase in phases if role in phase.roles and phase.last <= done]
        if not ended or any(role in phase.roles and phase.first < done < phase.last for phase in phases):
            continue  # it has not begun, or goes on from the last checkpoint
        where = folder / CHECKPOINTS / str(ended[-1].last)
        damage = (damage_of(where) if where.is_dir() else "it is missing") or ""
        if damage := told(f"whether the {role} is whole", damage):
            raise UserError(
                f"the checkpoint {where} is damaged: {damage}. The {role} was to be trained on from there, after "
                f"{ended[-1].name}. Put the folder back from a copy, or give another run folder; what has been made "
                "stays as it is."
            )


def last_of_each(phases: Sequence[Phase], steps: Sequence[int]) -> Set[int]:
    """Of saved steps, the last one at which a phase of each model ended.

    >>> turns = [Phase(("a",), "", 1, 0, 4, 4), Phase(("b",), "", 1, 4, 8, 4), Phase(("a",), "", 2, 8, 12, 4)]
    >>> sorted(last_of_each(turns, [2, 4, 6, 8, 10])), sorted(last_of_each(turns, [4, 8, 12]))
    ([4, 8], [8, 12])
    """
    ordered = sorted(phases, key=lambda one: one.last)
    ends = {role: phase.last for phase in ordered if phase.last in steps for role in phase.roles}
    return set(ends.values())
