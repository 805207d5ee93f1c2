"""Models on the run's own devices that say what a policy's responses are worth.

They lie beside the policy's weights, and work when the policy has ended sampling. A judge of single responses gives a
score; a judge of two compares each response with the policy's greedy one, in both orders. Either may go by a rubric
that a generator writes once for each prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params
from patarm_jax.ask.answers import Answer
from patarm_jax.config.policy import AsksSources, SourceSection
from patarm_jax.config.sections import ModelSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import encode_question
from patarm_jax.data.scores import room_for
from patarm_jax.judge.criteria import shown_rubric
from patarm_jax.judge.forms import FORMS, RUBRIC, Form
from patarm_jax.model.sharding import Program, gather_json, process_in
from patarm_jax.model.transformer import abstract_params
from patarm_jax.padding import bucket
from patarm_jax.rollout.engine import abstract_programs
from patarm_jax.rollout.judging import Judge, Judged, judge, judge_all, make_judge, written_ids
from patarm_jax.rollout.numbers import Numbers
from patarm_jax.rollout.probabilities import LogProbs, expected_scores, unscored
from patarm_jax.rollout.responses import NO_BASELINE, Responses, Worth, without_answers
from patarm_jax.rollout.schedule import Request
from patarm_jax.run.drawing import as_the_model_says
from patarm_jax.run.learner import rollout_rules
from patarm_jax.run.open_model import Model, load_params, open_model, other_rubrics, weights_digest
from patarm_jax.run.process import say
from patarm_jax.run.programs import GIB, per_device
from patarm_jax.types import JudgeKind, Judgement, Message

_KIND: dict[str, JudgeKind] = {
    "judge": "pointwise",
    "pairwise": "pairwise",
    "rubric_judge": "rubric_judge",
    "scalar": "scalar",
    "ordinal": "ordinal",
}
NO_RUBRIC = "the prompt is too long for the generator of rubrics"
_KEYS = 2**32 - 16  # counted down from, by source: no completion's id, from which its key is folded


def said_of(judgements: Sequence[Judgement] | Sequence[Answer]) -> str:
    """All votes on a response, with the reason where one cannot be read."""
    return "\n\n".join(f"[{one.reason}]\n{one.text}" if one.reason else one.text for one in judgements)


@dataclass(frozen=True)
class OpenedModel:
    """A judge or reward model, and the generator of its rubrics where it has one, before their weights are loaded."""

    section: SourceSection
    number: int  # among the sources
    where: str  # its settings
    model: Model
    generator: Model | None
    how: ModelSection  # how both compute

    @property
    def digest(self) -> str:
        """What it is known by, wherever it lies."""
        return " ".join(weights_digest(model) for model in (self.model, self.generator) if model is not None)

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

    @property
    def _generators(self) -> str:
        return f"{self.section.called}'s generator"

    def resident(self, config: AsksSources, mesh: Mesh) -> dict[str, Params]:
        """The abstract weights that stay on the devices, by what they are."""
        rules, dtype = rollout_rules(config.mesh), jnp.dtype(self.how.dtype)
        every = {self.section.called: self.model, self._generators: self.generator}
        return {
            name: abstract_params(model.arch, mesh, rules, dtype, sampling=True)
            for name, model in every.items()
            if model is not None
        }

    def programs(self, config: AsksSources, mesh: Mesh) -> dict[str, Program]:
        """What it runs for the responses of a step, with abstract arguments; none of a model that writes nothing."""
        if not self.form.writes:
            return {}
        asked = config.prompts_at_once * config.judged_per_prompt(self.section)
        writers = {self.section.called: (judge_of(self, mesh), asked)}
        if (writer := writer_of(self, mesh)) is not None:
            writers[self._generators] = writer, config.prompts_at_once
        weights, width = self.resident(config, mesh), bucket(self.section.max_prompt_tokens)
        return {
            f"{name}: {program}": found
            for name, (judge, requests) in writers.items()
            for program, found in abstract_programs(judge.engine, weights[name], requests, width).items()
        }

    def questions(self, responses: Responses, answer: str, rubric: str = "") -> list[np.ndarray]:
        """What it reads of a response, [T] int32 each; beside the policy's greedy one, with it first and second."""
        shown: list[tuple[str, ...]] = [(answer,)]
        if self.form.responses == 2:
            shown = [(answer, responses.baseline or ""), (responses.baseline or "", answer)]
        return [self._encoded(self._messages(responses, of_it, rubric)) for of_it in shown]

    @property
    def short(self) -> np.ndarray:
        """A question that it can always be asked."""
        shown = ["Hello."] * self.form.responses
        return self._encoded(self.form.ask("Hello.", *shown, domain="chat", rubrics=self.section.rubrics))

    def _messages(self, responses: Responses, shown: Sequence[str], rubric: str) -> list[Message]:
        prompt = responses.preference
        return self.form.ask(prompt.prompt, *shown, domain=prompt.domain, rubrics=self.section.rubrics, rubric=rubric)

    def _encoded(self, messages: Sequence[Message]) -> np.ndarray:
        return encode_question(self.model.tokenizer, messages, self.form)

    def too_long(self, questions: Sequence[np.ndarray]) -> str:
        """Why what it reads of a response is too long; empty where it is not."""
        longest = max(map(len, questions))
        excess = self.room.excess(longest, self.section.max_prompt_tokens)
        words = excess.replace("data.max_prompt_tokens", "max_prompt_tokens")
        return excess and f"with this response its prompt has {longest:,} tokens, {words}"


