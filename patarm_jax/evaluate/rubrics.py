"""The rubrics that a judge compares by: one for each prompt, which a generator writes once and which is kept."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from patarm_jax.ask.answers import Answer, Known, Question
from patarm_jax.judge.criteria import criteria_of, shown_rubric
from patarm_jax.judge.forms import RUBRIC
from patarm_jax.types import Domain, Message


class Prompted(Protocol):
    """What a rubric is written for, such as an item of a benchmark."""

    @property
    def id(self) -> str:
        """Names it."""

    @property
    def prompt(self) -> Sequence[Message]:
        """The conversation."""

    @property
    def domain(self) -> Domain:
        """Of the prompt."""


@dataclass(frozen=True)
class Written:
    """What became of the rubrics of an evaluation; where one is blank, the judge is asked as without a generator."""

    generator: str  # its name
    prompts: int  # each has a rubric
    in_form: float  # the share of rubrics that are numbered lists of criteria of known kinds
    blank: int  # nothing was written that can be shown, or nothing came: refused, or the prompt too long
    cut: int  # cut off at the limit of new tokens
    criteria: float  # of a rubric that is in form, in the mean; NaN where none is
    characters: float  # of what the judge was shown, in the mean
    reasons: list[tuple[str, int]]  # why others are out of form, with their numbers, the most frequent first


def rubric_questions(items: Sequence[Prompted]) -> dict[str, Question]:
    """Asks for a rubric of every prompt, once, whatever items share it; by `prompt_of`."""
    questions: dict[str, Question] = {}
    for item in items:
        messages = RUBRIC.ask(item.prompt, domain=item.domain, rubrics="generated")
        questions.setdefault(prompt_of(item), Question(item.id, len(questions), messages))
    return questions


def prompt_of(item: Prompted) -> str:
    """Names an item's prompt: two items with the same one share their rubric."""
    return json.dumps(list(item.prompt), ensure_ascii=False)


def rubrics_shown(questions: Mapping[str, Question], known: Known) -> dict[str, str]:
    """What a judge is shown for each prompt that has a rubric, also of those that are not asked about now."""
    answered = {prompt: known.get((question.key, 0)) for prompt, question in questions.items()}
    return {prompt: shown_rubric(answer.text) for prompt, answer in answered.items() if answer is not None}


def hardly_usable(written: Written) -> str:
    """Words on rubrics of which less than half are in form; empty where more are."""
    if written.in_form >= 0.5:
        return ""
    reason, count = written.reasons[0]
    advice = "Most were cut off: raise generator.max_new_tokens. " if written.cut > written.prompts / 2 else ""
    blank = f", and {written.blank:,} are blank" if written.blank else ""
    share = f"only {100 * written.in_form:.1f} %" if written.in_form else "none"
    return (
        f"{share} of the {written.prompts:,} rubrics by {written.generator} can be read as rubrics{blank}. Most often "
        f"({count:,} ×): {reason}. {advice}What is judged by them says little of a judge with its generator."
    )


def counted(generator: str, answers: Sequence[Answer]) -> Written:
    """What became of the rubrics that these answers are."""
    shown = [shown_rubric(answer.text) for answer in answers]
    numbers = [len(criteria) for text in shown if (criteria := criteria_of(text))]
    wrong = Counter(answer.reason for answer in answers if answer.status != "OK")
    return Written(
        generator=generator,
        prompts=len(answers),
        in_form=sum(answer.status == "OK" for answer in answers) / len(answers),
        blank=sum(not text for text in shown),
        cut=sum(answer.cut for answer in answers),
        criteria=float(np.mean(numbers)) if numbers else float("nan"),
        characters=float(np.mean([len(text) for text in shown])),
        reasons=wrong.most_common(5),
    )
