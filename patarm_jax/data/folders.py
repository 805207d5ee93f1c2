"""Which files of a folder are data, and which split they belong to, by the rules of the Hugging Face Hub.

The split of `data/train-00000-of-00002.parquet`, `eval.jsonl` or `dev/part-1.csv` stands in the name: a word of
`SPLIT_WORDS` that other characters than letters set apart, in the name of the file or of a folder above it; or, in
front of the number of a shard, any word. Of a clone of a Hub data set whose README.md lists its files by splits, that
list counts instead. A folder that `datasets` wrote is data as a whole.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from patarm_jax.types import UserError

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
PACKED = (".gz", ".zst", ".bz2", ".xz")
_TEXT = (".jsonl", ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
_SAME = {".ndjson": ".jsonl", ".jsonlines": ".jsonl"}  # other endings of the same kind
KINDS = ".jsonl, .json, .csv or .tsv (each also as .gz, .zst, .bz2 or .xz), .parquet or .arrow"

# They describe data and hold none.
_METADATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_DOCUMENTS = ("", ".md", ".rst", ".py", ".cff", ".bib")  # endings of what nobody takes for data
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_NO_SPLIT = ("data", "part", "shard", "chunk", "file")  # how the shards of anything are called


@dataclass(frozen=True)
class Part:
    """A file with data, or a folder that `datasets` wrote."""

    path: Path
    inside: str  # its path in the folder that is read
    split: str | None  # as its name says; None: it says none


def kind_of(file: Path) -> str:
    """The ending that says how a file is read, without its packing; empty where none does.

    >>> [kind_of(Path(name)) for name in ("a.ndjson", "a.CSV.gz", "a.parquet", "a.gz", "a.parquet.gz")]
    ['.jsonl', '.csv', '.parquet', '', '']
    """
    suffixes = (suffix.lower() for suffix in file.suffixes)
    *before, last = ["", *(_SAME.get(suffix, suffix) for suffix in suffixes)]
    if last in PACKED and before:
        return before[-1] if before[-1] in _TEXT else ""
    return last if last in _TEXT + _TABLES else ""


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` writes."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def parts_of(
    folder: Path, splits: Sequence[str] | None, unwanted: str, setting: str
) -> tuple[list[Part], tuple[str, ...]]:
    """The parts of a folder that are read, in the order of their names, and the paths of the files that are not.

    Args:
        folder: with files, folders of files, or what `datasets` wrote.
        splits: the parts of these are read where names say splits. None: all parts, whatever their names say;
            empty: all parts, but not of two splits.
        unwanted: parts that are left out where there are others, as a regular expression over `/` and their paths.
        setting: the section of the settings, as an error names it.
    """
    found, others = _found(folder)
    if not found:
        raise UserError(f"the folder {folder} holds no {KINDS} file. Give the folder that the files lie in.")
    wanted = [part for part in found if not (unwanted and re.search(unwanted, f"/{part.inside}"))] or found
    taken = wanted if splits is None else _of_splits(folder, wanted, splits, setting)
    return taken, tuple(part.inside for part in found if part not in taken) + tuple(others)


def _found(folder: Path) -> tuple[list[Part], list[str]]:
    """All parts, and the paths of files that are none."""
    parts: list[Part] = []
    others: list[str] = []
    listed = _listed_in_readme(folder)
    for path, split in _walk(folder, set()):
        inside = path.relative_to(folder).as_posix()
        if listed and kind_of(path):
            if path in listed:
                parts.append(Part(path, inside, listed[path]))
            else:
                others.append(inside)
        elif path.is_dir() or (kind_of(path) and path.name not in _METADATA):
            parts.append(Part(path, inside, split or split_named(inside, path.is_dir())))
        elif path.suffix.lower() not in _DOCUMENTS:
            others.append(inside)
    return parts, others


def _walk(folder: Path, seen: set[Path]) -> Iterator[tuple[Path, str | None]]:
    """Files and saved folders, with their splits where metadata say them."""
    if (real := folder.resolve()) in seen:  # a link that leads back
        return
    seen.add(real)
    if (folder / "dataset_dict.json").is_file():
        yield from ((folder / split, split) for split in _splits_of(folder / "dataset_dict.json"))
        return
    if is_saved(folder):
        yield folder, None
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}. Check its permissions.") from error
    for entry in entries:
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            yield from _walk(entry, seen)
        elif entry.is_file() or entry.is_symlink():  # a link that leads nowhere is an error when it is read
            yield entry, None


def _splits_of(file: Path) -> list[str]:
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
        if isinstance(splits, list) and all(isinstance(one, str) and (file.parent / one).is_dir() for one in splits):
            return splits
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise UserError(f"{file} does not name the folders beside it. Write the data set again with save_to_disk.")


def _listed_in_readme(folder: Path) -> dict[Path, str]:
    """The files that the head of a data set's README.md lists, as the Hub reads it, and their splits; often none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("\n---", 1)[0]) if text.startswith("---") else None
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}  # a page for people
    configs = head.get("configs") if isinstance(head, dict) else None
    found: dict[Path, str] = {}
    for config in configs if isinstance(configs, list) else []:
        base = str(config.get("data_dir") or "") if isinstance(config, dict) else ""
        for split, patterns in _splits_of_config(config):
            for pattern in patterns if isinstance(patterns, list) else [patterns]:
                if isinstance(pattern, str) and (pattern := f"{base}/{pattern}".strip("/")):
                    found |= dict.fromkeys(_matching(folder, pattern), split)
    return found


