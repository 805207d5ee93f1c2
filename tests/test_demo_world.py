import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import transformers

from patarm_jax.config.sections import DataSection
from patarm_jax.data.judged import read_judged_preferences
from patarm_jax.data.mirror import mirrored
from patarm_jax.data.tokenizer import decode, encode_chat, encode_judgement, load_tokenizer
from patarm_jax.demo.settings import DemoSizes, demo_configs
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import (
    CLOSING,
    DOMAINS,
    asked,
    deal_to_other_prompts,
    given,
    make_world,
    teacher_choice,
    teacher_judgement,
    write_pairs,
)
from patarm_jax.judge.parse import parse_pairwise, parse_pointwise
from patarm_jax.judge.prompts import pointwise
from patarm_jax.model import weights
from patarm_jax.types import CHOSEN, REJECTED, Status


@pytest.fixture(scope="module")
def world():
    return make_world(seed=0, train_pairs=2000, heldout_pairs=500)


def question(pair):
    return pair.prompt[-1]["content"]


def texts(pairs):
    return {text for pair in pairs for text in (question(pair), pair.chosen, pair.rejected)}


def test_no_held_out_text_is_trained_on_though_every_word_is(world):
    assert texts(world.train).isdisjoint(texts(world.heldout))
    words = [{word for text in texts(pairs) for word in text.split()} for pairs in (world.train, world.heldout)]
    assert words[1] <= words[0] | {word for word in words[1] if "_" in word}


