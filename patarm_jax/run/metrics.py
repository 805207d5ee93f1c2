"""What a run writes and shows while it goes: metrics, judgements, and how long each phase took.

Clocks are read here and nowhere below the recipes. Nothing here computes a metric. Of several processes the first one
writes and shows.
"""

import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import rich.console
import rich.panel
import rich.text
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

from patarm_jax.files import whole_file, write_text, writing
from patarm_jax.types import Status, UserError

Scalar = float | int | np.generic | jax.Array

# ------------------------------------------------------------------------------------------------------------ metrics


@dataclass(frozen=True, eq=False)
class MetricsWriter:
    """Where the metrics of a step go. Process 0 has all that were asked for, every other process has none."""

    lines: io.FileIO | None  # metrics.jsonl; unbuffered, so that a killed run loses nothing
    tensorboard: RecordWriter | None  # written at once, so that a full disk is noticed here
    wandb: Any  # a wandb Run, or None

    def write(self, step: int, metrics: Mapping[str, Scalar]) -> None:
        """One line of metrics.jsonl, `{"step": …}` and the metrics by name; NaN and infinities become null there."""
        if self.lines is None:
            return
        values = {name: np.asarray(metrics[name]).item() for name in sorted(metrics)}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = json.dumps({"step": step} | {name: finite.get(name) for name in values}, allow_nan=False) + "\n"
        with _writing(Path(str(self.lines.name))):
            if self.lines.write(line.encode()) < len(line):  # the last bytes of a disk: the next line must not follow
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.tensorboard is not None:
            scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
            _write_event(self.tensorboard, step, summary=summary_pb2.Summary(value=scalars))
        if self.wandb is not None:
            self.wandb.log(finite, step=step)

    def close(self) -> None:
        """Everything written so far is on disk, or on its way to Weights & Biases."""
        if self.lines is not None:
            self.lines.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def open_metrics(
    run_folder: Path, step: int, *, tensorboard: bool, wandb_project: str, config: Mapping[str, Any]
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
    with _writing(path):
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


def _write_event(board: RecordWriter, step: int, **content: Any) -> None:
    with _writing(Path(board.path)):
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
    found: list[dict[str, Any]] = []
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            found.append(values | {"step": int(values["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is not metrics of a step. Remove the line, or the file.") from error
    return found


def _open_wandb(run_folder: Path, project: str, config: Mapping[str, Any]) -> Any:
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
        with _writing(identity):
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


def _writing(path: Path) -> contextlib.AbstractContextManager[None]:
    return writing(path, "Then run the command again to resume from the last checkpoint.")


# --------------------------------------------------------------------------------------------------------------- time


@dataclass(frozen=True)
class Timer:
    """How long the phases of one step took.

    >>> timer = Timer()
    >>> with timer.phase("sample"):
    ...     pass
    >>> list(timer.seconds)
    ['time/sample']
    """

    note: Callable[[str], object] = len  # is told when a phase begins: step and phase
    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # "time/<phase>" → wall-clock seconds
    begun: float = field(default_factory=lambda: time.perf_counter())

    @property
    def total(self) -> float:
        """Wall-clock seconds since it was made."""
        return time.perf_counter() - self.begun

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase. Arrays are computed in the background: wait for them inside."""
        self.note(f"step {self.step}: {name}")
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"time/{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


class Compilations:
    """Counts what JAX compiles in this process: one program per shape, so a count that grows on tells of a shape lost.

    Of a resumed run's they differ from an uninterrupted one's, as times do; hence their names.
    """

    def __init__(self) -> None:
        self.counts = {"time/compile": 0.0, "time/compiled_programs": 0.0, "time/programs_from_disk": 0.0}
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)

    def since_last(self) -> dict[str, float]:
        """Seconds and programs since the last call."""
        counts = dict(self.counts)
        self.counts.update(dict.fromkeys(counts, 0.0))
        return counts

    def _took(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.counts["time/compile"] += duration_secs
            self.counts["time/compiled_programs"] += 1

    def _happened(self, event: str, **kwargs: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.counts["time/programs_from_disk"] += 1


@functools.cache
def compilations() -> Compilations:
    """The one count of this process; JAX forgets no listener."""
    return Compilations()


# --------------------------------------------------------------------------------------------------------- judgements


@dataclass(frozen=True)
class RolloutRow:
    """One sampled judgement and what became of it."""

    pair_id: str
    side: Literal["chosen", "rejected"]
    text: str
    status: Status
    score: float | None  # None unless status is OK
    reward: float
    advantage: float


SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("side", pa.string()),
        ("text", pa.string()),
        ("status", pa.string()),  # the name of the Status
        ("score", pa.float64()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
    ]
)


def write_rollouts(folder: Path, step: int, rows: Sequence[RolloutRow]) -> Path:
    """Writes the judgements of a step, of all processes, as `step_000010.parquet`; the file appears whole."""
    path = folder / f"step_{step:06}.parquet"
    table = pa.Table.from_pylist([asdict(row) | {"status": row.status.name} for row in rows], schema=SCHEMA)
    with _writing(path):
        with whole_file(path) as part:
            pyarrow.parquet.write_table(table, part)
    return path


def show_judgements(step: int, rows: Sequence[RolloutRow], characters: int = 600) -> None:
    """Prints judgements on stdout, each in a frame that says whose it is, long texts without their middle."""
    if jax.process_index() != 0:
        return
    console = rich.console.Console(file=sys.stdout)
    console.print(f"judgements at step {step}")
    for row in rows:
        score = "" if row.score is None else f" · score {row.score:g}"
        title = f"{row.pair_id} · {row.side} · {row.status.name}{score} · reward {row.reward:+.2f}"
        # As Text: what stands in brackets is the model's, no markup of ours.
        body = rich.text.Text(_printable(_shortened(row.text, characters)))
        console.print(rich.panel.Panel(body, title=rich.text.Text(_printable(title)), title_align="left", width=100))


def _shortened(text: str, characters: int) -> str:
    """The beginning and the end, where the score is.

    >>> _shortened("abcdefghijklmnop", 9)
    'abcdef … nop'
    """
    tail = characters // 3
    return text if len(text) <= characters else f"{text[: characters - tail]} … {text[len(text) - tail :]}"


def _printable(text: str) -> str:
    """No control character reaches the terminal, whatever the model wrote."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)
