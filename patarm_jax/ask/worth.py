"""Who says what a policy's responses are worth: a judge or reward model here, a judge behind a server, a function.

Each is a `rollout.responses.Source`. A model here lies on the run's own devices, beside the policy's weights, and works
when the policy has ended sampling; a server is asked while it still samples.
"""

import asyncio
import contextlib
import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params
from patarm_jax.ask.answers import Answer, Answers, Question, open_answers
from patarm_jax.ask.endpoint import Remote, ask_name, ask_while_they_come
from patarm_jax.config.policy import PolicyConfig, SourceSection
from patarm_jax.config.sections import EndpointSection, ModelSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_question
from patarm_jax.data.scores import room_for
from patarm_jax.judge.forms import FORMS, POINTWISE, Form
from patarm_jax.model.sharding import Program, gather_json, process_in
from patarm_jax.model.transformer import abstract_params
from patarm_jax.padding import bucket
from patarm_jax.rollout.engine import abstract_programs
from patarm_jax.rollout.judging import Judge, Judged, judge, make_judge, written_ids
from patarm_jax.rollout.numbers import Numbers, make_numbers
from patarm_jax.rollout.probabilities import LogProbs, expected_scores, make_logprobs, unscored
from patarm_jax.rollout.responses import Responses, Source, Worth, without_answers
from patarm_jax.rollout.schedule import Request
from patarm_jax.run.drawing import as_the_model_says
from patarm_jax.run.learner import rollout_rules
from patarm_jax.run.margin import imported
from patarm_jax.run.open_model import Model, load_params, open_model
from patarm_jax.run.process import say
from patarm_jax.types import JudgeKind, Judgement, UsageError, UserError

_KIND: dict[str, JudgeKind] = {"judge": "pointwise", "scalar": "scalar", "ordinal": "ordinal"}
_KEYS = 2**32 - 16  # counted down from, by source: no completion's id, from which its key is folded
Reward = Callable[..., Sequence[float | None]]  # as TRL calls it


def _said(judgements: Sequence[Judgement] | Sequence[Answer]) -> str:
    """All votes on a response, with the reason where one has no score."""
    return "\n\n".join(one.text if one.score is not None else f"[{one.reason}]\n{one.text}" for one in judgements)


# ------------------------------------------------------------------------------------------------------------- a model


@dataclass(frozen=True)
class OpenedModel:
    """A judge or reward model before its weights are loaded."""

    section: SourceSection
    number: int  # among the sources
    where: str  # its settings
    model: Model
    how: ModelSection  # how it computes

    @property
    def form(self) -> Form:
        """How it is asked."""
        return FORMS[_KIND[self.section.kind]]

    @property
    def room(self) -> Room:
        """Its positions, and how many of them an answer may take."""
        where = f"{self.where}.sampling.max_new_tokens"
        new = self.section.sampling.max_new_tokens or 0
        return room_for(self.model.arch.max_position_embeddings, self.model.tokenizer, self.form, new, where)

    def programs(self, config: PolicyConfig, mesh: Mesh) -> dict[str, Program]:
        """What it runs for the responses of a step, with abstract arguments; none of a model that writes nothing."""
        if not self.section.is_judge:
            return {}
        arch, dtype = self.model.arch, jnp.dtype(self.how.dtype)
        weights = abstract_params(arch, mesh, rollout_rules(config.mesh), dtype, unstacked=True)
        asked, width = config.pairs_per_step * config.group_size, bucket(self.section.max_prompt_tokens)
        every = abstract_programs(judge_of(self, mesh).engine, weights, asked, width)
        return {f"{self.section.called}: {name}": program for name, program in every.items()}

    def question(self, responses: Responses, answer: str) -> np.ndarray:
        """What it reads of a response, [T] int32."""
        prompt, rubrics = responses.preference, self.section.rubrics
        messages = self.form.ask(prompt.prompt, answer, domain=prompt.domain, rubrics=rubrics)
        return encode_question(self.model.tokenizer, messages, self.form)


def open_source_model(config: PolicyConfig, number: int) -> OpenedModel:
    """Opens the folder of a source's model; it computes as the policy does, on the same devices."""
    section = config.every_source[number]
    how = replace(config.model, path=section.model, adapter="", weights="load")
    model = open_model(how, _KIND[section.kind], called=f"{config.place_of(number)}.model")
    if section.is_judge:
        drawn = as_the_model_says(section.sampling, model)
        say(f"{section.called}: {drawn.said}")
        section = replace(section, sampling=replace(section.sampling, **vars(drawn.sampling)))
    opened = OpenedModel(section, number, config.place_of(number), model, how)
    opened.room.check()
    return opened


