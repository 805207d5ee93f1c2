"""Whether to stop: one process is asked, by a signal, and all do."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from patarm_jax.run.peers import stop_asked_of_any
from patarm_jax.run.process import noted_signals, was_asked


@contextlib.contextmanager
def stop_after_steps() -> Iterator[Callable[[], bool]]:
    """Yields `asked()`: whether to save and stop after this step; all processes call it after each, and agree."""
    with noted_signals():
        yield _any_was_asked if jax.process_count() > 1 else was_asked


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yields `asked()`: whether to stop, where each process does work of its own and others need not call it."""
    with noted_signals():
        yield lambda: stop_asked_of_any(was_asked())


def _any_was_asked() -> bool:
    return bool(multihost_utils.process_allgather(np.int32(was_asked())).any())
