"""A judge behind a server that speaks OpenAI's protocol, and the requests to it that are under way, many at a time.

Nothing here needs JAX: a trainer that asks a judge for its rewards need not have it.
"""

import asyncio
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2 as httpx

from patarm_jax.ask.answers import Answer, Answers, Kind, Question, no_answer
from patarm_jax.ask.client import LOOK, Stopped, complete, connect, served_model
from patarm_jax.ask.dialect import Dialect
from patarm_jax.ask.replies import Parse, Refused, Reply, Unavailable, as_answer
from patarm_jax.config.sections import EndpointSection, JudgingSection
from patarm_jax.run.process import say
from patarm_jax.types import UsageError, UserError

_MOST_LOST = 2  # times the concurrency: after so many failures in a row, and 20 at least, the evaluation stops
_ENOUGH_ALIKE = 2  # refusals in the same words, where nothing was ever answered, to say that all would be refused
_ENOUGH_REFUSED = 3  # in any words
_MOST_REFUSED = 100  # in a row where others were answered before, to say that no more will be
_SECONDS_BETWEEN = 60.0  # two words on trouble


@dataclass(frozen=True)
class Remote:
    """A judge that a server serves."""

    section: EndpointSection
    name: str  # the model's, as the server calls it; empty while nothing is asked
    sampling: JudgingSection  # what is unset is left to the server
    votes: int
    seed: int

    def __post_init__(self) -> None:
        """Refuses what is for a server to see to."""
        if self.sampling.batch_invariant:
            raise UsageError(
                "sampling.batch_invariant is on, and a server puts its own batches together. Leave it out, and see "
                "what the server offers for it."
            )

    @property
    def identity(self) -> dict[str, object]:
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

    with ThreadPoolExecutor(1) as aside:  # whoever asks may be inside an event loop
        return aside.submit(asyncio.run, ask()).result()


@dataclass(frozen=True)
class _Held:
    """A refused question, until it is known whether every question is refused."""

    question: Question
    vote: int
    sent: Mapping[str, object]
    refusal: Refused


