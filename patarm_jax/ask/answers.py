"""Questions to a judge and its answers, kept on disk as they come: a stopped evaluation never asks twice.

The file is JSON lines: first whose answers these are, then one line per answer, in the order they came.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Literal

from patarm_jax import locks
from patarm_jax.files import writing
from patarm_jax.types import Judgement, Message, UserError

KEPT = "What is judged is kept."
_BEGINNING = '{"judge": '  # how a file of answers begins


class Kind(StrEnum):
    """What came of asking a question once."""

    ANSWER = "ANSWER"  # the judge wrote to its end
    CUT = "CUT"  # the judge wrote, and was cut off at the limit of new tokens
    REFUSED = "REFUSED"  # there will be no answer to this question: a content filter, or the server rejects it
    TOO_LONG = "TOO_LONG"  # the question does not fit into the judge's context
    FAILED = "FAILED"  # there is no answer, and there might be one: it is asked again


@dataclass(frozen=True)
class Question:
    """What a judge is asked, N times."""

    id: str  # names what is judged, such as "17/chosen/0"
    sample_id: (
        int  # its index among all questions, not only those asked with a limit; sampling keys are derived from it
    )
    messages: Sequence[Message]
    rubric: str = ""  # that they show, where the answer is read by it

    @functools.cached_property
    def key(self) -> str:
        """Names the question with its text: when the data change, it is another."""
        text = json.dumps([self.id, list(self.messages)], ensure_ascii=False)
        return f"{self.id}#{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Answer:
    """One answer to a question, as it was read."""

    question: str  # Question.key
    vote: int  # 0 … N − 1
    status: str  # the name of its Status for an ANSWER or CUT, else the name of the kind; reason says why
    kind: str  # the name of a Kind
    score: float | None = None  # None unless status is OK
    choice: Literal["A", "B"] | None = None  # the better one of two responses
    text: str = ""
    reason: str = ""
    tokens: int = 0  # how many were written; 0 where nobody counted
    finish_reason: str = ""  # why the server, or the sampler here, wrote no further, in its own word
    sent: Mapping[str, object] | None = None  # the request to a server but for model and messages
    opened: bool = False  # whether <think> was put before the text, which the server's chat template had written
    drawn: float | None = None  # where the score is the expected one, the number that was written
    outside: float | None = None  # where it is, the probability of all but whole numbers from 0 to 10

    @property
    def cut(self) -> bool:
        """Whether it was cut off at the limit of new tokens."""
        return self.kind == Kind.CUT

    @property
    def came(self) -> bool:
        """Whether asking is over; what failed is asked again."""
        return self.kind != Kind.FAILED


def answer_of(
    question: Question,
    vote: int,
    judgement: Judgement,
    tokens: int,
    cut: bool,
    finish_reason: str = "",
    sent: Mapping[str, object] | None = None,
    opened: bool = False,
) -> Answer:
    """A judgement as the answer to a question."""
    return Answer(
        question=question.key,
        vote=vote,
        status=judgement.status.name,
        kind=Kind.CUT if cut else Kind.ANSWER,
        score=judgement.score,
        choice=judgement.choice,
        text=judgement.text,
        reason=judgement.reason,
        tokens=tokens,
        finish_reason=finish_reason or ("length" if cut else "stop"),
        sent=sent,
        opened=opened,
    )


def no_answer(question: Question, vote: int, kind: Kind, reason: str, **more: Any) -> Answer:
    """The record that there is none; `more` are further fields of an Answer."""
    return Answer(question.key, vote, status=kind, kind=kind, reason=reason, **more)


Known = dict[tuple[str, int], Answer]  # (question, vote) → answer


@dataclass
class Answers:
    """The answers of one judge, in memory and on disk."""

    path: Path
    file: IO[bytes]
    known: Known

    @property
    def any_came(self) -> bool:
        """Whether any question was ever answered."""
        return any(answer.kind in (Kind.ANSWER, Kind.CUT) for answer in self.known.values())

    def add(self, answers: Iterable[Answer]) -> None:
        """Writes them down together, at once."""
        lines = []
        for answer in answers:
            before = self.known.get((answer.question, answer.vote))
            if before == answer or (before is not None and before.came and not answer.came):
                continue  # it failed before for the same reason; or what came stays
            self.known[answer.question, answer.vote] = answer
            lines.append(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        _append(self.path, self.file, "".join(lines))

    def of(self, question: Question, votes: int) -> list[Answer]:
        """The N answers to a question."""
        key = question.key
        return [self.known[key, vote] for vote in range(votes)]


def missing(
    known: Known, questions: Sequence[Question], votes: int, again: Collection[Kind] = (Kind.FAILED,)
) -> list[tuple[Question, list[int]]]:
    """What is to be asked yet: questions with the votes they lack; of the kinds in `again` those there are too."""
    lacking = []
    for question in questions:
        key = question.key
        found = (known.get((key, vote)) for vote in range(votes))
        lacks = [vote for vote, answer in enumerate(found) if answer is None or answer.kind in again]
        if lacks:
            lacking.append((question, lacks))
    return lacking


def read_answers(path: Path, identity: Mapping[str, object]) -> Known:
    """The answers in a file, if there is one; it is left alone, whoever writes it meanwhile."""
    found = identity_of(path)
    if found is None:
        return {}
    _refuse_another(path, json.loads(json.dumps(identity)), found)
    *lines, _ = path.read_bytes().split(b"\n")
    return _parsed(path, lines)


def take_in(answers: Answers, files: Iterable[Path], identity: Mapping[str, object]) -> None:
    """Adds, in memory, what came into other files; what failed there tells nothing, and what came here stays."""
    for file in files:
        if file != answers.path:
            for place, answer in read_answers(file, identity).items():
                known = answers.known.get(place)
                if answer.came and (known is None or not known.came):
                    answers.known[place] = answer


@contextlib.contextmanager
def open_answers(path: Path, identity: Mapping[str, object]) -> Iterator[Answers]:
    """The answers in a file, which is made when it is missing; UserError when they are another judge's.

    They can still be read when the file is closed.

    Args:
        path: of the file.
        identity: JSON that tells whose answers these are: who judged, how, and what else a draw depends on.
    """
    wanted = json.loads(json.dumps(identity))
    with writing(path, KEPT):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)  # what a full disk did not take is not tried again when it is closed
    with file:
        if locks.lock(file.fileno()) is False:  # two processes would ask everything twice
            raise locks.held(path)
        with writing(path, KEPT):
            answers = _opened(path, wanted, file)
        yield answers


def _append(path: Path, file: IO[bytes], text: str) -> None:
    """All of a text, as an unbuffered file takes it; a line that a full disk cut off is removed by the next opening."""
    rest = memoryview(text.encode())
    with writing(path, KEPT):
        while rest:
            rest = rest[file.write(rest) :]


def identity_of(path: Path) -> dict[str, Any] | None:
    """Whose answers a file holds, as they were opened first; None where nothing is written yet."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        first = file.readline()
    if not first.endswith(b"\n"):
        return None
    try:
        return dict(json.loads(first)["judge"])
    except (ValueError, KeyError, TypeError) as error:
        raise _foreign(path) from error


