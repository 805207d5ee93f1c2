"""How far a command has come: a bar on a terminal, elsewhere a line now and then, and what it took at the end."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Never, Protocol, TextIO

from tqdm import tqdm

from patarm_jax.run.process import is_first

Shown = Mapping[str, float | str]


class Progress(Protocol):
    """Takes note of a step that is done, what to show of it, and the tokens since the command began."""

    def __call__(self, step: int, values: Shown, tokens: int = 0) -> None:
        """`values` are of this step; a text is shown as it is."""


def percent(share: float) -> str:
    """A share as one reads it.

    >>> [percent(share) for share in (0.0, 0.004, 0.125, 1.0, float("nan"))]
    ['0 %', '0.4 %', '12.5 %', '100 %', '– %']
    """
    return "– %" if share != share else f"{round(100 * share, 1):g} %"


@contextlib.contextmanager
def progress(
    steps: int,
    done: int = 0,
    *,
    unit: str = "step",
    every: float = 30.0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Yields `report(step, values, tokens)`, to be called after each step.

    On a terminal it moves a bar; elsewhere it prints a line after the first step, after the last one, and in between
    when `every` seconds have passed since the last line. The pace is that of the steps since the last line:

        step 10/200  loss 1.234  since step 4: 2.1 s/step, 5,210 tokens/s  6 min left

    The first line tells no time left, for the first step compiles. At the end comes what all steps took together,
    those of earlier starts of the run left out.

    Args:
        steps: of the whole run.
        done: steps that were done when the run was resumed.
        unit: what is counted.
        every: seconds.
        stream: stderr unless given.
        clock: seconds.
    """
    stream = stream or sys.stderr
    if not is_first():
        yield lambda step, values, tokens=0: None
        return
    begun, last = clock(), (done, 0)

    def noted(report: Progress) -> Progress:
        def note(step: int, values: Shown, tokens: int = 0) -> None:
            nonlocal last
            last = step, tokens
            report(step, values, tokens)

        return note

    if stream.isatty():
        with tqdm(total=steps, initial=done, unit=unit, file=stream, dynamic_ncols=True) as bar:
            yield noted(_bar(bar))
    else:
        yield noted(_lines(steps, done, unit, every, stream, clock))
    if last[0] > done + 1:
        seconds, count = clock() - begun, last[0] - done
        pace = _pace(seconds, count, last[1], unit)
        print(f"{count:,} {unit}s in {_span(seconds)}: {pace} over all of them", file=stream, flush=True)


def _bar(bar: "tqdm[Never]") -> Progress:
    def move(step: int, values: Shown, tokens: int = 0) -> None:
        bar.set_postfix_str("  ".join(_named(values)), refresh=False)
        bar.update(step - bar.n)

    return move


def _lines(steps: int, done: int, unit: str, every: float, stream: TextIO, clock: Callable[[], float]) -> Progress:
    first, (last_step, last_time, last_tokens) = done + 1, (done, clock(), 0)

    def report(step: int, values: Shown, tokens: int = 0) -> None:
        nonlocal last_step, last_time, last_tokens
        now = clock()
        if step not in (first, steps) and now - last_time < every:
            return
        seconds, count = now - last_time, max(1, step - last_step)
        parts = [f"{unit} {step}/{steps}", *_named(values)]
        if step == first < steps:
            parts.append(f"the first in {_span(seconds)}")
        else:
            pace = _pace(seconds, count, tokens - last_tokens, unit)
            parts += [f"since {unit} {last_step}: {pace}", f"{_span(seconds / count * (steps - step))} left"]
        print("  ".join(parts), file=stream, flush=True)
        last_step, last_time, last_tokens = step, now, tokens

    return report


def _named(values: Shown) -> list[str]:
    return [f"{name} {value if isinstance(value, str) else format(value, '.4g')}" for name, value in values.items()]


def _pace(seconds: float, count: int, tokens: int, unit: str) -> str:
    """Seconds for one, or how many in a second, and tokens where they are counted.

    >>> _pace(21.0, 10, 0, "step"), _pace(0.5, 10, 800, "question")
    ('2.1 s/step', '20 questions/s, 1,600 tokens/s')
    """
    seconds = max(seconds, 1e-9)
    each = seconds / count
    pace = (
        f"{each:.0f} s/{unit}" if each >= 10 else f"{each:.2g} s/{unit}" if each >= 1 else f"{1 / each:.3g} {unit}s/s"
    )
    return f"{pace}, {tokens / seconds:,.0f} tokens/s" if tokens else pace


def _span(seconds: float) -> str:
    """Seconds as one reads them.

    >>> [_span(seconds) for seconds in (0, 59.4, 100, 3599, 11_400)]
    ['0 s', '59 s', '2 min', '1 h 0 min', '3 h 10 min']
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
