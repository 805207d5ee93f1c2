"""How often a judge of two prefers a policy's responses to a baseline's, asked in both orders."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patarm_jax.evaluate.responded import PromptTask, Response, Share, share_of_values

Votes = Sequence[bool | None]  # whether each judgement chose the policy's response; None where it could not be read


@dataclass(frozen=True)
class Comparison:
    """What a judge says of a policy's response beside a baseline's."""

    first: Votes  # where the policy's stands first
    second: Votes

    @property
    def outcome(self) -> float:
        """1 where most judgements of both orders choose the policy's response, 0 where most do not, else ½.

        It is ½ too where none of one order could be read: the other alone may only like the place.

        >>> Comparison([True, True], [True, False]).outcome, Comparison([True], [False]).outcome
        (1.0, 0.5)
        >>> Comparison([None, False], [False, None]).outcome, Comparison([True], [None]).outcome
        (0.0, 0.5)
        """
        chosen = [vote for vote in (*self.first, *self.second) if vote is not None]
        return 0.5 if self.is_unread else 0.5 * (1.0 + float(np.sign(2 * sum(chosen) - len(chosen))))

    @property
    def is_unread(self) -> bool:
        """Whether no judgement of one of the orders could be read."""
        return any(all(vote is None for vote in votes) for votes in (self.first, self.second))


@dataclass(frozen=True)
class Scored:
    """Everything that was measured."""

    name: str
    baseline: str
    judge: str
    tasks: Sequence[PromptTask]
    ours: Sequence[Response]
    theirs: Sequence[Response]
    # Of each prompt; None where not both have an answer: then the one that has wins, and none where neither has.
    comparisons: Sequence[Comparison | None]

    @cached_property
    def outcomes(self) -> list[float]:
        """1, ½ or 0 of each prompt."""
        return [
            compared.outcome if compared else 0.5 * (1.0 + bool(one.answer.strip()) - bool(other.answer.strip()))
            for compared, one, other in zip(self.comparisons, self.ours, self.theirs, strict=True)
        ]

    @cached_property
    def numbers(self) -> dict[str, Share]:
        """Shares of the prompts, with intervals."""
        every = self.outcomes
        return {
            "win_rate": share_of_values(every),
            "wins": share_of_values([float(one == 1.0) for one in every]),
            "ties": share_of_values([float(one == 0.5) for one in every]),
            "losses": share_of_values([float(one == 0.0) for one in every]),
        }

    @property
    def unread(self) -> int:
        """Prompts of which no judgement of one of the orders could be read, which are ties."""
        return sum(one is not None and one.is_unread for one in self.comparisons)

    @property
    def without_answer(self) -> tuple[int, int]:
        """How many responses are none: the policy's, and the baseline's."""
        ours, theirs = (sum(not one.answer.strip() for one in side) for side in (self.ours, self.theirs))
        return ours, theirs

    @property
    def first_chosen(self) -> float | None:
        """The share of readable judgements that choose the response that stands first; ½ without a bias of position.

        None where none could be read.
        """
        compared = [one for one in self.comparisons if one is not None]
        first = [vote for one in compared for vote in one.first if vote is not None]
        second = [not vote for one in compared for vote in one.second if vote is not None]
        return float(np.mean([*first, *second])) if first or second else None

    @property
    def lengths(self) -> tuple[float, float]:
        """Characters of an answer in the mean, of the policy and of the baseline."""
        ours, theirs = (float(np.mean([len(one.answer) for one in side])) for side in (self.ours, self.theirs))
        return ours, theirs
