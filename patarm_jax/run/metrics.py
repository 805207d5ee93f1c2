"""Where the metrics of a run are written: metrics.jsonl, TensorBoard, Weights & Biases.

Nothing here computes a metric. Of several processes the first one writes.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from patarm_jax.files import whole_file, write_text, writing
from patarm_jax.run.process import TO_RESUME
from patarm_jax.types import UserError

Scalar = float | int | np.generic | jax.Array


@dataclass(frozen=True, eq=False)
class MetricsWriter:
    """Where the metrics of a step go. Process 0 has all that were asked for, every other process has none."""

    lines: io.FileIO | None  # metrics.jsonl; unbuffered, so that a killed run loses nothing
    tensorboard: RecordWriter | None  # written at once, so that a full disk is noticed here
    wandb: Any  # a wandb Run, or None

    def write(
        self, step: int, metrics: Mapping[str, Scalar], labels: Mapping[str, object] = MappingProxyType({})
    ) -> None:
        """One line of metrics.jsonl, `{"step": …}` and the metrics by name; NaN and infinities become null there.

        Args:
            step: that was done.
            metrics: numbers.
            labels: what else the line says; JSON, of which TensorBoard shows nothing.
        """
        if self.lines is None:
            return
        values = {name: np.asarray(metrics[name]).item() for name in sorted(metrics)}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = (
            json.dumps({"step": step} | dict(labels) | {name: finite.get(name) for name in values}, allow_nan=False)
            + "\n"
        )
        with writing(Path(str(self.lines.name)), TO_RESUME):
            if self.lines.write(line.encode()) < len(line):  # the last bytes of a disk: the next line must not follow
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.tensorboard is not None:
            scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
            _write_event(self.tensorboard, step, summary=summary_pb2.Summary(value=scalars))
        if self.wandb is not None:
            self.wandb.log({**labels, **finite}, step=step)

    def close_files(self) -> None:
        """Everything written so far is on disk."""
        if self.lines is not None:
            self.lines.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def close(self) -> None:
        """Everything written so far is on disk, or on its way to Weights & Biases."""
        self.close_files()
        if self.wandb is not None:
            self.wandb.finish()


def open_metrics(
    run_folder: Path, step: int, *, tensorboard: bool, wandb_project: str, config: Mapping[str, object]
) -> MetricsWriter:
    """The metrics of a run that has done `step` steps: later lines, of a run that was cut off, are removed.

    Args:
        run_folder: holds metrics.jsonl, and tensorboard/ when that is on.
        step: 0 for a new run.
        tensorboard: whether TensorBoard event files are written.
        wandb_project: of Weights & Biases; empty: not used.
        config: the resolved config as nested mappings, shown by Weights & Biases.
    """
    if jax.process_index() != 0:
        return MetricsWriter(None, None, None)
    path = run_folder / "metrics.jsonl"
    with writing(path, TO_RESUME):
        run_folder.mkdir(parents=True, exist_ok=True)
        _cut_off_after(path, step)
        board = _open_tensorboard(run_folder / "tensorboard", step) if tensorboard else None
    run = _open_wandb(run_folder, wandb_project, config) if wandb_project else None
    return MetricsWriter(path.open("ab", buffering=0), board, run)


_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\..*")  # the number is the time in seconds, as others write it


def _open_tensorboard(folder: Path, step: int) -> RecordWriter:
    """A new event file; steps after `step`, which will be done again, are hidden from what was written before."""
    folder.mkdir(parents=True, exist_ok=True)
    board = RecordWriter(str(folder / _name_of_events(folder)))
    _write_event(board, 0, file_version="brain.Event:2")
    _write_event(board, step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
    return board


def _name_of_events(folder: Path) -> str:
    """The name of a file that TensorBoard reads after all that are there: in the order of their names.

    Usually the number in it is the time. Where the clock was set back, or the last file is of this second, it goes on
    from the last: else the older steps would be read last, and hide the newer ones.
    """
    there = [int(found[1]) for path in folder.iterdir() if (found := _EVENTS.fullmatch(path.name))]
    return f"events.out.tfevents.{max([int(time.time()), *(number + 1 for number in there)])}.{socket.gethostname()}"


def _write_event(board: RecordWriter, step: int, **content: object) -> None:
    with writing(Path(board.path), TO_RESUME):
        board.write(event_pb2.Event(step=step, wall_time=time.time(), **content).SerializeToString())
        board.flush()


def _cut_off_after(path: Path, step: int) -> None:
    """Keeps the lines up to a step; what a killed process did not finish writing has no end of line."""
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    kept = [line + b"\n" for line, values in zip(lines, read_metrics(path), strict=True) if values["step"] <= step]
    with whole_file(path) as part:
        part.write_bytes(b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, in order; none where there is no such file.

    Raises:
        UserError: when a line is not metrics of a step.
    """
    found: list[dict[str, object]] = []
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            found.append(values | {"step": int(values["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not metrics of a step. Remove the line, or the file.") from error
    return found


def _open_wandb(run_folder: Path, project: str, config: Mapping[str, object]) -> object:
    """A run of Weights & Biases; a resumed run goes on in the one it began."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"run.wandb_project is {project!r} and wandb is not installed. "
            "Run `pip install 'patarm-jax[wandb]'`, or leave run.wandb_project empty."
        ) from error
    identity = run_folder / "wandb_id.txt"
    if not identity.exists():
        with writing(identity, TO_RESUME):
            write_text(identity, secrets.token_hex(4))
    try:
        with _no_one_to_ask():
            return wandb.init(
                project=project,
                id=identity.read_text(encoding="utf-8"),
                name=run_folder.absolute().name,
                resume="allow",
                dir=str(run_folder),
                config=dict(config),
            )
    except Exception as error:  # its own, those of its connection, and those of what it starts have no common name
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise UserError(
            f"run.wandb_project is {project!r}, and Weights & Biases cannot be used: {reason}. Run `wandb login` once "
            "or set WANDB_API_KEY; WANDB_MODE=offline keeps everything in the run folder until `wandb sync`; an empty "
            "run.wandb_project does without."
        ) from error


@contextlib.contextmanager
def _no_one_to_ask() -> Iterator[None]:
    """Without a keyboard to read from: a question for a key, which wandb asks on a terminal, would wait for ever."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before
