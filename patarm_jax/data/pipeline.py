"""From preferences to batches of arrays; the only file that knows grain.

A pair is one record from here on, so no shuffle can tear it apart. Everything is encoded once, up front: then what is
too long is known and counted, and so is the number of batches. All processes see the same global batches, each takes
its part of every one, and all pad to the length of the global batch; so they never wait for one another in vain.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import grain
import jax
import numpy as np
from tqdm import tqdm

from patarm_jax.config import DataSection
from patarm_jax.data.preferences import Report
from patarm_jax.data.sft import JudgedPreference
from patarm_jax.data.tokenizer import Tokenizer, encode_chat, encode_judgement
from patarm_jax.judge.prompts import pointwise
from patarm_jax.types import Preference, RubricMode, SFTBatch, UsageError, UserError

Tokens = np.ndarray  # [T] int32


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """A preference and what a judge reads about each side; for SFT, what it learns to write too."""

    index: int  # in the preferences that were encoded, dropped ones counted: stable when a limit changes
    preference: Preference
    prompt_tokens: tuple[Tokens, Tokens]  # (chosen, rejected)
    completion_tokens: tuple[Tokens, Tokens] | None = None  # (chosen, rejected), end token included; None without SFT

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longer prompt."""
        return max(map(len, self.prompt_tokens))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longer prompt with its completion."""
        if self.completion_tokens is None:
            return self.longest_prompt
        return max(
            len(prompt) + len(text) for prompt, text in zip(self.prompt_tokens, self.completion_tokens, strict=True)
        )


@dataclass(frozen=True, eq=False)
class PairBatch:
    """This process's part of a global batch, and what all processes must agree on."""

    records: tuple[EncodedPair, ...]
    ids: tuple[str, ...]  # of all pairs of the global batch
    longest_prompt: int  # tokens, over the global batch
    longest_sequence: int  # tokens of prompt and completion together, over the global batch


# ---- Encoding -------------------------------------------------------------------------------------------------------


def encode_pairs(
    tokenizer: Tokenizer,
    preferences: Sequence[Preference | JudgedPreference],
    rubrics: RubricMode,
    section: DataSection,
) -> tuple[list[EncodedPair], Report]:
    """Encodes each preference, with its judgements where it has them; drops and counts what exceeds the limits."""
    kept: list[EncodedPair] = []
    dropped: Counter[str] = Counter()
    shortest: dict[str, int] = {}  # reason → the smallest limit that would have kept a preference
    # disable=None: no bar where nobody watches.
    for index, preference in enumerate(tqdm(preferences, desc="encode", unit="pair", disable=None)):
        pair = _encode(tokenizer, index, preference, rubrics)
        excess = _excess(pair, section)
        if excess is None:
            kept.append(pair)
            continue
        reason, length = excess
        dropped[reason] += 1
        shortest[reason] = min(length, shortest.get(reason, length))
    if not kept:
        found = "; ".join(
            f"{count:,} × {reason}, the shortest {shortest[reason]:,}" for reason, count in dropped.items()
        )
        raise UserError(f"no preference is short enough: {found or 'there are none'}. Raise the limit in the config.")
    return kept, Report(len(kept), dict(dropped.most_common()))


def _encode(tokenizer: Tokenizer, index: int, given: Preference | JudgedPreference, rubrics: RubricMode) -> EncodedPair:
    if isinstance(given, JudgedPreference):
        judgements = (given.chosen_judgement, given.rejected_judgement)
        chosen, rejected = (np.asarray(encode_judgement(tokenizer, text), np.int32) for text in judgements)
        return replace(_encode(tokenizer, index, given.preference, rubrics), completion_tokens=(chosen, rejected))
    messages = (pointwise(given.prompt, text, given.domain, rubrics) for text in (given.chosen, given.rejected))
    chosen, rejected = (np.asarray(encode_chat(tokenizer, each), np.int32) for each in messages)
    return EncodedPair(index, given, (chosen, rejected))


