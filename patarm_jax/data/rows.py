"""Rows of a table, wherever it lies: JSON lines, JSON, parquet, a folder of those, or the Hugging Face Hub.

The only file that knows `datasets`. What the columns mean is for `preferences` to say.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_jax.config import one_line
from patarm_jax.types import UsageError, UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
_KINDS = ".jsonl, .json or .parquet"


@dataclass(frozen=True)
class Row:
    """One row, and where it was found."""

    where: str  # as an error tells it: the path, then the line of a .jsonl file or the number of the row, from 1
    name: str  # "file-name:line" or "file-name:row": the same wherever the file is moved
    origin: str  # the path of the file, or the Hub id
    values: dict[str, Any]


def read_rows(path: str, split: str, unwanted: str = "") -> Iterator[Row]:
    """The rows of a file, of the files in a folder and its folders by their names, or of a split of a Hub data set.

    Args:
        path: of the file or folder, or the Hub id.
        split: of a Hub id. In a folder, files and folders whose names hold it are read without those beside them, as
            a copy of a Hub data set needs it: `data/train-00000-of-00001.parquet`, and not `data/test-…`.
        unwanted: files of a folder that are left out where there are others, as a regular expression over their paths.
    """
    if not path:
        raise UsageError(f"data.path is empty. Give a {_KINDS} file, a folder of them, or a Hub id such as org/name.")
    local = Path(path).expanduser()
    if local.is_dir():
        yield from _read_folder(local, split, unwanted)
    elif local.exists():
        yield from _read_file(local)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path) and local.suffix not in SUFFIXES:
        yield from _read_hub(path, split)
    else:
        raise UserError(f"data.path {path} does not exist. Give a {_KINDS} file, a folder of them, or a Hub id.")


def _read_folder(folder: Path, split: str, unwanted: str) -> Iterator[Row]:
    # No part of a longer word; a slice such as train[:100] names no file.
    of_split = re.compile(rf"(?<![^\W\d_]){re.escape(split)}(?![^\W\d_])" if split else "(?!)")
    files = _data_files(folder, of_split)
    if not files:
        raise UserError(f"the folder {folder} holds no {_KINDS} file. Give the folder that the files lie in.")
    paths = {file: f"/{file.relative_to(folder).as_posix()}" for file in files}
    wanted = [file for file in files if not (unwanted and re.search(unwanted, paths[file]))]
    for file in wanted or files:
        yield from _read_file(file)


def _data_files(folder: Path, of_split: re.Pattern[str]) -> list[Path]:
    """The files in a folder and its folders, by their names; of those beside each other, only ones of the split."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found[entry.name] = _data_files(entry, of_split)
        elif entry.suffix in SUFFIXES:
            found[entry.name] = [entry]
    named = [name for name, files in found.items() if files and of_split.search(name)]
    return [file for name in (named or found) for file in found[name]]


def _read_file(file: Path) -> Iterator[Row]:
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise UserError(f"cannot tell what {file} is by its name. Give a {_KINDS} file.")
    number_of_rows = 0
    for row in readers[file.suffix](file):
        number_of_rows += 1
        yield row
    if not number_of_rows:
        raise UserError(f"{file} is empty. Give a file with one preference per row, or remove it.")


# ---- JSON: by the standard library, because its errors can name the file and the line -------------------------------


def _read_json_lines(file: Path) -> Iterator[Row]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file}:{number}"
            if line.strip():
                yield Row(where, f"{file.name}:{number}", str(file), _object(_parse_line(line, where), where))


def _read_json(file: Path) -> Iterator[Row]:
    with _open(file) as stream:
        content = stream.read()
    if not content.strip():
        return
    try:
        parsed = _loads(content, str(file))
    except json.JSONDecodeError as error:
        remedy = "It looks like JSON lines: name it .jsonl" if error.msg == "Extra data" else "Mend it there"
        raise UserError(f"{file}:{error.lineno} is not JSON: {error.msg} at column {error.colno}. {remedy}.") from error
    for number, value in enumerate(_the_list(parsed, file), start=1):
        where = f"{file}, row {number}"
        yield Row(where, f"{file.name}:{number}", str(file), _object(value, where))


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}. Check its permissions.") from error


def _parse_line(line: bytes, where: str) -> Any:
    try:
        return _loads(line, where)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON: {error.msg} at column {error.colno}. "
            "Write one JSON object per line, or remove the line."
        ) from error


def _loads(content: bytes, where: str) -> Any:
    """What the JSON says; a JSONDecodeError is left to the caller, who knows what the file should look like."""
    try:
        return json.loads(content.decode("utf-8-sig"))  # some editors begin a file with a byte-order mark
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8: {error.reason} at byte {error.start}. Save the file as UTF-8."
        ) from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply. Write text or a list of messages in each column.") from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise UserError(f"{where} holds a number of too many digits. Write it as text, or remove it.") from error


def _the_list(parsed: Any, file: Path) -> list[Any]:
    """The list a JSON file is, or the only list in the object it is."""
    if isinstance(parsed, list):
        return parsed
    lists = [value for value in parsed.values() if isinstance(value, list)] if isinstance(parsed, dict) else []
    if len(lists) != 1:
        got = f"an object with {len(lists)} lists" if isinstance(parsed, dict) else type(parsed).__name__
        raise UserError(f"{file} holds {got}. Make it a list of rows, or an object with one list of rows.")
    return lists[0]


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {type(value).__name__}, not an object. Write a row as {{column: value, …}}.")
    return value


# ---- Parquet and the Hub: by datasets, which is imported when it is needed, for it weighs 80 MB ---------------------


def _read_parquet(file: Path) -> Iterator[Row]:
    import datasets

    try:
        # Streaming reads the file itself; otherwise a copy of it would be left in a cache.
        table = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        for number, values in enumerate(table, start=1):
            yield Row(f"{file}, row {number}", f"{file.name}:{number}", str(file), values)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {one_line(error)}. Give a parquet file.") from error


def _read_hub(path: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(path, split=split)
    except Exception as error:  # of datasets, the Hub and the network, which share no base class
        raise UserError(
            f"cannot load split {split} of {path} from the Hub, and no local file has that name: {one_line(error)}. "
            "Check data.path, data.split and the network, or download the files and give their folder."
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(f"{path}, row {number}", f"{path}:{number}", path, values)
