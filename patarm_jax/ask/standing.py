"""A judge behind a server that is asked by whoever has a question, at any time, by a thread of its own.

What is asked for in the same words is asked once, whoever waits for it, and what is kept is not asked at all. Nothing
here needs JAX.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from patarm_jax.ask.answers import Answer, Answers, Question
from patarm_jax.ask.remote import Asking, Remote
from patarm_jax.ask.replies import Parse


@dataclass(frozen=True)
class _Wanted:
    """A question, with the votes that it lacks yet."""

    question: Question
    lacking: set[int]
    given: "Future[list[Answer]]"


class Standing:
    """Asks while there is something to be asked, and begins anew when there is again."""

    def __init__(self, remote: Remote, answers: Answers, parse: Parse) -> None:
        """`answers` is where they go; nothing else writes there meanwhile. `parse` reads what was written."""
        self._remote, self._answers = remote, answers
        self._asking = Asking(
            remote=remote,
            answers=answers,
            parse=parse,
            work=iter(()),
            stopping=lambda: False,
            came=self._came,
            answered=answers.any_came,
        )
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Question, int]] = deque()
        self._wanted: dict[tuple[str, int], list[_Wanted]] = {}  # by question and vote
        self._open = False  # whether the thread takes what is put into `_waiting`
        self._thread: threading.Thread | None = None

    def ask(self, question: Question) -> "Future[list[Answer]]":
        """Its answers, one for each vote, when all have come or failed.

        What failed is asked again when it is asked for again. The future raises UserError where nobody is answered: the
        server is gone, or refuses everything.
        """
        wanted = _Wanted(question, set(), Future())
        with self._lock:
            for vote in range(self._remote.votes):
                place = question.key, vote
                known = self._answers.known.get(place)
                if known is not None and known.came:
                    continue
                wanted.lacking.add(vote)
                if place not in self._wanted:
                    self._waiting.append((question, vote))
                self._wanted.setdefault(place, []).append(wanted)
            if not wanted.lacking:
                wanted.given.set_result(self._answers.of(question, self._remote.votes))
            elif not self._open:
                self._open = True
                self._thread = threading.Thread(target=self._ask, args=(self._thread,), daemon=True)
                self._thread.start()
        return wanted.given

    def _ask(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # it may still be writing down what it could not release earlier
        self._asking.work, self._asking.trouble, self._asking.lost = self._next(), "", 0
        try:
            asyncio.run(self._asking.run())
        except BaseException as error:  # raised where the answers are waited for
            with self._lock:
                self._open = False
                self._waiting.clear()
                failed = {id(one): one for every in self._wanted.values() for one in every}
                self._wanted.clear()
            for one in failed.values():
                one.given.set_exception(error)

    def _next(self) -> Iterator[tuple[Question, int] | None]:
        """What is to be asked; None while there is nothing yet. It ends when nothing is under way either."""
        while True:
            with self._lock:
                if self._waiting:
                    work = self._waiting.popleft()
                elif self._asking.under_way:
                    work = None
                else:
                    self._open = False
                    return
            yield work

    def _came(self, answer: Answer) -> None:
        with self._lock:
            waiting = self._wanted.pop((answer.question, answer.vote), [])
            for one in waiting:
                one.lacking.discard(answer.vote)
        for one in waiting:
            if not one.lacking:
                one.given.set_result(self._answers.of(one.question, self._remote.votes))
