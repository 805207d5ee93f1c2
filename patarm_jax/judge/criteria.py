"""Rubrics that a model writes for one request, and judgements of two responses by such a rubric: read, never guessed.

The two texts of Rubric-ARM. A rubric is a numbered list and nothing else:

    1. The response names three primes. [Hard Rule]
    2. The response explains no more than was asked. [Principle]

A judgement by it has these lines, each once and in this order, with a line for each criterion of the rubric:

    --- Compliance Check ---
    Identified Gatekeeper Criterion: …
    --- Analysis ---
    **Response A:**
    - Criterion 1 [Hard Rule]: Justification: …
    **Response B:**
    - Criterion 1 [Hard Rule]: Justification: …
    --- Final Judgment ---
    Justification: …
    Winner: Response A

What is out of form is BAD_TAGS, a winner that is neither of the two BAD_SCORE. A model may have thought first: nothing
is read from there.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from patarm_jax.judge.parse import WHITESPACE, Unreadable, cut_to_quote, holds, thinking_if_any
from patarm_jax.types import Judgement, Status

CriterionKind = Literal["Hard Rule", "Principle"]  # what the request asks for outright; what makes any response good
COMPLIANCE, ANALYSIS, FINAL = "--- Compliance Check ---", "--- Analysis ---", "--- Final Judgment ---"
OF_A, OF_B = "**Response A:**", "**Response B:**"
HEADINGS = (COMPLIANCE, ANALYSIS, OF_A, OF_B, FINAL)
GATEKEEPER, JUSTIFICATION, WINNER = "Identified Gatekeeper Criterion:", "Justification:", "Winner:"

_ITEM = re.compile(r"([0-9]{1,4})\.[ \t]+(.*)")
_KIND = re.compile(rf"\[({'|'.join(get_args(CriterionKind))})\]")
_NAMES_A_RESPONSE = re.compile(r"\bResponse\s+[AB]\b|\b(?i:Winner)\s*:")
_CRITERION = re.compile(r"(?:[-*][ \t]+)?Criterion ([0-9]{1,4})(?:[ \t]+\[[^\]]*\])?:(.*)")


@dataclass(frozen=True)
class Criterion:
    """One item of a rubric."""

    text: str  # one line that begins with "The response", without its kind
    kind: CriterionKind


def parse_rubric(text: str) -> Judgement:
    r"""Reads a rubric that a model wrote; `generated_rubrics` is the list as `render_criteria` writes it.

    >>> rubric = parse_rubric("1. The response is in French. [Hard Rule]\n\n2. The response is kind.  [Principle]")
    >>> print(rubric.status.name, rubric.generated_rubrics, sep="\n")
    OK
    1. The response is in French. [Hard Rule]
    2. The response is kind. [Principle]
    >>> parse_rubric("1. The response is kind.").reason
    "item 1, 'The response is kind.', does not end with [Hard Rule] or [Principle]"
    """
    try:
        thinking, start = thinking_if_any(text)
        criteria = list(_criteria(_lines(text[start:])))
    except Unreadable as fault:
        return Judgement(text, Status.BAD_TAGS, str(fault))
    shown = render_criteria(criteria)
    return Judgement(text, Status.OK, "", thinking=thinking.strip(), generated_rubrics=shown)


def shown_rubric(text: str) -> str:
    r"""What a judge is shown of what a generator wrote: the rubric as `render_criteria` writes it.

    Out of form, what stands behind the thinking, save lines that speak of response A or B or of a winner: no rubric
    knows of these, and they would tell the judge how to decide. Nothing, where the thinking has no end.

    >>> shown_rubric("<think>A poem.</think>Be kind.\nResponse A is.")
    'Be kind.'
    """
    read = parse_rubric(text)
    if read.status is Status.OK:
        return read.generated_rubrics
    try:
        behind = text[thinking_if_any(text)[1] :]
    except Unreadable:
        return ""
    return "\n".join(line for line in behind.splitlines() if not _NAMES_A_RESPONSE.search(line)).strip()


def criteria_of(rubric: str) -> tuple[Criterion, ...]:
    """The criteria of a rubric's text; none where it is empty or out of form.

    >>> criteria_of("1. The response is kind. [Principle]")
    (Criterion(text='The response is kind.', kind='Principle'),)
    >>> criteria_of("Be kind.")
    ()
    """
    try:
        return tuple(_criteria(_lines(rubric)))
    except Unreadable:
        return ()


def render_criteria(criteria: Sequence[Criterion]) -> str:
    """A rubric's text, numbered from 1; `criteria_of` gives the criteria back."""
    return "\n".join(f"{number}. {one.text} [{one.kind}]" for number, one in enumerate(criteria, 1))


