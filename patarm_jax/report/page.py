"""One HTML file that opens without a network: numbers, charts, and rows to read, in bundles.

The data travel inside the page, compressed, each bundle of rows by itself: only those that are looked at are unpacked.
What a model wrote reaches the page as text and never as markup.
"""

import base64
import gzip
import hashlib
import html
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeVar

import numpy as np

from patarm_jax.files import check_writable, write_text, writing
from patarm_jax.locks import hold_output
from patarm_jax.types import UsageError, UserError

PAGE = "report.html"
T = TypeVar("T")
_SHOWN = 4000  # characters of a prompt or response that are shown


@dataclass(frozen=True)
class Bundle:
    """Rows that are unpacked together, such as those of a step."""

    name: str
    data: str  # as `packed` makes it


@dataclass(frozen=True)
class Content:
    """What is on a page."""

    payload: Mapping[str, object]  # as page.html reads it
    bundles: Sequence[Bundle]
    said: str  # a clause on what is in it


def make_page(folder: Path, out: Path | None, megabytes: int, fill: Callable[[int], Content]) -> tuple[Path, str]:
    """Writes the page of a folder.

    Args:
        folder: what it tells of.
        out: the file; None: `report.html` in the folder.
        megabytes: of rows the page may hold; of more, evenly spaced ones are taken.
        fill: from so many bytes to what is on it.

    Returns:
        the file, and a clause on what is in it.
    """
    if megabytes < 1:
        raise UsageError(f"--megabytes is {megabytes}. Give 1 or more.")
    path = out or folder / PAGE
    try:
        mark = _mark(folder, path)
    except UserError as error:
        if out is None:
            raise UserError(f"{error} For the page, that is --out FILE.") from error
        raise
    with hold_output(path, lambda message: print(message, file=sys.stderr)):
        content = fill(megabytes * 1_000_000)
        with writing(path):
            write_text(path, _text({"name": folder.resolve().name, **content.payload}, content.bundles, mark))
    return path, content.said


def _mark(folder: Path, out: Path) -> str:
    """What the page of a folder is known by; refuses a file that is there and is not that page.

    Inside the folder itself report.html is always its page.
    """
    mark = f"patarm report {hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        return mark  # what is wrong is said where the config is read
    check_writable(out, folder=False)
    if out.is_file() and out.resolve() != (folder / PAGE).resolve() and out.stat().st_size:
        with out.open("rb") as page:
            if mark.encode() not in page.read(2000):
                raise UserError(f"{out} is there and is not the page of {folder}. Name another file as --out.")
    return mark


def _text(payload: Mapping[str, object], bundles: Sequence[Bundle], mark: str) -> str:
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    kind = 'type="application/octet-stream"'
    rows = [f'<script {kind} data-bundle="{html.escape(one.name)}">{one.data}</script>' for one in bundles]
    # The browser runs this script and no other.
    page = page.replace("__MARK__", mark, 1).replace("__SCRIPT__", f"sha256-{digest}", 1)
    return page.replace("__PAYLOAD__", packed(payload), 1).replace("__BUNDLES__", "\n".join(rows), 1)


def packed(value: object) -> str:
    """JSON, gzipped, as base64: no letter of it means anything to HTML."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def within(every: Sequence[T], size: Callable[[T], int], limit: int) -> list[T]:
    """As many evenly spaced ones as the limit holds; the first and the last always.

    Not all of many are measured to learn that they are too much: they are measured in random order, so that those that
    filled the limit tell fairly how many will fit.
    """
    count = len(every)
    sizes: dict[int, int] = {}
    while True:
        taken = [round(i) for i in np.linspace(0, len(every) - 1, count)]
        total, fit = 0, 0
        for index in random.Random(0).sample(taken, len(taken)):
            if index not in sizes:
                sizes[index] = size(every[index])
            total += sizes[index]
            fit += total <= limit
            if total > limit:
                break
        if fit == count or count <= 2:
            return [every[index] for index in taken]
        count = max(2, fit)


def beginning(text: str) -> str:
    """A text, or its beginning and how much more there is."""
    left = len(text) - _SHOWN
    return text if left <= 0 else f"{text[:_SHOWN]} … ({left:,} more characters)"
