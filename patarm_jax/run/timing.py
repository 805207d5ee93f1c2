"""How long the phases of a step took, and what was compiled meanwhile."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax


@dataclass(frozen=True)
class Timer:
    """How long the phases of one step took.

    >>> timer = Timer()
    >>> with timer.phase("sample"):
    ...     pass
    >>> list(timer.seconds)
    ['time/sample']
    """

    note: Callable[[str], object] = len  # is told when a phase begins: step and phase
    step: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # "time/<phase>" → wall-clock seconds
    begun: float = field(default_factory=lambda: time.perf_counter())

    @property
    def total(self) -> float:
        """Wall-clock seconds since it was made."""
        return time.perf_counter() - self.begun

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase. Arrays are computed in the background: wait for them inside."""
        self.note(f"step {self.step}: {name}")
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"time/{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


class Compilations:
    """Counts what JAX compiles in this process, one program per shape: a growing count means a shape keeps recompiling.

    Of a resumed run's they differ from an uninterrupted one's, as times do; hence their names.
    """

    def __init__(self) -> None:
        self.counts = {"time/compile": 0.0, "time/compiled_programs": 0.0, "time/programs_from_disk": 0.0}
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)

    def since_last(self) -> dict[str, float]:
        """Seconds and programs since the last call."""
        counts = dict(self.counts)
        self.counts.update(dict.fromkeys(counts, 0.0))
        return counts

    def _took(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.counts["time/compile"] += duration_secs
            self.counts["time/compiled_programs"] += 1

    def _happened(self, event: str, **kwargs: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.counts["time/programs_from_disk"] += 1


@functools.cache
def compilations() -> Compilations:
    """The one count of this process; JAX forgets no listener."""
    return Compilations()