def tell_resident(models: Sequence[OpenedModel], config: AsksSources, mesh: Mesh) -> None:
    """Prints, of a dry run, what the weights of sources take beside its programs."""
    resident = {name: of for opened in models for name, of in opened.resident(config, mesh).items()}
    if resident and jax.process_index() == 0:
        weights = ", ".join(f"{name} {per_device(of) / GIB:.3f} GiB" for name, of in resident.items())
        print(f"and so do the models of the reward, per device: {weights}")


def open_source_model(config: AsksSources, number: int) -> OpenedModel:
    """Opens the folders of a source's models; they compute as the policy does, on the same devices."""
    section, where = config.every_source[number], config.place_of(number)
    how = replace(config.model, path=section.model, adapter="", weights="load")
    model = open_model(how, _KIND[section.kind], called=f"{where}.model")
    generator = None
    if section.generator:
        generator = open_model(replace(how, path=section.generator), "rubric", called=f"{where}.generator")
    if section.is_judge:
        drawn = as_the_model_says(section.sampling, model)
        say(f"{section.called}: {drawn.said}")
        section = replace(section, sampling=replace(section.sampling, **vars(drawn.sampling)))
        if caution := other_rubrics(model, section.called, section.rubrics, bool(section.generator)):
            say(f"{caution}. {where}.rubrics and {where}.generator say by which it is asked")
    opened = OpenedModel(section, number, where, model, generator, how)
    opened.room.check()
    return opened


def load_source_weights(config: AsksSources, how: ModelSection, model: Model, mesh: Mesh) -> Params:
    """A model's weights as the sampler takes them, beside the policy's."""
    rules, dtype = rollout_rules(config.mesh), jnp.dtype(how.dtype)
    return load_params(how, model, mesh, config.run.seed, rules, dtype, sampling=True)


def judge_of(opened: OpenedModel, mesh: Mesh) -> Judge:
    """The judge of a source, without its weights."""
    section, model = opened.section, opened.model
    sampling = as_the_model_says(section.sampling, model).sampling
    return make_judge(model.arch, model.tokenizer, mesh, opened.how, sampling, section.votes, opened.form)


@dataclass(frozen=True)
class Generator:
    """A generator that writes one rubric for each prompt, greedily."""

    judge: Judge  # with groups of one
    weights: Params
    room: Room


def writer_of(opened: OpenedModel, mesh: Mesh) -> Judge | None:
    """The generator of a source, without its weights; None where it has none."""
    model = opened.generator
    if model is None:
        return None
    greedy = replace(opened.section.sampling, temperature=0.0, top_k=0, top_p=1.0)
    greedy = replace(greedy, max_new_tokens=opened.section.max_rubric_tokens)
    sampling = as_the_model_says(greedy, model).sampling
    return make_judge(model.arch, model.tokenizer, mesh, opened.how, sampling, 1, RUBRIC)


def generator_of(config: AsksSources, opened: OpenedModel, mesh: Mesh) -> Generator | None:
    """The generator of a source, with its weights; None where it has none."""
    model, writer = opened.generator, writer_of(opened, mesh)
    if model is None or writer is None:
        return None
    how, where = replace(opened.how, path=opened.section.generator), f"{opened.where}.max_rubric_tokens"
    room = Room(model.arch.max_position_embeddings, opened.section.max_rubric_tokens, where)
    return Generator(writer, load_source_weights(config, how, model, mesh), room)


@dataclass
class Waiting:
    """What is offered until it is collected."""

    offered: list[Responses] = field(default_factory=list)

    def offer(self, responses: Responses) -> None:
        """Takes the responses to one prompt."""
        self.offered.append(responses)

    def settle(self) -> None:
        """Nothing fails here that would not fail again."""

    def taken(self) -> list[Responses]:
        """All of them, in the order of their prompts, which are then no more."""
        found = sorted(self.offered, key=lambda one: one.index)
        self.offered.clear()
        return found


