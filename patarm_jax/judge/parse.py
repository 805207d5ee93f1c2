"""Reads what a judge wrote: the four sections, and the score or the choice in the last of them.

It never raises, never guesses and never mends: a text out of form is BAD_TAGS, an answer out of form is BAD_SCORE.

A judgement has this form, each tag exact, lower-case, once and in this order:

    <think>…</think> <generate_rubrics>…</generate_rubrics> <eval>…</eval> <answer>8.5</answer>

The thinking is free text: it ends at the first `</think>`, and tags inside it count for nothing. After it, text between
and behind the sections is tolerated, since a stray remark leaves no doubt about the score. Before `<think>` only
whitespace may stand, since what is written before the thinking was not thought about.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Literal

from patarm_jax.types import Judgement, Status

JUDGEMENT_TAGS = ("think", "generate_rubrics", "eval", "answer")

# Only characters that everyone calls whitespace: str.strip() and \s take Unicode's too, as \d takes full-width digits.
WHITESPACE = " \t\n\r\f\v"
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
# Fixed strings and no repetition: a search looks at each character a bounded number of times, however hostile the text.
_ANY_TAG = re.compile("|".join(f"<{name}>|</{name}>" for name in JUDGEMENT_TAGS))
# What general models write around their thinking: Qwen, DeepSeek and most others; Magistral; Kimi; gpt-oss; and others.
_OPENS_THINKING = re.compile(
    r"<(?:seed:)?(?:think|thinking|thought|reasoning) ?>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|channel\|>analysis<\|message\|>"
)
_CLOSES_THINKING = re.compile(
    r"</(?:seed:)?(?:think|thinking|thought|reasoning) ?>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>"
    r"|<\|channel\|>final<\|message\|>"
)
_ANSWER_TAG = re.compile("<answer>|</answer>")
_QUOTED = 40  # characters of a bad answer repeated in the reason; logs and tables stay readable

_Answer = tuple[float | None, Literal["A", "B"] | None]  # (score, choice), one of them None


class Unreadable(Exception):
    """What is wrong with what a judge wrote, in words."""


@dataclass(frozen=True)
class _Sections:
    thinking: str
    generated_rubrics: str
    evaluation: str
    answer: str


def parse_pointwise(text: str) -> Judgement:
    """Reads a judgement of one response; `score` is a number from 0 to 10.

    >>> form = "<think>…</think><generate_rubrics>Wit</generate_rubrics><eval>Dull.</eval><answer>{}</answer>"
    >>> judgement = parse_pointwise(form.format(" 3.5 "))
    >>> judgement.status.name, judgement.score, judgement.generated_rubrics, judgement.evaluation
    ('OK', 3.5, 'Wit', 'Dull.')
    >>> judgement = parse_pointwise(form.format("8/10"))
    >>> judgement.status.name, judgement.score, judgement.reason
    ('BAD_SCORE', None, "<answer> holds '8/10'; it must hold one plain number")
    >>> judgement = parse_pointwise("<think>Easy.</think><answer>8</answer>")
    >>> judgement.status.name, judgement.score, judgement.reason
    ('BAD_TAGS', None, '<generate_rubrics> is missing')
    """
    return _parse(text, _four_sections, partial(_score, lowest=0))


def parse_pairwise(text: str) -> Judgement:
    """Reads a judgement of two responses; `choice` is the better one.

    >>> form = "<think>…</think><generate_rubrics>Wit</generate_rubrics><eval>Dull.</eval><answer>{}</answer>"
    >>> parse_pairwise(form.format("B")).choice
    'B'
    >>> judgement = parse_pairwise(form.format("both"))
    >>> judgement.status.name, judgement.choice, judgement.reason
    ('BAD_SCORE', None, "<answer> holds 'both'; it must hold A or B alone")
    """
    return _parse(text, _four_sections, _choice)


def parse_baseline(text: str) -> Judgement:
    """Reads a general model's judgement: an explanation, then a number from 1 to 10 in `<answer>`.

    A general model may think first. All up to the first `</think>`, or what it writes in its place, is its thinking,
    whether it opened that itself or its chat template did. No score is read from there, nor from thinking that never
    ends.

    >>> judgement = parse_baseline("Clear, but wrong on the date. <answer>4</answer>")
    >>> judgement.status.name, judgement.score, judgement.evaluation
    ('OK', 4.0, 'Clear, but wrong on the date.')
    >>> parse_baseline("Perhaps <answer>9</answer>? No.</think>Poor. <answer>2</answer>").score
    2.0
    >>> parse_baseline("<answer>0</answer>").reason
    'score 0 is not between 1 and 10'
    """
    return _parse(text, _answer_alone, partial(_score, lowest=1))


def closes_thinking_it_did_not_open(text: str) -> bool:
    """Whether the chat template has opened the thinking that this text ends: `</think>` stands in it, alone.

    >>> [closes_thinking_it_did_not_open(text) for text in ("Hm.</think>So.", "<think>Hm.</think>So.", "Hm.")]
    [True, False, False]
    """
    before, closing, _ = text.partition("</think>")
    return bool(closing) and "<think>" not in before


def _parse(text: str, take_apart: Callable[[str], _Sections], read: Callable[[str], _Answer]) -> Judgement:
    try:
        sections = take_apart(text)
    except Unreadable as fault:
        return Judgement(text, Status.BAD_TAGS, str(fault))
    answer: _Answer = (None, None)
    status, reason = Status.OK, ""
    try:
        answer = read(sections.answer.strip(WHITESPACE))
    except Unreadable as fault:
        status, reason = Status.BAD_SCORE, str(fault)
    score, choice = answer
    return Judgement(
        text,
        status,
        reason,
        score=score,
        choice=choice,
        thinking=sections.thinking.strip(),
        generated_rubrics=sections.generated_rubrics.strip(),
        evaluation=sections.evaluation.strip(),
    )


def _four_sections(text: str) -> _Sections:
    thinking, start = _thinking(text)
    tags = _in_order(list(_ANY_TAG.finditer(text, start)), JUDGEMENT_TAGS[1:])
    rubrics, evaluation, answer = (text[tags[i].end() : tags[i + 1].start()] for i in (0, 2, 4))
    return _Sections(thinking=thinking, generated_rubrics=rubrics, evaluation=evaluation, answer=answer)


def _answer_alone(text: str) -> _Sections:
    thinking, start = thinking_if_any(text)
    opening, closing = _in_order(list(_ANSWER_TAG.finditer(text, start)), ("answer",))
    return _Sections(
        thinking=thinking,
        generated_rubrics="",
        evaluation=text[start : opening.start()],
        answer=text[opening.end() : closing.start()],
    )


def _thinking(text: str) -> tuple[str, int]:
    """The thinking, and where the rest of the text begins."""
    before, opening, after = text.partition("<think>")
    if not opening:
        raise Unreadable("<think> is missing")
    if before.strip(WHITESPACE):
        raise Unreadable("<think> does not come first: text stands before it")
    thinking, closing, _ = after.partition("</think>")
    if not closing:
        raise Unreadable("</think> is missing")
    return thinking, len(before) + len(opening) + len(thinking) + len(closing)


def thinking_if_any(text: str) -> tuple[str, int]:
    """The thinking and where the rest begins, of a model that need not think or whose template opens its thinking."""
    closing = _CLOSES_THINKING.search(text)
    if closing is None:
        if opening := _OPENS_THINKING.search(text):
            raise Unreadable(f"the thinking that {opening.group()} opens has no end")
        return "", 0
    if again := _OPENS_THINKING.search(text, closing.end()) or _CLOSES_THINKING.search(text, closing.end()):
        raise Unreadable(f"{again.group()} is repeated")
    before = text[: closing.start()]
    opening = _OPENS_THINKING.search(before)
    return before[opening.end() :] if opening else before, closing.end()


def answer_of(text: str) -> str | None:
    r"""What a policy has answered, behind its thinking where it has thought; None where there is no answer.

    >>> answer_of("Rice."), answer_of("<think>Rice?</think>\n\nRice."), answer_of("hm</think>Rice.")
    ('Rice.', 'Rice.', 'Rice.')
    >>> answer_of("<think>Rice, or"), answer_of("<think></think> ")
    (None, None)
    """
    closing = _CLOSES_THINKING.search(text)
    if closing is None and _OPENS_THINKING.match(text.lstrip()):
        return None
    return text[closing.end() if closing else 0 :].strip() or None


def _in_order(tags: list[re.Match[str]], names: tuple[str, ...]) -> list[re.Match[str]]:
    """The tags found, if they are the opening and closing tags of `names`, each once and in order."""
    expected = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    found = [tag.group() for tag in tags]
    for tag in expected:
        if tag not in found:
            raise Unreadable(f"{tag} is missing")
    for tag in found:
        # The thinking has had its two tags already, so a single further one repeats it.
        if tag not in expected or found.count(tag) > 1:
            raise Unreadable(f"{tag} is repeated")
    for tag, due in zip(found, expected, strict=True):
        if tag != due:
            raise Unreadable(f"{tag} is out of order: {due} should come first")
    return tags


def _score(answer: str, lowest: int) -> _Answer:
    if not _NUMBER.fullmatch(answer):
        raise Unreadable(f"<answer> {holds(answer)}; it must hold one plain number")
    # Compared before rounding: as a float, 10.00000000000000001 would be 10.
    if not lowest <= Decimal(answer) <= 10:
        raise Unreadable(f"score {cut_to_quote(answer)} is not between {lowest} and 10")
    return float(answer), None


def _choice(answer: str) -> _Answer:
    if answer == "A":
        return None, "A"
    if answer == "B":
        return None, "B"
    raise Unreadable(f"<answer> {holds(answer)}; it must hold A or B alone")


def holds(answer: str) -> str:
    """What stands where an answer should, as a reason says it."""
    return f"holds {cut_to_quote(answer)!r}" if answer else "is empty"


def cut_to_quote(answer: str) -> str:
    """The beginning of a text, as a reason repeats it."""
    return answer if len(answer) <= _QUOTED else answer[: _QUOTED - 1] + "…"
