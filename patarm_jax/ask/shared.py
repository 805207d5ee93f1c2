"""The answers of a judge that several processes ask: each writes down its own, and the first puts them together.

While they ask, each process appends to a file of its own beside the answers, on storage that all share; a killed one
loses nothing. The next command takes in what they hold, however many processes it has. What is asked is the same in
every process, and is dealt among them; a draw hangs on its question alone, so that all together draw what one would.
"""

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from patarm_jax.ask.answers import KEPT, Answers, Question, open_answers, read_answers
from patarm_jax.files import writing
from patarm_jax.run.peers import agree, gather, wait_to_see

Work = TypeVar("Work")


@contextlib.contextmanager
def shared_answers(path: Path, identity: Mapping[str, object]) -> Iterator[Answers]:
    """`open_answers` for several processes; all must enter it and leave it.

    Inside, an answer that is added is this process's own. Afterwards every process has the answers of all, and the file
    holds them. When one of them fails, its answers and those of the others are taken in by the next command.
    """
    first, alone = jax.process_index() == 0, jax.process_count() == 1
    if first:
        with open_answers(path, identity) as answers:
            _take_in(answers, identity)
            _meet("answers are there")
            _meet("answers are read")
            yield answers
            _meet("all is asked")
            for process in range(1, jax.process_count()):
                wait_to_see(_own(path, process), "--output")
            _take_in(answers, identity)
            _meet("answers are put together")
    else:
        _meet("answers are there")
        wait_to_see(path, "--output")
        known = read_answers(path, identity)
        _meet("answers are read")
        with open_answers(_own(path, jax.process_index()), identity) as own:
            own.known.update(known)
            yield own
        _meet("all is asked")
        _meet("answers are put together")
        own.known.update(read_answers(path, identity))
    if not alone:
        _meet("answers are read by all")


def agree_on_questions(identity: Mapping[str, object], questions: Sequence[Question]) -> None:
    """Refuses, on every process alike, a judge or questions that are not the same in all of them."""
    keys = hashlib.sha256("\n".join(question.key for question in questions).encode()).hexdigest()
    agree("what they ask", {**identity, "number of questions": len(questions), "questions": keys})


def my_share(work: Sequence[Work]) -> list[Work]:
    """This process's part of what all have in the same order: every n-th, so that long and short are shared alike."""
    return list(work[jax.process_index() :: jax.process_count()])


def done_by_all(done: bool) -> bool:
    """Whether every process has asked all of its share; all must call it."""
    return set(gather("telling whether all is asked", str(int(done)))) == {"1"}


def _own(path: Path, process: int) -> Path:
    return path.with_name(f".{path.name.lstrip('.')}.process-{process}")


def _take_in(answers: Answers, identity: Mapping[str, object]) -> None:
    """Adds what other processes have written, now or before they were killed, and removes their files."""
    name = glob.escape(answers.path.name.lstrip("."))
    for file in sorted(answers.path.parent.glob(f".{name}.process-*")):
        answers.add(read_answers(file, identity).values())
        with writing(file, KEPT):
            file.unlink()
    os.fsync(answers.file.fileno())  # before others read it, on other machines


def _meet(where: str) -> None:
    """Waits until all processes are there, which may take hours."""
    gather(where, "")
