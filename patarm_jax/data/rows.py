"""Rows of a table, wherever it lies: JSON lines, JSON, parquet, a folder of those, or the Hugging Face Hub.

The only file that knows `datasets`. What the columns mean is for `preferences` to say.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patarm_jax.config import one_line
from patarm_jax.types import UsageError, UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
_KINDS = ".jsonl, .json or .parquet"
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class Row:
    """One row, and where it was found."""

    where: str  # as an error tells it: the path, then the line of a .jsonl file or the number of the row, from 1
    name: str  # "file-name:line" or "file-name:row": the same wherever the file is moved
    origin: str  # the path of the file, or the Hub id
    values: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows to read, and which files of the folder they lie in are not read."""

    rows: Iterator[Row]
    left_out: tuple[str, ...] = ()  # paths in the folder

    @property
    def remark(self) -> str:
        """A clause on what is not read; empty where everything is."""
        if not self.left_out:
            return ""
        more = f" and {len(self.left_out) - 3} more" if len(self.left_out) > 3 else ""
        return f"; not read: {', '.join(self.left_out[:3])}{more}"


def read_rows(path: str, split: str, unwanted: str = "") -> Table:
    """The rows of a file, of the files in a folder and its folders by their names, or of a split of a Hub data set.

    Args:
        path: of the file or folder, or the Hub id.
        split: of a Hub id, and of a folder whose files are named by their splits as on the Hub: of
            `data/train-00000-of-00001.parquet` and `data/test-00000-of-00001.parquet` one is read.
        unwanted: files of a folder that are left out where there are others, as a regular expression over their paths.
    """
    if not path:
        raise UsageError(f"data.path is empty. Give a {_KINDS} file, a folder of them, or a Hub id such as org/name.")
    local = Path(path).expanduser()
    if local.is_dir():
        return _read_folder(local, split, unwanted)
    if local.exists():
        return Table(_read_file(local))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and local.suffix not in SUFFIXES:
        return Table(_read_hub(path, split))
    raise UserError(f"data.path {path} does not exist. Give a {_KINDS} file, a folder of them, or a Hub id.")


def _read_folder(folder: Path, split: str, unwanted: str) -> Table:
    files = _data_files(folder)
    if not files:
        raise UserError(f"the folder {folder} holds no {_KINDS} file. Give the folder that the files lie in.")
    paths = {file: f"/{file.relative_to(folder).as_posix()}" for file in files}
    wanted = [file for file in files if not (unwanted and re.search(unwanted, paths[file]))] or files
    taken = _of_split(folder, wanted, split)
    rows = (row for file in taken for row in _read_file(file))
    return Table(rows, tuple(paths[file].removeprefix("/") for file in files if file not in taken))


def _data_files(folder: Path) -> list[Path]:
    """The files in a folder and its folders, by their names."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    """Of a folder that is laid out by splits the files of one; of any other all."""
    inside: dict[Path, list[Path]] = {}  # what lies in the folder → its files
    for file in files:
        inside.setdefault(folder / file.relative_to(folder).parts[0], []).append(file)
    names = {entry: _split_named(entry.stem if entry in files else entry.name) for entry in inside}
    splits = sorted({name for name in names.values() if name is not None})
    if None in names.values() or len(splits) < 2:
        return [
            file
            for entry, its in inside.items()
            for file in ([entry] if entry in files else _of_split(entry, its, split))
        ]
    if split not in splits:
        raise UserError(
            f"{folder} holds the splits {', '.join(splits)}, and data.split is {split or 'empty'}. Name one of them."
        )
    return [file for entry, its in inside.items() if names[entry] == split for file in its]


def _split_named(name: str) -> str | None:
    """The split that a name is, as the Hub writes it.

    >>> [_split_named(name) for name in ("train-00000-of-00002", "gpt-00000-of-00001", "test", "train_math", "chat")]
    ['train', 'gpt', 'test', None, None]
    """
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", name)
    return shard[1] if shard else name if name in _SPLITS else None


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