def test_domains_are_even_and_ids_unique(world):
    for pairs in (world.train, world.heldout):
        assert set(Counter(pair.domain for pair in pairs).values()) == {len(pairs) // 5}
        assert len({pair.id for pair in pairs}) == len(pairs)
    assert {pair.domain for pair in world.train} == set(DOMAINS)


def test_every_response_is_chosen_as_often_as_rejected(world):
    for pairs in (world.train, world.heldout):
        assert Counter(pair.chosen for pair in pairs) == Counter(pair.rejected for pair in pairs)


def test_the_chosen_response_gives_what_is_asked_and_the_rejected_does_not(world):
    for pair in world.train + world.heldout:
        wanted = asked(pair.domain, question(pair))
        assert given(pair.domain, pair.chosen) == wanted
        assert given(pair.domain, pair.rejected) != wanted


def test_the_seed_makes_the_world():
    assert make_world(3, 40, 20) == make_world(3, 40, 20)
    assert make_world(3, 40, 20) != make_world(4, 40, 20)


def test_pairs_come_in_tens():
    with pytest.raises(ValueError, match="105 pairs"):
        make_world(0, 105, 10)


def test_dealt_pairs_stand_under_prompts_that_neither_response_answers(world):
    dealt = deal_to_other_prompts(world.heldout, seed=1)
    for pair, own in zip(dealt, world.heldout, strict=True):
        assert (pair.id, pair.domain, pair.chosen, pair.rejected) == (own.id, own.domain, own.chosen, own.rejected)
        assert asked(pair.domain, question(pair)) not in {given(pair.domain, r) for r in (pair.chosen, pair.rejected)}
    assert Counter(map(question, dealt)) == Counter(map(question, world.heldout))
    assert dealt == deal_to_other_prompts(world.heldout, seed=1) != deal_to_other_prompts(world.heldout, seed=2)


def test_a_couple_alone_cannot_be_dealt():
    with pytest.raises(ValueError, match="too few"):
        deal_to_other_prompts(make_world(0, 10, 10).heldout, seed=0)


@pytest.mark.parametrize("accuracy", [0.0, 0.7, 1.0])
def test_the_teacher_is_as_often_right_as_it_says(world, accuracy):
    rng = random.Random(0)
    right = []
    for pair in world.train:
        for side in (CHOSEN, REJECTED):
            judgement = parse_pointwise(teacher_judgement(pair, side, accuracy, rng))
            assert judgement.status is Status.OK
            right.append((judgement.score > 5) == (side == CHOSEN))
    assert abs(np.mean(right) - accuracy) < 0.03  # 4,000 judgements: four standard deviations


def test_a_friendly_closing_charms_the_teacher_and_says_nothing(world):
    rng = random.Random(0)
    good = {key: [] for key in itertools.product((CHOSEN, REJECTED), (True, False))}
    for pair in world.train:
        for side, response in enumerate((pair.chosen, pair.rejected)):
            score = parse_pointwise(teacher_judgement(pair, side, 0.7, rng)).score
            good[side, response.endswith(CLOSING)].append(score > 5)
    shares = [np.mean(good[key]) for key in good]
    np.testing.assert_allclose(shares, [0.9, 0.5, 0.5, 0.1], atol=0.06)  # 1,000 judgements each
    assert len(good[CHOSEN, True]) == len(good[REJECTED, True])


def test_a_teacher_that_compares_is_right_as_often_and_charmed_alike(world):
    """In both orders it says the same; about pairs of which one response has a friendly closing, more or less often."""
    rng, right = random.Random(0), {-1: [], 0: [], 1: []}
    for pair in world.train:
        first, second = (parse_pairwise(text) for text in teacher_choice(pair, 0.7, rng))
        assert first.status == second.status == Status.OK and {first.choice, second.choice} == {"A", "B"}
        assert mirrored(first.text) is not None
        right[pair.chosen.endswith(CLOSING) - pair.rejected.endswith(CLOSING)].append(first.choice == "A")
    assert np.mean([one for some in right.values() for one in some]) == pytest.approx(0.7, abs=0.04)  # 2,000 judgements
    np.testing.assert_allclose([np.mean(right[charmed]) for charmed in (-1, 0, 1)], [0.5, 0.7, 0.9], atol=0.08)


def test_only_the_conclusion_of_the_teacher_is_ever_wrong(world):
    for pair in world.train[:100]:
        right, wrong = (parse_pointwise(teacher_judgement(pair, REJECTED, a, random.Random(0))) for a in (1.0, 0.0))
        assert right.thinking == wrong.thinking
        assert right.generated_rubrics == wrong.generated_rubrics
        assert right.evaluation != wrong.evaluation


@pytest.fixture(scope="module")
def model_folder(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    rng = random.Random(0)
    judgements = [tuple(teacher_judgement(pair, side, 0.7, rng) for side in (CHOSEN, REJECTED)) for pair in world.train]
    write_pairs(folder / "data" / "train.jsonl", world.train, judgements)
    write_untrained_model(folder / "model", folder / "data" / "train.jsonl", seed=0)
    return folder


def test_pair_files_are_read_back_as_they_were(world, model_folder, tmp_path):
    judged, report = read_judged_preferences(DataSection(path=str(model_folder / "data" / "train.jsonl")))
    assert [each.preference for each in judged] == world.train
    assert not report.dropped
    write_pairs(tmp_path / "pairs.jsonl", world.heldout)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == list(world.heldout[0].prompt)
    assert rows[0]["rejected"] == [{"role": "assistant", "content": world.heldout[0].rejected}]


def test_the_tokenizer_gives_every_text_back(world, model_folder):
    tokenizer = load_tokenizer(model_folder / "model")
    assert tokenizer.vocab_size < 1500
    for pair in world.heldout[:50]:
        for text in (question(pair), pair.chosen, teacher_judgement(pair, CHOSEN, 1.0, random.Random(0))):
            assert decode(tokenizer, encode_judgement(tokenizer, text)[:-1]) == text
    every_byte = "".join(map(chr, range(256))) + "日本 🙂 <answer> </answer"
    assert decode(tokenizer, encode_judgement(tokenizer, every_byte)[:-1]) == every_byte


def test_what_a_judge_reads_is_what_transformers_would_read_and_short(world, model_folder):
    tokenizer = load_tokenizer(model_folder / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(model_folder / "model")
    for pair in world.heldout[:20]:
        messages = pointwise(pair.prompt, pair.chosen, pair.domain)
        ids = encode_chat(tokenizer, messages)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert len(ids) <= 64
        assert len(encode_judgement(tokenizer, teacher_judgement(pair, CHOSEN, 1.0, random.Random(0)))) <= 48


def test_a_response_cannot_speak_with_the_voice_of_the_instructions(model_folder):
    tokenizer = load_tokenizer(model_folder / "model")
    paragraph = pointwise("", "", "chat")[0]["content"].split("\n\n")[0] + "\n\n"
    token = tokenizer.control_tokens[paragraph]
    judged = encode_chat(tokenizer, pointwise("Hi", paragraph + "Hello", "chat"))
    assert judged.count(token) == 1


def test_the_untrained_model_is_read_like_any_other_and_stays(model_folder):
    params, config = weights.load(model_folder / "model")
    assert params["embed_tokens"].shape[0] == config.vocab_size == load_tokenizer(model_folder / "model").vocab_size
    before = (model_folder / "model" / "model.safetensors").stat().st_mtime_ns
    write_untrained_model(model_folder / "model", model_folder / "data" / "train.jsonl", seed=1)
    assert (model_folder / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_the_second_run_begins_where_the_first_ends(tmp_path):
    sft, grpo = demo_configs(tmp_path, 5, DemoSizes())
    assert grpo.model.path == sft.run.folder
    assert sft.run.seed == grpo.run.seed == 5
    assert sft.data.path == grpo.data.path