@dataclass
class Asking:
    """The requests under way, and what became of those that are finished."""

    remote: Remote
    answers: Answers
    parse: Parse
    work: Iterator[tuple[Question, int] | None]  # None while nothing is to be asked yet, which only `resting` allows
    stopping: Callable[[], bool]
    came: Callable[[Answer], None]  # told of each answer when it is kept, and of what failed
    answered: bool  # whether any question ever was
    resting: Callable[[], Awaitable[None]] | None = None  # awaited while nothing is to be asked yet
    to_go_on: str = "; run the same command again to resume"  # behind what is to be done about trouble
    dialect: Dialect = field(default_factory=Dialect)
    requests: int = 0  # how many were sent, those that were tried again included
    lost: int = 0  # failures in a row that say that it is not the question's fault
    held: list[_Held] = field(default_factory=list)  # while no answer tells whether all would be refused
    foreign: Counter[str] = field(default_factory=Counter)  # replies that are none, until there is an answer
    last_reason: str = ""  # why the last question has no answer
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
        self._release_held()
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
        for one in self.work:
            if one is None:
                assert self.resting is not None
                if not self.under_way:
                    self._release_held()  # nothing that is under way can tell more of it
                await self.resting()
                if self._ending():
                    return
                continue
            question, vote = one
            # Whether what was refused is refused to all will be told by those under way.
            while self._doubtful() and self.under_way and not self._ending():
                await asyncio.sleep(LOOK)
            self._give_up_where_all_is_refused()
            if self._ending():
                return
            self.under_way += 1
            try:
                await self._ask(client, question, vote)
            finally:
                self.under_way -= 1

    async def _ask(self, client: httpx.AsyncClient, question: Question, vote: int) -> None:
        remote = self.remote
        while True:
            fields = self.dialect.fields(question, vote, remote.sampling, remote.section, remote.seed)
            request = {"model": remote.name, "messages": self.dialect.messages(question), **fields}
            sent = self.dialect.record(fields)
            try:
                reply = await complete(client, request, remote.section, self._ending, self._tell, self._spend)
            except Stopped:
                return  # it is asked when the same command goes on
            except Refused as refusal:
                changed = self.dialect.adapt(refusal, sent)
                if changed is not None:
                    if changed:
                        say(f"{remote.section.url}: {changed}. Every answer is kept with what was sent for it.")
                    continue
                self._refused(question, vote, sent, refusal)
            except Unavailable as error:
                reason = f"after {error.requests} requests: {error}"
                self._add(no_answer(question, vote, Kind.FAILED, reason, finish_reason=error.finish, sent=sent))
                self.lost += 1
            else:
                self._answered(question, vote, sent, reply)
            break
        if self.lost > self._too_many and not self.trouble:
            self.trouble = (
                f"{remote.section.url} did not answer the last {self.lost} questions, the last one {self.last_reason}. "
                f"See whether the server is up and takes such requests{self.to_go_on}."
            )

    def _answered(self, question: Question, vote: int, sent: Mapping[str, object], reply: Reply) -> None:
        self.lost = 0
        if reply.kind == Kind.REFUSED:
            more = {"text": reply.text, "finish_reason": reply.finish_reason, "tokens": reply.tokens, "sent": sent}
            self._add(no_answer(question, vote, Kind.REFUSED, f"refused: {reply.reason}", **more))
            return
        self.answered = True
        self._release_held(followed=True)
        self._add(as_answer(question, vote, self.parse, self.remote.section.opens_thinking, reply, sent))

    def _refused(self, question: Question, vote: int, sent: Mapping[str, object], refusal: Refused) -> None:
        """Whether a refusal is this question's own or everyone's, what follows will tell."""
        self.lost = 0 if self.answered and refusal.lasting else self.lost + 1
        self.held.append(_Held(question=question, vote=vote, sent=sent, refusal=refusal))
        if refusal.for_all:
            self._give_up(refusal)

    def _release_held(self, followed: bool = False) -> None:
        """Records refusals: as final where an answer followed them, else as failed, for the judge may be gone.

        At the end of all requests nothing follows. Then a refusal is final that names the question, or that was the
        same when the command ran before, or that is one of a few where nothing else went wrong.
        """
        few = not self.trouble and sum(not one.refusal.own for one in self.held) < _ENOUGH_REFUSED
        for one in self.held:
            reason = f"refused: {one.refusal}"
            before = self.answers.known.get((one.question.key, one.vote))
            again = before is not None and before.reason == reason
            final = self.answered and one.refusal.lasting and (followed or few or again or one.refusal.own)
            kind = one.refusal.kind if final else Kind.FAILED
            self._add(no_answer(one.question, one.vote, kind, reason, sent=one.sent))
        self.held.clear()

    def _add(self, answer: Answer) -> None:
        self.answers.add([answer])
        self.last_reason = answer.reason
        self.came(answer)

    # ---- Whether to go on ----

    @property
    def _too_many(self) -> int:
        return max(20, _MOST_LOST * self.remote.section.concurrency)

    def _doubtful(self) -> bool:
        """Whether a refusal may be one of everything."""
        return not self.answered and any(not one.refusal.own for one in self.held)

    def _give_up_where_all_is_refused(self) -> None:
        if not self.held:
            return
        doubtful = [one.refusal for one in self.held if not one.refusal.own]
        if self.answered:
            if len(doubtful) > _MOST_REFUSED:
                self._give_up(doubtful[-1])
            return
        alike = len(doubtful) >= _ENOUGH_ALIKE and len({_without_numbers(each) for each in doubtful}) == 1
        if alike or len(doubtful) >= _ENOUGH_REFUSED or len(self.held) > self._too_many:
            self._give_up(self.held[-1].refusal)

    def _give_up(self, refusal: Refused) -> None:
        section = self.remote.section
        self.trouble = self.trouble or (
            f"{section.url} answers {refusal}. Check endpoint.url, endpoint.model, the sampling settings and the key "
            f"in {section.api_key_env}{self.to_go_on}."
        )

    def _tell(self, trouble: Unavailable) -> None:
        """Says now and then that requests are tried again: else nobody would know why nothing comes."""
        if trouble.foreign and not self.answered:
            self.foreign[str(trouble)] += 1
            if self.foreign[str(trouble)] >= max(_ENOUGH_REFUSED, self.under_way):
                self.trouble = self.trouble or (
                    f"{self.remote.section.url} does not answer as OpenAI's chat protocol has it: {trouble}. Check "
                    f"endpoint.url, which ends in /v1 as a rule{self.to_go_on}."
                )
        now = asyncio.get_running_loop().time()
        if now - self.told >= _SECONDS_BETWEEN:
            self.told = now
            say(f"trying again, {self.under_way} requests under way: {trouble}")

    def _spend(self) -> None:
        """Counts a request that is about to be sent; raises Stopped where no more may be."""
        most = self.remote.section.max_requests
        if most and self.requests >= most:
            self.trouble = self.trouble or (
                f"endpoint.max_requests {most} have been sent, those that were tried again included, and answers are "
                f"missing. Raise it{self.to_go_on.replace(';', ', and')}."
            )
            raise Stopped
        self.requests += 1


def _without_numbers(refusal: Refused) -> str:
    """The refusal but for lengths, ids and times, in which those of one cause differ."""
    return re.sub(r"[0-9a-f-]*\d[0-9a-f-]*", "", str(refusal))
