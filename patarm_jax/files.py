"""Writing to disk: files and folders that appear whole, and what stands in the way, as one sentence.

What is not whole yet has a name that is this project's alone, `.NAME.patarm-01234567`. It is removed when its writer is
gone, which is told by a lock that no one holds any more; nothing else is ever removed or overwritten on the way.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patarm_jax.types import UsageError, UserError

_OURS = re.compile(r"\..*\.patarm-[0-9a-f]{8}", re.DOTALL)
_NAMED = 50  # letters of the name of what is written that its temporary name repeats; file systems allow 255 bytes
_PROBE = b"\0" * 4096  # a full disk takes an empty file, but no byte
LOCK = ".patarm-lock"  # in a folder that is held: see locks.py
_NOTHING = {"lost+found", LOCK}  # the one stands in every new file system, the other in a folder that is held


# What only looks like a path: a first part that ends in a colon, as in gs://bucket/x, or file:/x.
# One slash is what `Path` and many a script leave of gs://; behind a single letter it may be a drive's.
_ADDRESS = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.:-]*):/(?:/|(?<=..:/))")


def refuse_address(text: str, setting: str) -> None:
    """Refuses an address where a place on this machine's disks is meant, before `Path` makes a folder name of it.

    >>> refuse_address("runs/a:b", "run.folder")
    >>> refuse_address("file:///runs", "run.folder")
    Traceback (most recent call last):
      ...
    patarm_jax.types.UsageError: run.folder is file:///runs, an address; a path is wanted. Leave out file://.
    """
    if not (found := _ADDRESS.match(text)):
        return
    scheme = found[1].lower()
    if scheme == "file":
        remedy = "Leave out file://"
    elif scheme in ("http", "https"):
        remedy = "Download it and give the path; for data on the Hugging Face Hub, the id (owner/name) will do"
    elif scheme == "hf":
        remedy = "Download it and give the folder; for data, the id on the Hub (owner/name) will do"
    else:
        remedy = "Mount the bucket as a folder (with gcsfuse, s3fs or the like) and give that folder"
    raise UsageError(f"{setting} is {text.strip()}, an address; a path is wanted. {remedy}.")


# ------------------------------------------------------------------------------------------------- what is in the way


@contextlib.contextmanager
def writing(path: Path, kept: str = "") -> Iterator[None]:
    """Turns what cannot be written into one sentence; `kept` says what is not lost."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error, kept) from error


def cannot_write(path: Path, error: OSError, kept: str = "") -> UserError:
    """Why something cannot be written, and what to do about it."""
    reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    if error.errno == errno.EDQUOT:  # what the disk has free says nothing of what this user may take
        remedy = "Remove some of your files there, ask for a larger quota, or name another place"
    elif error.errno == errno.ENOSPC or "No space left on device" in reason:
        disk = os.statvfs(_existing(path))
        if disk.f_files and not disk.f_favail:
            reason, remedy = f"{reason}: it holds no more files", "Remove some files or name another place"
        else:
            free = disk.f_bavail * disk.f_frsize / 2**30
            reason, remedy = f"{reason}; {free:.1f} GiB are free there", "Free some space or name another place"
    elif error.errno in (errno.EACCES, errno.EPERM):
        remedy = f"Name another place, or get the right to write in {_existing(path)}"
    elif error.errno == errno.EROFS:
        remedy = "Nothing can be written on that disk; name another place"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "Raise the limit of open files, such as with `ulimit -n 65536`"
    elif error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        remedy = (
            "The disk, or the server that has it, does not answer as it should; look after it or name another place"
        )
    elif error.errno in (errno.ENOTDIR, errno.EEXIST) and not (found := _existing(path)).is_dir():
        reason, remedy = f"{found} is a file", "Name a place inside a folder"
    else:
        remedy = "Name another place"
    return UserError(f"cannot write {path}: {reason}. {remedy}.{f' {kept}' if kept else ''}")


def check_writable(path: Path, folder: bool) -> None:
    """Finds out whether a file, or files in a folder, can be written, before anything is computed for them.

    Nothing stays behind: a folder that is missing is not made.

    Raises:
        UserError: when the disk is full or read-only, when the folder is not the user's to write in, when a parent is
            a file, or when there is a folder where a file is wanted, or the other way round.
    """
    if path.exists() and path.is_dir() != folder:
        is_, wanted = ("a folder", "file") if path.is_dir() else ("a file", "folder")
        raise UserError(f"cannot write {path}: it is {is_}. Name a {wanted}.")
    with writing(path):
        if path.exists() and not folder:
            path.open("ab").close()
            if not path.is_file():  # a device or a pipe has no place for what is not whole
                return
        where = path if path.is_dir() else _existing(path.absolute().parent)
        if not where.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        probe = where / _own_name(path.absolute().name)
        try:
            probe.write_bytes(_PROBE)
        finally:
            probe.unlink(missing_ok=True)


