"""A judgement of one response by a rubric that only says of each criterion whether it is met: read, never guessed.

One JSON object and nothing else, with a member for each criterion in its order:

    {"1": {"why": "It names three primes.", "met": true}, "2": {"why": "It rambles.", "met": false}}

What counts of it is how likely true and false were where one of the two was written, see `rollout.verdicts`; by the
words alone a criterion counts in full, for the response or against it. What is out of form is BAD_TAGS, an answer that
is neither true nor false BAD_SCORE. A model may have thought first: nothing is read from there.

Source: RUBRIC-ARROW (arXiv 2605.29156); the form is our own.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from patarm_jax.judge.criteria import Criterion, CriterionKind
from patarm_jax.judge.parse import WHITESPACE, Unreadable, cut_to_quote, thinking_if_any
from patarm_jax.types import Judgement, Status, Verdict

WEIGHTS: dict[CriterionKind, float] = {"Hard Rule": 3.0, "Principle": 1.0}
WHY, MET = "why", "met"

# A string, or a word outside strings; the text is known to be JSON.
_STRING_OR_WORD = re.compile(r'"(?:[^"\\]|\\.)*+"|[a-z]++', re.DOTALL)


def parse_checklist(text: str, criteria: Sequence[Criterion] = ()) -> Judgement:
    r"""Reads what a judge found of each criterion; `score` is Σ w·(1 if it is met, else −1).

    Args:
        text: what the judge wrote.
        criteria: of the rubric; where there are none, any number will do, and all together weigh 1, so that a longer
            list of a judge's own is worth no more.

    >>> rule = Criterion("The response is short.", "Hard Rule")
    >>> judgement = parse_checklist('{"1": {"why": "It is short.", "met": true}}', [rule])
    >>> judgement.status.name, judgement.score, judgement.verdicts
    ('OK', 3.0, (Verdict(met=True, weight=3.0, place=37),))
    >>> parse_checklist('{"1": {"why": "It is short.", "met": "yes"}}').reason
    'criterion 1 has the "met" "yes"; it must be true or false'
    >>> parse_checklist('{"2": {"why": "It is short.", "met": true}}').reason
    'criterion 1 is missing'
    """
    try:
        thinking, start = thinking_if_any(text)
        found = _members(text[start:].strip(WHITESPACE))
        if criteria and len(found) != len(criteria):
            many = "1 criterion is" if len(found) == 1 else f"{len(found)} criteria are"
            raise Unreadable(f"{many} judged and the rubric has {len(criteria)}")
    except Unreadable as fault:
        return Judgement(text, Status.BAD_TAGS, str(fault))
    for number, met in enumerate(found, 1):
        if not isinstance(met, bool):
            reason = f'criterion {number} has the "{MET}" {cut_to_quote(json.dumps(met))}; it must be true or false'
            return Judgement(text, Status.BAD_SCORE, reason)
    weights = [WEIGHTS[one.kind] for one in criteria] or [1 / len(found)] * len(found)
    words = [word for word in _STRING_OR_WORD.finditer(text, start) if word.group()[0] != '"']
    verdicts = tuple(
        Verdict(met, weight, word.start()) for met, weight, word in zip(found, weights, words, strict=True)
    )
    score = sum(one.weight if one.met else -one.weight for one in verdicts)
    return Judgement(
        text,
        Status.OK,
        "",
        score=score,
        thinking=thinking.strip(),
        evaluation=text[start:].strip(),
        verdicts=verdicts,
    )


def render_checklist(findings: Sequence[tuple[str, bool]]) -> str:
    """A judgement as `parse_checklist` reads it.

    Args:
        findings: of each criterion, why, and whether it is met.

    >>> render_checklist([("It is short.", True)])
    '{"1": {"why": "It is short.", "met": true}}'
    """
    said = {str(number): {WHY: why, MET: met} for number, (why, met) in enumerate(findings, 1)}
    return json.dumps(said, ensure_ascii=False)


def _members(text: str) -> list[Any]:
    """What is said of each criterion in turn, whatever it is."""
    try:
        said = json.loads(text, object_pairs_hook=_each_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise Unreadable(f"it is no JSON: {error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError) as error:
        raise Unreadable(f"it is no JSON that can be read: {error}") from None
    if not isinstance(said, dict) or not said:
        raise Unreadable("it is no JSON object with a member for each criterion")
    found = []
    for number, (name, member) in enumerate(said.items(), 1):
        if name != str(number):
            known = str(number) in said
            raise Unreadable(f"criterion {number} is {'out of order' if known else 'missing'}")
        if not isinstance(member, dict) or list(member) != [WHY, MET]:
            raise Unreadable(f'criterion {number} is no object of "{WHY}" and "{MET}", in this order')
        if not isinstance(member[WHY], str) or not member[WHY].strip(WHITESPACE):
            raise Unreadable(f'criterion {number} has no "{WHY}"')
        found.append(member[MET])
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise Unreadable(f"{cut_to_quote(json.dumps(twice))} is repeated")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise Unreadable(f"it is no JSON: {name} is no number")