def load_source_weights(config: PolicyConfig, opened: OpenedModel, mesh: Mesh) -> Params:
    """Its weights as the sampler takes them, beside the policy's."""
    rules, dtype = rollout_rules(config.mesh), jnp.dtype(opened.how.dtype)
    return load_params(opened.how, opened.model, mesh, config.run.seed, rules, dtype, unstacked=True)


@dataclass
class _Waiting:
    """What is offered until it is collected."""

    offered: list[Responses] = field(default_factory=list)

    def offer(self, responses: Responses) -> None:
        """Takes the responses to one prompt."""
        self.offered.append(responses)

    def taken(self) -> list[Responses]:
        """All of them, in the order of their prompts, which are then no more."""
        found = sorted(self.offered, key=lambda one: one.index)
        self.offered.clear()
        return found


@dataclass
class JudgeHere(_Waiting):
    """A pointwise judge on the run's devices."""

    opened: OpenedModel = field(kw_only=True)
    judge: Judge = field(kw_only=True)  # whose group is its votes
    weights: Params = field(kw_only=True)
    logprobs: LogProbs | None = field(kw_only=True)  # where scores are the expected ones

    @property
    def name(self) -> str:
        """In metrics."""
        return self.opened.section.called

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """The mean score of each response over its votes; all at once."""
        opened, every = self.opened, self.taken()
        found = {one.index: without_answers(one) | self._too_long(one) for one in every}
        asked = [(one, member) for one in every for member in range(len(one.answers))]
        # Processes must ask for equally many: what is not asked is asked with an empty response, and not looked at.
        requests = [
            Request(
                opened.question(one, "" if member in found[one.index] else one.answers[member] or ""),
                one.record.index * len(one.answers) + member,
            )
            for one, member in asked
        ]
        mine = jax.random.fold_in(key, _KEYS - opened.number)
        judged = sorted(judge(self.judge, self.weights, requests, mine), key=lambda one: one.group.index)
        for (one, member), request, of_it in zip(asked, requests, judged, strict=True):
            if member not in found[one.index]:
                found[one.index] = {**found[one.index], member: self._worth(request, of_it)}
        return {index: [of_it[member] for member in sorted(of_it)] for index, of_it in found.items()}

    def _too_long(self, responses: Responses) -> dict[int, Worth]:
        found = {}
        for member, answer in enumerate(responses.answers):
            length = len(self.opened.question(responses, answer)) if answer else 0
            if excess := self.opened.room.excess(length, self.opened.section.max_prompt_tokens):
                words = excess.replace("data.max_prompt_tokens", "max_prompt_tokens")
                found[member] = Worth(None, f"with this response the judge's prompt has {length:,} tokens, {words}")
        return found

    def _worth(self, request: Request, judged: Judged) -> Worth:
        scores = [one.score for one in judged.judgements]
        if self.logprobs is not None:
            scores = self._expected(request, judged)
        known = [score for score in scores if score is not None]
        return Worth(float(np.mean(known)) if known else None, _said(judged.judgements))

    def _expected(self, request: Request, judged: Judged) -> list[float | None]:
        assert self.logprobs is not None
        each = zip(written_ids(judged.group), judged.judgements, strict=True)
        lacking = [unscored(self.judge.tokenizer, np.asarray(request.tokens), ids, one) for ids, one in each]
        given = expected_scores(self.logprobs, self.weights, self.judge.engine.mesh, [one for one in lacking if one])
        return [next(given).score if one else None for one in lacking]


