"""A process as the person who watches it sees it: what it says, and how it is asked to stop."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


def say(message: str) -> None:
    """One line for the person who watches, from the first process only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether SIGTERM or Ctrl-C asked this run to save and stop after a step.

    A second Ctrl-C stops at once. Of several processes, all stop after the same step, whichever was asked: there JAX
    has the signal SIGTERM, and asking it is a synchronisation.
    """
    together = jax.process_count() > 1
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if together:
            os.kill(os.getpid(), signal.SIGTERM)
        os.write(  # print is not reentrant
            2, b"\nstopping when what is under way is done; the same command goes on from there\n"
        )

    numbers = (signal.SIGINT,) if together else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield multihost_utils.reached_preemption_sync_point if together else lambda step: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
