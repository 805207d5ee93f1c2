"""Checkpoints of a run: the training state, where the data iterator stands, and what run they belong to.

The only file that knows orbax. Saving goes on in the background while the run trains; a step's folder appears under
its own name when it is whole, so that a run killed at any moment starts again from the last whole one.
"""

import contextlib
import functools
import inspect
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from patarm_jax.arrays import Params, Tree
from patarm_jax.run.checkpoint_files import FILES, Damage, damage_of, note_files, steps_in
from patarm_jax.run.whose import refuse_another_run
from patarm_jax.types import UserError

Found = TypeVar("Found")
STATE, DATA, FINGERPRINT = "state", "data", "fingerprint"
UNFINISHED = "*.orbax-checkpoint-tmp"
_GO_ON = "Set run.on_damaged to previous to go on from {}, remove that folder, or give another run folder"


def _silent(message: str) -> None:
    """Tells no one."""


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """The checkpoints of one run; every method is called by all processes."""

    folder: Path
    fingerprint: Mapping[str, object]
    options: ocp.CheckpointManagerOptions
    tracks_best: bool = False  # else orbax takes the last one for the best
    on_damaged: Literal["stop", "previous"] = "stop"
    say: Callable[[str], None] = _silent  # told of a damaged checkpoint that is passed over

    @functools.cached_property
    def manager(self) -> ocp.CheckpointManager:
        """Orbax's, which reads the metrics of all steps when it is made: not before the damaged ones are put aside."""
        return _manager(self.folder, self.options)

    def latest(self) -> int | None:
        """The last step that has a folder, whole or damaged, or None."""
        return max(steps_in(self.folder), default=None)

    def best(self) -> int | None:
        """The step whose metrics were best, or None when none came with any."""
        step = self.manager.best_step() if self.tracks_best else None
        return step if step is not None and self.manager.metrics(step) else None

    def save(
        self, step: int, state: Tree, data_state: Mapping[str, object], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begins to save; waits for an earlier save first. A step that is on disk already is not written again.

        The state may be donated as soon as this returns.

        Args:
            step: optimiser updates done so far.
            state: a pytree of arrays, sharded in any way; random keys may be among them.
            data_state: JSON, the same on all processes.
            metrics: by which the best checkpoint is told, where this step has any.

        Raises:
            UserError: when this save, or the one before it, could not be written.
        """
        self.wait()
        with self._failures():
            self._remove_unfinished()  # nothing is being saved now: these are a killed run's
            self.manager.save(
                step,
                metrics=None if metrics is None else dict(metrics),
                args=ocp.args.Composite(
                    **{
                        STATE: ocp.args.StandardSave(state),
                        DATA: ocp.args.JsonSave(dict(data_state)),
                        FINGERPRINT: ocp.args.JsonSave(dict(self.fingerprint)),
                    }
                ),
            )

    def restore(self, abstract_state: Found) -> tuple[Found, dict[str, object], int]:
        """The last checkpoint as (state, data state, step), each array straight into its sharding.

        With `on_damaged` "previous" the last one that is whole; those after it are put aside.

        Args:
            abstract_state: the state's pytree of ShapeDtypeStructs with shardings; of any mesh, not only the one that
                saved.

        Raises:
            UserError: when there is none, when it is of another run, or when it is damaged.
        """
        (state, data_state), step = self._last_whole(lambda step: self._restored(step, abstract_state), _GO_ON)
        self._put_damaged_aside(step)
        return state, data_state, step

    def last_whole(self) -> int | None:
        """The last step whose files are all there, or None; those after it are treated as `on_damaged` says."""
        if self.latest() is None:
            return None

        def look(step: int) -> None:
            if damage := _seen_by_all(damage_of(self.folder / str(step))):
                raise Damage(damage)

        _, step = self._last_whole(look, _GO_ON)
        self._put_damaged_aside(step)
        return step

    def restore_step(self, abstract_state: Found, step: int, name: str = "") -> tuple[Found, dict[str, object]]:
        """One checkpoint as (state, data state); arguments and errors as of `restore`.

        Args:
            abstract_state: of the model alone that is named.
            step: of the checkpoint.
            name: of a model, in a checkpoint of several; empty: the whole state is restored.
        """
        try:
            return self._restored(step, abstract_state, name)
        except Damage as damage:
            raise self._refusal(step, damage, _GO_ON) from None

    def restore_params(self, abstract_params: Params, step: int | None = None, name: str = "") -> tuple[Params, int]:
        """(parameters of one checkpoint without the optimiser's moments, straight into their shardings; its step).

        Args:
            abstract_params: as of `restore`.
            step: None: the last one, as `restore` takes it; nothing is put aside.
            name: of the model, in a checkpoint of several.

        Raises:
            UserError: as from `restore`.
        """
        wanted = {"params": abstract_params}
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)

        def read(step: int) -> Params:
            return self._read_some(step, wanted, arguments, name)["params"]

        remedy = "Name another checkpoint of the run, such as {}"
        if step is None:
            return self._last_whole(read, remedy)
        try:
            return read(step), step
        except Damage as damage:
            raise self._refusal(step, damage, remedy) from None

    def updates(self, step: int, name: str = "") -> int:
        """Optimiser updates that the weights of a checkpoint have had: those tried, without those skipped."""
        counters = {"step": 0, "skipped": 0}
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), counters)
        found = self._read_some(step, counters, on_host, name)
        return int(found["step"]) - int(found["skipped"])

    def _read_some(self, step: int, wanted: Tree, arguments: Tree, name: str) -> Tree:
        """Some parts of the state of a model; its name is empty where the checkpoint has but one. Raises Damage."""
        if name:
            wanted, arguments = {name: wanted}, {name: arguments}
        some = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        found = self._read(step, **{STATE: some})[STATE]
        return found[name] if name else found

    def _last_whole(self, read: Callable[[int], Found], remedy: str) -> tuple[Found, int]:
        """What the last checkpoint gives, or the last that is whole, and its step."""
        steps = steps_in(self.folder)
        if not steps:
            raise UserError(f"{self.folder} holds no whole checkpoint. Start the run anew, or give another run folder.")
        first: UserError | None = None
        for step in reversed(steps):
            try:
                found = read(step)
            except Damage as damage:
                first = first or self._refusal(step, damage, remedy)
                if self.on_damaged == "stop":
                    raise first from None
                self.say(f"{self.folder / str(step)} is damaged: {damage}")
            else:
                if first is not None:
                    self.say(f"run.on_damaged is previous: the checkpoint of step {step} is taken")
                return found, step
        assert first is not None
        raise first

    def _restored(self, step: int, abstract_state: Found, name: str = "") -> tuple[Found, dict[str, object]]:
        said = self._read(step, **{DATA: ocp.args.JsonRestore(), FINGERPRINT: ocp.args.JsonRestore()})
        refuse_another_run(str(self.folder / str(step)), expected=self.fingerprint, got=said[FINGERPRINT])
        if name:
            arguments = ocp.checkpoint_utils.construct_restore_args(abstract_state)
            return self._read_some(step, abstract_state, arguments, name), said[DATA]
        return self._read(step, **{STATE: ocp.args.StandardRestore(abstract_state)})[STATE], said[DATA]

    def _refusal(self, step: int, damage: Damage, remedy: str) -> UserError:
        before = max((other for other in steps_in(self.folder) if other < step), default=None)
        if before is None:
            remedy = "There is none before it: remove that folder to begin anew, or give another run folder"
        return UserError(
            f"cannot restore the checkpoint {self.folder / str(step)}: {damage}. It is damaged, or of another model. "
            f"{remedy.format(self.folder / str(before))}."
        )

    def _put_damaged_aside(self, last: int) -> None:
        """Those after the last whole one, and others that are damaged."""
        damaged = [one for one in steps_in(self.folder) if one > last or damage_of(self.folder / str(one))]
        if _seen_by_all("some" if damaged else ""):  # nothing is moved before every process has looked
            self._put_aside(damaged)

    def _put_aside(self, steps: Sequence[int]) -> None:
        """Moves damaged checkpoints out of the way of those that will be saved; none is removed."""
        for step in steps:
            if jax.process_index() == 0:
                aside = _free_name(self.folder.with_name(self.folder.name + "-damaged") / str(step))
                aside.parent.mkdir(exist_ok=True)
                os.rename(self.folder / str(step), aside)
                self.say(f"the damaged checkpoint of step {step} is kept as {aside}")
        multihost_utils.sync_global_devices("put damaged checkpoints aside")

    def check(self) -> None:
        """Raises UserError when the save that is going on in the background has failed."""
        with self._failures():
            self.manager.check_for_errors()
        if not self.manager.is_saving_in_progress():
            self._note_files()

    def wait(self) -> None:
        """Returns when nothing is being saved any more; raises UserError when the last save failed."""
        with self._failures():
            self.manager.wait_until_finished()
        self._note_files()

    def close(self) -> None:
        """Waits, and ends the threads that save."""
        if "manager" not in vars(self):  # nothing was saved
            return
        try:
            self.wait()
        finally:
            self.manager.close()

    def _note_files(self) -> None:
        """Writes down what files the last checkpoint has, now that all are there."""
        step = self.latest()
        if jax.process_index() == 0 and step is not None and not (self.folder / str(step) / FILES).exists():
            with self._failures():
                note_files(self.folder / str(step))

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Tree:
        """Items of a checkpoint; raises Damage."""
        where = self.folder / str(step)
        if damage := _seen_by_all(damage_of(where) if where.is_dir() else "it is missing"):
            raise Damage(damage)

        def read() -> Tree:
            # Not by the manager, which looks at all checkpoints, when one of them is damaged.
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                return reader.restore(where.absolute(), args=ocp.args.Composite(**items))

        return _or_damage(read)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """A failed save as one sentence; what was half-written makes room again."""
        try:
            yield
        except Exception as error:  # tensorstore's reach us as ValueError, the file system's as OSError, gloo's as more
            self._remove_unfinished()
            raise UserError(
                f"cannot write a checkpoint into {self.folder}: {_reason(error)}. "
                f"{self._what_is_left()} Fix this and run the command again to resume."
            ) from error

    def _what_is_left(self) -> str:
        step = self.latest()
        return "No checkpoint was there before." if step is None else f"The checkpoint of step {step} is untouched."

    def _remove_unfinished(self) -> None:
        if jax.process_index() == 0:
            for folder in self.folder.glob(UNFINISHED):
                shutil.rmtree(folder, ignore_errors=True)


def _seen_by_all(damage: str) -> str:
    """What is wrong as this process sees it or, where it sees nothing, another one; all decide alike."""
    if jax.process_count() > 1 and multihost_utils.process_allgather(np.int32(bool(damage))).any():
        return damage or "another process finds it damaged"
    return damage


def open_checkpoints(
    folder: Path,
    keep: int,
    fingerprint: Mapping[str, object],
    best: str = "",
    on_damaged: Literal["stop", "previous"] = "stop",
    say: Callable[[str], None] = _silent,
    kept_besides: Callable[[Sequence[int]], Set[int]] | None = None,
) -> Checkpoints:
    """The checkpoints in a folder, which is made when it is missing.

    Args:
        folder: of this run alone, on storage that all processes share.
        keep: so many last checkpoints are kept.
        fingerprint: JSON that tells this run from others, such as the model's config and a hash of the data. It is
            stored with each checkpoint; `restore` refuses one in which any of these keys is absent or differs.
        best: the metric whose largest value tells the best checkpoint, which is kept besides; empty: none is.
        on_damaged: whether a damaged checkpoint stops the run, or the one before it is taken.
        say: tells the user of damaged checkpoints that are passed over.
        kept_besides: of the steps that are saved, those that are kept however old they are.
    """
    logging.getLogger("absl").addFilter(_not_from_orbax)
    policies = ocp.checkpoint_managers
    latest = policies.LatestN(keep)
    if best:

        def value(metrics: Mapping[str, float]) -> float:
            found = metrics.get(best, math.nan)  # by another metric, before the run was stopped
            return -math.inf if math.isnan(found) else found

        kept = policies.BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=value, preservation_policy=policies.AnyPreservationPolicy([latest, kept])
        )
    elif kept_besides is not None:
        several = policies.AnyPreservationPolicy([latest, _Besides(kept_besides)])
        options = ocp.CheckpointManagerOptions(preservation_policy=several)
    else:
        options = ocp.CheckpointManagerOptions(preservation_policy=latest)
    checkpoints = Checkpoints(
        folder=folder,
        fingerprint=json.loads(json.dumps(dict(fingerprint))),
        options=options,
        tracks_best=bool(best),
        on_damaged=on_damaged,
        say=say,
    )
    if checkpoints.latest() is None:
        checkpoints.manager  # noqa: B018  # makes the folder, or says why not
    return checkpoints


@dataclass(frozen=True)
class _Besides:
    """Orbax's preservation policy that keeps the steps which a function names."""

    kept: Callable[[Sequence[int]], Set[int]]

    def should_preserve(
        self, checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo], *, context: object
    ) -> list[bool]:
        """Of each checkpoint, whether it is kept."""
        kept = self.kept([each.step for each in checkpoints])
        return [each.step in kept for each in checkpoints]


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(folder.absolute(), options=options)
    except OSError as error:
        raise UserError(f"cannot keep checkpoints in {folder}: {error}. Give another run folder.") from error


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs a traceback for each of its threads; what matters in them is raised as well."""
    return "/orbax/" not in record.pathname


def _or_damage(read: Callable[[], Found]) -> Found:
    """What is read; what orbax and tensorstore raise of a damaged checkpoint, as Damage."""
    try:
        return read()
    except (ValueError, KeyError, OSError, TypeError, AttributeError, AssertionError) as error:
        _silence_coroutines()
        raise Damage(_reason(error)) from None


def _silence_coroutines() -> None:
    """Orbax leaves the arrays that it had not come to yet as coroutines of a closed event loop.

    Each of them complains on stderr when it is read or collected, whenever that may be; all else is passed on.
    """
    before = sys.unraisablehook
    if getattr(before, "__module__", "") == __name__:
        return

    def complain(unraisable: "sys.UnraisableHookArgs") -> None:
        left = unraisable.object
        of_orbax = inspect.iscoroutine(left) and "/orbax/" in left.cr_code.co_filename
        if not of_orbax and not (left is None and str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    warnings.filterwarnings("ignore", message="coroutine '_read_array", category=RuntimeWarning)
    sys.unraisablehook = complain


def _free_name(path: Path) -> Path:
    """The path, or with a number behind it when it is taken."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _reason(error: Exception) -> str:
    """The gist of an error, on one line: tensorstore appends its whole specification, and nests its layers."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "No space left on device" in text:
        return "the disk is full"
    return text.split(" [tensorstore_spec", 1)[0][:300].rstrip(".")
