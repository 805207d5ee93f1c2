"""What a judge is asked about the items of a benchmark, and how its answers become scores or choices."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import MappingProxyType

import numpy as np

from patarm_jax.ask.answers import Answer, Answers, Question
from patarm_jax.evaluate.items import Item
from patarm_jax.evaluate.outcomes import Choices, Scores
from patarm_jax.evaluate.rubrics import prompt_of
from patarm_jax.judge.forms import ORDERS, SIDES, Form
from patarm_jax.types import Message, RubricMode

_Ask = Callable[[str, list[Message]], Question]  # name and messages → the question, which may be an earlier item's
_Messages = Callable[..., list[Message]]  # responses → what the judge reads about them


@dataclass(frozen=True)
class Asked:
    """The questions about one item: a list for each side, or one of (i, j, order) for each pair and order."""

    of_sides: tuple[Sequence[Question], Sequence[Question]] = ((), ())  # (chosen, rejected), one for each response
    of_pairs: tuple[tuple[int, int, int, Question], ...] = ()  # (chosen, rejected, index in ORDERS, question)
    rubric: str = ""  # a generator's, which the questions show

    @property
    def questions(self) -> list[Question]:
        """All of them."""
        return [*self.of_sides[0], *self.of_sides[1], *(question for *_, question in self.of_pairs)]


def ask_about(
    items: Sequence[Item], form: Form, rubrics: RubricMode, written: Mapping[str, str] = MappingProxyType({})
) -> list[Asked]:
    """The questions about every item; identical questions are asked once, whatever items they are about.

    Args:
        items: of a benchmark.
        form: of the judge.
        rubrics: which the judge's prompt holds, or asks for.
        written: the rubric of a generator for each prompt that has one, by `prompt_of`.
    """
    asked_before: dict[str, Question] = {}

    def ask(name: str, messages: list[Message]) -> Question:
        text = json.dumps(messages)
        return asked_before.setdefault(text, Question(name, len(asked_before), messages, read_by))

    about, asked = _pairs if form.responses == 2 else _sides, []
    for item in items:
        rubric = written.get(prompt_of(item), "")
        read_by = rubric if form.weighs_words else ""
        messages = partial(form.ask, item.prompt, domain=item.domain, rubrics=rubrics, rubric=rubric)
        asked.append(replace(about(item, messages, ask), rubric=rubric))
    return asked


def questions_of(asked: Sequence[Asked]) -> list[Question]:
    """All of them, each once."""
    return list({question.sample_id: question for one in asked for question in one.questions}.values())


def _sides(item: Item, messages: _Messages, ask: _Ask) -> Asked:
    chosen, rejected = (
        [ask(f"{item.id}/{side}/{number}", messages(response)) for number, response in enumerate(responses)]
        for side, responses in zip(SIDES, (item.chosen, item.rejected), strict=True)
    )
    return Asked(of_sides=(chosen, rejected))


def _pairs(item: Item, messages: _Messages, ask: _Ask) -> Asked:
    pairs = []
    for i, j, order in product(range(len(item.chosen)), range(len(item.rejected)), range(2)):
        responses = (item.chosen[i], item.rejected[j])
        first, second = responses if order == 0 else responses[::-1]
        pairs.append((i, j, order, ask(f"{item.id}/{i}:{j}/{ORDERS[order]}", messages(first, second))))
    return Asked(of_pairs=tuple(pairs))


def judged(asked: Sequence[Asked], answers: Answers, votes: int) -> Scores | Choices:
    """What the answers say, padded to the item with most responses."""
    if asked[0].of_pairs:
        return _choices(asked, answers, votes)
    sides = []
    for side in range(2):
        most = max(len(one.of_sides[side]) for one in asked)
        scores = np.full((len(asked), most, votes), np.nan)
        has, lost = np.zeros((len(asked), most), bool), np.zeros((len(asked), most, votes), bool)
        for index, one in enumerate(asked):
            for number, question in enumerate(one.of_sides[side]):
                given = answers.of(question, votes)
                has[index, number] = True
                scores[index, number] = [np.nan if answer.score is None else answer.score for answer in given]
                lost[index, number] = [not answer.came for answer in given]
        sides.append((scores, has, lost))
    (chosen, has_chosen, lost_chosen), (rejected, has_rejected, lost_rejected) = sides
    return Scores(
        chosen=chosen,
        rejected=rejected,
        has_chosen=has_chosen,
        has_rejected=has_rejected,
        lost_chosen=lost_chosen,
        lost_rejected=lost_rejected,
    )


def _choices(asked: Sequence[Asked], answers: Answers, votes: int) -> Choices:
    places = [(i, j) for one in asked for i, j, *_ in one.of_pairs]
    most = (max(i for i, _ in places) + 1, max(j for _, j in places) + 1)
    choices = np.full((len(asked), *most, 2, votes), np.nan)
    has = np.zeros((len(asked), *most), bool)
    for index, one in enumerate(asked):
        for i, j, order, question in one.of_pairs:
            has[index, i, j] = True
            choices[index, i, j, order] = [_choice(answer, order) for answer in answers.of(question, votes)]
    return Choices(choices, has)


def _choice(answer: Answer, order: int) -> float:
    """1 for the chosen response, which stands first in order 0."""
    if answer.choice is None:
        return np.nan
    return 1.0 if (answer.choice == "A") == (order == 0) else -1.0
