"""The road of a reward model that writes nothing, from what it reads to a number: a head's, or an expected score."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params
from patarm_jax.config.sections import ModelSection
from patarm_jax.data.scores import score_tokens
from patarm_jax.data.tokenizer import Tokenizer
from patarm_jax.judge.forms import Form
from patarm_jax.model.architecture import Architecture
from patarm_jax.rollout.probabilities import Unscored, expected_scores, make_logprobs
from patarm_jax.rollout.scalar import make_scorer, scores


@dataclass(frozen=True)
class Number:
    """What was given for one of several."""

    index: int  # which
    value: float
    outside: float | None = None  # of an expected score, the probability of all but whole numbers from 0 to 10


# From parameters, layers unstacked, and what is read, [T] int32 each, to the numbers in any order.
Numbers: TypeAlias = Callable[[Params, Sequence[np.ndarray]], Iterator[Number]]


def make_numbers(
    arch: Architecture,
    tokenizer: Tokenizer,
    mesh: Mesh,
    section: ModelSection,
    form: Form,
    batch_invariant: bool = False,
) -> Numbers:
    """The numbers that a model gives as one of a form; processes that share the mesh are given the same to read.

    Args:
        arch: of the network.
        tokenizer: of the model.
        mesh: where its weights lie.
        section: how it computes.
        form: one that writes nothing.
        batch_invariant: whether a number is the same to the bit whatever else is read.
    """
    if form.has_score_head:
        scorer = make_scorer(arch, mesh, section)

        def by_head(params: Params, read: Sequence[np.ndarray]) -> Iterator[Number]:
            return (Number(index, value) for index, value in scores(scorer, params, mesh, read, batch_invariant))

        return by_head
    logprobs, behind = make_logprobs(arch, mesh, section), score_tokens(tokenizer)

    def by_expectation(params: Params, read: Sequence[np.ndarray]) -> Iterator[Number]:
        longest_first = sorted(range(len(read)), key=lambda index: -len(read[index]))
        waiting = [Unscored(read[index], behind) for index in longest_first]
        found = expected_scores(logprobs, params, mesh, waiting, batch_invariant)
        return (Number(index, one.score, one.outside) for index, one in zip(longest_first, found, strict=True))

    return by_expectation