def is_writable(folder: Path) -> bool:
    """Whether files can be written in a folder, as `check_writable` finds it."""
    try:
        check_writable(folder, folder=True)
    except UserError:
        return False
    return True


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


# ------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write, which becomes `path` when the block ends and vanishes when it fails.

    A device or a pipe is written straight away. OSError passes through.
    """
    path = path.resolve()  # where it is a link, what it points to is replaced
    if path.exists() and not path.is_file():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    part = path.with_name(_own_name(path.name))
    with _locked(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY):
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text; it appears whole. OSError passes through."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file with two blanks of indent; it appears whole. OSError passes through."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None when there is no such file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Make it a file that you may read.") from error
    except (ValueError, RecursionError) as error:  # not UTF-8 is a ValueError too
        raise UserError(f"{path} is not valid JSON ({one_line(error)}). Copy the file again.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is a JSON {type(raw).__name__}, not an object. Copy the file again.")
    return raw


def one_line(error: Exception | str) -> str:
    """What an error says, to be put inside a sentence."""
    return " ".join(str(error).split()).rstrip(".")


# ----------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def appearing_whole(folder: Path | str, replace: bool = False) -> Iterator[Path]:
    """Yields a folder to fill, which becomes `folder` when the block ends and vanishes when it fails.

    All processes must enter it; the first one makes the folder, and it alone may write there. An empty folder that is
    there already stays, as a mounted disk must, and is filled from a folder inside it.

    Args:
        folder: must not exist, or be empty.
        replace: a folder that is not empty makes room for the new one, when that is whole.

    Raises:
        UserError: when `folder` is not empty, or cannot be written.
    """
    import jax  # whoever only asks a judge that is served writes no such folder, and need not have it
    import numpy as np
    from jax.experimental import multihost_utils

    folder, first = Path(folder).resolve(), jax.process_index() == 0
    occupied = first and is_occupied(folder)
    if multihost_utils.broadcast_one_to_all(np.int32(occupied)) and not replace:
        raise occupied_error(folder)
    token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
    inside = folder.is_dir() and not occupied
    part = (folder if inside else folder.parent) / _own_name(folder.name, token)
    try:
        if not first:
            yield part
        else:
            _remove_stale(folder)
            part.mkdir(parents=True)
            with _locked(part, os.O_RDONLY):
                yield part
                if inside:
                    _move_up(part, folder)
                elif not replace and is_occupied(folder):  # meanwhile
                    raise occupied_error(folder)
                else:
                    _put_in_place(part, folder)
    except BaseException as error:
        if first:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(folder, error, "Nothing else was touched.") from error
        raise
    multihost_utils.sync_global_devices(f"wrote {folder}")


def is_occupied(folder: Path) -> bool:
    """Whether something stands in a folder that is to be filled, or in its place."""
    if folder.is_dir():
        _remove_stale(folder / folder.name)  # what a killed process left inside
        return any(path.name not in _NOTHING for path in folder.iterdir())
    return folder.exists()


def occupied_error(folder: Path) -> UserError:
    """What is said of a folder that is not empty."""
    if folder.is_dir():
        return UserError(f"{folder} exists and is not empty. Give another folder, or remove it first.")
    return UserError(f"{folder} is a file. Give a folder.")


def _move_up(part: Path, folder: Path) -> None:
    """Moves what is whole into the folder around it, config.json last: without it no one takes it for a model."""
    moved = []
    try:
        for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
            os.rename(path, folder / path.name)
            moved.append(folder / path.name)
        part.rmdir()
    except OSError:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def _put_in_place(part: Path, folder: Path) -> None:
    """Gives a folder its name; what had that name before is removed when it has."""
    before = folder.with_name(_own_name(folder.name))
    if folder.is_dir():
        os.rename(folder, before)
    try:
        os.rename(part, folder)
    except OSError:
        if before.is_dir():
            os.rename(before, folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- names that are ours


def _own_name(name: str, token: int | None = None) -> str:
    """A temporary name of what is to be called `name`.

    >>> _own_name("export", token=255)
    '.export.patarm-000000ff'
    """
    return f".{name[:_NAMED]}.patarm-{secrets.randbits(31) if token is None else token:08x}"


def _remove_stale(path: Path) -> None:
    """Removes what processes that are gone have left of earlier attempts to write the same."""
    begin = f".{path.name[:_NAMED]}.patarm-"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for left in list(path.parent.iterdir()):
            if left.name.startswith(begin) and _OURS.fullmatch(left.name) and not _is_held(left):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[None]:
    """Shows others that what stands under a temporary name is being written; not all file systems know locks."""
    handle = os.open(path, flags, 0o666)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _is_held(path: Path) -> bool:
    """Whether someone writes there, or might: where locks are not known, it is not told."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(handle)
