"""One writer at a time: a lock that ends with the process that holds it, however that ends.

The lock is the operating system's (flock), on an open file. The file's text only says who holds it: what a killed
process leaves of it is no lock. Programs that are started meanwhile, and forked children, do not inherit it.
"""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from patarm_jax.files import LOCK, writing
from patarm_jax.types import LearntNothing, UserError

# How long a lock of another machine is waited for. When a machine is gone, a shared file system takes its locks back
# after a while: NFS after 90 s.
PATIENCE = 100.0
_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # no locks there
_open: set[int] = set()  # descriptors of the locks of this process


# --------------------------------------------------------------------------------------------- folders and outputs


@contextlib.contextmanager
def hold_folder(folder: Path, say: Callable[[str], None], patience: float = PATIENCE) -> Iterator[None]:
    """Keeps every other process from writing into a folder while the block runs; the folder is made when it is missing.

    A killed process leaves nothing that would keep the next one out. After an error the folder stays held until this
    process ends: what is saved in the background may still be writing. Of several processes the first one holds it.

    Args:
        folder: that is written over time.
        say: tells what is worth knowing, such as that the file system knows no locks.
        patience: seconds that a lock of another machine, which may be gone, is waited for.

    Raises:
        UserError: when another process holds it, naming that process; or when nothing can be written there.
    """
    path = folder.resolve() / LOCK
    made: list[Path] = []
    with writing(folder):
        handle = _kept.pop(path, None)
        if handle is None or not is_file_of(path, handle):
            made = _make(path.parent)
            handle = _acquired(path, folder, made, say, patience)
    try:
        yield
    except BaseException as error:
        has_ended = isinstance(error, LearntNothing)  # in vain, and all is saved
        if handle is not None and not has_ended and any(each != path for each in path.parent.glob("*")):
            _kept[path] = handle
        else:
            _let_go(path, handle, made)
        raise
    _let_go(path, handle, made)


@contextlib.contextmanager
def hold_output(path: Path, say: Callable[[str], None], patience: float = PATIENCE) -> Iterator[None]:
    """Keeps every other process from writing a file, or a folder that appears whole, while the block runs.

    The lock stands beside it, or inside a folder that is there already. A device or a pipe is not held. Arguments and
    errors are those of `hold_folder`.
    """
    about, path = path, path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        yield
        return
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    place = path / LOCK if path.is_dir() else path.with_name(f".{name}{LOCK}")
    with writing(about):
        made = _make(place.parent)
        handle = _acquired(place, about, made, say, patience)
    try:
        yield
    finally:
        _let_go(place, handle, made)


_kept: dict[Path, int] = {}  # locks of folders in which something failed, held until this process ends


def _acquired(path: Path, about: Path, made: list[Path], say: Callable[[str], None], patience: float) -> int | None:
    try:
        return acquire(path, about, say, patience)
    except BaseException:
        _remove_empty(made)
        raise


def _let_go(path: Path, handle: int | None, made: list[Path]) -> None:
    if handle is not None:
        release(path, handle)
    _remove_empty(made)


def _make(folder: Path) -> list[Path]:
    """Makes a folder with its parents; gives those that were missing, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders that were made in which nothing was written."""
    with contextlib.suppress(OSError):
        for each in folders:
            each.rmdir()


# ------------------------------------------------------------------------------------------------- a file's lock


def lock(handle: int) -> bool | None:
    """Takes the lock of an open file, which must be open for writing on some file systems.

    Returns:
        whether it was taken; False: another one has it; None: this file system knows no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _UNKNOWN:
            return None
        raise
    return True


def acquire(path: Path, about: Path, say: Callable[[str], None], patience: float = PATIENCE) -> int | None:
    """The descriptor of a file that is made, locked, and tells who locked it; None where locks are not known.

    Args:
        path: of the lock's file.
        about: what is locked, as it is called in what is said.
        say: tells that a file system knows no locks, and that another machine is waited for.
        patience: seconds that a lock of another machine is waited for.

    Raises:
        UserError: when another process has it. OSError passes through.
    """
    waiting, until = False, time.monotonic() + patience
    while True:
        try:
            handle = _opened(path)
        except FileNotFoundError:  # whoever had made the folder has ended, and found nothing in it
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            taken = lock(handle)
        except OSError:
            os.close(handle)
            raise
        if taken is None:
            os.close(handle)
            path.unlink(missing_ok=True)
            say(f"{about} is on a file system without locks: nothing keeps a second process from writing there too")
            return None
        if taken and is_file_of(path, handle):
            _sign(handle)
            _open.add(handle)
            return handle
        os.close(handle)
        if taken:  # whoever had it has ended, and removed the file between our opening and locking it
            continue
        who = _signature(path)
        if who.get("host", socket.gethostname()) == socket.gethostname() or time.monotonic() > until:
            raise held(about, who)
        if not waiting:
            say(
                f"{about} is being written by another process{_named(who)}; waiting up to {patience:.0f} s, in case "
                "that machine is gone"
            )
        waiting = True
        time.sleep(min(2.0, patience))


def release(path: Path, handle: int) -> None:
    """Gives a lock back and removes its file, in this order for others: the file is gone before the lock is."""
    with contextlib.suppress(OSError):
        path.unlink()
    _open.discard(handle)
    os.close(handle)


class Held(UserError):
    """Another process writes there."""


def held(about: Path, who: dict[str, object] | None = None) -> Held:
    """What is said of a file or folder that another process is writing."""
    return Held(
        f"{about} is being written by another process{_named(who or {})}. Wait until it has ended, stop it, or name "
        "another place."
    )


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        # Left, or held, by another user of this folder. Reading is enough for a lock on a local disk.
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def is_file_of(path: Path, handle: int) -> bool:
    """Whether a lock's file is the one that stands there, and not one that was removed."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle))
    return False


def _sign(handle: int) -> None:
    """Writes down who has the lock; a disk that is full, or another user's file, does not take it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def _signature(path: Path) -> dict[str, object]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _named(who: dict[str, object]) -> str:
    """Who has a lock, as far as its file says.

    >>> _named({"pid": 17, "host": "node3", "since": "2026-01-02 03:04:05 UTC"})
    ', pid 17 on node3 since 2026-01-02 03:04:05 UTC'
    """
    if not {"pid", "host", "since"} <= who.keys():
        return ""
    return f", pid {who['pid']} on {who['host']} since {who['since']}"


def _forget() -> None:
    """In a forked child: were it to keep the descriptors, the locks would outlive this process."""
    for handle in _open:
        with contextlib.suppress(OSError):
            os.close(handle)
    _open.clear()
    _kept.clear()


def _release_kept() -> None:
    """At the end of the process, when what was saved in the background is written."""
    while _kept:
        release(*_kept.popitem())


os.register_at_fork(after_in_child=_forget)
atexit.register(_release_kept)
