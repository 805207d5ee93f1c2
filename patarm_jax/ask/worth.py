"""Who says what a policy's responses are worth: a judge or reward model here, a judge behind a server, a function.

Each is a `rollout.responses.Source`. A model here lies on the run's own devices, beside the policy's weights, and works
when the policy has ended sampling; a server is asked while it still samples.
"""

import asyncio
import contextlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.ask.answers import Answer, Answers, Kind, Question, open_answers, take_in
from patarm_jax.ask.remote import Remote, ask_name
from patarm_jax.ask.standing import Standing
from patarm_jax.ask.worth_here import (
    JudgeHere,
    NumberHere,
    OpenedModel,
    Waiting,
    generator_of,
    judge_of,
    load_source_weights,
    open_source_model,
    said_of,
)
from patarm_jax.config.policy import AsksSources, SourceSection
from patarm_jax.judge.forms import POINTWISE
from patarm_jax.rollout.numbers import make_numbers
from patarm_jax.rollout.probabilities import make_logprobs
from patarm_jax.rollout.responses import Responses, Source, Worth, without_answers
from patarm_jax.run.margin import imported
from patarm_jax.types import Message, UsageError, UserError

Reward = Callable[..., Sequence[float | None]]  # as TRL calls it


# ------------------------------------------------------------------------------------------------------------ a server


class JudgeServed:
    """A pointwise judge behind an OpenAI-compatible server, asked while the policy samples.

    Its answers are kept in a file: what a run that was stopped has asked already is not asked again.
    """

    def __init__(self, section: SourceSection, remote: Remote, kept: Path) -> None:
        self.name = section.called
        self._section = section
        self._open = contextlib.ExitStack()
        identity = remote.identity | {"rubrics": section.rubrics}
        self._answers: Answers = self._open.enter_context(open_answers(kept, identity))
        every, name = kept.parent.glob("*.jsonl"), f"{section.called}.jsonl"
        own = sorted(one for one in every if _OF_PROCESS.sub("", one.name) == name)
        take_in(self._answers, own, identity)  # of other processes, or of another number of them
        self._standing = Standing(remote, self._answers, POINTWISE.read, "; run the same command again to resume")
        self._votes = remote.votes
        self._given: dict[tuple[int, int], Future[list[Answer]]] = {}
        self._queued: set[tuple[str, int]] = set()  # what is asked for since the last time
        self._offered: list[Responses] = []

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
            every = [(question.key, vote) for vote in range(self._votes)]
            self._queued.update(
                one for one in every if (found := self._answers.known.get(one)) is None or not found.came
            )
            self._given[responses.index, member] = self._standing.ask(question)

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """Waits for all answers; those of a response in the mean over its votes."""
        found: dict[int, list[Worth]] = {}
        for one in self._offered:
            lost = without_answers(one)
            found[one.index] = [
                lost[member] if member in lost else _worth(self._given[one.index, member].result())
                for member in range(len(one.answers))
            ]
        self._offered.clear()
        self._given.clear()
        return found

    def settle(self) -> None:
        """Takes what has failed as final: a run that is killed and goes on must not learn something else from it."""
        failed = [self._answers.known.get(one) for one in sorted(self._queued)]
        given_up = [one for one in failed if one is not None and not one.came]
        final = Kind.REFUSED
        self._answers.add(replace(one, kind=final, status=final, reason=f"given up: {one.reason}") for one in given_up)
        self._queued.clear()


def _worth(given: Sequence[Answer]) -> Worth:
    known = [one.score for one in given if one.score is not None]
    return Worth(float(np.mean(known)) if known else None, said_of(given))


# ---------------------------------------------------------------------------------------------------------- a function


