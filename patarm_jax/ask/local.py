"""Puts questions to a Qwen3 on this machine's devices: all of them, all votes, one stream, longest prompts first."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from patarm_jax.arrays import Params
from patarm_jax.ask.answers import Answer, Answers, Kind, Question, answer_of, missing, no_answer
from patarm_jax.ask.shared import my_share
from patarm_jax.config.sections import JudgingSection, MeshSection, ModelSection, SamplingSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_question
from patarm_jax.data.scores import room_for
from patarm_jax.judge.forms import FORMS, RUBRIC, Form
from patarm_jax.model.kernels import kernels_in_use
from patarm_jax.model.sharding import make_mesh
from patarm_jax.rollout.judging import Judged, judge, make_judge, written_ids
from patarm_jax.rollout.numbers import make_numbers
from patarm_jax.rollout.probabilities import (
    Expected,
    Unscored,
    expected_scores,
    fill_a_batch,
    make_logprobs,
    unscored,
)
from patarm_jax.rollout.schedule import Request
from patarm_jax.rollout.verdicts import words_of
from patarm_jax.run.devices import tell_devices
from patarm_jax.run.drawing import as_the_model_says
from patarm_jax.run.learner import rollout_rules
from patarm_jax.run.open_model import Model, judge_digest, load_params, name_of, open_model
from patarm_jax.run.peers import ASKING, get_on
from patarm_jax.run.process import say
from patarm_jax.run.progress import percent, progress
from patarm_jax.run.stopping import stop_requests
from patarm_jax.types import ModelKind

AGAIN = (Kind.FAILED, Kind.TOO_LONG)  # what is too long for one limit may fit another
# The ids of a question's votes lie this far apart, so that more votes leave those there are as they are; no two votes
# share an id among up to a million questions.
_VOTE_STRIDE = 1 << 20


@dataclass(frozen=True)
class Local:
    """A judge on this machine's devices."""

    model: Model
    section: ModelSection
    placement: MeshSection
    mesh: Mesh
    sampling: SamplingSection  # complete, with the model's own for what was not set
    votes: int  # answers to each question
    seed: int
    max_prompt_tokens: int  # a longer question is recorded as failed
    form: Form  # how it is asked
    expects: bool = False  # whether a score is the expected one, and not the number that was drawn

    @property
    def name(self) -> str:
        """What the folder that was named is called; of the export of a run, the run."""
        return name_of(Path(self.section.adapter or self.section.path))

    def excess(self, prompt: int) -> str:
        """How a question of so many tokens is too long, as a clause; empty when it is not."""
        return self.room.excess(prompt, self.max_prompt_tokens)

    @property
    def room(self) -> Room:
        """The positions of the network, and how many of them an answer may take."""
        positions = self.model.arch.max_position_embeddings
        setting = "sampling.max_new_tokens" if self.form is not RUBRIC else "generator.max_new_tokens"
        return room_for(positions, self.model.tokenizer, self.form, self.sampling.max_new_tokens, setting)

    @property
    def identity(self) -> dict[str, object]:
        """What a draw depends on beside the question."""
        random, sampling = self.section.weights == "random", self.sampling
        return {
            "weights": f"{f'random, seed {self.seed}, ' if random else ''}{judge_digest(self.model)}",
            "dtype": self.section.dtype,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "seed": self.seed,
            **({"expected_score": True} if self.expects else {}),
        }


@dataclass(frozen=True)
class Encoded:
    """Questions as a judge reads them."""

    question: Question
    tokens: np.ndarray  # [T] int32
    first: int = 0  # the first vote to be asked; all from there on are


def open_local(
    section: ModelSection,
    placement: MeshSection,
    sampling: JudgingSection,
    votes: int,
    seed: int,
    longest: int,
    judge: ModelKind,
    expects: bool = False,
    called: str = "model.path",
) -> Local:
    """Opens the model's folder and takes the devices, of several processes each its own.

    Weights are loaded when there is something to ask. `called` is the setting that names the model.
    """
    model = open_model(section, judge, called=called)
    if FORMS[judge].weighs_words:
        words_of(model.tokenizer)  # refuses a vocabulary without them before anything is asked
    drawn = as_the_model_says(sampling, model)
    if FORMS[judge].writes:
        say(drawn.said if called == "model.path" else f"{called.partition('.')[0]}: {drawn.said}")
    mesh = make_mesh(placement, alone=True)
    local = Local(
        model=model,
        section=section,
        placement=placement,
        mesh=mesh,
        sampling=drawn.sampling,
        votes=votes,
        seed=seed,
        max_prompt_tokens=longest,
        form=FORMS[judge],
        expects=expects,
    )
    local.room.check()
    return local


def encode_questions(local: Local, lacking: Sequence[tuple[Question, list[int]]]) -> list[Encoded]:
    """What the judge reads of each question that lacks some votes."""
    encode = partial(encode_question, local.model.tokenizer, form=local.form)
    shown = tqdm(lacking, desc="encode", unit="question", disable=None)  # None: no bar where nobody watches
    return [Encoded(question, encode(messages=question.messages), min(votes)) for question, votes in shown]


def ask_local(
    local: Local, answers: Answers, questions: Sequence[Question], weights: Callable[[], Params] | None = None
) -> bool:
    """Answers what is not answered yet; False when it was asked to stop before the end.

    Args:
        local: that is asked.
        answers: what it has answered, and will have.
        questions: all of them.
        weights: where it is asked several times, what loads them once; None: they are loaded.
    """
    answer = partial(_judge if local.form.writes else _score, local)
    return _ask(local, answers, questions, answer, weights or partial(load_weights, local))


