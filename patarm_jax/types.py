"""The nouns every room speaks of: preferences, judgements, and the user's mistakes.

Nothing here computes, and nothing needs JAX: whoever only asks a judge and reads what it wrote imports strings alone.
What is made of arrays stands in `arrays`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal, TypedDict, get_args

CHOSEN, REJECTED = 0, 1
SCORES = tuple(range(11))  # whole ones that a judge may give

Domain = Literal["chat", "math", "code", "safety", "instruction_following"]
DOMAINS: dict[str, Domain] = {domain: domain for domain in get_args(Domain)}  # by name
RubricMode = Literal["adaptive", "primary", "generated"]
BenchmarkName = Literal["rewardbench", "rewardbench2", "rm-bench", "judgebench", "llmbar", "rmb", "ppe", "pairs"]
PolicyBenchmarkName = Literal[
    "ifeval", "infobench", "win-rate", "best-of-n"
]  # of a policy's responses; the others are of judges
# How a judge is asked: for a score of each response, which of two is better, for a score without rubrics (what a
# general model is asked as a baseline). Two write nothing. scalar: a Bradley-Terry head gives the score; ordinal: it is
# the expectation of a score from 0 to 10 that is asked for at once, by the model's own probabilities. rubric_judge:
# which of two is better by the rubric that a generator wrote for their prompt, as Rubric-ARM's judge.
JudgeKind = Literal["pointwise", "pairwise", "baseline", "scalar", "ordinal", "rubric_judge", "checklist"]
# What a model of ours is asked for: a judgement of some kind, or a rubric.
JudgeByRubrics = Literal["rubric_judge", "checklist"]  # kinds of judge that go by a generator's rubric alone
BY_RUBRICS: tuple[JudgeByRubrics, ...] = get_args(JudgeByRubrics)
# policy: a model that answers, and may think before it does; policy_unthinking: one whose turn is begun unthought.
PolicyKind = Literal["policy", "policy_unthinking"]
ModelKind = JudgeKind | Literal["rubric", "classify"] | PolicyKind
# Whether the chat template of a server that is not seen writes `<think>` itself; auto: as its answers show.
OpensThinking = Literal["auto", "yes", "no"]


class UserError(Exception):
    """Something the user can fix. The message says what was got, what is allowed and what to do."""

    exit_code = 1


class LearntNothing(UserError):
    """A run came to its end, and nothing was learnt in it."""


class UsageError(UserError):
    """A command line or a config that cannot be meant."""

    exit_code = 2


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """One (prompt, chosen, rejected): the record that is never torn apart."""

    id: str
    prompt: Conversation  # all turns before the response, the last one the user's
    chosen: str
    rejected: str
    domain: Domain
    source: str
    labels: tuple[float, float] | None = None  # scores given to the chosen and to the rejected response, 0 to 10
    margin: float | None = None  # by how much a reward model is to prefer the chosen response
    rubric: str = ""  # by which the responses are compared, as the judge is shown it
    # Of a prompt alone, whose responses are empty: all that stands in its row.
    row: Mapping[str, object] = field(default_factory=dict, compare=False)


class Status(IntEnum):
    """How reading a judgement went. The integers are what `reward.format_reward` takes."""

    OK = 0
    BAD_SCORE = 1  # the tags stand in order, but what is inside <answer> is no valid score (or choice)
    BAD_TAGS = 2  # a tag is missing, repeated or out of order


@dataclass(frozen=True)
class Verdict:
    """Whether a response meets one criterion, as a judge wrote it."""

    met: bool
    weight: float  # of the criterion
    place: int  # where true or false begins in the text, in characters


@dataclass(frozen=True)
class Judgement:
    """What was read from the text a judge wrote about a response."""

    text: str
    status: Status
    reason: str  # why it failed; empty when status is OK
    score: float | None = None  # pointwise: 0 ≤ score ≤ 10; of a checklist |score| ≤ Σ weights; None unless OK
    choice: Literal["A", "B"] | None = None  # pairwise, None unless status is OK
    thinking: str = ""
    generated_rubrics: str = ""
    evaluation: str = ""
    verdicts: tuple[Verdict, ...] = ()  # of a checklist, none unless status is OK
