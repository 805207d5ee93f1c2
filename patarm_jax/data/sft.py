"""What supervised fine-tuning learns from: a preference with a written judgement of each side, or in each order.

Strings only; `pipeline` turns them into tokens. Judgements come from a stronger model, or, to try things out, from the
templates here.
"""

import hashlib
from dataclasses import dataclass

from patarm_jax.judge.checklist import render_checklist
from patarm_jax.judge.criteria import Criterion, criteria_of, judged_by, render_comparison, render_criteria
from patarm_jax.judge.rubrics import primary
from patarm_jax.types import CHOSEN, REJECTED, Preference

_SCORES = {CHOSEN: (6, 7, 8, 9), REJECTED: (1, 2, 3, 4)}
_FINDING = {CHOSEN: "The response does well", REJECTED: "The response falls short"}


@dataclass(frozen=True)
class JudgedPreference:
    """A preference and, for each question about it, the judgement that SFT teaches."""

    preference: Preference
    # Of the chosen and of the rejected response; of a judge of pairs, with the chosen one first and with it second; of
    # a generator, the rubric alone, and of a policy the response.
    judgements: tuple[str, ...]


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
    reasoning = f"I judge the response by {names} first, then by how it fits this prompt."
    return _in_form(reasoning, f"{_FINDING[side]} on {names}, and on Fit.", str(score))


def template_choice(preference: Preference, place: int) -> str:
    """A pairwise judgement written from the label alone; as `template_judgement`, it teaches the form, not taste.

    Args:
        preference: that is judged.
        place: where the chosen response stands, 0 for A and 1 for B.

    >>> prompt = ({"role": "user", "content": "2 + 2?"},)
    >>> print(template_choice(Preference("a", prompt, "4", "5", "math", ""), 1))
    <think>
    I compare the responses by Correctness and Logic first, then by how they fit this prompt.
    </think>
    <generate_rubrics>
    Fit: does the response do what this very prompt asks?
    </generate_rubrics>
    <eval>
    Response B does better on Correctness and Logic, and on Fit.
    </eval>
    <answer>B</answer>
    """
    names = " and ".join(rubric.name for rubric in primary(preference.domain))
    chosen = "AB"[place]
    reasoning = f"I compare the responses by {names} first, then by how they fit this prompt."
    return _in_form(reasoning, f"Response {chosen} does better on {names}, and on Fit.", chosen)


def template_rubric(preference: Preference) -> str:
    """A rubric written from the domain alone; it teaches the form, and nothing of the prompt.

    >>> prompt = ({"role": "user", "content": "2 + 2?"},)
    >>> print(template_rubric(Preference("a", prompt, "4", "5", "math", "")))
    1. The response does what this very request asks for. [Hard Rule]
    2. The response does well on Correctness. [Principle]
    3. The response does well on Logic. [Principle]
    """
    first = Criterion("The response does what this very request asks for.", "Hard Rule")
    names = [rubric.name for rubric in primary(preference.domain)]
    return render_criteria([first, *(Criterion(f"The response does well on {name}.", "Principle") for name in names)])


def template_comparison(preference: Preference, place: int) -> str:
    """A judgement by the preference's rubric, written from the label alone; it teaches the form, not taste.

    Args:
        preference: that is judged.
        place: where the chosen response stands, 0 for A and 1 for B.

    >>> prompt = ({"role": "user", "content": "2 + 2?"},)
    >>> rubric = "1. The response is right. [Hard Rule]"
    >>> print(template_comparison(Preference("a", prompt, "4", "5", "math", "", rubric=rubric), 1))
    --- Compliance Check ---
    Identified Gatekeeper Criterion: Criterion 1
    --- Analysis ---
    **Response A:**
    - Criterion 1 [Hard Rule]: Justification: Response A falls short of it.
    **Response B:**
    - Criterion 1 [Hard Rule]: Justification: Response B meets it.
    --- Final Judgment ---
    Justification: Response B meets the rubric better.
    Winner: Response B
    """
    chosen, criteria = "AB"[place], criteria_of(preference.rubric)

    def findings(letter: str) -> list[str]:
        finding = "meets it" if letter == chosen else "falls short of it"
        return [judged_by(criterion, f"Response {letter} {finding}.") for criterion in criteria]

    why = f"Response {chosen} meets the rubric better."
    return render_comparison("Criterion 1", findings("A"), findings("B"), why, chosen)


def template_checklist(preference: Preference, side: int) -> str:
    """A checklist of one response by the preference's rubric, written from the label alone; it teaches the form.

    >>> prompt = ({"role": "user", "content": "2 + 2?"},)
    >>> rubric = "1. The response is right. [Hard Rule]"
    >>> template_checklist(Preference("a", prompt, "4", "5", "math", "", rubric=rubric), REJECTED)
    '{"1": {"why": "It falls short of this.", "met": false}}'
    """
    found = ("It meets this.", True) if side == CHOSEN else ("It falls short of this.", False)
    return render_checklist([found] * (len(criteria_of(preference.rubric)) or 1))


def _in_form(reasoning: str, finding: str, answer: str) -> str:
    return (
        f"<think>\n{reasoning}\n</think>\n"
        "<generate_rubrics>\nFit: does the response do what this very prompt asks?\n</generate_rubrics>\n"
        f"<eval>\n{finding}\n</eval>\n"
        f"<answer>{answer}</answer>"
    )
