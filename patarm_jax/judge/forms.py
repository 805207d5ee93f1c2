"""How a model is asked for a judgement, or for a rubric, and how its answer is read.

No other file tells the kinds of judge apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from patarm_jax.judge.checklist import parse_checklist
from patarm_jax.judge.criteria import criteria_of, parse_rubric, parse_rubric_judge
from patarm_jax.judge.domains import parse_domain
from patarm_jax.judge.parse import parse_baseline, parse_pairwise, parse_pointwise
from patarm_jax.judge.prompts import baseline, checklist, classify, ordinal, pairwise, pointwise, rubric_judge
from patarm_jax.judge.prompts import rubric as ask_for_rubric
from patarm_jax.types import Judgement, Message, ModelKind, Preference, RubricMode, Status


class Ask(Protocol):
    """What a model reads about a prompt and one response, two, or none."""

    def __call__(
        self, prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
    ) -> list[Message]:
        """Messages; `domain` says which primary rubrics there are, `rubric` is a generator's for the prompt."""


class Read(Protocol):
    """What is read from what a model wrote; it never raises."""

    def __call__(self, text: str, rubric: str = "", /) -> Judgement:
        """Status and content; `rubric` is what a judge was shown of a generator's, where it must go through it."""


@dataclass(frozen=True)
class Form:
    """How to ask, and how to read."""

    name: ModelKind
    responses: int  # how many one question shows
    ask: Ask
    read: Read
    # Of a judgement whose question has a place in its pair: what it is worth as a number, None where it is not valid.
    number: Callable[[Judgement, int], float | None]
    # What the two questions about a pair are called: of the chosen and of the rejected response, or in both orders.
    places: tuple[str, str]
    reads_rubrics: bool = True
    writes: bool = True  # whether the answer is text, which is read, and not a number
    has_score_head: bool = False  # whether a head of one number gives that number, in place of the vocabulary's
    weighs_words: bool = False  # whether true and false count by how likely they were, see `rollout.verdicts`
    thinks: bool = True  # whether what is written may begin with the model's thinking; else its turn begins unthought
    converses: bool = False  # whether what is written answers the conversation itself, and is not about it

    def shown(self, preference: Preference) -> tuple[tuple[str, ...], ...]:
        """The responses in each question about a pair: each by itself, both in either order, or none in one."""
        both = preference.chosen, preference.rejected
        return {0: ((),), 1: ((both[0],), (both[1],)), 2: (both, both[::-1])}[self.responses]


def _pointwise(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    (response,) = responses
    return pointwise(prompt, response, domain, rubrics, rubric)


def _pairwise(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    first, second = responses
    return pairwise(prompt, first, second, domain, rubrics, rubric)


def _baseline(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    (response,) = responses
    return baseline(prompt, response)


def _ordinal(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    (response,) = responses
    return ordinal(prompt, response)


def _dialogue(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    (response,) = responses
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
    return [*turns, Message(role="assistant", content=response)]


def _conversation(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)


def _rubric(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    return ask_for_rubric(prompt)


def _classify(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    return classify(prompt)


def _rubric_judge(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    first, second = responses
    return rubric_judge(prompt, first, second, rubric)


def _checklist(
    prompt: str | Sequence[Message], *responses: str, domain: str, rubrics: RubricMode, rubric: str = ""
) -> list[Message]:
    (response,) = responses
    return checklist(prompt, response, rubric)


def _regardless(parse: Callable[[str], Judgement]) -> Read:
    """Reads without a look at the rubric."""

    def read(text: str, rubric: str = "", /) -> Judgement:
        return parse(text)

    return read


def _comparison(text: str, rubric: str = "", /) -> Judgement:
    """A judgement that goes through every criterion of its rubric, where that is one."""
    return parse_rubric_judge(text, len(criteria_of(rubric)) or None)


def _checked(text: str, rubric: str = "", /) -> Judgement:
    """A judgement of every criterion of its rubric, where that is one."""
    return parse_checklist(text, criteria_of(rubric))


def _writes_nothing(text: str, rubric: str = "", /) -> Judgement:
    raise TypeError("a reward model gives a number and writes nothing that could be read")


def _as_it_is(text: str) -> Judgement:
    """A response, which may be anything."""
    return Judgement(text, Status.OK, "")


def _score(judgement: Judgement, _place: int) -> float | None:
    return judgement.score


def _no_number(_judgement: Judgement, _place: int) -> None:
    return None


def _is_right(judgement: Judgement, place: int) -> float | None:
    """1 for the choice of the chosen response, which stands first in place 0; 0 for the other."""
    return None if judgement.choice is None else float((judgement.choice == "A") == (place == 0))


SIDES = ("chosen", "rejected")
ORDERS = ("chosen first", "rejected first")

# One response, a score from 0 to 10.
POINTWISE = Form("pointwise", 1, _pointwise, _regardless(parse_pointwise), _score, SIDES)
# Two responses, a choice.
PAIRWISE = Form("pairwise", 2, _pairwise, _regardless(parse_pairwise), _is_right, ORDERS)
# A general model, asked for a score without rubrics.
BASELINE = Form("baseline", 1, _baseline, _regardless(parse_baseline), _score, SIDES, reads_rubrics=False)
# A reward model with a head that gives one number.
SCALAR = Form(
    "scalar", 1, _dialogue, _writes_nothing, _score, SIDES, reads_rubrics=False, writes=False, has_score_head=True
)
# The expectation of a score that is asked for at once.
ORDINAL = Form("ordinal", 1, _ordinal, _writes_nothing, _score, SIDES, reads_rubrics=False, writes=False)
# A rubric for a prompt, before there are responses; its places are of the judgement that says what it is worth.
RUBRIC = Form("rubric", 0, _rubric, _regardless(parse_rubric), _no_number, ORDERS, reads_rubrics=False, thinks=False)
# Two responses and the rubric of their prompt, a choice.
RUBRIC_JUDGE = Form(
    "rubric_judge",
    2,
    _rubric_judge,
    _comparison,
    _is_right,
    ORDERS,
    reads_rubrics=False,
    thinks=False,
)

# One response and the rubric of its prompt, which criteria it meets, weighed by how likely true and false were.
CHECKLIST = Form(
    "checklist",
    1,
    _checklist,
    _checked,
    _score,
    SIDES,
    reads_rubrics=False,
    thinks=False,
    weighs_words=True,
)

# The domain of a request, before there are responses.
CLASSIFY = Form("classify", 0, _classify, _regardless(parse_domain), _no_number, SIDES, reads_rubrics=False)

# A response to a conversation; what it is worth, others say.
POLICY = Form(
    "policy",
    0,
    _conversation,
    _regardless(_as_it_is),
    _no_number,
    ("response", "response"),
    reads_rubrics=False,
    converses=True,
)
POLICY_UNTHINKING = replace(POLICY, name="policy_unthinking", thinks=False)

_EVERY = (
    *(POINTWISE, PAIRWISE, BASELINE, SCALAR, ORDINAL, RUBRIC, RUBRIC_JUDGE, CHECKLIST, CLASSIFY),
    *(POLICY, POLICY_UNTHINKING),
)
FORMS: dict[str, Form] = {form.name: form for form in _EVERY}
