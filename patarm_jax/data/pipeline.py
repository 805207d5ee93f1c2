"""From preferences to batches of encoded pairs; the only file that knows grain.

A pair is one record from here on, so no shuffle can tear it apart. Everything is encoded once, up front: then what is
too long is known and counted, and so is the number of batches. All processes see the same global batches, each takes
its part of every one, and all pad to the length of the global batch; so they never wait for one another in vain.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import grain
import numpy as np
from tqdm import tqdm

from patarm_jax.config.sections import DataSection
from patarm_jax.data.limits import Room
from patarm_jax.data.preferences import Report
from patarm_jax.data.scores import opened_answer
from patarm_jax.data.sft import JudgedPreference
from patarm_jax.data.tokenizer import (
    Tokenizer,
    encode_chat,
    encode_dialogue,
    encode_judgement,
    encode_unthought,
    unthought_opening,
)
from patarm_jax.judge.forms import POINTWISE, Form
from patarm_jax.types import Message, Preference, RubricMode, UsageError, UserError

Tokens = np.ndarray  # [T] int32


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """A preference and the questions that a judge reads about it; for SFT, what it learns to write too."""

    index: int  # in the preferences that were encoded, dropped ones counted: stable when a limit changes
    preference: Preference
    # Two: of the chosen and of the rejected response, or of both with the chosen one first and second. One, of pairs
    # that are shown in one order at a time, or where a rubric is asked for of the prompt.
    prompt_tokens: tuple[Tokens, ...]
    # Of each question or, of a policy's prompt, of both responses; end tokens included. None where none are taught.
    completion_tokens: tuple[Tokens, ...] | None = None
    places: tuple[int, ...] = (0, 1)  # which of the two questions these are

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompt_tokens))

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(prompt, completion) tokens of each question; of one with several completions, of each."""
        read = list(map(len, self.prompt_tokens))
        written = [0] * len(read) if self.completion_tokens is None else list(map(len, self.completion_tokens))
        return tuple(zip(read * (len(written) // len(read)), written, strict=True))

    def only(self, place: int) -> "EncodedPair":
        """The pair with one of its two questions."""
        written = self.completion_tokens
        return replace(
            self,
            prompt_tokens=(self.prompt_tokens[place],),
            completion_tokens=written and (written[place],),
            places=(place,),
        )


@dataclass(frozen=True, eq=False)
class PairBatch:
    """This process's part of a global batch, and what all processes must agree on."""

    records: tuple[EncodedPair, ...]
    ids: tuple[str, ...]  # those of all pairs of the global batch
    # (prompt, completion) tokens of every question of the global batch, in the order of the pairs
    lengths: tuple[tuple[int, int], ...]

    @property
    def longest_prompt(self) -> int:
        """Tokens, over the global batch."""
        return max(prompt for prompt, _ in self.lengths)


def digest_of(records: Sequence[EncodedPair]) -> str:
    """Tells these records, in this order, from any others: SHA-256 over ids, tokens and the numbers they carry."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.preference.id.encode())
        for tokens in (*record.prompt_tokens, *(record.completion_tokens or ())):
            digest.update(tokens.tobytes())
        if record.preference.row:  # of a prompt, by which its responses may be rewarded
            about = [record.preference.domain, record.preference.row]
            digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        for numbers in (record.preference.labels, record.preference.margin):
            if numbers is not None:
                digest.update(repr(numbers).encode())
    return digest.hexdigest()


# ---- Encoding -------------------------------------------------------------------------------------------------------


def encode_pairs(
    tokenizer: Tokenizer,
    preferences: Sequence[Preference | JudgedPreference],
    rubrics: RubricMode,
    section: DataSection,
    room: Room,
    form: Form = POINTWISE,
) -> tuple[list[EncodedPair], Report]:
    """Encodes each preference, with its judgements where it has them; drops and counts what exceeds the limits.

    Args:
        tokenizer: of the judge.
        preferences: what is encoded.
        rubrics: which the prompts hold.
        section: the limits of the config.
        room: what the network has positions for.
        form: how the judge is asked about them.

    Raises:
        UserError: when none is short enough.
    """
    room.check()
    kept: list[EncodedPair] = []
    dropped: Counter[str] = Counter()
    shortest: dict[str, int] = {}  # reason → the smallest limit that would have kept a preference
    # disable=None: no bar where nobody watches.
    for index, preference in enumerate(tqdm(preferences, desc="encode", unit="pair", disable=None)):
        pair = encode_pair(tokenizer, index, preference, rubrics, form)
        excess = _excess(pair, section, room)
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
        remedy = "Raise the limit in the config"
        if any("max_position_embeddings" in reason for reason in dropped):
            lower = f"lower {room.setting}, " if room.new_tokens else ""
            remedy = (
                f"Raise the limit where it is the config's; where it is the model's, {lower}give shorter texts or a "
            )
            remedy += "model with more positions"
        raise UserError(f"no preference is short enough: {found or 'there are none'}. {remedy}.")
    return kept, Report(len(kept), dict(dropped.most_common()))


def encode_pair(
    tokenizer: Tokenizer, index: int, given: Preference | JudgedPreference, rubrics: RubricMode, form: Form
) -> EncodedPair:
    """One preference as `encode_pairs` encodes it, however long it is."""
    if isinstance(given, JudgedPreference):
        if form.converses and form.thinks:
            _refuse_unthought(tokenizer, given)
        encode = encode_judgement if form.thinks else encode_unthought
        written = tuple(np.asarray(encode(tokenizer, text), np.int32) for text in given.judgements)
        return replace(encode_pair(tokenizer, index, given.preference, rubrics, form), completion_tokens=written)
    ask = partial(form.ask, given.prompt, domain=given.domain, rubrics=rubrics, rubric=given.rubric)
    questions = [encode_question(tokenizer, ask(*responses), form) for responses in form.shown(given)]
    return EncodedPair(index, given, tuple(questions), places=tuple(range(len(questions))))


def _refuse_unthought(tokenizer: Tokenizer, given: JudgedPreference) -> None:
    """Refuses responses without a thinking's end where the chat template has begun one."""
    begun = "<think>" in tokenizer.opening and "</think>" not in tokenizer.opening
    if begun and not all("</think>" in text for text in given.judgements):
        raise UserError(
            f"the chat template in {tokenizer.fast.name_or_path} begins the thinking itself, and a response of "
            f"{given.preference.id} ends none with </think>: the policy would learn to answer inside its thinking. Say "
            "that it is not to think (judge: policy_unthinking of sft, thinking: false of dpo), or give its thinking."
        )


def encode_question(tokenizer: Tokenizer, messages: Sequence[Message], form: Form) -> Tokens:
    """What a judge of a form reads: a question up to where it begins to write, or all before the number it gives."""
    if form.converses:
        ids = encode_dialogue(tokenizer, messages, answering=True)
        ids += [] if form.thinks else unthought_opening(tokenizer)
    elif form.writes:
        ids = encode_chat(tokenizer, messages) + ([] if form.thinks else unthought_opening(tokenizer))
    elif form.has_score_head:
        ids = encode_dialogue(tokenizer, messages)
    else:
        ids = encode_chat(tokenizer, messages) + opened_answer(tokenizer)
    return np.asarray(ids, np.int32)


def _excess(pair: EncodedPair, section: DataSection, room: Room) -> tuple[str, int] | None:
    """Why a pair is too long, and how long it is; None when it is not."""
    if clause := room.excess(pair.longest_prompt, section.max_prompt_tokens):
        return f"prompt {clause}", pair.longest_prompt
    longest_completion = max(map(len, pair.completion_tokens or ()), default=0)
    if longest_completion > section.max_completion_tokens:
        return f"judgement longer than data.max_completion_tokens {section.max_completion_tokens:,}", longest_completion
    if (together := max(map(sum, pair.lengths))) > room.positions:
        clause = f"longer than max_position_embeddings {room.positions:,} of the model"
        return f"prompt and judgement together {clause}", together
    return None


# ---- Batches --------------------------------------------------------------------------------------------------------


Batches: TypeAlias = grain.DatasetIterator[PairBatch]  # in the order in which they are trained on


def batches_drawn(state: Mapping[str, Any]) -> int:
    """How many batches were drawn when this was the iterator's state."""
    return int(state["next_index"])


def batches_per_epoch(number_of_records: int, pairs_per_step: int) -> int:
    """Whole batches in one pass over the records; those left over wait for the next epoch's shuffle."""
    return number_of_records // pairs_per_step


def batches(
    records: Sequence[EncodedPair],
    pairs_per_step: int,
    epochs: int | None,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    in_turns: bool = False,
    times: int = 1,
) -> Batches:
    """Shuffled batches, each epoch in another order; `get_state` and `set_state` resume exactly.

    No batch spans two epochs. The state is the number of batches drawn, the same on all processes.

    Args:
        records: all of them, the same on every process.
        pairs_per_step: of a global batch.
        epochs: passes over the records; None: without end.
        seed: of the order.
        process_index: whose part of each batch this is.
        process_count: among so many.
        in_turns: each pair comes with one of its two questions: every second one with the other, and in every second
            epoch.
        times: how often each batch comes, one time after the other.
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
        .batch(pairs_per_step, drop_remainder=True, batch_fn=tuple)
        .repeat(epochs)
        .map_with_index(partial(_global_batch, batches_per_epoch(len(records), pairs_per_step), in_turns))
        .map(lambda batch: replace(batch, records=batch.records[mine]))
    )
    if times > 1:
        dataset = grain.MapDataset.mix([dataset] * times)
    # The records are in memory: threads that read ahead would have nothing to wait for.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _spread(seed: int) -> int:
    """A seed for grain, which adds the epoch to it: unspread, run 1 would begin with the second epoch of run 0."""
    return int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])


def _global_batch(per_epoch: int, in_turns: bool, number: int, records: Sequence[EncodedPair]) -> PairBatch:
    if in_turns:
        epoch = number // per_epoch
        records = [record.only((record.index + epoch) % 2) for record in records]
    return PairBatch(
        tuple(records),
        ids=tuple(record.preference.id for record in records),
        lengths=tuple(side for record in records for side in record.lengths),
    )