def _excess(pair: EncodedPair, section: DataSection) -> tuple[str, int] | None:
    """Why a pair is too long, and how long it is; None when it is not."""
    if pair.longest_prompt > section.max_prompt_tokens:
        return f"prompt longer than data.max_prompt_tokens {section.max_prompt_tokens:,}", pair.longest_prompt
    longest_completion = max(map(len, pair.completion_tokens or ()), default=0)
    if longest_completion > section.max_completion_tokens:
        return f"judgement longer than data.max_completion_tokens {section.max_completion_tokens:,}", longest_completion
    return None


# ---- Batches --------------------------------------------------------------------------------------------------------


def batches_per_epoch(number_of_records: int, pairs_per_step: int) -> int:
    """Whole batches in one pass over the records; those left over wait for the next epoch's shuffle."""
    return number_of_records // pairs_per_step


def batches(
    records: Sequence[EncodedPair],
    pairs_per_step: int,
    epochs: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[PairBatch]:
    """Shuffled batches, each epoch in another order; `get_state` and `set_state` resume exactly.

    No batch spans two epochs. The state is the number of batches drawn, the same on all processes.
    """
    if pairs_per_step % process_count:
        raise UsageError(
            f"pairs_per_step is {pairs_per_step}, which {process_count} processes cannot share equally. "
            f"Make it a multiple of {process_count}."
        )
    if len(records) < pairs_per_step:
        raise UserError(
            f"{len(records):,} usable pairs do not fill one batch of pairs_per_step {pairs_per_step:,}. "
            "Lower pairs_per_step, or give more data."
        )
    share = pairs_per_step // process_count
    mine = slice(process_index * share, (process_index + 1) * share)
    dataset = (
        grain.MapDataset.source(records)
        .shuffle(seed=_spread(seed))
        .batch(pairs_per_step, drop_remainder=True, batch_fn=_global_batch)
        .repeat(epochs)
        .map(lambda batch: replace(batch, records=batch.records[mine]))
    )
    # The records are in memory: threads that read ahead would have nothing to wait for.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _spread(seed: int) -> int:
    """A seed for grain, which adds the epoch to it: unspread, run 1 would begin with the second epoch of run 0."""
    return int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])


def _global_batch(records: Sequence[EncodedPair]) -> PairBatch:
    return PairBatch(
        tuple(records),
        ids=tuple(record.preference.id for record in records),
        longest_prompt=max(record.longest_prompt for record in records),
        longest_sequence=max(record.longest_sequence for record in records),
    )


# ---- Arrays ---------------------------------------------------------------------------------------------------------


def bucket(length: int, multiple: int) -> int:
    """The padded length for a length: `multiple` times the least of 1, 2, 3, 4, 6, 8, 12, 16, … that is enough.

    Two sizes per doubling: a step is compiled for a dozen lengths at most, and past twice the multiple a row grows by
    less than half.

    >>> [bucket(length, 128) for length in (1, 128, 129, 257, 513, 769, 1025)]
    [128, 128, 256, 384, 768, 1024, 1536]
    """
    needed = max(1, -(-length // multiple))
    power = 1 << (needed - 1).bit_length()  # the least power of two that is enough
    three_quarters = 3 * power // 4
    return multiple * (three_quarters if power >= 4 and three_quarters >= needed else power)


def sft_batch(batch: PairBatch, pad_id: int, multiple: int) -> SFTBatch:
    """Prompts with their judgements, rows chosen 0, rejected 0, chosen 1, …; the leaves are numpy's."""
    prompts = [prompt for record in batch.records for prompt in record.prompt_tokens]
    completions = [text for record in batch.records for text in record.completion_tokens or ()]
    rows = [np.concatenate(parts) for parts in zip(prompts, completions, strict=True)]
    tokens, lengths = _padded(rows, bucket(batch.longest_sequence, multiple), pad_id)
    # The type speaks of the arrays a step takes. Placing these on devices is for whoever knows the mesh.
    leaves = (tokens, lengths, np.asarray(list(map(len, prompts)), np.int32))
    return SFTBatch(*cast(tuple[jax.Array, jax.Array, jax.Array], leaves))


def _padded(rows: Sequence[Tokens], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, length] tokens, [B] lengths)."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, np.asarray(list(map(len, rows)), np.int32)
