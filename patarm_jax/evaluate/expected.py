"""What expected scores did, beside the numbers that the judge drew: how far judgements of one response differ."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Of one judgement: its expected score, the number it drew, and the probability of all but whole numbers from 0 to 10.
Pair = tuple[float, float, float]


@dataclass(frozen=True)
class Spread:
    """Means over responses; None where none has two judgements."""

    outside: float  # the probability of all but whole numbers from 0 to 10
    variance: float | None  # of the expected scores of a response
    variance_drawn: float | None  # of the numbers drawn

    def __str__(self) -> str:
        """A sentence."""
        said = f"of the probability {100 * self.outside:.1f} % lies on no whole number from 0 to 10"
        if self.variance is None:
            return f"Scores are the expected ones; {said}."
        return (
            f"Scores are the expected ones: judgements of a response have a variance of {self.variance:.2f}, the "
            f"numbers drawn of {self.variance_drawn:.2f}; {said}."
        )


def spread_of(responses: Iterable[Sequence[Pair]]) -> Spread | None:
    """Of the readable judgements of each response; None where there are none.

    >>> spread = spread_of([[(5.0, 4.0, 0.25), (6.0, 8.0, 0.5)], [(1.0, 1.0, 0.0)], []])
    >>> spread.outside, spread.variance, spread.variance_drawn
    (0.25, 0.5, 8.0)
    """
    found = [np.array(one) for one in responses if len(one)]
    if not found:
        return None
    outside = float(np.concatenate(found)[:, 2].mean())
    several = [one[:, :2].var(axis=0, ddof=1) for one in found if len(one) > 1]
    if not several:
        return Spread(outside, None, None)
    variance, drawn = np.mean(several, axis=0)
    return Spread(outside, float(variance), float(drawn))
