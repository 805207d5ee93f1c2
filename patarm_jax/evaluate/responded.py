"""A policy's responses to a benchmark's prompts, as those who score them see them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from patarm_jax.evaluate.proportions import limits
from patarm_jax.judge.parse import answer_of
from patarm_jax.types import Message, Preference


class Task(Protocol):
    """What a benchmark asks of a policy."""

    @property
    def id(self) -> str:
        """Names it."""

    @property
    def prompt(self) -> str:
        """The prompt as text, by which files of responses name it."""

    @property
    def messages(self) -> list[Message]:
        """The same as a conversation."""


@dataclass(frozen=True)
class PromptTask:
    """A prompt of any file of prompts."""

    preference: Preference  # with the row that it stands in

    @property
    def id(self) -> str:
        """Names it."""
        return self.preference.id

    @property
    def prompt(self) -> str:
        """The user's last words."""
        return self.preference.prompt[-1]["content"]

    @property
    def messages(self) -> list[Message]:
        """The conversation."""
        return list(self.preference.prompt)


@dataclass(frozen=True)
class Response:
    """What a policy has written."""

    text: str  # all of it, its thinking included
    cut_off: bool = False  # at the limit of new tokens

    @property
    def answer(self) -> str:
        """What is scored: what stands behind the thinking, and without thinking the text as it is; empty where nothing.

        >>> Response("Rice. ").answer, Response("<think>hm</think> Rice.").answer, Response("<think>hm").answer
        ('Rice. ', 'Rice.', '')
        """
        answer = answer_of(self.text) or ""
        return self.text if answer == self.text.strip() else answer

    @property
    def is_lost_in_thought(self) -> bool:
        """Whether it was cut off before its thinking ended."""
        return self.cut_off and bool(self.text.strip()) and not self.answer


@dataclass(frozen=True)
class Share:
    """A share and its 95 % interval, whose units are prompts."""

    value: float
    low: float
    high: float
    count: int  # of what it is a share of

    @property
    def interval(self) -> str:
        """In per cent."""
        return f"{100 * self.low:.1f} … {100 * self.high:.1f}"


def share_of_units(units: Sequence[Sequence[bool]]) -> Share:
    """The share of all that is true, of units that hold several each."""
    return share_of_values([float(np.mean(each)) for each in units], [float(len(each)) for each in units])


def share_of_values(values: Sequence[float], sizes: Sequence[float] = ()) -> Share:
    """The same of units whose shares are known; they hold one each where no sizes are given."""
    size = np.array(sizes or [1.0] * len(values))
    found = limits(np.array(values), size)
    low, high = found.interval
    return Share(float(found.value), float(low), float(high), int(size.sum()))
