"""Rewards by form alone, to be set beside a judge's: what is repeated, how long a response is, how it is laid out.

None is on by itself. They are called as TRL calls reward functions, and named like any other in a policy's config:

    reward:
      sources:
        - {kind: judge, model: runs/judge}
        - {kind: function, function: "patarm_jax.shaping:repeated", weight: -2.0}
        - {kind: function, function: "patarm_jax.shaping:tokens", weight: -0.001}
"""

import re
from collections.abc import Sequence
from typing import Any

from patarm_jax.types import Message

_WORDS = 4  # of a phrase that is repeated


def repeated(completions: Sequence[str | Sequence[Message]], **_: Any) -> list[float]:
    """The share of phrases of four words that the response has said before, from 0 to below 1.

    >>> repeated([[{"role": "assistant", "content": "a b c d a b c d"}], [{"role": "assistant", "content": "a b"}]])
    [0.2, 0.0]
    """
    return [_repeated(_text(completion).split()) for completion in completions]


def _text(completion: str | Sequence[Message]) -> str:
    """Of a response as text, or as its one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def _repeated(words: Sequence[str]) -> float:
    phrases = [tuple(words[first : first + _WORDS]) for first in range(len(words) - _WORDS + 1)]
    return (len(phrases) - len(set(phrases))) / len(phrases) if phrases else 0.0


def tokens(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """How many tokens were written, the thinking included and the end token not.

    >>> tokens([[1, 2, 3], []])
    [3.0, 0.0]
    """
    return [float(len(ids)) for ids in completion_ids]


def plain(completions: Sequence[str | Sequence[Message]], **_: Any) -> list[float]:
    """1 for a response in plain paragraphs, 0 for one with a heading, a list, a table or bold type in Markdown.

    >>> plain([[{"role": "assistant", "content": "Rice."}], [{"role": "assistant", "content": "- Rice"}]])
    [1.0, 0.0]
    """
    return [float(_MARKDOWN.search(_text(completion)) is None) for completion in completions]


_MARKDOWN = re.compile(r"^\s*(?:#{1,6}\s|[-*+]\s|\d+[.)]\s|\|)|\*\*|__", re.MULTILINE)