class FunctionOf(Waiting):
    """A Python function of the user's, called as TRL calls a reward function."""

    def __init__(self, section: SourceSection, function: Reward) -> None:
        super().__init__()
        self.name, self._function = section.called, function

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """What the function gives for all of them at once.

        It is called with `prompts` and `completions`, as texts where the column prompt is text and else as lists of
        messages, `completion_ids`, the other columns of the prompts' rows and `trainer_state`; None of what it returns
        is no reward.
        """
        every = self.taken()
        found = {one.index: dict(without_answers(one)) for one in every}
        asked = [(one, member) for one in every for member, answer in enumerate(one.answers) if answer is not None]
        if asked:
            names = set.union(*({*one.preference.row} for one, _ in asked)) - _OURS
            columns = {name: [one.preference.row.get(name) for one, _ in asked] for name in sorted(names)}
            values = self._called(
                prompts=[_prompt(one) for one, _ in asked],
                completions=[_completion(one, one.answers[member] or "") for one, member in asked],
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
                number = self._number(value)
                is_number = np.isfinite(number)
                found[one.index][member] = Worth(number) if is_number else Worth(None, f"{self.name} gives {value}")
        return {index: [of_it[member] for member in sorted(of_it)] for index, of_it in found.items()}

    def _number(self, value: object) -> float:
        try:
            return np.nan if value is None else float(value)  # type: ignore[arg-type]  # whatever it gives
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward function {self.name} gives {str(value)[:80]!r} ({type(value).__name__}) for a completion. "
                "Return a number for each, None where there is no reward."
            ) from error

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


def _prompt(responses: Responses) -> str | list[Message]:
    """As TRL gives it: a text where the data have a text."""
    given = responses.preference.row.get(PROMPT)
    return (
        given
        if isinstance(given, str)
        else [Message(role=turn["role"], content=turn["content"]) for turn in responses.preference.prompt]
    )


def _completion(responses: Responses, answer: str) -> str | list[Message]:
    is_text = isinstance(responses.preference.row.get(PROMPT), str)
    return answer if is_text else [Message(role="assistant", content=answer)]


@dataclass(frozen=True)
class TrainerState:
    """What TRL hands a reward function of the run, as far as it is known here."""

    global_step: int  # where pairs are made, the batch of prompts in its round


PROMPT = "prompt"  # in a row, whatever its column is called
_OF_PROCESS = re.compile(r"\.process-\d+")
_OURS = {"prompts", "completions", "completion_ids", "trainer_state", "prompt"}


async def _result(given: Any) -> Any:
    return await given


# ----------------------------------------------------------------------------------------------------------------- all


def open_models(config: AsksSources) -> dict[int, OpenedModel]:
    """The models here of a run's sources, by their numbers; what else is wrong with sources is found too."""
    found = {}
    for number, section in enumerate(config.every_source):
        if section.kind == "function":
            imported(section.function, f"{config.place_of(number)}.function")
        elif not section.endpoint.url:
            found[number] = open_source_model(config, number)
            if section.expected_score and jax.process_count() > 1:
                raise UsageError(
                    f"{config.place_of(number)}.expected_score is true, and {jax.process_count()} processes share the "
                    "judge: expected scores are computed by one. Leave it out, or give votes."
                )
    return found


def open_sources(config: AsksSources, models: Mapping[int, OpenedModel], mesh: Mesh, folder: Path) -> list[Source]:
    """All sources of a run, gold ones last, with their weights; `folder` keeps the answers of servers."""
    return [
        _open_source(config, number, section, models, mesh, folder)
        for number, section in enumerate(config.every_source)
    ]


def _open_source(
    config: AsksSources,
    number: int,
    section: SourceSection,
    models: Mapping[int, OpenedModel],
    mesh: Mesh,
    folder: Path,
) -> Source:
    if section.kind == "function":
        return FunctionOf(section, imported(section.function, f"{config.place_of(number)}.function"))
    if section.endpoint.url:
        name = section.endpoint.model or ask_name(section.endpoint)
        remote = Remote(section.endpoint, name, section.sampling, section.votes, config.run.seed)
        own = "" if jax.process_count() == 1 else f".process-{jax.process_index()}"
        return JudgeServed(section, remote, folder / f"{section.called}{own}.jsonl")
    opened = models[number]
    weights = load_source_weights(config, opened.how, opened.model, mesh)
    if section.is_judge:
        return JudgeHere(
            opened=opened,
            judge=judge_of(opened, mesh),
            weights=weights,
            generator=generator_of(config, opened, mesh),
            logprobs=make_logprobs(opened.model.arch, mesh, opened.how) if section.expected_score else None,
        )
    how = mesh, opened.how, opened.form, section.sampling.batch_invariant
    numbers = make_numbers(opened.model.arch, opened.model.tokenizer, *how)
    return NumberHere(opened=opened, mesh=mesh, numbers=numbers, weights=weights)
