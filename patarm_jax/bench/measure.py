"""Clocks and limits: how long a call takes, how fast this machine is, how much memory was needed."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """How long calls took."""

    first: float  # seconds of the first call, compilation included
    seconds: tuple[float, ...]  # those of the later calls

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """(slowest − fastest) / median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


@dataclass(frozen=True)
class Roofline:
    """What all devices together can do, measured here and now."""

    flops: float  # multiplications and additions per second in a large matmul
    bandwidth: float  # bytes per second read from the devices' memory


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """What a call gives, and the seconds until it is there."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def clock(call: Callable[[], object]) -> float:
    """Seconds until what a call gives is there."""
    return timed(call)[1]


def time_calls(call: Callable[[], object], repeats: int) -> Timing:
    """The first call apart, one to warm up, then `repeats`."""
    first = clock(call)
    clock(call)
    return Timing(first, tuple(clock(call) for _ in range(repeats)))


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Calls in turns, so that a noisy machine is as noisy to each."""
    first = {name: clock(call) for name, call in calls.items()}
    for call in calls.values():
        clock(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(clock(call))
    return {name: Timing(first[name], tuple(each)) for name, each in seconds.items()}


def limits(dtype: str) -> Roofline:
    """The best of several tries on one device, times the number of devices."""
    size, length = (2048, 2**26) if jax.default_backend() == "cpu" else (8192, 2**29)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1))
    multiply = jax.jit(lambda a, b: a @ b)
    matmul = min(time_calls(lambda: multiply(a, b), 10).seconds)
    x = jnp.ones(length, dtype)
    add = jax.jit(lambda x: x.sum(dtype=jnp.float32))
    read = min(time_calls(lambda: add(x), 10).seconds)
    return Roofline(2 * size**3 / matmul * jax.device_count(), x.nbytes / read * jax.device_count())


def host_peak() -> int:
    """Bytes that this process held in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak() -> int | None:
    """Bytes of the fullest device at most; None where the backend does not count them."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return max(peaks) if peaks else None