@dataclass
class NumberHere(_Waiting):
    """A reward model on the run's devices, which writes nothing."""

    opened: OpenedModel = field(kw_only=True)
    mesh: Mesh = field(kw_only=True)
    numbers: Numbers = field(kw_only=True)
    weights: Params = field(kw_only=True)

    @property
    def name(self) -> str:
        """In metrics."""
        return self.opened.section.called

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """The number of each response; processes that share the devices read those of all."""
        opened, every = self.opened, self.taken()
        found = {one.index: dict(without_answers(one)) for one in every}
        places, mine = [], []
        for one in every:
            for member, answer in enumerate(one.answers):
                if answer is None:
                    continue
                tokens = opened.question(one, answer)
                if excess := opened.room.excess(len(tokens), opened.section.max_prompt_tokens):
                    words = excess.replace("data.max_prompt_tokens", "max_prompt_tokens")
                    reason = f"with this response its prompt has {len(tokens):,} tokens, {words}"
                    found[one.index][member] = Worth(None, reason)
                    continue
                places.append((one.index, member))
                mine.append(tokens.tolist())
        process, _ = process_in(self.mesh)
        counts = gather_json(self.mesh, [len(mine)])
        read = [np.asarray(tokens, np.int32) for tokens in gather_json(self.mesh, mine)]
        values = np.full(len(read), np.nan)
        for given in self.numbers(self.weights, read) if read else ():
            values[given.index] = given.value
        own = values[sum(counts[:process]) :][: len(mine)]
        for (index, member), value in zip(places, own, strict=True):
            is_number = np.isfinite(value)
            found[index][member] = Worth(float(value)) if is_number else Worth(None, f"the model gives {value}")
        return {index: [of_it[member] for member in sorted(of_it)] for index, of_it in found.items()}


# ------------------------------------------------------------------------------------------------------------ a server


