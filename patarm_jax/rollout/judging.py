"""The one road from (prompt, response) to a Judgement. Training, scoring and every benchmark take it.

Text goes in through the tokenizer, comes out through the parser, and in between is arrays. Nothing here updates a
weight or writes a file.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params
from patarm_jax.config.sections import ModelSection, SamplingSection
from patarm_jax.data.pipeline import EncodedPair
from patarm_jax.data.tokenizer import Tokenizer, decode, written
from patarm_jax.judge.forms import POINTWISE, Form
from patarm_jax.model.architecture import Architecture
from patarm_jax.rollout.draw import SamplingParams
from patarm_jax.rollout.engine import Engine, make_engine, network_for
from patarm_jax.rollout.schedule import Finished, Group, Request, completed_groups, stacked
from patarm_jax.rollout.verdicts import Words, weighed, words_of
from patarm_jax.types import Judgement


@dataclass(frozen=True)
class Judge:
    """A judge without its weights, which change at every step of reinforcement learning."""

    tokenizer: Tokenizer
    engine: Engine
    form: Form  # what its prompts ask for
    words: Words | None = None  # of a form that weighs them


@dataclass(frozen=True)
class Judged:
    """The G judgements of one request, and the tokens they were written in."""

    group: Group
    judgements: list[Judgement]


def make_judge(
    arch: Architecture,
    tokenizer: Tokenizer,
    mesh: Mesh,
    section: ModelSection,
    sampling: SamplingSection,
    group: int,
    form: Form = POINTWISE,
    vote_stride: int = 0,
    longest: int = 0,
) -> Judge:
    """A judge for a network of this shape that gives `group` judgements.

    For vote_stride see `completion_id`, and for the longest prompt `Engine`.
    """
    words = words_of(tokenizer) if form.weighs_words else None
    drawn = SamplingParams(
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        named_ids=words.ids if words else (),
    )
    network = network_for(section, arch, mesh, sampling.batch_invariant)
    engine = make_engine(network, mesh, group, drawn, sampling.rows, vote_stride=vote_stride, longest=longest)
    return Judge(tokenizer, engine, form, words)


def requests_of(records: Sequence[EncodedPair]) -> list[Request]:
    """The questions of each pair in turn; a sample id names one of the data set, whatever batch it is in."""
    return [
        Request(tokens, 2 * record.index + place)
        for record in records
        for place, tokens in zip(record.places, record.prompt_tokens, strict=True)
    ]


def judge(
    judging: Judge, params: Params, requests: Sequence[Request], key: jax.Array, rubrics: Sequence[str] = ()
) -> Iterator[Judged]:
    """The G judgements of each request, as soon as they are written, the longest prompts first.

    Args:
        judging: from `make_judge`.
        params: its weights.
        requests: this process's; all processes have equally many.
        key: the same key, sample id and weights give the same judgements, in whatever company.
        rubrics: of each request, the generator's rubric that it shows, which its judgements must go through; none
            given: none is looked at.
    """
    for group in completed_groups(judging.engine, params, requests, key):
        rubric = rubrics[group.index] if rubrics else ""
        judgements = read_judgements(judging.tokenizer, group, judging.form, rubric)
        if judging.words is not None:
            each = zip(written_ids(group), group.named, judgements, strict=True)
            judgements = [weighed(judging.tokenizer, judging.words, *one) for one in each]
        yield Judged(group, judgements)


def judge_all(
    judging: Judge, params: Params, requests: Sequence[Request], key: jax.Array, rubrics: Sequence[str] = ()
) -> tuple[Finished, list[list[Judgement]]]:
    """What was written for all requests and what it says, in their order; arguments as of `judge`."""
    every = sorted(judge(judging, params, requests, key, rubrics), key=lambda judged: judged.group.index)
    return stacked([judged.group for judged in every]), [judged.judgements for judged in every]


def read_judgements(tokenizer: Tokenizer, group: Group, form: Form = POINTWISE, rubric: str = "") -> list[Judgement]:
    """What the completions of a request say: the judge's turn, without the end token of one that has it.

    Of a model that does not think, without what its turn was begun with.
    """
    text = written if form.thinks else decode
    return [form.read(text(tokenizer, ids), rubric) for ids in written_ids(group)]


def rubrics_of(records: Sequence[EncodedPair]) -> list[str]:
    """Of each of `requests_of`, the generator's rubric that it shows; empty where it shows none."""
    return [record.preference.rubric for record in records for _ in record.places]


def written_ids(group: Group) -> list[list[int]]:
    """The tokens of each completion, without the end token of one that has it."""
    ends = np.where(group.truncated, group.lengths, np.maximum(group.lengths - 1, 0))
    return [tokens[:end].tolist() for tokens, end in zip(group.tokens, ends, strict=True)]


def numbers_of(
    judgements: Sequence[Sequence[Judgement]], places: Sequence[int], form: Form = POINTWISE
) -> tuple[np.ndarray, np.ndarray]:
    """Where text becomes numbers again, both [R, G].

    Args:
        judgements: [R][G].
        places: [R], which of the two questions about its pair each was asked.
        form: of the questions.

    Returns:
        scores, or 1 for the right choice and 0 for the wrong one, float32 (NaN where not valid); statuses int32.
    """
    values = [[form.number(one, place) for one in group] for group, place in zip(judgements, places, strict=True)]
    numbers = [[math.nan if value is None else value for value in group] for group in values]
    statuses = [[int(one.status) for one in group] for group in judgements]
    return np.asarray(numbers, np.float32), np.asarray(statuses, np.int32)


def places_of(records: Sequence[EncodedPair]) -> list[int]:
    """Of each of `requests_of`, which of the two questions about its pair it is."""
    return [place for record in records for place in record.places]
