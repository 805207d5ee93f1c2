"""A preference on its way through the stages, with where it came from; as a parquet file and as training reads it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from patarm_jax.files import one_line, whole_file
from patarm_jax.types import Conversation, Domain, UserError


@dataclass(frozen=True)
class Pair:
    """One preference and its provenance."""

    id: str  # unique in the set
    prompt: Conversation
    chosen: str
    rejected: str
    domain: Domain
    source: str
    corpus: str  # the source section that it was read by
    licence: str  # empty: not known
    origin: str  # where it was read: the file and its line or row
    # What a judge makes of it: the scores of each response, None where one could not be read, and in which share of
    # comparisons the chosen one's is higher.
    chosen_scores: tuple[float | None, ...] | None = None
    rejected_scores: tuple[float | None, ...] | None = None
    accuracy: float | None = None
    part: str = ""  # rl or sft, once rows are selected
    # What a teacher says of it, as training reads it.
    chosen_judgement: str | None = None
    rejected_judgement: str | None = None
    pairwise_judgement: str | None = None
    pairwise_judgement_swapped: str | None = None

    @property
    def asked(self) -> str:
        """The user's last words."""
        return self.prompt[-1]["content"]


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("domain", pa.string()),
        ("source", pa.string()),
        ("corpus", pa.string()),
        ("licence", pa.string()),
        ("origin", pa.string()),
        ("chosen_scores", pa.list_(pa.float64())),
        ("rejected_scores", pa.list_(pa.float64())),
        ("accuracy", pa.float64()),
        ("part", pa.string()),
        ("chosen_judgement", pa.string()),
        ("rejected_judgement", pa.string()),
        ("pairwise_judgement", pa.string()),
        ("pairwise_judgement_swapped", pa.string()),
    ]
)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes them; the file appears whole, and the same pairs give the same bytes. OSError passes through."""
    table = pa.Table.from_pylist([values_of(one) for one in pairs], schema=SCHEMA)
    with whole_file(path) as part:
        pyarrow.parquet.write_table(table, part, compression="zstd")


def values_of(pair: Pair) -> dict[str, Any]:
    """As a row of a table."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(pair).items()}


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file that a stage has written."""
    try:
        rows = pyarrow.parquet.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}. Remove its folder to make it again.") from error
    tuples = ("prompt", "chosen_scores", "rejected_scores")
    return [Pair(**row | {name: row[name] and tuple(row[name]) for name in tuples}) for row in rows]


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of a folder's files; of what is no path, itself."""
    if path.is_dir():
        every: Sequence[Path] = sorted(one for one in path.rglob("*") if one.is_file())
        lines = [f"{one.relative_to(path)} {digest_of(one)}" for one in every]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if not path.is_file():
        return str(path)  # a Hub id
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
