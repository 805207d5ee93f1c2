"""What supervised fine-tuning learns from: a preference with a written judgement of each side.

Strings only; `pipeline` turns them into tokens. Judgements come from a stronger model, or, to try things out, from
`template_judgement`.
"""

import hashlib
from dataclasses import dataclass

from patarm_jax.judge.rubrics import primary
from patarm_jax.types import CHOSEN, REJECTED, Preference

_SCORES = {CHOSEN: (6, 7, 8, 9), REJECTED: (1, 2, 3, 4)}
_FINDING = {CHOSEN: "The response does well", REJECTED: "The response falls short"}


@dataclass(frozen=True)
class JudgedPreference:
    """A preference and, for each side, the judgement that SFT teaches."""

    preference: Preference
    chosen_judgement: str
    rejected_judgement: str


def template_judgement(preference: Preference, side: int) -> str:
    """A judgement written from the label alone: 6 to 9 for the chosen side, 1 to 4 for the rejected one.

    It teaches the form, not taste: nothing in it was read from the response, and the score within its range is drawn
    from a hash of id and side, so that no single number is learnt and every run writes the same.

    >>> prompt = ({"role": "user", "content": "2 + 2?"},)
    >>> print(template_judgement(Preference("a", prompt, "4", "5", "math", ""), REJECTED))
    <think>
    I judge the response by Correctness and Logic first, then by how it fits this prompt.
    </think>
    <generate_rubrics>
    Fit: does the response do what this very prompt asks?
    </generate_rubrics>
    <eval>
    The response falls short on Correctness and Logic, and on Fit.
    </eval>
    <answer>2</answer>
    """
    names = " and ".join(rubric.name for rubric in primary(preference.domain))
    # hashlib, because Python's own hash of a string changes from process to process.
    drawn = hashlib.sha256(f"{side}:{preference.id}".encode()).digest()[0]
    score = _SCORES[side][drawn % len(_SCORES[side])]
    return (
        f"<think>\nI judge the response by {names} first, then by how it fits this prompt.\n</think>\n"
        "<generate_rubrics>\nFit: does the response do what this very prompt asks?\n</generate_rubrics>\n"
        f"<eval>\n{_FINDING[side]} on {names}, and on Fit.\n</eval>\n"
        f"<answer>{score}</answer>"
    )
