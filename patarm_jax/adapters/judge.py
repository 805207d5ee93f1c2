"""The judge that the reward functions of all adapters ask: one for each process, with answers that are kept.

judge: a URL, a YAML file with the settings of `AdapterConfig`, or those settings themselves. Where nothing is given,
the environment variable PATARM_JUDGE holds the URL or the file.
"""

import asyncio
import atexit
import contextlib
import hashlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from patarm_jax import locks
from patarm_jax.adapters.texts import Shown, ends_thinking_of_its_template, shown
from patarm_jax.ask.answers import Answer, Answers, Question, open_answers, take_in
from patarm_jax.ask.remote import Remote, ask_name
from patarm_jax.ask.standing import Standing
from patarm_jax.config.adapters import AdapterConfig
from patarm_jax.config.flags import merged
from patarm_jax.config.load import from_mapping, read_yaml
from patarm_jax.judge.forms import POINTWISE
from patarm_jax.run.process import say
from patarm_jax.types import DOMAINS, UsageError, UserError

NAMED_BY = "PATARM_JUDGE"


@dataclass(frozen=True)
class Opinion:
    """What a judge says of a response."""

    score: float | None  # from 0 to 10, the mean of its votes; None: there is none
    reason: str = ""  # why there is none
    judgements: tuple[str, ...] = ()  # what it wrote


class Asked(Protocol):
    """Who answers questions, here or behind an endpoint."""

    @property
    def has_answered(self) -> bool:
        """Whether it has ever answered."""

    def ask(self, questions: Sequence[Question]) -> Sequence["Future[list[Answer]]"]:
        """Their answers, one for each vote."""


class _Served:
    """A judge behind an endpoint."""

    def __init__(self, remote: Remote, answers: Answers) -> None:
        self._standing = Standing(remote, answers, POINTWISE.read, to_go_on="")

    @property
    def has_answered(self) -> bool:
        return self._standing.has_answered

    def ask(self, questions: Sequence[Question]) -> "Sequence[Future[list[Answer]]]":
        return [self._standing.ask(question) for question in questions]


# So many responses in a row whose judgements failed end the training: of a judge that has answered, and of one that
# never has. Else it would go on for hours, with nothing to learn from.
_MOST_FAILED, _MOST_FAILED_AT_FIRST = 16, 4


