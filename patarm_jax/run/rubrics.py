"""The rubrics of a run as they are kept, one line for each pair.

In RUN/rubrics/round-N.jsonl, or in step-N.jsonl where a step of the judge has its own:

    {"prompt_id": …, "text": …, "sha256": …, "status": "OK"}

The text is what the judge is shown; the SHA-256 of its UTF-8 bytes names it in the rollouts. The status is of what the
generator wrote.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from patarm_jax.files import whole_file, writing
from patarm_jax.run.process import TO_RESUME
from patarm_jax.types import UserError

RUBRICS = "rubrics"  # the folder


@dataclass(frozen=True)
class RubricRow:
    """One line."""

    prompt_id: str  # of the pair
    text: str
    sha256: str
    status: str  # the name of a `types.Status`


def sha256_of(text: str) -> str:
    """What names a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def keep_rubrics(path: Path, rows: Sequence[RubricRow]) -> None:
    """Writes the rubrics of a round; the file appears whole."""
    with writing(path, TO_RESUME):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows]
            part.write_text("".join(lines), encoding="utf-8")


def kept_rubrics(path: Path, ids: Sequence[str]) -> list[RubricRow]:
    """The rubrics of a round, of just these pairs in this order.

    Raises:
        UserError: when they are of other pairs, or a line is not as it was written.
    """
    remedy = "Remove the file: the run then writes the same rubrics again"
    try:
        rows = [RubricRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}. {remedy}.") from error
    if changed := [row.prompt_id for row in rows if sha256_of(row.text) != row.sha256]:
        raise UserError(f"{path}: the rubric of {changed[0]} is not the one of its sha256. {remedy}.")
    if [row.prompt_id for row in rows] != list(ids):
        raise UserError(f"{path} holds rubrics of other pairs than those of this round. {remedy}.")
    return rows
