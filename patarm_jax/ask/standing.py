"""A judge behind a server that is asked by whoever has a question, at any time, by a thread of its own.

What is asked for in the same words is asked once, whoever waits for it, and what is kept is not asked at all. Who
cancels a future waits no more: what nobody waits for is not asked. Nothing here needs JAX.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from patarm_jax.ask.answers import Answer, Answers, Question
from patarm_jax.ask.remote import Asking, Remote
from patarm_jax.ask.replies import Parse

_LINGER = 5.0  # seconds that the thread, with its connections, waits for further questions
_LOOK = 0.5  # seconds between looking whether they are over, or all is to stop


@dataclass(frozen=True)
class _Wanted:
    """A question, with the votes that it lacks yet."""

    question: Question
    lacking: set[int]
    given: "Future[list[Answer]]"


class Standing:
    """Asks while there is something to be asked, and begins anew when there is again."""

    def __init__(self, remote: Remote, answers: Answers, parse: Parse, to_go_on: str) -> None:
        """What is asked goes to `answers`, where nothing else writes meanwhile.

        Args:
            remote: who is asked.
            answers: where they go.
            parse: reads what was written.
            to_go_on: a clause behind what an error says is to be done, as of `Asking`.
        """
        self._remote, self._answers = remote, answers
        self._asking = Asking(
            remote=remote,
            answers=answers,
            parse=parse,
            work=iter(()),
            stopping=lambda: False,
            came=self._came,
            answered=answers.any_came,
            resting=self._rest,
            to_go_on=to_go_on,
        )
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Question, int]] = deque()
        self._wanted: dict[tuple[str, int], list[_Wanted]] = {}  # by question and vote
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the thread, while it takes what is put into `_waiting`
        self._wake = asyncio.Event()
        self._busy = 0.0  # when there last was something to do

    @property
    def has_answered(self) -> bool:
        """Whether the judge has ever answered."""
        return self._asking.answered

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
            elif self._loop is None:
                self._loop, self._wake = asyncio.new_event_loop(), asyncio.Event()
                self._thread = threading.Thread(target=self._ask, args=(self._loop, self._thread), daemon=True)
                self._thread.start()
            else:
                with contextlib.suppress(RuntimeError):  # it is closed, and all that is wanted will be told why
                    self._loop.call_soon_threadsafe(self._wake.set)
        return wanted.given

    def _ask(self, loop: asyncio.AbstractEventLoop, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # it may still be closing its connections
        self._asking.work, self._asking.trouble, self._busy = self._next(), "", time.monotonic()
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(self._asking.run())
        except BaseException as error:  # raised where the answers are waited for
            self._asking.lost = 0
            with self._lock:
                self._loop = None
                self._waiting.clear()
                failed = {id(one): one for every in self._wanted.values() for one in every}
                self._wanted.clear()
            for one in failed.values():
                with contextlib.suppress(InvalidStateError):  # cancelled
                    one.given.set_exception(error)

    def _next(self) -> Iterator[tuple[Question, int] | None]:
        """What is to be asked; None while there is nothing yet. It ends when there was nothing for a while."""
        while True:
            work = None
            with self._lock:
                while self._waiting and work is None:
                    question, vote = self._waiting.popleft()
                    place = question.key, vote
                    if all(one.given.cancelled() for one in self._wanted.get(place, ())):
                        self._wanted.pop(place, None)  # nobody waits for it any more
                    else:
                        work = question, vote
                if work is not None or self._asking.under_way:
                    self._busy = time.monotonic()
                elif time.monotonic() - self._busy > _LINGER:
                    self._loop = None
                    return
            yield work

    async def _rest(self) -> None:
        """Until there may be something to be asked."""
        wake = self._wake
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(wake.wait(), _LOOK)
        wake.clear()

    def _came(self, answer: Answer) -> None:
        with self._lock:
            waiting = self._wanted.pop((answer.question, answer.vote), [])
            for one in waiting:
                one.lacking.discard(answer.vote)
        for one in waiting:
            if not one.lacking:
                with contextlib.suppress(InvalidStateError):  # cancelled
                    one.given.set_result(self._answers.of(one.question, self._remote.votes))
