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
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, get_args

from patarm_jax import locks
from patarm_jax.adapters.texts import Shown, shown
from patarm_jax.ask.answers import Answer, Answers, Question, open_answers, read_answers
from patarm_jax.ask.remote import Remote, ask_name
from patarm_jax.ask.standing import Standing
from patarm_jax.config.adapters import AdapterConfig
from patarm_jax.config.flags import merged
from patarm_jax.config.load import from_mapping, read_yaml
from patarm_jax.judge.forms import POINTWISE
from patarm_jax.run.process import say
from patarm_jax.types import Domain, UsageError, UserError

NAMED_BY = "PATARM_JUDGE"
_DOMAINS: dict[object, Domain] = {domain: domain for domain in get_args(Domain)}


@dataclass(frozen=True)
class Opinion:
    """What a judge says of a response."""

    score: float | None  # from 0 to 10, the mean of its votes; None: there is none
    reason: str = ""  # why there is none
    judgements: tuple[str, ...] = ()  # what it wrote


class Asked(Protocol):
    """Who answers questions, here or behind an endpoint."""

    def ask(self, questions: Sequence[Question]) -> Sequence["Future[list[Answer]]"]:
        """Their answers, one for each vote."""


class _Served:
    """A judge behind an endpoint."""

    def __init__(self, remote: Remote, answers: Answers) -> None:
        self._standing = Standing(remote, answers, POINTWISE.read)

    def ask(self, questions: Sequence[Question]) -> "Sequence[Future[list[Answer]]]":
        return [self._standing.ask(question) for question in questions]


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
        say(f"rewards by {self._name}, answers kept in {config.kept or 'memory'}")

    def of_batch(
        self, prompts: Sequence[object], completions: Sequence[object], columns: Mapping[str, Any]
    ) -> list[Opinion]:
        """What it says of the completions of a batch, whose columns may name their domains."""
        seen = self.config.sees_thinking
        every = [shown(prompt, completion, seen) for prompt, completion in zip(prompts, completions, strict=True)]
        domains = columns.get(self.config.domain_column)
        return self.opinions(every, [None] * len(every) if domains is None else list(domains))

    def opinions(self, every: Sequence[Shown], domains: Sequence[object]) -> list[Opinion]:
        """What each is worth, when all have been judged or `time_limit` is over; of their domains those that are known.

        Raises:
            UserError: nobody is answered: the server is gone, or refuses everything.
        """
        end = time.monotonic() + self.config.time_limit
        return [
            self._opinion(one, None if given is None else _until(given, end))
            for one, given in zip(every, self._begin(every, domains), strict=True)
        ]

    async def opinion(self, one: Shown, domain: object) -> Opinion:
        """The same of one, while others are waited for."""
        (given,) = self._begin([one], [domain])
        if given is None:
            return self._opinion(one, None)
        try:
            # Shielded: another may wait for the same answer.
            waiting = asyncio.shield(asyncio.wrap_future(given))
            return self._opinion(one, await asyncio.wait_for(waiting, self.config.time_limit))
        except TimeoutError:
            return self._opinion(one, ())

    def _begin(self, every: Sequence[Shown], domains: Sequence[object]) -> "list[Future[list[Answer]] | None]":
        questions = [self._question(one, domain) for one, domain in zip(every, domains, strict=True) if not one.reason]
        given = iter(self._asked.ask(questions))
        return [None if one.reason else next(given) for one in every]

    def _question(self, one: Shown, domain: object) -> Question:
        known = _DOMAINS.get(domain, self.config.domain) if isinstance(domain, str) else self.config.domain
        messages = POINTWISE.ask(one.prompt, one.response, domain=known, rubrics=self.config.rubrics)
        number = hashlib.sha256(json.dumps(list(messages)).encode()).digest()
        return Question("", int.from_bytes(number[:4]) % (1 << 20), messages)  # the same words, the same answer

    def _opinion(self, one: Shown, given: Sequence[Answer] | None) -> Opinion:
        """What the answers say, of which there are none where it was too late, and None where nothing was asked."""
        if given is None:
            return Opinion(None, one.reason)
        if not given:
            return Opinion(None, f"no answer in {self.config.time_limit:g} s")
        scores = [answer.score for answer in given if answer.score is not None]
        texts = tuple(answer.text for answer in given)
        if scores:
            return Opinion(fmean(scores), judgements=texts)
        if not any(answer.came for answer in given) and not self._answers.any_came:
            raise UserError(
                f"{self._name} has not answered a single question yet, this one {given[0].reason}. See whether the "
                "server is up, and check endpoint.url, endpoint.model and the key."
            )
        return Opinion(None, given[0].reason or given[0].status, texts)


def _until(given: "Future[list[Answer]]", end: float) -> Sequence[Answer]:
    """The answers, or none at the end of patience."""
    try:
        return given.result(max(0.0, end - time.monotonic()))
    except TooLate:
        return ()


# ------------------------------------------------------------------------------------------------------------- opening

_opening = threading.Lock()
_judges: dict[tuple[int, str], Judge] = {}  # by process, since a forked one has no threads, and settings


def judge_of(
    judge: str | os.PathLike[str] | Mapping[str, Any] | None, settings: Mapping[str, Any], served: bool = False
) -> Judge:
    """The judge of this process with these settings, opened where it is not open.

    Args:
        judge: a URL, a YAML file, settings, or None: what the environment names.
        settings: laid over those, as nested mappings.
        served: whether it must be behind an endpoint, since many processes and threads ask it.
    """
    config = _config(judge, settings)
    if served and not config.endpoint.url:
        raise UsageError(
            f"the judge is {config.model.path}, in this process; this trainer asks from many. Serve it, as with `vllm "
            "serve`, and give endpoint.url."
        )
    key = os.getpid(), repr(config)
    with _opening:
        if key not in _judges:
            _judges[key] = Judge(config)
        return _judges[key]


def _config(judge: str | os.PathLike[str] | Mapping[str, Any] | None, settings: Mapping[str, Any]) -> AdapterConfig:
    judge = judge if judge is not None else os.environ.get(NAMED_BY) or {}
    where = ""
    if isinstance(judge, Mapping):
        given = _plain(judge)
    elif str(judge).startswith(("http://", "https://")):
        given = {"endpoint": {"url": str(judge)}}
    else:
        given, where = read_yaml(Path(judge)), str(judge)
    return from_mapping(AdapterConfig, merged(merged(asdict(AdapterConfig()), given), _plain(settings)), where)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts, where a trainer has mappings of its own."""
    return {name: _plain(value) if isinstance(value, Mapping) else value for name, value in settings.items()}


# A file for each process that writes, for as many as there are at a time, among the answers of one judge.
_FILE = "answers-{}.jsonl"


def _kept(config: AdapterConfig, identity: Mapping[str, object]) -> Answers:
    """Where answers are kept, with all that are there: of other processes, and of other days."""
    identity = {**identity, "rubrics": config.rubrics}
    open_until_exit = contextlib.ExitStack()
    atexit.register(open_until_exit.close)
    if not config.kept:
        folder = Path(open_until_exit.enter_context(tempfile.TemporaryDirectory()))
    else:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        folder = Path(config.kept).expanduser() / digest
    for number in itertools.count():
        path = folder / _FILE.format(number)
        with contextlib.suppress(locks.Held):  # by another process
            answers = open_until_exit.enter_context(open_answers(path, identity))
            break
    for other in sorted(folder.glob(_FILE.format("*"))):
        if other != path:
            answers.known = read_answers(other, identity) | answers.known
    return answers
