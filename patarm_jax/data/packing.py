"""From a batch of encoded pairs to the arrays of a step: sequences behind one another in rows.

Every process computes the same shapes, from everyone's lengths. The leaves are numpy's: placing them on devices is for
whoever knows the mesh.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from patarm_jax.arrays import (
    ComparedPairs,
    ComparedShape,
    PreferredPairs,
    PreferredShape,
    ScoredPairs,
    ScoredShape,
    SFTBatch,
    SFTShape,
)
from patarm_jax.data.pipeline import PairBatch, Tokens
from patarm_jax.padding import bucket, pack
from patarm_jax.types import CHOSEN, REJECTED


def sft_shape(batch: PairBatch, multiple: int, rows_multiple: int = 1, packed: bool = True) -> SFTShape:
    """The shape of a batch for SFT.

    Args:
        batch: this process's records, and the lengths of everyone's.
        multiple: widths are buckets of so many tokens.
        rows_multiple: a process's number of rows is a multiple of this.
        packed: whether sequences stand behind one another where a row has room, or each in a row of its own.
    """
    share = sum(len(record.prompt_tokens) for record in batch.records)
    width = bucket(max(map(sum, batch.lengths)), multiple)
    rows, targets = 0, 0
    for start in range(0, len(batch.lengths), share):
        lengths = batch.lengths[start : start + share]
        plan = _plan(list(map(sum, lengths)), width, packed)
        rows = max(rows, len(plan))
        targets = max(targets, *(sum(lengths[i][1] for i in row) for row in plan))
    return SFTShape(_rows(rows, share, rows_multiple), width, bucket(targets, multiple))


def sft_batch(batch: PairBatch, shape: SFTShape, pad_id: int, packed: bool = True) -> SFTBatch:
    """Prompts with their judgements, as arrays of the batch's `sft_shape`."""
    prompts = [prompt for record in batch.records for prompt in record.prompt_tokens]
    completions = [text for record in batch.records for text in record.completion_tokens or ()]
    sequences = [np.concatenate(both) for both in zip(prompts, completions, strict=True)]
    plan = _plan(list(map(len, sequences)), shape.width, packed)
    tokens, starts, ends = _laid(plan, sequences, shape.rows, shape.width, pad_id)
    read, targets = np.zeros((2, shape.rows, shape.targets), np.int32)
    counts = np.zeros(shape.rows, np.int32)
    for row, members in enumerate(plan):
        for index in members:
            completion, end = completions[index], ends[index]
            judged = slice(counts[row], counts[row] + len(completion))
            read[row, judged], targets[row, judged] = np.arange(end - len(completion) - 1, end - 1), completion
            counts[row] += len(completion)
    return SFTBatch(tokens=tokens, starts=starts, read=read, targets=targets, counts=counts)


def compared_shape(batch: PairBatch, multiple: int, rows_multiple: int = 1, packed: bool = True) -> ComparedShape:
    """The shape of a batch of pairs that a reward model compares.

    Args:
        batch: this process's records, and the lengths of everyone's.
        multiple: widths are buckets of so many tokens.
        rows_multiple: a process's number of rows is a multiple of this.
        packed: whether pairs stand behind one another where a row has room, or each in a row of its own.
    """
    lengths, share = _lengths_of_pairs(batch), len(batch.records)
    width = bucket(max(lengths), multiple)
    plans = [_plan(lengths[start : start + share], width, packed) for start in range(0, len(lengths), share)]
    pairs = max(len(row) for plan in plans for row in plan)
    return ComparedShape(_rows(max(map(len, plans)), share, rows_multiple), width, bucket(pairs, 1))


def compared_batch(batch: PairBatch, shape: ComparedShape, pad_id: int, packed: bool = True) -> ComparedPairs:
    """Both conversations of each pair, as arrays of the batch's `compared_shape`; a pair lies in one row."""
    conversations = [prompt for record in batch.records for prompt in record.prompt_tokens]
    plan = _plan([sum(map(len, record.prompt_tokens)) for record in batch.records], shape.width, packed)
    of_sides = [[2 * index + side for index in members for side in (CHOSEN, REJECTED)] for members in plan]
    tokens, starts, ends = _laid(of_sides, conversations, shape.rows, shape.width, pad_id)
    last = np.zeros((shape.rows, shape.pairs, 2), np.int32)
    margins = np.zeros((shape.rows, shape.pairs), np.float32)
    counts = np.zeros(shape.rows, np.int32)
    for row, members in enumerate(plan):
        counts[row] = len(members)
        last[row, : counts[row]] = ends.reshape(-1, 2)[members] - 1
        margins[row, : counts[row]] = [batch.records[index].preference.margin or 0.0 for index in members]
    return ComparedPairs(tokens=tokens, starts=starts, last=last, margins=margins, counts=counts)


