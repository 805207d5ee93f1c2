"""InFoBench (arXiv 2401.03601): instructions taken apart into questions that a judge answers with yes or no.

All questions about a response are put in one chat that grows, so that the judge sees what it has said before. DRFR is
the share of all questions that are answered with yes, whatever response they belong to.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from patarm_jax.data.rows import Row, read_rows
from patarm_jax.evaluate.responded import Response, Share, share_of_units
from patarm_jax.types import Message, UserError

HUB = "kqsong/InFoBench"
SUBSETS = {"easy": "Easy_set", "hard": "Hard_set"}
RULES = (
    "You check one text. You see the input that it was written from, where there is one, then the text, then one "
    "question about it; further questions about the same text follow. Answer each with YES or NO. Say YES only where "
    "the text meets what the question asks for wholly and beyond doubt. Say NO where it misses it, meets it in part, "
    "or leaves you unsure, and where the question is about something that the text does not have."
)


class _Row(msgspec.Struct):
    id: str
    input: str
    instruction: str
    decomposed_questions: list[str]
    subset: Literal["Easy_set", "Hard_set"]
    output: str | None = None  # of files of results: what was responded
    eval: list[bool | None] | None = None  # and what a judge said of it


@dataclass(frozen=True)
class Task:
    """An instruction, and the questions that tell whether it was followed."""

    id: str
    instruction: str
    input: str
    subset: str
    questions: tuple[str, ...]
    output: str | None = None  # a response that stands in the file
    verdicts: tuple[bool | None, ...] | None = None  # and what its judge has said

    @property
    def prompt(self) -> str:
        """What the policy is asked."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    @property
    def messages(self) -> list[Message]:
        """The same as a conversation."""
        return [Message(role="user", content=self.prompt)]


def read_tasks(path: str, split: str) -> tuple[list[Task], str]:
    """All instructions, and a clause on what was read; arguments as of `ifeval.read_tasks`."""
    tasks = [_task(row) for row in read_rows(path or HUB, (split,) if split else None).rows]
    if not tasks:
        raise UserError(f"{path or HUB} holds no row of InFoBench. Give its file.")
    return tasks, f"{len(tasks):,} instructions with {sum(len(one.questions) for one in tasks):,} questions"


def _task(row: Row) -> Task:
    try:
        given = msgspec.convert(row.values, _Row)
    except msgspec.ValidationError as error:
        raise UserError(f"{row.where} is no row of infobench: {error}. It has {', '.join(row.values)}.") from error
    if not given.decomposed_questions:
        raise UserError(f"{row.where} has no decomposed_questions, by which a response is judged.")
    if given.eval is not None and len(given.eval) != len(given.decomposed_questions):
        raise UserError(
            f"{row.where} has {len(given.decomposed_questions)} questions and {len(given.eval)} answers in eval."
        )
    verdicts = None if given.eval is None else tuple(given.eval)
    questions = tuple(given.decomposed_questions)
    return Task(given.id, given.instruction, given.input, given.subset, questions, given.output, verdicts)


# ------------------------------------------------------------------------------------------------------------- judging

Verdicts = tuple[bool | None, ...]  # of each question; None where the judge said neither
# From chats, each with the id that names it, to what is said at their end; None where nothing comes.
Say = Callable[[Sequence[tuple[str, list[Message]]]], list[str | None] | None]


def ask_all(say: Say, tasks: Sequence[Task], responses: Sequence[Response]) -> list[Verdicts] | None:
    """Puts every question about every response, the first ones first; None when it was asked to stop before the end."""
    chats = [_opening(task, one) for task, one in zip(tasks, responses, strict=True)]
    found: list[list[bool | None]] = [[] for _ in tasks]
    for number in range(max(len(task.questions) for task in tasks)):
        asked = [place for place, task in enumerate(tasks) if number < len(task.questions)]
        for place in asked:
            question = Message(role="user", content=tasks[place].questions[number])
            # The first question stands with what it is about.
            chats[place] = chats[place] + [question] if number else _with_question(chats[place], question)
        said = say([(f"{tasks[place].id}/{number + 1}", chats[place]) for place in asked])
        if said is None:
            return None
        for place, text in zip(asked, said, strict=True):
            found[place].append(verdict_of(text or ""))
            chats[place] = [*chats[place], Message(role="assistant", content=text or "")]
    return [tuple(each) for each in found]


def _opening(task: Task, response: Response) -> list[Message]:
    source = f"Input:\n{task.input}\n\n" if task.input else ""
    about = f"{source}Text:\n{response.answer}"
    return [Message(role="system", content=RULES), Message(role="user", content=about)]


def _with_question(chat: list[Message], question: Message) -> list[Message]:
    *before, about = chat
    return [*before, Message(role="user", content=f"{about['content']}\n\nQuestion:\n{question['content']}")]


def verdict_of(text: str) -> bool | None:
    """What a judge's answer says: its beginning, or the one of YES and NO that stands in it, in capitals.

    >>> [verdict_of(text) for text in ("Yes, it does.", "no", "It is YES.", "Is it YES or NO?", "Perhaps.", "")]
    [True, False, True, None, None, None]
    """
    begins = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    if begins:
        return begins[1].lower() == "yes"
    words = set(re.findall(r"\b(?:YES|NO)\b", text))
    return words == {"YES"} if len(words) == 1 else None


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Scored:
    """What a policy is worth, by a judge."""

    name: str  # of the policy
    judge: str
    tasks: Sequence[Task]
    responses: Sequence[Response]
    verdicts: Sequence[Verdicts]
    numbers: dict[str, Share]  # drfr, easy, hard

    @property
    def unread(self) -> int:
        """Questions that the judge has answered with neither yes nor no."""
        return sum(one is None for each in self.verdicts for one in each)


def score(
    name: str, judge: str, tasks: Sequence[Task], responses: Sequence[Response], verdicts: Sequence[Verdicts]
) -> Scored:
    """Adds up what the judge has said; neither yes nor no is no yes."""
    of_all = {"drfr": list(range(len(tasks)))}
    of_subsets = {key: [n for n, task in enumerate(tasks) if task.subset == subset] for key, subset in SUBSETS.items()}
    numbers = {
        key: share_of_units([[one is True for one in verdicts[n]] for n in places])
        for key, places in (of_all | of_subsets).items()
        if places
    }
    return Scored(name, judge, tasks, responses, verdicts, numbers)
