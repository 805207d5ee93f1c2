"""Scores as probabilities: how likely each of 0 … 10 is behind what a judge has written, beside the one that it drew.

    P(s) = p("s</answer>" | prompt, judgement up to "<answer>"),   expected score = Σ s·P(s) / Σ P(s)

A score is its whole continuation: with Qwen3's vocabulary "10" is two tokens, and "1" begins 1, 1.5 and 10.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params, Tree
from patarm_jax.config.sections import ModelSection
from patarm_jax.data.scores import OPENING, score_tokens
from patarm_jax.data.tokenizer import Tokenizer, decode
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.kernels import kernel_for
from patarm_jax.model.sharding import OnMesh, batch_shards, fetch, place_batch, process_in
from patarm_jax.model.transformer import Output, forward
from patarm_jax.padding import bucket
from patarm_jax.rollout.engine import PREFILL_TOKENS
from patarm_jax.train.losses import mask_from_lengths
from patarm_jax.train.steps import completion_logprobs
from patarm_jax.types import SCORES, Judgement, Status


@dataclass(frozen=True)
class Unscored:
    """A judgement up to its answer, and how each score would go on behind it."""

    prefix: np.ndarray  # [T] int32, the prompt and what was written up to the answer
    continuations: tuple[tuple[int, ...], ...]  # of each of `SCORES`


@dataclass(frozen=True)
class Expected:
    """What the probabilities of the scores say."""

    score: float  # the expectation over 0 … 10
    outside: float  # the probability of everything else, such as 7.5


def unscored(tokenizer: Tokenizer, prompt: np.ndarray, written: Sequence[int], judgement: Judgement) -> Unscored | None:
    """A judgement before its score; None of one that cannot be read.

    Args:
        tokenizer: of the judge.
        prompt: [T] int32, its question.
        written: the tokens it wrote, without the end token.
        judgement: what they say.
    """
    if judgement.status is not Status.OK:
        return None
    text = decode(tokenizer, written)
    end = text.rindex(OPENING) + len(OPENING)
    kept = tokens_before(tokenizer, written, end)
    rest = text[len(decode(tokenizer, written[:kept])) : end]  # of the tag, where a token reaches beyond it
    prefix = np.concatenate([prompt, np.asarray(written[:kept], np.int32)])
    return Unscored(prefix, score_tokens(tokenizer, rest))


def tokens_before(tokenizer: Tokenizer, written: Sequence[int], end: int) -> int:
    """The most tokens whose text is no longer than this; texts of beginnings never shrink."""
    low, high = 0, len(written)
    while low < high:
        middle = (low + high + 1) // 2
        if len(decode(tokenizer, written[:middle])) <= end:
            low = middle
        else:
            high = middle - 1
    return low


# From (params, prefixes [R, T], lengths [R], continuations [R, 11, C], lengths [R, 11]) to log-probs [R, 11].
LogProbs = Callable[[Params, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def make_logprobs(arch: Architecture, mesh: Mesh, section: ModelSection) -> LogProbs:
    """The jitted log-probs of whole continuations; each prefix is computed once for all of them."""
    kernel, shards = kernel_for(section, arch, mesh, "shared"), batch_shards(mesh)

    def read(params: Params, _frozen: Tree, prompt: jax.Array, lengths: jax.Array, completion: jax.Array) -> Output:
        return forward(params, arch, prompt, lengths, completion, dtype=section.dtype, kernel=kernel)

    def logprobs(
        params: Params, prefix: jax.Array, lengths: jax.Array, tokens: jax.Array, counts: jax.Array
    ) -> jax.Array:
        found = completion_logprobs(read, params, None, prefix, lengths, tokens, shards=shards)
        return jnp.where(mask_from_lengths(counts, tokens.shape[-1]), found, 0.0).sum(axis=-1)

    return OnMesh(mesh, logprobs)


def fill_a_batch(judgements: Sequence[Unscored], mesh: Mesh) -> bool:
    """Whether they are as many as are read at a time, each in a row as wide as the longest."""
    longest = max((len(each.prefix) for each in judgements), default=0)
    return len(judgements) * longest >= PREFILL_TOKENS * batch_shards(mesh)


def expected_scores(
    logprobs: LogProbs, params: Params, mesh: Mesh, judgements: Sequence[Unscored], batch_invariant: bool = False
) -> Iterator[Expected]:
    """What is expected of each judgement, in their order; so many at a time as prompts are read.

    Processes that share the mesh are given the same judgements; each computes its part, and all get every score.
    With batch_invariant each is read in the buckets of its own lengths, so that no other changes what is expected.
    """
    if batch_invariant:
        yield from _each_in_its_bucket(logprobs, params, mesh, judgements)
        return
    waiting: list[Unscored] = []
    for one in judgements:
        if waiting and fill_a_batch([*waiting, one], mesh):
            yield from _expected(logprobs, params, mesh, waiting, _rows_for(len(waiting), mesh))
            waiting = []
        waiting.append(one)
    if waiting:
        yield from _expected(logprobs, params, mesh, waiting, _rows_for(len(waiting), mesh))


def _each_in_its_bucket(
    logprobs: LogProbs, params: Params, mesh: Mesh, judgements: Sequence[Unscored]
) -> Iterator[Expected]:
    """As `expected_scores`, those of like lengths together, on as many rows as these lengths always have."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, one in enumerate(judgements):
        alike.setdefault(_widths([one]), []).append(index)
    found: dict[int, Expected] = {}
    for (width, _), indices in alike.items():
        rows = batch_shards(mesh) * max(1, PREFILL_TOKENS // width)
        for first in range(0, len(indices), rows):
            now = indices[first : first + rows]
            every = _expected(logprobs, params, mesh, [judgements[index] for index in now], rows)
            found.update(zip(now, every, strict=True))
    yield from (found[index] for index in range(len(judgements)))


def _rows_for(judgements: int, mesh: Mesh) -> int:
    shards = batch_shards(mesh)
    return shards * bucket(-(-judgements // shards), 1)


def _widths(judgements: Sequence[Unscored]) -> tuple[int, int]:
    """What holds their prefixes, and what holds their continuations."""
    prefix = max(len(each.prefix) for each in judgements)
    return bucket(prefix), bucket(max(len(ids) for each in judgements for ids in each.continuations), 4)


def _expected(
    logprobs: LogProbs, params: Params, mesh: Mesh, judgements: Sequence[Unscored], rows: int
) -> Iterator[Expected]:
    (mine, processes), (width, longest) = process_in(mesh), _widths(judgements)
    prefix, lengths = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
    tokens, counts = np.zeros((rows, len(SCORES), longest), np.int32), np.ones((rows, len(SCORES)), np.int32)
    for row, each in enumerate(judgements):
        lengths[row] = len(each.prefix)
        prefix[row, : lengths[row]] = each.prefix
        for place, ids in enumerate(each.continuations):
            counts[row, place] = len(ids)
            tokens[row, place, : len(ids)] = ids
    share = slice(mine * rows // processes, (mine + 1) * rows // processes)
    placed = place_batch(mesh, tuple(x[share] for x in (prefix, lengths, tokens, counts)))
    found = fetch(logprobs(params, *placed)).astype(np.float64)
    yield from map(expectation, found[: len(judgements)])


def expectation(logprobs: np.ndarray) -> Expected:
    """The expected score of log-probs [11] of 0 … 10, and what probability none of them has.

    >>> found = expectation(np.log(np.array([1e-9] * 7 + [0.5, 0.25, 1e-9, 1e-9])))
    >>> round(found.score, 3), round(found.outside, 3)
    (7.333, 0.25)
    """
    peak = float(logprobs.max())
    weights = np.exp(logprobs - peak)
    total = float(weights.sum())
    score = float((weights * np.asarray(SCORES)).sum() / total)
    return Expected(score=score, outside=max(0.0, 1.0 - math.exp(peak) * total))
