"""A process as the person who watches it sees it: what it says, and how it is asked to stop."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

# What is said besides when a run cannot write.
TO_RESUME = "Then run the command again to resume from the last checkpoint."


def is_first() -> bool:
    """Whether this is the first of the processes that share a run; one that has not loaded JAX shares none."""
    jax = sys.modules.get("jax")  # whoever only asks a server need not have it
    return jax is None or jax.process_index() == 0


def say(message: str) -> None:
    """One line for the person who watches, if anybody does, from the first process only."""
    if is_first():
        with contextlib.suppress(BrokenPipeError):
            print(message, file=sys.stderr, flush=True)


def print_aside(text: str) -> threading.Thread:
    """Says something, without waiting: where nobody reads it, printing never returns."""

    def print_and_flush() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(text, end="\n" if text else "", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()

    saying = threading.Thread(target=print_and_flush, daemon=True)
    saying.start()
    return saying


_received: list[int] = []  # signals that asked this process to stop


def was_asked() -> bool:
    """Whether SIGTERM or Ctrl-C asked this process to stop."""
    return bool(_received)


def note_signals() -> dict[int, Any]:
    """From now on SIGTERM and Ctrl-C are noted, and a second Ctrl-C stops at once; gives the handlers there were."""
    _received.clear()
    return {number: signal.signal(number, _note) for number in (signal.SIGTERM, signal.SIGINT)}


def _note(number: int, _frame: object) -> None:
    if _received and number == signal.SIGINT:
        raise KeyboardInterrupt
    _received.append(number)
    with contextlib.suppress(OSError):  # print is not reentrant
        os.write(2, b"\nstopping when the current work is done; run the command again to resume\n")


@contextlib.contextmanager
def noted_signals() -> Iterator[None]:
    """Signals are noted while the block runs, and nothing that is said can end it, should nobody read it any more.

    A process that has joined others notes them from then on: what it was asked while it loaded or compiled still holds.
    """
    before = {} if signal.getsignal(signal.SIGTERM) is _note else note_signals()
    streams = sys.stdout, sys.stderr
    unread: tuple[Any, Any] = _Unread(sys.stdout), _Unread(sys.stderr)  # all of a stream that is used
    sys.stdout, sys.stderr = unread
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in before.items():
            signal.signal(number, handler)


class _Unread:
    """A stream whose reader may end before its writer, as `tee` does at the same Ctrl-C: then nothing is said."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes to the stream, or nowhere."""
        with contextlib.suppress(BrokenPipeError):
            return int(self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, where somebody reads it."""
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()