def _matching(folder: Path, pattern: str) -> list[Path]:
    """The data files of a pattern, in which `**` counts as `*` within a name."""
    names = [name if name == "**" else re.sub(r"\*+", "*", name) for name in pattern.split("/")]
    return [path for path in folder.glob("/".join(names)) if kind_of(path)]


def _splits_of_config(config: object) -> list[tuple[str, object]]:
    """(split, patterns of its files), in the forms in which data_files may be written."""
    match config:
        case {"data_files": dict(files)}:
            return [(str(split), patterns) for split, patterns in files.items()]
        case {"data_files": list(files)} if all(isinstance(one, dict) for one in files):
            return [(str(one.get("split", "train")), one.get("path")) for one in files]
        case {"data_files": files}:
            return [("train", files)]
    return []


def split_named(inside: str, whole: bool = False) -> str | None:
    """The split that the path of a file in a folder says; None where it says none.

    Args:
        inside: the path, with `/` between folders.
        whole: the path is a folder's.

    >>> names = "data/train-00000-of-00002.parquet gpt-00000-of-00001.json eval.jsonl dev/a.csv my_test2.json.gz"
    >>> [split_named(name) for name in names.split()]
    ['train', 'gpt', 'test', 'validation', 'test']
    >>> [split_named(name) for name in ("latest.jsonl", "brainstorming/a.json", "part-00000-of-00002.parquet")]
    [None, None, None]
    """
    *folders, name = inside.split("/")
    stem = name if whole else name.split(".")[0] if kind_of(Path(name)) else name
    shard = _SHARD.match(stem)
    found = [_splits_in(part) for part in (*folders, stem if whole or shard else Path(name).name)]
    certain = {split for each in found if len(each) == 1 for split in each}
    if len(certain) > 1 or (not certain and any(found)):
        said = sorted({split for each in found for split in each})
        raise UserError(
            f"the name of {inside} says the splits {' and '.join(said)}. "
            "Give that file or its folder itself as the path, or give it a name with one of them."
        )
    if shard and re.fullmatch(r"\w+(\.\w+)*", shard[1]) and shard[1].lower() not in _NO_SPLIT:
        return shard[1]  # as it stands: the Hub knows splits of any name by their shards
    return next(iter(certain), None)


def _splits_in(name: str) -> set[str]:
    return {SPLIT_WORDS[word] for word in re.split(r"[\W\d_]+", name.lower()) if word in SPLIT_WORDS}


def _of_splits(folder: Path, parts: Sequence[Part], splits: Sequence[str], setting: str) -> list[Part]:
    named: dict[str | None, str] = {part.split: part.inside for part in reversed(parts) if part.split}  # first of each
    if not named:
        return list(parts)
    naming, unnamed = ([part.inside for part in parts if bool(part.split) is says] for says in (True, False))
    if unnamed:
        raise UserError(
            f"in {folder}, {_some(naming)} {'names' if len(naming) == 1 else 'name'} a split, and {_some(unnamed)} "
            f"{'names' if len(unnamed) == 1 else 'name'} none, so that training data and held-out data cannot be told "
            f"apart. Give one file or folder as {setting}.path, or rename the files so that all of them name their "
            "split, such as train_more.jsonl, or none does."
        )
    taken = [part for part in parts if any(_is(part.split, split, named) for split in splits)]
    if taken or (not splits and len(named) == 1):
        return taken or list(parts)
    listed = ", ".join(f"{split} ({named[split]})" for split in sorted(named, key=str))
    many = "splits" if len(named) > 1 else "split"
    got = f"{setting}.split is {splits[0]}" if splits and splits[0] else f"{setting}.split is empty"
    raise UserError(f"{folder} holds the {many} {listed}, and {got}. Set {setting}.split to one that is there.")


def _is(split: str | None, wanted: str, named: dict[str | None, str]) -> bool:
    """Whether a split is the one that is wanted: by its name or, where none has that, by another word for it."""
    if wanted in named:
        return split == wanted
    return split is not None and SPLIT_WORDS.get(split.lower()) == SPLIT_WORDS.get(wanted.lower(), "")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
