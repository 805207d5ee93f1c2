"""Rows of a table, wherever it lies: in files of several kinds, a folder of those, or the Hugging Face Hub.

The only file that knows `datasets`. What the columns mean is for `preferences` to say.
"""

import csv
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patarm_jax.data.cells import separated_cell
from patarm_jax.data.folders import KINDS, Part, kind_of, parts_of
from patarm_jax.data.reading import lines_of, refuse_pointer, text_of
from patarm_jax.files import one_line
from patarm_jax.types import UsageError, UserError

_SAID_SEPARATOR = re.compile(r"""["']?sep=(?P<mark>[,;\t|])["']?\s*""", re.IGNORECASE)  # a first line of Excel's
_OLD_LINE_ENDS = (
    r"holds a carriage return (\r) that is no part of a line end, as old Macs ended their lines. Save the file with "
    r"line ends of Unix (\n) or Windows (\r\n); in CSV, put a cell that holds one into double quotes."
)


@dataclass(frozen=True)
class Row:
    """One row, and where it was found."""

    where: str  # as an error tells it: the path, then the line of a text file or the number of the row, from 1
    name: str  # "file-name:line" or "file-name:row": the same wherever the file is moved
    origin: str  # the path of the file, or the Hub id
    values: dict[str, object]


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


def read_rows(path: str, splits: Sequence[str] | None, unwanted: str = "", setting: str = "data") -> Table:
    """The rows of a file, of the files in a folder and its folders by their names, or of a split of a Hub data set.

    Args:
        path: of the file or folder, or the Hub id.
        splits: of a folder whose files are named by their splits, those that are read: of `train.jsonl` and
            `eval.jsonl` one. Of a Hub id the first is. Empty: the only one, of a Hub id train. None: all files,
            whatever splits their names say.
        unwanted: files of a folder that are left out where there are others, as a regular expression over their paths.
        setting: the section of the settings that says path and split, as an error names it.
    """
    if not path:
        raise UsageError(f"{setting}.path is empty. Give a {KINDS} file, a folder of them, or a Hub id like org/name.")
    local = Path(path).expanduser()
    if local.is_dir():
        parts, left_out = parts_of(local, splits, unwanted, setting)
        return Table((row for part in parts for row in _read_part(part)), left_out)
    if local.exists():
        return Table(_read_file(local))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not kind_of(local):
        return Table(_read_hub(path, splits[0] if splits else "train", setting))
    raise UserError(f"{setting}.path {path} does not exist. Give a {KINDS} file, a folder of them, or a Hub id.")


def _read_part(part: Part) -> Iterator[Row]:
    return _not_empty(_read_saved(part.path), part.path) if part.path.is_dir() else _read_file(part.path)


def _read_file(file: Path) -> Iterator[Row]:
    readers = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_separated,
        ".tsv": _read_separated,
        ".parquet": _read_table,
        ".arrow": _read_table,
    }
    kind = kind_of(file)
    if kind not in readers:
        raise UserError(f"cannot tell what {file} is by its name. Give a {KINDS} file.")
    return _not_empty(readers[kind](file), file)


def _not_empty(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path} is empty. Give a file with one preference per row, or remove it.")
    yield first
    yield from rows


# ---- Text: by the standard library, because its errors can name the file and the line -------------------------------


def _read_json_lines(file: Path) -> Iterator[Row]:
    for where, line in lines_of(file):
        if line.strip():
            values = _object(_parse_line(line, where), where)
            yield Row(where=where, name=_name(file, where), origin=str(file), values=values)


def _read_json(file: Path) -> Iterator[Row]:
    content = text_of(file)
    if not content.strip():
        return
    try:
        parsed = _loads(content, str(file))
    except json.JSONDecodeError as error:
        remedy = "It looks like JSON lines: name it .jsonl" if error.msg == "Extra data" else "Fix it there"
        raise UserError(f"{file}:{error.lineno} is not JSON: {error.msg} at column {error.colno}. {remedy}.") from error
    for number, value in enumerate(_the_list(parsed, file), start=1):
        where = f"{file}, row {number}"
        yield Row(where=where, name=f"{file.name}:{number}", origin=str(file), values=_object(value, where))