def _judge(local: Local, params: Params, encoded: Sequence[Encoded]) -> Iterator[list[Answer]]:
    """The answers of a judge that writes."""
    arch, tokenizer, key = local.model.arch, local.model.tokenizer, jax.random.key(local.seed)
    whole = sum(len(one.tokens) for one in encoded)
    read = 0
    for first in sorted({one.first for one in encoded}):  # unlike where votes were raised and that was stopped
        group = local.votes - first
        judging = make_judge(
            arch, tokenizer, local.mesh, local.section, local.sampling, group, local.form, vote_stride=_VOTE_STRIDE
        )
        alike = [one for one in encoded if one.first == first]
        requests = [Request(one.tokens, one.question.sample_id + first * _VOTE_STRIDE) for one in alike]
        every = judge(judging, params, requests, key, [one.question.rubric for one in alike])
        for judged, expected in _with_expected(local, params, alike, every) if local.expects else _as_drawn(every):
            written, question = judged.group, alike[judged.group.index].question
            read += written.read
            each = zip(judged.judgements, written.lengths.tolist(), written.truncated.tolist(), strict=True)
            answers = [answer_of(question, vote, *one) for vote, one in enumerate(each, first)]
            yield [_scored(answer, more) for answer, more in zip(answers, expected, strict=True)]
    if read < whole:
        say(f"{read:,} of {whole:,} prompt tokens were read: what several prompts begin with is read once")


# The judgements of a question, and what is expected of each; None where what was drawn counts.
_Expecting = Iterator[tuple[Judged, Sequence[Expected | None]]]


def _as_drawn(every: Iterable[Judged]) -> _Expecting:
    yield from ((judged, [None] * len(judged.judgements)) for judged in every)


def _with_expected(local: Local, params: Params, encoded: Sequence[Encoded], every: Iterable[Judged]) -> _Expecting:
    """Several questions at a time, as many as their tokens fill a batch."""
    logprobs = make_logprobs(local.model.arch, local.mesh, local.section)
    waiting: list[tuple[Judged, list[Unscored | None]]] = []

    def readable() -> list[Unscored]:
        return [one for _, ones in waiting for one in ones if one]

    def through() -> _Expecting:
        found = expected_scores(logprobs, params, local.mesh, readable(), local.sampling.batch_invariant)
        yield from ((judged, [next(found) if one else None for one in ones]) for judged, ones in waiting)
        waiting.clear()

    for judged in every:
        prompt = encoded[judged.group.index].tokens
        each = zip(written_ids(judged.group), judged.judgements, strict=True)
        waiting.append((judged, [unscored(local.model.tokenizer, prompt, ids, one) for ids, one in each]))
        if fill_a_batch(readable(), local.mesh):
            yield from through()
    yield from through()


def _scored(answer: Answer, expected: Expected | None) -> Answer:
    """The answer with its expected score, where there is one."""
    if expected is None:
        return answer
    return replace(answer, score=expected.score, drawn=answer.score, outside=expected.outside)


def _score(local: Local, params: Params, encoded: Sequence[Encoded]) -> Iterator[list[Answer]]:
    """The answers of a reward model that writes nothing, which are scores."""
    settings = local.model.tokenizer, local.mesh, local.section, local.form, local.sampling.batch_invariant
    numbers = make_numbers(local.model.arch, *settings)
    for given in numbers(params, [one.tokens for one in encoded]):
        answer = Answer(question=encoded[given.index].question.key, vote=0, status="OK", kind=Kind.ANSWER)
        if math.isfinite(given.value):
            yield [replace(answer, score=given.value, outside=given.outside)]
        else:
            yield [replace(answer, status="BAD_SCORE", reason=f"the reward model gives {given.value}")]


def _ask(
    local: Local,
    answers: Answers,
    questions: Sequence[Question],
    answer: Callable[[Params, Sequence[Encoded]], Iterator[list[Answer]]],
    weights: Callable[[], Params],
) -> bool:
    lacking = missing(answers.known, questions, local.votes, AGAIN)
    if len(lacking) < len(questions):
        say(f"{len(questions) - len(lacking)} of {len(questions)} questions are answered")
    encoded = encode_questions(local, lacking)
    every = [one for one in encoded if not local.excess(len(one.tokens))]
    short = my_share(sorted(every, key=lambda one: -len(one.tokens)))
    done = len(questions) - len(every)
    total = done + len(short)  # without what other processes are asking
    for one in my_share(encoded):
        if excess := local.excess(len(one.tokens)):
            reason = f"{len(one.tokens):,} tokens, {excess}"
            votes = range(one.first, local.votes)
            answers.add(no_answer(one.question, vote, Kind.TOO_LONG, reason) for vote in votes)
    if not short:
        return True
    get_on(f"{ASKING}: loading and compiling")
    params = weights()
    tell_devices()
    say(kernels_in_use(local.section, local.model.arch, local.mesh, "causal", "written"))
    written, cut, count = 0, 0, 0
    with stop_requests() as asked, progress(total, done, unit="question") as report:
        for given in answer(params, short):
            answers.add(given)
            done += 1
            get_on(f"{ASKING}: {done} of {total} questions are answered")
            written += sum(one.tokens for one in given)
            cut, count = cut + sum(one.cut for one in given), count + len(given)
            report(done, {"cut off": percent(cut / count)} if written else {}, written)  # a reward model writes nothing
            if asked() and done < total:
                share = "" if total == len(questions) else " of the first process"
                say(f"stopped after {done} of {total} questions{share}; run the command again to resume")
                return False
    return True


def load_weights(local: Local) -> Params:
    """The weights as the sampler takes them."""
    rules, dtype = rollout_rules(local.placement), jnp.dtype(local.section.dtype)
    return load_params(local.section, local.model, local.mesh, local.seed, rules, dtype, sampling=True)
