"""Whether a checkpoint on disk is whole: a list of its files, written down when all of them were there.

Orbax reads a checkpoint from which files are missing as far as it can, and not always rightly.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from patarm_jax.files import write_json
from patarm_jax.types import UserError

FILES = "patarm_files.json"  # in the folder of a step: {file: [bytes, sha256 or null]}
_SMALL = 1 << 16  # bytes of a file whose content is checked too; the large ones hold sums of their own
_ITEMS = "_CHECKPOINT_METADATA"  # orbax's list of what is in a checkpoint


class Damage(Exception):
    """A checkpoint that cannot be read rightly; the message says why, without naming it."""


def steps_in(folder: Path) -> list[int]:
    """The steps that have a folder there, in order; one that is being written has another name."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())


def metrics_of(step: Path) -> dict[str, float]:
    """The metrics by which a checkpoint may be chosen; empty where it was not evaluated, or cannot be read."""
    try:
        found = json.loads((step / "metrics" / "metrics").read_bytes())
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def best_of(folder: Path, metric: str) -> int | None:
    """The step whose value of a metric is the largest, the last of equals; None where no checkpoint has one."""
    values = [(metrics_of(folder / str(step)).get(metric, math.nan), step) for step in steps_in(folder)]
    return max(((value, step) for value, step in values if not math.isnan(value)), default=(0.0, None))[1]


def note_files(step: Path) -> None:
    """Writes down which files a checkpoint has; all of them must be there. OSError passes through."""
    write_json(step / FILES, {name: _about(step / name) for name in _names(step)})


def damage_of(step: Path) -> str:
    """Why a checkpoint is not whole, as a clause; empty where nothing is found.

    Where no list was written, because the run was killed in the moment after, what orbax needs is looked for.
    """
    try:
        noted = json.loads((step / FILES).read_bytes())
    except FileNotFoundError:
        return _lacking(step)
    except (OSError, ValueError):
        return f"{FILES} cannot be read"
    if not isinstance(noted, dict):
        return f"{FILES} cannot be read"
    for name, expected in noted.items():
        try:
            found = _about(step / name)
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except OSError as error:  # such as a lost right, or a network disk that is away: nothing is wrong with the file
            raise UserError(
                f"cannot read {step / name}: {error.strerror}. Make it a file that you may read."
            ) from error
        if found[0] != expected[0]:
            return f"{name} has {found[0]:,} bytes instead of {expected[0]:,}"
        if found != expected:
            return f"{name} is another than was written"
    return ""


def _names(step: Path) -> list[str]:
    found = (Path(root, file) for root, _, files in os.walk(step) for file in files)
    return sorted(str(path.relative_to(step)) for path in found if path.name != FILES)


def _about(path: Path) -> list[object]:
    size = path.stat().st_size
    return [size, hashlib.sha256(path.read_bytes()).hexdigest() if size <= _SMALL else None]


def _lacking(step: Path) -> str:
    """The first of the files without which orbax reads something else, or nothing, in silence."""
    try:
        items = json.loads((step / _ITEMS).read_bytes())["item_handlers"]
        for item in items:
            if not any((step / item).iterdir()):
                return f"{item} is empty"
        if "metrics" in items:
            json.loads((step / "metrics" / "metrics").read_bytes())
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(step)} is missing"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"it cannot be read ({' '.join(str(error).split()).rstrip('.')})"
    described = step / "state" / "array_metadatas"
    if not described.is_dir() or not any(described.iterdir()):
        return f"{described.relative_to(step)} is missing"
    return ""