@dataclass
class JudgeHere(Waiting):
    """A judge on the run's devices, of single responses or of two."""

    opened: OpenedModel = field(kw_only=True)
    judge: Judge = field(kw_only=True)  # whose group is its votes
    weights: Params = field(kw_only=True)
    generator: Generator | None = field(kw_only=True)
    logprobs: LogProbs | None = field(kw_only=True)  # where scores are the expected ones
    # So many that are offered one after the other have the same prompt, and one rubric.
    of_one_prompt: int = field(default=1, kw_only=True)

    @property
    def name(self) -> str:
        """In metrics."""
        return self.opened.section.called

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """The mean score of each response over its votes, or the share of comparisons that it wins; all at once."""
        every = self.taken()
        mine = jax.random.fold_in(key, _KEYS - self.opened.number)
        rubrics = self._rubrics(every, mine)
        found = {one.index: dict(without_answers(one)) for one in every}
        asked: list[tuple[Responses, int, list[Request]]] = []
        for one, rubric in zip(every, rubrics, strict=True):
            for member, answer in enumerate(one.answers):
                questions = self.opened.questions(one, answer or "", rubric or "")
                if answer is not None and self.judge.form.responses == 2 and one.baseline is None:
                    found[one.index][member] = Worth(None, NO_BASELINE)
                elif answer is not None and (excess := self.opened.too_long(questions)):
                    found[one.index][member] = Worth(None, excess)
                elif answer is not None and rubric is None:
                    found[one.index][member] = Worth(None, NO_RUBRIC)
                if member in found[one.index]:
                    # Processes must ask for equally many: another, short question is asked, and not looked at.
                    questions = [self.opened.short] * len(questions)
                first = (one.record.index * len(one.answers) + member) * len(questions)
                requests = [Request(tokens, first + place) for place, tokens in enumerate(questions)]
                asked.append((one, member, requests))
        every_request = [request for *_, requests in asked for request in requests]
        of_rubrics = [rubric or "" for one, rubric in zip(every, rubrics, strict=True) for _ in one.answers]
        read_by = [rubric for (*_, requests), rubric in zip(asked, of_rubrics, strict=True) for _ in requests]
        judged = sorted(judge(self.judge, self.weights, every_request, mine, read_by), key=lambda one: one.group.index)
        for number, (one, member, requests) in enumerate(asked):
            if member not in found[one.index]:
                of_it = judged[number * len(requests) : (number + 1) * len(requests)]
                found[one.index][member] = self._worth(requests, of_it)
        return {index: [of_it[member] for member in sorted(of_it)] for index, of_it in found.items()}

    def _rubrics(self, every: Sequence[Responses], key: jax.Array) -> list[str | None]:
        """The generator's rubric of each prompt; empty ones where there is no generator, None where it is too long."""
        if self.generator is None:
            return [""] * len(every)
        writer, room = self.generator.judge, self.generator.room

        def question(prompt: str | Sequence[Message]) -> np.ndarray:
            messages = RUBRIC.ask(prompt, domain="chat", rubrics="generated")
            return encode_question(writer.tokenizer, messages, RUBRIC)

        asked = [question(one.preference.prompt) for one in every[:: self.of_one_prompt]]
        fits = [not room.excess(len(tokens), self.opened.section.max_prompt_tokens) for tokens in asked]
        short = question("Hello.")
        requests = [
            Request(tokens if fit else short, number)
            for number, (tokens, fit) in enumerate(zip(asked, fits, strict=True))
        ]
        _, written = judge_all(writer, self.generator.weights, requests, key)
        found = [shown_rubric(rubric.text) if fit else None for (rubric,), fit in zip(written, fits, strict=True)]
        return [rubric for rubric in found for _ in range(self.of_one_prompt)]

    def _worth(self, requests: Sequence[Request], judged: Sequence[Judged]) -> Worth:
        if self.judge.form.responses == 2:
            return self._share_won(judged)
        ((request,), (of_it,)) = requests, judged
        scores = [one.score for one in of_it.judgements]
        if self.logprobs is not None:
            scores = self._expected(request, of_it)
        known = [score for score in scores if score is not None]
        return Worth(float(np.mean(known)) if known else None, said_of(of_it.judgements))

    def _share_won(self, judged: Sequence[Judged]) -> Worth:
        """½·(share won standing first + share won standing second); None where one of the orders has no choice."""
        shares: list[float | None] = []
        for place, of_it in enumerate(judged):
            choices = [one.choice for one in of_it.judgements if one.choice is not None]
            shares.append(float(np.mean([choice == "AB"[place] for choice in choices])) if choices else None)
        said = "\n\n".join(said_of(of_it.judgements) for of_it in judged)
        known = [share for share in shares if share is not None]
        return Worth(float(np.mean(known)) if len(known) == len(shares) else None, said, tuple(shares))

    def _expected(self, request: Request, judged: Judged) -> list[float | None]:
        assert self.logprobs is not None
        each = zip(written_ids(judged.group), judged.judgements, strict=True)
        lacking = [unscored(self.judge.tokenizer, np.asarray(request.tokens), ids, one) for ids, one in each]
        engine, readable = self.judge.engine, [one for one in lacking if one]
        given = expected_scores(self.logprobs, self.weights, engine.mesh, readable, engine.batch_invariant)
        return [next(given).score if one else None for one in lacking]


@dataclass
class NumberHere(Waiting):
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
                (tokens,) = questions = opened.questions(one, answer)
                if excess := opened.too_long(questions):
                    found[one.index][member] = Worth(None, excess)
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