def _foreign(path: Path) -> UserError:
    return UserError(f"{path} holds no answers of a judge. Name another folder, or remove the file.")


def _opened(path: Path, wanted: Mapping[str, Any], file: IO[bytes]) -> Answers:
    found = identity_of(path)
    if found is not None:
        _refuse_another(path, wanted, found)
    lines = _whole_lines(path)
    known = _parsed(path, lines)
    if not lines:
        _append(path, file, json.dumps({"judge": wanted}, ensure_ascii=False) + "\n")
    return Answers(path, file, known)


def _parsed(path: Path, lines: Sequence[bytes]) -> Known:
    known = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            fields = json.loads(line)
            if "kind" not in fields:
                if fields.get("status") != "OK":
                    continue  # an earlier version took servers' errors for answers: it is asked again
                fields["kind"] = Kind.CUT if fields.pop("cut", False) else Kind.ANSWER
            answer = Answer(**fields)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is not an answer: {error}. Remove the line; its question is asked again."
            ) from error
        known[answer.question, answer.vote] = answer
    return known


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of the file, after cutting off what a killed process did not finish writing."""
    *lines, rest = path.read_bytes().split(b"\n")  # not splitlines: an answer may hold other ends of lines
    if rest and not lines and not rest.startswith(_BEGINNING.encode()[: len(rest)]):
        raise _foreign(path)
    if rest:
        os.truncate(path, path.stat().st_size - len(rest))
    return lines


def _refuse_another(path: Path, wanted: Mapping[str, object], found: Mapping[str, object]) -> None:
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path} holds answers of another evaluation: {name} is {found.get(name)!r} there and "
                f"{wanted.get(name)!r} here. Set it as it was, or name another folder."
            )