def render_comparison(gatekeeper: str, of_a: Sequence[str], of_b: Sequence[str], why: str, winner: str) -> str:
    """A judgement by a rubric as `parse_rubric_judge` reads it.

    Args:
        gatekeeper: the criterion that is checked first.
        of_a: what is said of response A by each criterion, from `judged_by`.
        of_b: the same of response B.
        why: the justification of the choice.
        winner: A or B.
    """
    lines = [COMPLIANCE, f"{GATEKEEPER} {gatekeeper}", ANALYSIS]
    for heading, said in ((OF_A, of_a), (OF_B, of_b)):
        lines += [heading, *(f"- Criterion {number} {one}" for number, one in enumerate(said, 1))]
    return "\n".join([*lines, FINAL, f"{JUSTIFICATION} {why}", f"{WINNER} Response {winner}"])


def judged_by(criterion: Criterion, finding: str) -> str:
    """What is said of a response by one criterion, for `render_comparison`."""
    return f"[{criterion.kind}]: {JUSTIFICATION} {finding}"


def parse_rubric_judge(text: str, criteria: int | None = None) -> Judgement:
    r"""Reads a judgement of two responses by a rubric; `choice` is the winner.

    Args:
        text: what the judge wrote.
        criteria: how many the rubric has; None where any number will do, as long as it is the same for both responses.

    >>> form = "\n".join([
    ...     COMPLIANCE, GATEKEEPER + " length", ANALYSIS, OF_A, "- Criterion 1 [Hard Rule]: Justification: Too long.",
    ...     OF_B, "- Criterion 1 [Hard Rule]: Justification: Short.", FINAL, "Justification: B is short.", "Winner: {}",
    ... ])
    >>> parse_rubric_judge(form.format("Response B")).choice
    'B'
    >>> judgement = parse_rubric_judge(form.format("neither"))
    >>> judgement.status.name, judgement.choice, judgement.reason
    ('BAD_SCORE', None, "Winner: holds 'neither'; it must hold Response A or Response B")
    >>> parse_rubric_judge(form.format("Response B"), criteria=2).reason
    '**Response A:** has 1 criterion and the rubric has 2'
    """
    try:
        thinking, start = thinking_if_any(text)
        compliance, analysis, of_a, of_b, final = _parts(_lines(text[start:]))
        _said_behind(GATEKEEPER, compliance, COMPLIANCE)
        if analysis:
            raise Unreadable(f"{cut_to_quote(analysis[0])!r} stands between {ANALYSIS} and {OF_A}")
        _check_counts(_criteria_judged(of_a, OF_A), _criteria_judged(of_b, OF_B), criteria)
        winner = _winner(final)
    except Unreadable as fault:
        return Judgement(text, Status.BAD_TAGS, str(fault))
    evaluation = "\n".join([OF_A, *of_a, OF_B, *of_b, *final[:-1]])
    choice, reason = _choice(winner)
    return Judgement(
        text,
        Status.BAD_SCORE if choice is None else Status.OK,
        reason,
        choice=choice,
        thinking=thinking.strip(),
        evaluation=evaluation,
    )


def _lines(text: str) -> list[str]:
    """Those that are not blank, without the white space around them."""
    return [line for line in (line.strip(WHITESPACE) for line in text.split("\n")) if line]


def _criteria(lines: Sequence[str]) -> Iterator[Criterion]:
    if not lines:
        raise Unreadable("nothing is written")
    for number, line in enumerate(lines, 1):
        item = _ITEM.fullmatch(line)
        if item is None:
            raise Unreadable(f"line {number}, {cut_to_quote(line)!r}, is no item of a numbered list")
        if item[1] != str(number):
            raise Unreadable(f"item {number} has the number {item[1]}")
        yield _criterion(f"item {number}, {cut_to_quote(item[2])!r},", item[2])