def _read_separated(file: Path) -> Iterator[Row]:
    """CSV or TSV: a first row of names, cells in quotes where they hold line breaks or the separator.

    Rows are strict, since a quote that is never closed or a cell too many moves all that follows into other columns.
    Columns without a name, such as a spreadsheet's empty ones, are not read.
    """
    csv.field_size_limit(2**31 - 1)  # responses may be longer than Python's limit of 131,072 characters
    lines = (line for _, line in lines_of(file))
    first = next(lines, "")
    above = 0
    if said := _SAID_SEPARATOR.fullmatch(first):
        first, above = next(lines, ""), 1
    separator = said["mark"] if said else _separator(file, first)
    reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
    names: list[str] = []
    begins = above + 1
    try:
        for cells in reader:
            where, begins = f"{file}:{begins}", above + reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = _names(cells, where)
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{where} has {len(cells)} cells, and the first row names {len(names)} columns. "
                    "Put a cell that holds the separator, a quote or a line break into double quotes."
                )
            yield Row(where=where, name=_name(file, where), origin=str(file), values=_named(names, cells))
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(f"{file}:{begins} {_OLD_LINE_ENDS}") from error
        raise UserError(
            f"the row that begins in {file}:{begins} is not of the form of the others: {one_line(error)}. "
            'Write a quote inside a quoted cell twice (""), and close each quote.'
        ) from error


def _separator(file: Path, first: str) -> str:
    """A tab in TSV; in CSV a comma, or what some spreadsheets write in its place."""
    if kind_of(file) == ".tsv":
        return "\t"
    outside = re.sub(r'"[^"]*(?:"|\Z)', "", first)  # a name in quotes may hold any of them
    return next((mark for mark in ",;\t" if mark in outside), ",")


def _named(names: Sequence[str], cells: Sequence[str]) -> dict[str, object]:
    return {name: separated_cell(cell) for name, cell in zip(names, cells, strict=True) if name}


def _names(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{where} names the column {twice[0]!r} twice. Give each column a name of its own.")
    return names


def _name(file: Path, where: str) -> str:
    return f"{file.name}:{where.rpartition(':')[2]}"


def _parse_line(line: str, where: str) -> object:
    try:
        return _loads(line, where)
    except json.JSONDecodeError as error:
        if "\r" in line.strip():
            raise UserError(f"{where} {_OLD_LINE_ENDS}") from error
        remedy = "Write one JSON object per line, or remove the line"
        if not line.endswith("\n"):
            remedy = "The file ends here without a line end and may be cut off: fetch it again, or remove the line"
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}. {remedy}.") from error


def _loads(content: str, where: str) -> object:
    """What the JSON says; a JSONDecodeError is left to the caller, who knows what the file should look like."""
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply. Write text or a list of messages in each column.") from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise UserError(f"{where} holds a number of too many digits. Write it as text, or remove it.") from error


def _the_list(parsed: object, file: Path) -> list[object]:
    """The list a JSON file is, or the only list in the object it is."""
    if isinstance(parsed, list):
        return parsed
    lists = [value for value in parsed.values() if isinstance(value, list)] if isinstance(parsed, dict) else []
    if len(lists) != 1:
        got = f"an object with {len(lists)} lists" if isinstance(parsed, dict) else type(parsed).__name__
        raise UserError(f"{file} holds {got}. Make it a list of rows, or an object with one list of rows.")
    return lists[0]


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise UserError(f"{where} holds {type(value).__name__}, not an object. Write a row as {{column: value, …}}.")
    return value


# ---- Tables and the Hub: by datasets, which is imported when it is needed, for it weighs 80 MB ----------------------


def _read_table(file: Path) -> Iterator[Row]:
    import datasets

    refuse_pointer(file)
    kind = kind_of(file)[1:]
    try:
        # Streaming reads the file itself; otherwise a copy of it would be left in a cache.
        table = datasets.load_dataset(kind, data_files=str(file), split="train", streaming=True)
        for number, values in enumerate(table, start=1):
            yield Row(where=f"{file}, row {number}", name=f"{file.name}:{number}", origin=str(file), values=values)
    except Exception as error:  # errors of datasets and pyarrow share no base class
        article = "an" if kind[0] in "aeiou" else "a"
        raise UserError(f"cannot read {file}: {one_line(error)}. Give {article} {kind} file.") from error


def _read_saved(folder: Path) -> Iterator[Row]:
    """What `save_to_disk` wrote, from the disk as it is needed."""
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
        for number, values in enumerate(table, start=1):
            yield Row(
                where=f"{folder}, row {number}", name=f"{folder.name}:{number}", origin=str(folder), values=values
            )
    except Exception as error:
        raise UserError(
            f"cannot read the data set in {folder}: {one_line(error)}. Write it again with save_to_disk."
        ) from error


def _read_hub(path: str, split: str, setting: str) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(path, split=split)
    except Exception as error:  # errors of datasets, the Hub and the network share no base class
        raise UserError(
            f"cannot load split {split} of {path} from the Hub, and no local file has that name: {one_line(error)}. "
            f"Check {setting}.path, {setting}.split and the network, or download the files and give their folder."
        ) from error
    for number, values in enumerate(table, start=1):
        yield Row(where=f"{path}, row {number}", name=f"{path}:{number}", origin=path, values=values)
