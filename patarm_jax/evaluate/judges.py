"""Ways to ask a judge about the items of a benchmark, and how its answers become scores or choices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from patarm_jax.evaluate.answers import Answer, Answers, Question
from patarm_jax.evaluate.benchmarks import Item
from patarm_jax.evaluate.outcomes import Choices, Scores
from patarm_jax.judge.parse import parse_baseline, parse_pairwise, parse_pointwise
from patarm_jax.judge.prompts import baseline, pairwise, pointwise
from patarm_jax.types import JudgeKind, Judgement, Message, RubricMode

SIDES = ("chosen", "rejected")
ORDERS = ("chosen first", "rejected first")


@dataclass(frozen=True)
class Asked:
    """The questions about one item: a list for each side, or one of (i, j, order) for each pair and order."""

    of_sides: tuple[Sequence[Question], Sequence[Question]] = ((), ())  # (chosen, rejected), one for each response
    of_pairs: tuple[tuple[int, int, int, Question], ...] = ()  # (chosen, rejected, index in ORDERS, question)

    @property
    def questions(self) -> list[Question]:
        """All of them."""
        return [*self.of_sides[0], *self.of_sides[1], *(question for *_, question in self.of_pairs)]


# How an answer is read; a scalar head writes nothing that could be.
PARSERS: dict[JudgeKind, Callable[[str], Judgement]] = {
    "pointwise": parse_pointwise,
    "pairwise": parse_pairwise,
    "baseline": parse_baseline,
}


def ask_about(items: Sequence[Item], kind: JudgeKind, rubrics: RubricMode) -> list[Asked]:
    """The questions about every item; their rows number all of them, in order."""
    asked, row = [], 0
    for item in items:
        one = _pairs(item, rubrics, row) if kind == "pairwise" else _sides(item, kind, rubrics, row)
        row += len(one.questions)
        asked.append(one)
    return asked


def _sides(item: Item, kind: JudgeKind, rubrics: RubricMode, row: int) -> Asked:
    def messages(response: str) -> list[Message]:
        if kind == "pointwise":
            return pointwise(item.prompt, response, item.domain, rubrics)
        if kind == "baseline":
            return baseline(item.prompt, response)
        return [*item.prompt, Message(role="assistant", content=response)]

    def questions(side: int, responses: Sequence[str], first: int) -> list[Question]:
        return [
            Question(f"{item.id}/{SIDES[side]}/{number}", first + number, messages(response))
            for number, response in enumerate(responses)
        ]

    chosen = questions(0, item.chosen, row)
    return Asked(of_sides=(chosen, questions(1, item.rejected, row + len(chosen))))


def _pairs(item: Item, rubrics: RubricMode, row: int) -> Asked:
    pairs: list[tuple[int, int, int, Question]] = []
    for i, j, order in product(range(len(item.chosen)), range(len(item.rejected)), range(2)):
        responses = (item.chosen[i], item.rejected[j])
        first, second = responses if order == 0 else responses[::-1]
        messages = pairwise(item.prompt, first, second, item.domain, rubrics)
        name = f"{item.id}/{i}:{j}/{ORDERS[order]}"
        pairs.append((i, j, order, Question(name, row + len(pairs), messages)))
    return Asked(of_pairs=tuple(pairs))


def judged(asked: Sequence[Asked], answers: Answers, votes: int) -> Scores | Choices:
    """What the answers say, padded to the item with most responses."""
    if asked[0].of_pairs:
        return _choices(asked, answers, votes)
    sides = []
    for side in range(2):
        most = max(len(one.of_sides[side]) for one in asked)
        scores = np.full((len(asked), most, votes), np.nan)
        has = np.zeros((len(asked), most), bool)
        for index, one in enumerate(asked):
            for number, question in enumerate(one.of_sides[side]):
                has[index, number] = True
                scores[index, number] = [_score(answer) for answer in answers.of(question, votes)]
        sides.append((scores, has))
    (chosen, has_chosen), (rejected, has_rejected) = sides
    return Scores(chosen, rejected, has_chosen, has_rejected)


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


def _score(answer: Answer) -> float:
    return np.nan if answer.score is None else answer.score


def _choice(answer: Answer, order: int) -> float:
    """1 for the chosen response, which stands first in order 0."""
    if answer.choice is None:
        return np.nan
    return 1.0 if (answer.choice == "A") == (order == 0) else -1.0