def scored_shape(batch: PairBatch, multiple: int, scores: Sequence[Sequence[int]]) -> ScoredShape:
    """The shape of a batch of pairs whose scores are asked for.

    Args:
        batch: this process's records, and the lengths of everyone's.
        multiple: widths are buckets of so many tokens.
        scores: the tokens of each score.
    """
    return ScoredShape(len(batch.records), bucket(batch.longest_prompt, multiple), max(map(len, scores)))


def scored_batch(batch: PairBatch, shape: ScoredShape, pad_id: int, scores: Sequence[Sequence[int]]) -> ScoredPairs:
    """Both questions of each pair, as arrays of the batch's `scored_shape`."""
    prompts = np.full((shape.pairs, 2, shape.width), pad_id, np.int32)
    lengths = np.zeros((shape.pairs, 2), np.int32)
    for pair, record in enumerate(batch.records):
        for side, tokens in enumerate(record.prompt_tokens):
            lengths[pair, side] = len(tokens)
            prompts[pair, side, : len(tokens)] = tokens
    behind = np.full((len(scores), shape.continuation), pad_id, np.int32)
    for score, ids in enumerate(scores):
        behind[score, : len(ids)] = ids
    counts = np.asarray(list(map(len, scores)), np.int32)
    return ScoredPairs(
        prompt_tokens=prompts,
        prompt_lengths=lengths,
        score_tokens=np.tile(behind, (shape.pairs, 1, 1)),
        score_lengths=np.tile(counts, (shape.pairs, 1)),
    )


def preferred_shape(batch: PairBatch, multiple: int) -> PreferredShape:
    """The shape of a batch of prompts with two responses each.

    Args:
        batch: this process's records, and the lengths of everyone's.
        multiple: widths are buckets of so many tokens.
    """
    longest = max(completion for _, completion in batch.lengths)
    return PreferredShape(len(batch.records), bucket(batch.longest_prompt, multiple), bucket(longest, multiple))


def preferred_batch(
    batch: PairBatch,
    shape: PreferredShape,
    pad_id: int,
    reference: Mapping[int, Sequence[float]] = MappingProxyType({}),
    by_tokens: bool = True,
) -> PreferredPairs:
    """Prompts with both responses, as arrays of the batch's `preferred_shape`.

    Args:
        batch: this process's records, and the lengths of everyone's.
        shape: of the batch.
        pad_id: the padding.
        reference: the sums of log-probs of both responses, by a record's index; 0 where it is not known yet.
        by_tokens: whether chosen tokens count alike over the batch, or each by the length of its response.
    """
    prompts = np.full((shape.pairs, shape.width), pad_id, np.int32)
    completions = np.full((shape.pairs, 2, shape.completion), pad_id, np.int32)
    prompt_lengths, lengths = np.zeros(shape.pairs, np.int32), np.zeros((shape.pairs, 2), np.int32)
    sums = np.zeros((shape.pairs, 2), np.float32)
    for pair, record in enumerate(batch.records):
        (prompt,), written = record.prompt_tokens, record.completion_tokens or ()
        prompts[pair, : len(prompt)], prompt_lengths[pair] = prompt, len(prompt)
        for side, tokens in enumerate(written):
            completions[pair, side, : len(tokens)], lengths[pair, side] = tokens, len(tokens)
        sums[pair] = reference.get(record.index, (0.0, 0.0))
    chosen = np.array([completion for _, completion in batch.lengths[::2]])
    weights = 1 / np.maximum(lengths[:, 0], 1) if not by_tokens else np.full(shape.pairs, len(chosen) / chosen.sum())
    return PreferredPairs(
        prompt_tokens=prompts,
        prompt_lengths=prompt_lengths,
        completion_tokens=completions,
        completion_lengths=lengths,
        reference=sums,
        sft_weights=weights.astype(np.float32),
    )


def _lengths_of_pairs(batch: PairBatch) -> list[int]:
    """Tokens of both conversations of each pair of the global batch."""
    prompts = [prompt for prompt, _ in batch.lengths]
    return [chosen + rejected for chosen, rejected in zip(prompts[::2], prompts[1::2], strict=True)]


def _plan(lengths: Sequence[int], width: int, packed: bool) -> list[list[int]]:
    """Which sequences stand in which row."""
    return pack(lengths, width) if packed else [[index] for index in range(len(lengths))]


def _rows(needed: int, most: int, multiple: int) -> int:
    """A process's rows: packed ones differ in number from batch to batch, and buckets keep the compiled shapes few."""
    return min(bucket(-(-needed // multiple), 1), -(-most // multiple)) * multiple


def _laid(
    plan: Sequence[Sequence[int]], sequences: Sequence[Tokens], rows: int, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences behind one another in rows: tokens and starts [rows, width], and where in its row each one ends."""
    tokens = np.full((rows, width), pad_id, np.int32)
    starts = np.tile(np.arange(width, dtype=np.int32), (rows, 1))  # padding reads itself
    ends = np.zeros(len(sequences), np.int32)
    for row, members in enumerate(plan):
        end = 0
        for index in members:
            start, end = end, end + len(sequences[index])
            tokens[row, start:end], starts[row, start:end], ends[index] = sequences[index], start, end
    return tokens, starts, ends
