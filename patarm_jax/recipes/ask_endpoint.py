"""Puts questions to a server that speaks OpenAI's protocol, many at a time."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from patarm_jax.config import EndpointSection, SamplingSection
from patarm_jax.evaluate.answers import Answers, Question, answer_of, failed, missing
from patarm_jax.evaluate.endpoint import LOOK, Refused, Stopped, Unavailable, body, complete, connect, served_model
from patarm_jax.recipes.process import say, stop_requests
from patarm_jax.rollout.judging import Parse
from patarm_jax.train.metrics import Report, progress
from patarm_jax.types import UserError

_MOST_LOST = 2  # times the concurrency: after so many failures in a row, and 20 at least, the evaluation stops

_ENOUGH_REFUSED = 3  # of the first questions, to say that all would be
_SECONDS_BETWEEN = 60.0  # two words on trouble


@dataclass(frozen=True)
class Remote:
    """A judge that a server serves."""

    section: EndpointSection
    name: str  # of the model, as the server calls it; empty while nothing is asked
    sampling: SamplingSection
    votes: int
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on beside the question. Not the number of votes: more of them keep those there are."""
        sampling = self.sampling
        return {
            "endpoint model": self.name,
            "thinking": self.section.thinking,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": self.seed,
        }


def ask_name(section: EndpointSection) -> str:
    """The model that the server lists first."""

    async def ask() -> str:
        async with connect(section) as client:
            return await served_model(client, section)

    return asyncio.run(ask())


def ask_endpoint(remote: Remote, answers: Answers, questions: Sequence[Question], parse: Parse) -> bool:
    """Answers what is not answered yet; False when it was asked to stop before the end."""
    lacking = missing(answers.known, questions, remote.votes)
    work = [(question, vote) for question, votes in lacking for vote in votes]
    work.sort(key=lambda one: (one[0].key, one[1]) in answers.known)  # what failed before comes last
    total = len(questions) * remote.votes
    done = total - len(work)
    if done:
        say(f"{done} of {total} answers are there")
    if not work:
        return True
    say(f"asking {remote.name} at {remote.section.url}, {remote.section.concurrency} at a time")
    with stop_requests() as asked, progress(total, done, unit="answer") as report:
        asking = _Asking(remote, answers, parse, iter(work), lambda: asked(0), report, done, answers.any_came)
        asyncio.run(asking.run())
    if asking.done < total:
        say(f"stopped after {asking.done} of {total} answers; the same command goes on from there")
        return False
    return True


@dataclass
class _Asking:
    """The requests under way, and counts of those that are finished."""

    remote: Remote
    answers: Answers
    parse: Parse
    work: Iterator[tuple[Question, int]]
    stopping: Callable[[], bool]
    report: Report
    done: int
    answered: bool  # whether any question ever was
    lost: int = 0  # failures in a row that say that it is not the question's fault
    refusal: Refused | None = None  # that may be for all questions
    trouble: str = ""  # why nothing more is asked, and what to do about it
    under_way: int = 0
    told: float = -math.inf  # when trouble was last told of

    async def run(self) -> None:
        """Until all is asked, or must stop; what is under way is waited for even then, since it is paid for."""
        try:
            async with connect(self.remote.section) as client, asyncio.TaskGroup() as group:
                asking = [
                    group.create_task(self._one_after_another(client)) for _ in range(self.remote.section.concurrency)
                ]
                while not all(task.done() for task in asking) and not self._ending():
                    await asyncio.sleep(LOOK)
                if self._ending():
                    await self._tell_what_is_waited_for()
        except* UserError as errors:  # no address, or a full disk
            raise errors.exceptions[0] from None  # one of them says it all
        if self.trouble:
            raise UserError(self.trouble)

    async def _tell_what_is_waited_for(self) -> None:
        await asyncio.sleep(3 * LOOK)  # those that wait for their next try end meanwhile
        if self.under_way:
            say(
                f"waiting for {self.under_way} answers that are under way, {self.remote.section.timeout:g} s at most; "
                f"they are paid for. Ctrl-C {'again' if self.stopping() else 'twice'} gives them up"
            )

    def _ending(self) -> bool:
        return bool(self.trouble) or self.stopping()

    async def _one_after_another(self, client: httpx.AsyncClient) -> None:
        for question, vote in self.work:
            # Whether what was refused is refused to all will be told by those under way.
            while self.refusal and not self.answered and self.under_way and not self._ending():
                await asyncio.sleep(LOOK)
            if self.refusal and not self.answered and self.lost >= _ENOUGH_REFUSED:
                self._give_up(self.refusal)
            if self._ending():
                return
            self.under_way += 1
            try:
                await self._ask(client, question, vote)
            finally:
                self.under_way -= 1

    def _give_up(self, refusal: Refused) -> None:
        section = self.remote.section
        self.trouble = (
            f"{section.url} answers {refusal}. Check endpoint.url, endpoint.model and the key in "
            f"{section.api_key_env}; the same command goes on from here."
        )

    def _tell(self, trouble: Unavailable) -> None:
        """That requests are tried again, now and then: else nobody would know why nothing comes."""
        now = asyncio.get_running_loop().time()
        if now - self.told >= _SECONDS_BETWEEN:
            self.told = now
            say(f"trying again, {self.under_way} requests under way: {trouble}")

    async def _ask(self, client: httpx.AsyncClient, question: Question, vote: int) -> None:
        remote = self.remote
        request = body(remote.name, question, vote, remote.sampling, remote.section, remote.seed)
        try:
            reply = await complete(client, request, remote.section, self._ending, self._tell)
            answer = answer_of(question, vote, self.parse(reply.text), reply.tokens, reply.cut)
            self.lost, self.answered = 0, True
        except Stopped:
            return  # it is asked when the same command goes on
        except Refused as refusal:
            answer = failed(question, vote, f"refused: {refusal}")
            if refusal.for_all:
                self._give_up(refusal)
            elif refusal.perhaps_for_all:
                self.refusal = refusal
            # Where other questions are answered, a refusal such as 400 is this one's own: too long, for example.
            self.lost = 0 if self.answered and not refusal.perhaps_for_all else self.lost + 1
        except Unavailable as error:
            answer = failed(question, vote, f"after {error.requests} requests: {error}")
            self.lost += 1
        self.answers.add([answer])
        self.done += 1
        self.report(self.done, {})
        if self.lost > max(20, _MOST_LOST * remote.section.concurrency) and not self.trouble:
            self.trouble = (
                f"{remote.section.url} did not answer the last {self.lost} questions, the last one {answer.reason}. "
                "See whether the server is up and takes such requests; the same command goes on from here."
            )