class JudgeServed:
    """A pointwise judge behind an OpenAI-compatible server, asked by a thread of its own while the policy samples.

    Its answers are kept in a file: what a run that was stopped has asked already is not asked again.
    """

    def __init__(self, section: SourceSection, remote: Remote, kept: Path) -> None:
        self.name = section.called
        self._section, self._remote = section, remote
        self._open = contextlib.ExitStack()
        identity = remote.identity | {"rubrics": section.rubrics}
        self._answers: Answers = self._open.enter_context(open_answers(kept, identity))
        self._asked: dict[tuple[int, int], Question] = {}
        self._offered: list[Responses] = []
        self._waiting: queue.SimpleQueue[tuple[Question, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failed: list[BaseException] = []

    def offer(self, responses: Responses) -> None:
        """Has them asked for at once."""
        self._offered.append(responses)
        prompt = responses.preference
        for member, answer in enumerate(responses.answers):
            if answer is None:
                continue
            messages = POINTWISE.ask(prompt.prompt, answer, domain=prompt.domain, rubrics=self._section.rubrics)
            sample = responses.record.index * len(responses.answers) + member
            question = Question(prompt.id, sample, messages)
            self._asked[responses.index, member] = question
            for vote in range(self._remote.votes):
                known = self._answers.known.get((question.key, vote))
                if known is None or not known.came:
                    self._waiting.put((question, vote))
        if self._thread is None:
            self._thread = threading.Thread(target=self._ask, name=f"asking {self.name}", daemon=True)
            self._thread.start()

    def _ask(self) -> None:
        try:
            asyncio.run(ask_while_they_come(self._remote, self._answers, self._next, POINTWISE.read))
        except BaseException as error:  # raised where they are collected
            self._failed.append(error)

    def _next(self) -> Iterator[tuple[Question, int] | None]:
        """What is to be asked; None while there is nothing yet."""
        while True:
            try:
                work = self._waiting.get_nowait()
            except queue.Empty:
                yield None
                continue
            if work is None:
                return
            yield work

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """Waits for all answers; those of a response in the mean over its votes."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread, self._waiting = None, queue.SimpleQueue()
        if self._failed:
            raise self._failed.pop()
        found: dict[int, list[Worth]] = {}
        for one in self._offered:
            lost = without_answers(one)
            found[one.index] = [
                lost[member] if member in lost else self._worth(self._asked[one.index, member])
                for member in range(len(one.answers))
            ]
        self._offered.clear()
        self._asked.clear()
        return found

    def _worth(self, question: Question) -> Worth:
        given = self._answers.of(question, self._remote.votes)
        known = [one.score for one in given if one.score is not None]
        return Worth(float(np.mean(known)) if known else None, _said(given))


# ---------------------------------------------------------------------------------------------------------- a function


class FunctionOf(_Waiting):
    """A Python function of the user's, called as TRL calls a reward function."""

    def __init__(self, section: SourceSection, function: Reward) -> None:
        super().__init__()
        self.name, self._function = section.called, function

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """What the function gives for all of them at once.

        It is called with `prompts` and `completions` as lists of messages, `completion_ids`, the other columns of the
        prompts' rows and `trainer_state`; None of what it returns is no reward.
        """
        every = self.taken()
        found = {one.index: dict(without_answers(one)) for one in every}
        asked = [(one, member) for one in every for member, answer in enumerate(one.answers) if answer is not None]
        if asked:
            names = set.intersection(*({*one.preference.row} for one, _ in asked)) - _OURS
            columns = {name: [one.preference.row[name] for one, _ in asked] for name in sorted(names)}
            values = self._called(
                prompts=[[dict(turn) for turn in one.preference.prompt] for one, _ in asked],
                completions=[[{"role": "assistant", "content": one.answers[member]}] for one, member in asked],
                completion_ids=[list(one.ids[member]) for one, member in asked],
                trainer_state=TrainerState(step),
                **columns,
            )
            if len(values) != len(asked):
                raise UserError(
                    f"reward function {self.name} gives {len(values):,} values for {len(asked):,} completions. Return "
                    "one for each, None where there is no reward."
                )
            for (one, member), value in zip(asked, values, strict=True):
                number = np.nan if value is None else float(value)
                is_number = np.isfinite(number)
                found[one.index][member] = Worth(number) if is_number else Worth(None, f"{self.name} gives {value}")
        return {index: [of_it[member] for member in sorted(of_it)] for index, of_it in found.items()}

    def _called(self, **arguments: Any) -> Sequence[float | None]:
        try:
            given = self._function(**arguments)
            if inspect.isawaitable(given):
                given = asyncio.run(_result(given))
            return list(given)
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"reward function {self.name} raises {type(error).__name__}: {str(error)[:300]}. It is called with "
                f"{', '.join(arguments)}: take what it does not need as **kwargs."
            ) from error


@dataclass(frozen=True)
class TrainerState:
    """What TRL hands a reward function of the run, as far as it is known here."""

    global_step: int


_OURS = {"prompts", "completions", "completion_ids", "trainer_state", "prompt"}


async def _result(given: Any) -> Any:
    return await given


# ----------------------------------------------------------------------------------------------------------------- all


def open_models(config: PolicyConfig) -> dict[int, OpenedModel]:
    """The models here of a run's sources, by their numbers; what else is wrong with sources is found too."""
    found = {}
    for number, section in enumerate(config.every_source):
        if section.kind == "function":
            imported(section.function, f"{config.place_of(number)}.function")
        elif not section.url:
            found[number] = open_source_model(config, number)
            if section.expected_score and jax.process_count() > 1:
                raise UsageError(
                    f"{config.place_of(number)}.expected_score is true, and {jax.process_count()} processes share the "
                    "judge: expected scores are computed by one. Leave it out, or give votes."
                )
    return found


def open_sources(config: PolicyConfig, models: Mapping[int, OpenedModel], mesh: Mesh, folder: Path) -> list[Source]:
    """All sources of a run, gold ones last, with their weights; `folder` keeps the answers of servers."""
    return [
        _open_source(config, number, section, models, mesh, folder)
        for number, section in enumerate(config.every_source)
    ]


def _open_source(
    config: PolicyConfig,
    number: int,
    section: SourceSection,
    models: Mapping[int, OpenedModel],
    mesh: Mesh,
    folder: Path,
) -> Source:
    if section.kind == "function":
        return FunctionOf(section, imported(section.function, f"{config.place_of(number)}.function"))
    if section.url:
        endpoint = EndpointSection(
            url=section.url,
            model=section.served,
            timeout=section.timeout,
            concurrency=section.concurrency,
            tries=section.tries,
        )
        name = section.served or ask_name(endpoint)
        remote = Remote(endpoint, name, section.sampling, section.votes, config.run.seed)
        own = "" if jax.process_count() == 1 else f".process-{jax.process_index()}"
        return JudgeServed(section, remote, folder / f"{section.called}{own}.jsonl")
    opened = models[number]
    weights = load_source_weights(config, opened, mesh)
    if section.is_judge:
        logprobs = make_logprobs(opened.model.arch, mesh, opened.how) if section.expected_score else None
        return JudgeHere(opened=opened, judge=judge_of(opened, mesh), weights=weights, logprobs=logprobs)
    numbers = make_numbers(opened.model.arch, opened.model.tokenizer, mesh, opened.how, opened.form)
    return NumberHere(opened=opened, mesh=mesh, numbers=numbers, weights=weights)


def judge_of(opened: OpenedModel, mesh: Mesh) -> Judge:
    """The judge of a source, without its weights."""
    section, model = opened.section, opened.model
    sampling = as_the_model_says(section.sampling, model).sampling
    return make_judge(model.arch, model.tokenizer, mesh, opened.how, sampling, section.votes, opened.form)