def _criterion(name: str, text: str) -> Criterion:
    if not text.startswith("The response "):
        raise Unreadable(f'{name} does not begin with "The response"')
    kinds = list(_KIND.finditer(text))
    if not kinds or kinds[-1].end() < len(text):
        raise Unreadable(f"{name} does not end with [Hard Rule] or [Principle]")
    if len(kinds) > 1:
        raise Unreadable(f"{name} has more than one kind")
    if spoken := _NAMES_A_RESPONSE.search(text):
        raise Unreadable(f"{name} says {spoken.group()!r}: a rubric is written before there are responses")
    said = text[: kinds[0].start()].rstrip(WHITESPACE)
    if said == "The response" or len(said.splitlines()) > 1:
        raise Unreadable(f"{name} is not one line that says something of the response")
    kind: CriterionKind = "Hard Rule" if kinds[0][1] == "Hard Rule" else "Principle"
    return Criterion(said, kind)


def _parts(lines: Sequence[str]) -> list[list[str]]:
    """What stands behind each heading."""
    found = [line for line in lines if line in HEADINGS]
    for heading in HEADINGS:
        if found.count(heading) != 1:
            raise Unreadable(f"{heading} is {'repeated' if heading in found else 'missing'}")
    for heading, due in zip(found, HEADINGS, strict=True):
        if heading != due:
            raise Unreadable(f"{heading} is out of order: {due} should come first")
    if lines[0] != COMPLIANCE:
        raise Unreadable(f"{COMPLIANCE} does not come first: {cut_to_quote(lines[0])!r} stands before it")
    starts = [lines.index(heading) for heading in HEADINGS]
    return [list(lines[start + 1 : end]) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]


def _said_behind(label: str, lines: Sequence[str], heading: str) -> None:
    """Nothing is wrong where the lines begin with a label that something follows."""
    if not lines or not lines[0].startswith(label):
        raise Unreadable(f"{label} does not follow {heading}")
    if not " ".join(lines).removeprefix(label).strip(WHITESPACE):
        raise Unreadable(f"{label} is empty")


def _criteria_judged(lines: Sequence[str], heading: str) -> tuple[str, int]:
    """The heading, and how many criteria stand behind it, each with a number and a justification."""
    said: list[str] = []
    for line in lines:
        criterion = _CRITERION.fullmatch(line)
        if criterion is None and not said:
            raise Unreadable(f"{cut_to_quote(line)!r} stands between {heading} and its criteria")
        if criterion is None:
            said[-1] += f" {line}"
            continue
        if criterion[1] != str(len(said) + 1):
            raise Unreadable(f"criterion {len(said) + 1} of {heading} has the number {criterion[1]}")
        said.append(criterion[2])
    for number, text in enumerate(said, 1):
        if not text.strip(WHITESPACE).removeprefix(JUSTIFICATION).strip(WHITESPACE):
            raise Unreadable(f"criterion {number} of {heading} has no justification")
    return heading, len(said)


def _check_counts(of_a: tuple[str, int], of_b: tuple[str, int], criteria: int | None) -> None:
    for heading, count in (of_a, of_b):
        if count == 0 or criteria not in (None, count):
            many = "1 criterion" if count == 1 else f"{count or 'no'} criteria"
            raise Unreadable(f"{heading} has {many}" + ("" if criteria is None else f" and the rubric has {criteria}"))
    if of_a[1] != of_b[1]:
        raise Unreadable(f"{OF_A} has {of_a[1]} criteria and {OF_B} has {of_b[1]}")


def _winner(lines: Sequence[str]) -> str:
    """What stands behind the label in the last line, before which the decision is justified."""
    named = [line for line in lines if line.startswith(WINNER)]
    if not named:
        raise Unreadable(f"{WINNER} is missing")
    if len(named) > 1:
        raise Unreadable(f"{WINNER} is repeated")
    if lines[-1] != named[0]:
        raise Unreadable(f"{WINNER} is not the last line: {cut_to_quote(lines[-1])!r} stands behind it")
    _said_behind(JUSTIFICATION, lines[:-1], FINAL)
    return named[0].removeprefix(WINNER).strip(WHITESPACE)


def _choice(winner: str) -> tuple[Literal["A", "B"] | None, str]:
    """The choice, or None and why there is none."""
    if winner == "Response A":
        return "A", ""
    if winner == "Response B":
        return "B", ""
    return None, f"{WINNER} {holds(winner)}; it must hold Response A or Response B"
