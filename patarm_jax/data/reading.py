"""Opens data files: unpacks them, finds out their encoding, and gives their lines.

What is wrong with a file is one sentence that names the file and the line.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from patarm_jax.files import one_line
from patarm_jax.types import UserError

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how packed files begin, whatever they are called
_BZIP2, _XZ = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), b"\xfd7zXZ\0"
_POINTER = b"version https://git-lfs"  # what Git leaves in place of a large file that was not fetched
_PADDING = "\0 \t\r\n"


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where they are packed by gzip, Zstandard, bzip2 or xz."""
    try:
        raw = file.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}. Check its permissions.") from error
    try:
        with raw, _unpacked(raw, file) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(
            f"cannot read {file}: {one_line(error)}. The file is damaged or cut off: fetch it again."
        ) from error


def _unpacked(raw: io.BufferedReader, file: Path) -> Any:
    head = raw.peek(len(_POINTER))
    if head.startswith(_POINTER):
        raise UserError(f"{file} holds a pointer of Git LFS, not the data. Run `git lfs pull` in its folder.")
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=raw)
    if head.startswith(_ZSTD):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    if _BZIP2.match(head):
        return bz2.BZ2File(raw)
    if head.startswith(_XZ):
        return lzma.LZMAFile(raw)
    return raw


def refuse_pointer(file: Path) -> None:
    """Refuses what Git LFS leaves in place of a file, for readers that open the file themselves."""
    with opened(file):
        pass


def lines_of(file: Path) -> Iterator[tuple[str, str]]:
    r"""Each line with its end, and where it is: `("x.jsonl:1", "{}\n")`. Lines end at `\n` alone.

    UTF-8, UTF-16 and UTF-32, with and without a byte-order mark. Halves of characters (lone surrogates) are let
    through: who takes the text drops what it stands in. Zero bytes at the end, as a crash leaves them, are no line.
    """
    with opened(file) as stream:
        numbered = enumerate(_decoded(stream, file), start=1)
        for number, line in numbered:
            where = f"{file}:{number}"
            if "\0" in line and not line.strip(_PADDING):
                if next(numbered, None) is not None:
                    raise UserError(f"{where} holds zero bytes alone. The file is damaged: fetch it again.")
                return
            yield where, line.rstrip("\0")


def text_of(file: Path) -> str:
    """The whole text of a file, decoded as its lines are."""
    return "".join(line for _, line in lines_of(file))


def _decoded(stream: BinaryIO, file: Path) -> Iterator[str]:
    # Python's own rule for JSON looks at the byte-order mark and the zeros of the first four bytes. It holds for any
    # text that begins with ASCII.
    encoding = json.detect_encoding(_head(stream))
    if not encoding.startswith("utf-8"):
        try:
            with io.TextIOWrapper(stream, encoding, errors="surrogatepass", newline="\n") as text:
                yield from text
        except UnicodeError as error:
            raise UserError(
                f"{file} begins as {encoding.upper()}, but is not: {one_line(error)}. Save the file as UTF-8."
            ) from error
        return
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig", "surrogatepass")  # some editors begin a file with a byte-order mark
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}:{number} is not UTF-8: {error.reason} at byte {error.start}. Save the file as UTF-8."
            ) from error


def _head(stream: Any) -> bytes:
    return bytes(stream.peek(4)[:4])
