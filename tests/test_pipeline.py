"""Pairs become batches: nothing lost uncounted, any number of processes the same, any resume the same."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patarm_jax.config.sections import DataSection
from patarm_jax.data.limits import Room
from patarm_jax.data.packing import sft_batch, sft_shape
from patarm_jax.data.pipeline import EncodedPair, batches, batches_per_epoch, encode_pairs
from patarm_jax.data.sft import JudgedPreference, template_judgement
from patarm_jax.data.tokenizer import decode, encode_chat, encode_judgement, load_tokenizer
from patarm_jax.judge.prompts import pointwise
from patarm_jax.padding import bucket, pack
from patarm_jax.types import Preference, UsageError, UserError
from tests.toys import tiny_tokenizer_folder

ROOMY = DataSection(max_prompt_tokens=5000, max_completion_tokens=5000)
ROOM = Room(positions=10_000)


def preference(number: int) -> Preference:
    """The higher the number, the longer the chosen response."""
    prompt = ({"role": "user", "content": f"Count to {number}."},)
    return Preference(str(number), prompt, "and so on, " * number, "No.", "math", "")


def judged(number: int) -> JudgedPreference:
    given = preference(number)
    return JudgedPreference(given, (template_judgement(given, 0), template_judgement(given, 1) + " really" * number))


def record(index: int) -> EncodedPair:
    """A record with lengths of its own and no need of a tokenizer."""
    prompts = np.arange(1 + index % 7, dtype=np.int32), np.arange(2 + index % 5, dtype=np.int32)
    completions = np.arange(1 + index % 3, dtype=np.int32), np.arange(3 + index % 4, dtype=np.int32)
    return EncodedPair(index, preference(index), prompts, completions)


def indices(drawn) -> list[list[int]]:
    return [[each.index for each in batch.records] for batch in drawn]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer_folder(tmp_path_factory.mktemp("tiny")))


# ---- Encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rubrics", ["adaptive", "primary", "generated"])
def test_a_record_is_what_the_doors_say(tiny, rubrics):
    pairs, report = encode_pairs(tiny, [judged(n) for n in range(3)], rubrics, ROOMY, ROOM)
    assert (report.kept, report.dropped) == (3, {})
    for number, pair in enumerate(pairs):
        given = judged(number)
        assert (pair.index, pair.preference) == (number, given.preference)
        for side, response in enumerate((given.preference.chosen, given.preference.rejected)):
            messages = pointwise(given.preference.prompt, response, "math", rubrics)
            assert pair.prompt_tokens[side].tolist() == encode_chat(tiny, messages)
        for side, judgement in enumerate(given.judgements):
            assert pair.completion_tokens[side].tolist() == encode_judgement(tiny, judgement)


def test_without_judgements_only_prompts_are_encoded(tiny):
    with_judgements, _ = encode_pairs(tiny, [judged(1)], "adaptive", ROOMY, ROOM)
    [pair], _ = encode_pairs(tiny, [preference(1)], "adaptive", ROOMY, ROOM)
    assert pair.completion_tokens is None
    assert all(map(np.array_equal, pair.prompt_tokens, with_judgements[0].prompt_tokens))
    assert pair.lengths == tuple((len(tokens), 0) for tokens in pair.prompt_tokens)
    assert pair.longest_prompt == max(map(len, pair.prompt_tokens))


def test_what_is_too_long_is_dropped_and_counted_and_the_rest_keeps_its_index(tiny):
    given = [judged(number) for number in (9, 0, 8, 1, 2)]
    everything, _ = encode_pairs(tiny, given, "adaptive", ROOMY, ROOM)
    prompts = [pair.longest_prompt for pair in everything]
    completions = [max(map(len, pair.completion_tokens)) for pair in everything]
    limits = DataSection(max_prompt_tokens=prompts[2], max_completion_tokens=completions[3])
    kept, report = encode_pairs(tiny, given, "adaptive", limits, ROOM)
    assert [pair.index for pair in kept] == [1, 3]  # a limit is the longest that is allowed
    assert report.dropped == {
        f"judgement longer than data.max_completion_tokens {completions[3]:,}": 2,
        f"prompt longer than data.max_prompt_tokens {prompts[2]:,}": 1,
    }
    assert report.kept + sum(report.dropped.values()) == len(given)


def test_nothing_short_enough_is_an_error_with_the_lengths(tiny):
    everything, _ = encode_pairs(tiny, [preference(0), preference(5)], "adaptive", ROOMY, ROOM)
    with pytest.raises(UserError) as error:
        encode_pairs(tiny, [preference(0), preference(5)], "adaptive", DataSection(max_prompt_tokens=10), ROOM)
    shortest = everything[0].longest_prompt
    assert f"2 × prompt longer than data.max_prompt_tokens 10, the shortest {shortest}" in str(error.value)
    assert "Raise the limit" in str(error.value)


# ---- Batches --------------------------------------------------------------------------------------------------------

RECORDS = [record(index) for index in range(23)]


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_see_what_one_sees(process_count):
    alone = list(batches(RECORDS, 8, epochs=3, seed=5))
    shares = [list(batches(RECORDS, 8, 3, 5, index, process_count)) for index in range(process_count)]
    assert len(alone) == 3 * batches_per_epoch(len(RECORDS), 8) == 6
    for together, *parts in zip(alone, *shares, strict=True):
        assert together.records == tuple(each for part in parts for each in part.records)
        assert len({len(part.records) for part in parts}) == 1
        for part in parts:
            assert part.lengths == together.lengths


def test_lengths_are_those_of_the_global_batch():
    for batch in batches(RECORDS, 8, epochs=1, seed=5):
        lengths = [
            (len(prompt), len(completion))
            for each in batch.records
            for prompt, completion in zip(each.prompt_tokens, each.completion_tokens, strict=True)
        ]
        assert batch.lengths == tuple(lengths)
        assert batch.longest_prompt == max(prompt for prompt, _ in lengths)


def test_resuming_anywhere_is_not_having_stopped():
    whole = indices(batches(RECORDS, 4, epochs=2, seed=1))
    for cut in range(len(whole) + 1):
        first = batches(RECORDS, 4, epochs=2, seed=1)
        before = indices(next(first) for _ in range(cut))
        state = json.loads(json.dumps(first.get_state()))
        second = batches(RECORDS, 4, epochs=2, seed=1)
        second.set_state(state)
        assert before + indices(second) == whole


def test_the_state_is_the_same_on_every_process():
    states = []
    for index in range(2):
        iterator = batches(RECORDS, 4, 2, 1, index, 2)
        next(iterator)
        states.append(iterator.get_state())
    assert states[0] == states[1]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(size=st.integers(1, 12), extra=st.integers(0, 30), epochs=st.integers(1, 4), seed=st.integers(-(2**40), 2**40))
def test_every_epoch_is_a_selection_without_repetition(size, extra, epochs, seed):
    records = [record(index) for index in range(size + extra)]
    drawn = indices(batches(records, size, epochs, seed))
    per_epoch = batches_per_epoch(len(records), size)
    assert len(drawn) == epochs * per_epoch
    for epoch in range(epochs):
        flat = [index for batch in drawn[epoch * per_epoch : (epoch + 1) * per_epoch] for index in batch]
        assert len(flat) == len(set(flat)) == per_epoch * size
    assert drawn == indices(batches(records, size, epochs, seed))


def test_epochs_and_seeds_differ():
    drawn = [each for seed in range(4) for each in indices(batches(RECORDS, 23, epochs=4, seed=seed))]
    assert len(set(map(tuple, drawn))) == 16
    assert {tuple(sorted(each)) for each in drawn} == {tuple(range(23))}


def test_pairs_that_cannot_be_shared_or_do_not_suffice_are_refused():
    with pytest.raises(UsageError, match=r"pairs_per_step is 6, which 4 processes .* a multiple of 4"):
        batches(RECORDS, 6, 1, 0, 0, 4)
    with pytest.raises(UserError, match=r"23 usable pairs do not fill one batch of pairs_per_step 24\. Lower"):
        batches(RECORDS, 24, 1, 0)


# ---- Arrays ---------------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 10**6), multiple=st.sampled_from([1, 2, 8, 128, 100]))
@settings(derandomize=True)
def test_a_bucket_is_enough_a_multiple_and_not_much_more(length, multiple):
    padded = bucket(length, multiple)
    assert padded >= length
    assert padded % multiple == 0
    assert bucket(padded, multiple) == padded
    assert padded <= 2 * multiple or padded < 1.5 * length


def test_few_buckets():
    assert sorted({bucket(length, 8) for length in range(1, 129)}) == [8, 16, 24, 32, 48, 64, 96, 128]


@pytest.mark.parametrize("packed", [True, False])
def test_an_sft_batch_holds_every_judgement_behind_its_prompt(tiny, packed):
    given = [judged(number) for number in range(3)]
    records, _ = encode_pairs(tiny, given, "adaptive", ROOMY, ROOM)
    [batch] = batches(records, 3, epochs=1, seed=0)
    shape = sft_shape(batch, 32, rows_multiple=4, packed=packed)
    assert shape.width == bucket(max(map(sum, batch.lengths)), 32) and shape.rows % 4 == 0
    got = sft_batch(batch, shape, tiny.pad_id, packed)
    assert got.tokens.shape == (shape.rows, shape.width) and got.read.shape == (shape.rows, shape.targets)
    found, places = [], set()
    for row in range(shape.rows):
        count = int(got.counts[row])
        assert np.array_equal(got.targets[row, :count], got.tokens[row, got.read[row, :count] + 1])
        first = got.starts[row, got.read[row, :count]]  # of the sequence each predicted token stands in
        for start in np.unique(first):
            inside = got.read[row, :count][first == start]
            assert np.array_equal(inside, np.arange(inside[0], inside[-1] + 1))
            places |= {(row, place) for place in range(start, inside[-1] + 2)}
            prompt = got.tokens[row, start : inside[0] + 1]
            found.append((prompt.tolist(), decode(tiny, got.tokens[row, inside + 1])))
        assert (got.targets[row, count:] == 0).all() and (got.read[row, count:] == 0).all()
    expected = [
        (
            tokens.tolist(),
            given[each.index].judgements[side] + "<|im_end|>",
        )
        for each in batch.records
        for side, tokens in enumerate(each.prompt_tokens)
    ]
    assert sorted(found) == sorted(expected)
    assert len(places) == sum(map(sum, batch.lengths)), "no sequence may overlap another"
    padding = {(r, t) for r in range(shape.rows) for t in range(shape.width)} - places
    assert all(got.tokens[p] == tiny.pad_id and got.starts[p] == p[1] for p in padding)


@settings(derandomize=True)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_packing_loses_nothing_and_fills_rows(lengths):
    rows = pack(lengths, 20)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 20 for row in rows)
    assert len(rows) <= max(1, 2 * sum(lengths) / 20), "at most one row is not half full"


@pytest.mark.parametrize("packed", [True, False])
def test_processes_agree_on_shapes(packed):
    for batch, *parts in zip(
        batches(RECORDS, 8, 2, 0), *(batches(RECORDS, 8, 2, 0, index, 4) for index in range(4)), strict=True
    ):
        shapes = {sft_shape(part, 2, 2, packed) for part in parts}
        assert len(shapes) == 1
        [shape] = shapes
        arrays = [sft_batch(part, shape, 0, packed) for part in parts]
        assert sum(int(each.counts.sum()) for each in arrays) == sum(completion for _, completion in batch.lengths)
