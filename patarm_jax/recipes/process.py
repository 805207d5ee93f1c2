"""A process among others: how it finds them, speaks to the person who watches, and is asked to stop."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from patarm_jax.config import MeshSection
from patarm_jax.types import UserError


def start_processes(section: MeshSection) -> None:
    """Joins the other processes of a pod, before any device is touched."""
    if section.distributed == "auto" and not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(
                section.coordinator or None,
                section.processes or None,
                None if section.process_id < 0 else section.process_id,
            )
        except (ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"mesh.distributed is auto and the other processes were not found: {reason}. "
                "Set mesh.coordinator, mesh.processes and mesh.process_id, or mesh.distributed to none."
            ) from error


def say(message: str) -> None:
    """One line for the person who watches, from the first process only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields `asked(step)`: whether SIGTERM or Ctrl-C asked this run to save and stop after a step.

    A second Ctrl-C stops at once. Of several processes, all stop after the same step; there JAX has the signal, and
    asking it is a synchronisation.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        os.write(
            2, b"\nstopping when what is under way is done; the same command goes on from there\n"
        )  # print is not reentrant

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
