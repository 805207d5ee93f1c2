"""The rollouts of a step, as they are kept and shown: one row for each judgement."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import pyarrow as pa
import pyarrow.parquet
import rich.console
import rich.panel
import rich.text
from jax.sharding import Mesh

from patarm_jax.files import whole_file, writing
from patarm_jax.model.sharding import gather_json
from patarm_jax.run.process import TO_RESUME
from patarm_jax.types import Status


@dataclass(frozen=True)
class RolloutRow:
    """One sampled judgement and what became of it."""

    pair_id: str
    side: str  # chosen or rejected; of a pairwise judge, which response stood first: "chosen first", "rejected first"
    text: str
    status: Status
    score: float | None  # of a pointwise judge; None unless status is OK
    reward: float | None  # None where nothing says what it is worth
    advantage: float | None  # None where its group was left out
    choice: str | None = None  # of a pairwise judge, A or B; None unless status is OK
    # Of Rubric-ARM: the SHA-256 of the rubric that was judged by, under which rubrics/round-N.jsonl has its text.
    rubric_sha256: str | None = None
    judgement: str | None = None  # of a rubric: what the judge wrote by it


SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("side", pa.string()),
        ("text", pa.string()),
        ("status", pa.string()),  # the name of the Status
        ("score", pa.float64()),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("choice", pa.string()),
        ("rubric_sha256", pa.string()),
        ("judgement", pa.string()),
    ]
)


def write_rollouts(folder: Path, step: int, rows: Sequence[RolloutRow]) -> Path:
    """Writes the judgements of a step, of all processes, as `step_000010.parquet`; the file appears whole."""
    path = folder / f"step_{step:06}.parquet"
    table = pa.Table.from_pylist([asdict(row) | {"status": row.status.name} for row in rows], schema=SCHEMA)
    with writing(path, TO_RESUME):
        with whole_file(path) as part:
            pyarrow.parquet.write_table(table, part)
    return path


def gather_rows(mesh: Mesh, rows: Sequence[RolloutRow]) -> list[RolloutRow]:
    """The rows of all processes that share a mesh, one process after another, on each of them."""
    if not mesh.is_multi_process:
        return list(rows)
    every = gather_json(mesh, [asdict(row) for row in rows])
    return [RolloutRow(**row | {"status": Status(row["status"])}) for row in every]


def show_judgements(step: int, rows: Sequence[RolloutRow], characters: int = 600) -> None:
    """Prints judgements on stdout, each in a frame that says whose it is, long texts without their middle."""
    if jax.process_index() != 0:
        return
    console = rich.console.Console(file=sys.stdout)
    console.print(f"judgements at step {step}")
    for row in rows:
        score = "" if row.score is None else f" · score {row.score:g}"
        choice = "" if row.choice is None else f" · chose {row.choice}"
        reward = "no reward" if row.reward is None else f"reward {row.reward:+.2f}"
        title = f"{row.pair_id} · {row.side} · {row.status.name}{score}{choice} · {reward}"
        # As Text: what stands in brackets is the model's, no markup of ours.
        body = rich.text.Text(_printable(_head_and_tail(row.text, characters)))
        console.print(rich.panel.Panel(body, title=rich.text.Text(_printable(title)), title_align="left", width=100))


def _head_and_tail(text: str, characters: int) -> str:
    """The beginning and the end, where the score is.

    >>> _head_and_tail("abcdefghijklmnop", 9)
    'abcdef … nop'
    """
    tail = characters // 3
    return text if len(text) <= characters else f"{text[: characters - tail]} … {text[len(text) - tail :]}"


def _printable(text: str) -> str:
    """No control character reaches the terminal, whatever the model wrote."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text)