class Judge:
    """A pointwise judge, asked for what responses are worth."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        if config.endpoint.url:
            name = config.endpoint.model or ask_name(config.endpoint)
            remote = Remote(config.endpoint, name, config.sampling, config.votes, config.seed)
            self._answers = _kept(config, remote.identity)
            self._asked: Asked = _Served(remote, self._answers)
            self._name = f"{name} at {config.endpoint.url}"
        else:
            from patarm_jax.adapters.here import Here  # JAX is needed by nobody else

            here = Here(config)
            self._answers = here.answers = _kept(config, here.identity)
            self._asked, self._name = here, config.model.path
        self._failed = 0  # responses in a row
        self._opens_thinking = config.opens_thinking == "yes"
        say(f"rewards by {self._name}, answers kept in {config.kept or 'memory'}")

    def of_batch(
        self, prompts: Sequence[object], completions: Sequence[object], columns: Mapping[str, Any]
    ) -> list[Opinion]:
        """What it says of the completions of a batch, whose columns may name their domains."""
        domains = columns.get(self.config.domain_column)
        every = self.shown(list(zip(prompts, completions, strict=True)))
        return self.opinions(every, [None] * len(every) if domains is None else list(domains))

    def shown(self, pairs: Sequence[tuple[object, object]]) -> list[Shown]:
        """What it is shown of prompts with their completions."""
        if self.config.opens_thinking == "auto" and not self._opens_thinking:
            self._opens_thinking = any(ends_thinking_of_its_template(completion) for _, completion in pairs)
        seen, opens = self.config.sees_thinking, self._opens_thinking
        return [shown(prompt, completion, seen, opens) for prompt, completion in pairs]

    def opinions(self, every: Sequence[Shown], domains: Sequence[object]) -> list[Opinion]:
        """What each is worth, when all have been judged or `time_limit` is over; of their domains those that are known.

        Raises:
            UserError: nobody is answered: the server is gone, or refuses everything.
        """
        end = time.monotonic() + self.config.time_limit
        begun = self._begin(every, domains)
        given = [None if one is None else _until(one, end) for one in begun]
        return self._read(every, given)

    async def opinion(self, one: Shown, domain: object) -> Opinion:
        """The same of one, while others are waited for."""
        (begun,) = self._begin([one], [domain])
        given: Sequence[Answer] | None = None
        if begun is not None:
            try:
                given = await asyncio.wait_for(asyncio.wrap_future(begun), self.config.time_limit)
            except TimeoutError:
                given = ()
        (found,) = self._read([one], [given])
        return found

    def _begin(self, every: Sequence[Shown], domains: Sequence[object]) -> "list[Future[list[Answer]] | None]":
        questions = [self._question(one, domain) for one, domain in zip(every, domains, strict=True) if not one.reason]
        given = iter(self._asked.ask(questions))
        return [None if one.reason else next(given) for one in every]

    def _question(self, one: Shown, domain: object) -> Question:
        known = DOMAINS.get(domain, self.config.domain) if isinstance(domain, str) else self.config.domain
        messages = POINTWISE.ask(one.prompt, one.response, domain=known, rubrics=self.config.rubrics)
        number = hashlib.sha256(json.dumps(list(messages)).encode()).digest()
        return Question("", int.from_bytes(number[:4]) % (1 << 20), messages)  # the same words, the same answer

    def _read(self, every: Sequence[Shown], given: Sequence[Sequence[Answer] | None]) -> list[Opinion]:
        """What answers say: None where nothing was asked, none where it was too late."""
        opinions = [self._opinion(one, answers) for one, answers in zip(every, given, strict=True)]
        came = [answers and any(one.came for one in answers) for answers in given]
        why = ""
        for answers, has_come, opinion in zip(given, came, opinions, strict=True):
            if has_come:
                self._failed = 0
            elif answers or (answers is not None and not any(came)):  # where others came, late ones are only late
                self._failed, why = self._failed + 1, opinion.reason
        most = _MOST_FAILED if self._asked.has_answered else _MOST_FAILED_AT_FIRST
        if why and (self._failed >= most or (self._failed == len(every) > 1 and not self._asked.has_answered)):
            raise UserError(
                f"{self._name} has not answered the last {self._failed} questions, the last one because: {why}. See "
                "whether the server is up, and check endpoint.url, endpoint.model, the key and time_limit."
            )
        for answers in given:
            for one in answers or ():  # texts are on disk, where they are kept; in memory they would pile up
                if one.came and one.text:
                    self._answers.known[one.question, one.vote] = replace(one, text="")
        return opinions

    def _opinion(self, one: Shown, given: Sequence[Answer] | None) -> Opinion:
        if given is None:
            return Opinion(None, one.reason)
        if not given:
            return Opinion(None, f"no answer in {self.config.time_limit:g} s")
        scores = [answer.score for answer in given if answer.score is not None]
        texts = tuple(answer.text for answer in given)
        if scores:
            return Opinion(fmean(scores), judgements=texts)
        return Opinion(None, given[0].reason or given[0].status, texts)


def _until(given: "Future[list[Answer]]", end: float) -> Sequence[Answer]:
    """The answers, or none at the end of patience."""
    try:
        return given.result(max(0.0, end - time.monotonic()))
    except TooLate:
        given.cancel()  # what is not sent yet need not be
        return ()


# ------------------------------------------------------------------------------------------------------------- opening

_opening = threading.Lock()
_judges: dict[str, Judge] = {}  # of this process, by settings


def _begin_anew() -> None:
    """In a forked process, which has none of the threads."""
    global _opening
    _opening = threading.Lock()
    _judges.clear()


os.register_at_fork(after_in_child=_begin_anew)
Named = str | os.PathLike[str] | Mapping[str, Any] | None  # as `judge_of` takes a judge


def judge_of(judge: Named, settings: Mapping[str, Any], of_many: Mapping[str, Any] | None = None) -> Judge:
    """The judge of this process with these settings, opened where it is not open.

    Args:
        judge: a URL, a YAML file, settings, or None: what the environment names.
        settings: laid over those, as nested mappings.
        of_many: of a trainer that asks from many processes and threads, and so needs a judge behind an endpoint,
            settings that stand where no others are given.
    """
    config = _config(judge, settings, of_many or {})
    if of_many is not None and not config.endpoint.url:
        raise UsageError(
            f"the judge is {config.model.path}, in this process; this trainer asks from many. Serve it, as with `vllm "
            "serve`, and give endpoint.url."
        )
    with _opening:
        if (key := repr(config)) not in _judges:
            _judges[key] = Judge(config)
        return _judges[key]


Rewards = Callable[[Judge, Sequence[Any], Sequence[Any], Mapping[str, Any]], Any]  # as `_rewards` of the adapters


@dataclass(frozen=True)
class RewardFunction:
    """A reward function of a judge, which may be copied to other processes: each opens the judge for itself."""

    rewards: Rewards
    judge: Named
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "__name__", "patarm_judge")  # by which trainers log it
        judge_of(self.judge, self.settings)  # so that what is wrong is said before training begins

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        """The rewards of completions."""
        return self.rewards(judge_of(self.judge, self.settings), prompts, completions, columns)


def maker_of(rewards: Rewards) -> Callable[..., RewardFunction]:
    """What makes the reward functions of an adapter."""

    # Not a function of the adapter's module: Tunix takes every public one that it finds there for a reward function.
    def make_reward(judge: Named = None, **settings: Any) -> RewardFunction:
        """A reward function; `judge` and settings as `patarm_jax.adapters.judge` has them."""
        return RewardFunction(rewards, judge, settings)

    return make_reward


def _config(judge: Named, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> AdapterConfig:
    judge = judge if judge is not None else os.environ.get(NAMED_BY) or {}
    where = ""
    if isinstance(judge, Mapping):
        given = _plain(judge)
    elif str(judge).startswith(("http://", "https://")):
        given = {"endpoint": {"url": str(judge)}}
    else:
        given, where = read_yaml(Path(judge)), str(judge)
    complete = asdict(AdapterConfig())
    for over in (_plain(defaults), given, _plain(settings)):
        complete = merged(complete, over)
    return from_mapping(AdapterConfig, complete, where)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, where a trainer has mappings of its own."""
    return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


# A file for each process that writes, for as many as there are at a time, among the answers of one judge.
_FILE = "answers-{}.jsonl"


def _kept(config: AdapterConfig, identity: Mapping[str, object]) -> Answers:
    """Where answers are kept, with all that are there: of other processes, and of other days."""
    identity = {**identity, "rubrics": config.rubrics}
    if not config.kept:
        return Answers(Path(os.devnull), open(os.devnull, "ab", buffering=0), {})  # until the end
    open_until_exit = contextlib.ExitStack()
    atexit.register(open_until_exit.close)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(config.kept).expanduser() / digest
    for number in itertools.count():
        path = folder / _FILE.format(number)
        with contextlib.suppress(locks.Held):  # by another process
            answers = open_until_exit.enter_context(open_answers(path, identity))
            break
    take_in(answers, sorted(folder.glob(_FILE.format("*"))), identity)
    for place, answer in answers.known.items():
        answers.known[place] = replace(answer, text="")
    return answers
