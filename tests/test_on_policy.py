"""Pairs that are made of a policy's own responses: which two, by whom, and whole runs of rounds."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from patarm_jax.ask.round_robin import RoundRobin, worth_of_group
from patarm_jax.ask.worth_here import Waiting
from patarm_jax.cli import main
from patarm_jax.recipes.on_policy import pair_of
from patarm_jax.rollout.preferring import ALL_EQUAL, ONE_REWARD, SMALL_GAP, UNLIKE, Pair, preferred_pair
from patarm_jax.rollout.responses import NO_ANSWER, NO_BASELINE, Worth
from tests.chat_server import FORM, completion, served
from tests.flags import FLAGS
from tests.runs import (
    CUBE,
    exported,
    lines_of,
    reward_config,
    run_as_two,
    timeless,
)
from tests.test_policy import collected, opened, ordinal, responses_to, short, with_prompts
from tests.test_policy_runs import start_in
from tests.toys import TOPICS

# ---- Which two ------------------------------------------------------------------------------------------------------

REWARDS = arrays(np.float64, 5, elements=st.sampled_from([np.nan, 0.0, 1.0, 2.5, 7.0]))


@given(REWARDS, arrays(np.bool_, (5, 5)), st.sampled_from([0.0, 1.0, 5.0]))
def test_a_pair_is_what_a_plain_loop_finds(rewards, agreed, min_gap):
    best, reason, spread = None, ONE_REWARD if np.sum(~np.isnan(rewards)) < 2 else ALL_EQUAL, 0.0
    for i in range(5):
        for j in range(5):
            gap = rewards[i] - rewards[j]
            if not gap > 0:  # NaN included
                continue
            spread = max(spread, gap)
            if reason in (ALL_EQUAL, UNLIKE):
                reason = SMALL_GAP if agreed[i, j] else UNLIKE
            if agreed[i, j] and gap >= min_gap and (best is None or gap > rewards[best[0]] - rewards[best[1]]):
                best = i, j
    found = preferred_pair(rewards, agreed, min_gap)
    assert found == (reason if best is None else Pair(*best))


@given(arrays(np.float64, (4, 4, 2), elements=st.sampled_from([np.nan, 0.0, 0.25, 0.5, 0.75, 1.0])))
def test_comparisons_of_all_with_all_add_up_to_what_a_plain_loop_finds(shares):
    """`shares[i, j]`, i < j, are those that i wins against j, standing first and second."""
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    compared = []
    for i, j in pairs:
        first, second = shares[i, j].tolist()
        orders = tuple(None if np.isnan(share) else share for share in (first, second))
        compared.append(Worth(None if None in orders else (first + second) / 2, f"{i}{j}", orders))
    for member, worth in enumerate(worth_of_group(4, pairs, compared)):
        won, beaten = [], []
        for other in range(4):
            if member == other:
                continue
            of_two = shares[member, other] if member < other else 1 - shares[other, member]
            if not np.isnan(of_two).any():
                won.append(of_two.mean())
                beaten += [other] if (of_two > 0.5).all() else []
        assert worth.value == (pytest.approx(np.mean(won)) if won else None)
        assert list(worth.beats) == beaten
        assert worth.said.count("beside response") == 3


class LongerWins(Waiting):
    """A judge of two that prefers the longer response, and the first of two that are as long."""

    name = "longer"
    of_one_prompt = 1

    def collect(self, key, step):
        return {one.index: [self.worth(one.answers[0], one.baseline)] for one in self.taken()}

    def worth(self, response, other):
        if response is None or other is None:
            return Worth(None, "no answer")
        first, second = float(len(response) >= len(other)), float(len(response) > len(other))
        return Worth((first + second) / 2, "", (first, second))


@given(
    st.lists(st.lists(st.sampled_from([None, "a", "bb", "cc", "ddd"]), min_size=3, max_size=3), min_size=1, max_size=3)
)
def test_a_judge_of_two_ranks_all_responses_to_a_prompt(groups):
    every = [responses_to(*answers, index=index) for index, answers in enumerate(groups)]
    found = collected(RoundRobin(LongerWins()), *every)
    for index, answers in enumerate(groups):
        for worth, mine in zip(found[index], answers, strict=True):
            others = [other for other in answers if other is not None]
            if mine is None or len(others) < 2:
                assert worth.value is None and worth.beats == ()
                continue
            shorter = [len(mine) > len(other) for other in others]
            equal = sum(len(mine) == len(other) for other in others) - 1
            assert worth.value == pytest.approx((sum(shorter) + equal / 2) / (len(others) - 1))
            assert list(worth.beats) == [n for n, other in enumerate(answers) if other and len(mine) > len(other)]
        rows = [
            {"text": text or "", "reward": worth.value, "sources": {"longer": {"beats": worth.beats}}}
            for text, worth in zip(answers, found[index], strict=True)
        ]
        pair = pair_of(rows, 0.0)
        there = [len(text) for text in answers if text is not None]
        if len(there) > 1 and max(there) > min(there):
            assert (len(answers[pair.chosen]), len(answers[pair.rejected])) == (max(there), min(there))
        else:
            assert pair in (ONE_REWARD, ALL_EQUAL)
        for row in rows:
            row["sources"]["longer"]["beats"] = ()  # another preference in the other order, whatever the rewards
        assert isinstance(pair_of(rows, 0.0), str)


def test_equal_texts_and_rounding_make_no_pair():
    def rows(*given):
        return [{"text": text, "reward": reward, "sources": {}} for text, reward in given]

    assert pair_of(rows(("No", 8.0), ("No ", 3.0), ("Tea.", 5.0)), 0.0) == Pair(chosen=0, rejected=2)
    assert pair_of(rows(("No", 8.0), ("No", 3.0)), 0.0) == UNLIKE
    assert pair_of(rows(("No", 8.2), ("Tea.", 8.200000000000001)), 0.0) == ALL_EQUAL


# ---- Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(world, started):
    """The world with prompts, and a policy that has learnt to answer in a few words, so that its responses end."""
    rows = [{"prompt": f"Say {topic}.", "response": answer} for topic in TOPICS for answer in ("Tea.", "A lake.", "No")]
    (world / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(world / "answers.jsonl")}
    run = {"folder": str(world / "taught"), "steps": 60, "tensorboard": False}
    started(
        "sft", reward_config(world, "taught", data=data, run=run, heldout={"path": ""}, judge="policy_unthinking")
    ).end()
    return with_prompts(world)


def config_of(folder, name, sources, **sections):
    more = {
        "model": {"path": str(folder / "taught" / "export"), "weights": "load"},
        "data": {"path": str(folder / "prompts.jsonl")},
        "run": {"folder": str(folder / name), "steps": 3, "checkpoint_every": 1, "tensorboard": False},
        "heldout": {"path": ""},
        "optimizer": {"learning_rate": 1e-4},
        "thinking": False,
        "pairs_per_step": 2,
    }
    own = {
        "sources": sources,
        "rounds": 2,
        "responses": 5,
        "prompts_at_once": 2,
        "sampling": {"max_new_tokens": 8, "rows": 4},
    }
    changes = sections.pop("on_policy", {})
    more["on_policy"] = {} if changes is None else own | changes
    return reward_config(folder, name, **more | sections)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def responses_of(folder, number):
    return [row for path in sorted((folder / "responses" / f"round-{number}").iterdir()) for row in rows_of(path)]


def texts_of(folder, number):
    return [[one["text"] for one in row["responses"]] for row in responses_of(folder, number)]


def test_a_killed_run_of_rounds_ends_like_a_whole_one(folder, started):
    start = start_in(folder, started)

    def answer(request):
        response = request["messages"][-1]["content"].partition("<response>")[2]
        return 200, completion(FORM.format(len(response) % 11))

    with served(always=answer) as (url, chat):
        sources = [short(weight=0.1), {"kind": "judge", "endpoint": {"url": url}, "votes": 2, "name": "far"}]
        whole, killed = (config_of(folder, name, sources) for name in ("rounds_whole", "rounds_killed"))
        said = start("dpo", whole).end()
        asked = sorted(json.dumps(one) for one in chat.asked)
        chat.asked.clear()
        stopped = start("dpo", killed)
        stopped.until(lambda: len(list((folder / "rounds_killed").glob("responses/round-1/*"))) >= 2)
        stopped.process.kill()
        stopped.end(-9)
        kept = [path.read_text().count("\n") - 1 for path in (folder / "rounds_killed" / "answers").rglob("*.jsonl")]
        on_their_way = len(chat.asked) - sum(kept)  # each file begins with what was asked
        # What is sampled together changes nothing; a signal in the midst of a round's last prompts still stops.
        stopped = start("dpo", killed, "--on_policy.prompts_at_once", "6")
        stopped.until(lambda: "5 responses to each of 6 prompts" in stopped.so_far())
        stopped.process.terminate()
        said_of_stop = stopped.end()
        assert "stopped after 6 of 6 prompts of round 1; run the command again to resume" in said_of_stop
        again = start("dpo", killed)
        again.until(lambda: len(lines_of(folder / "rounds_killed" / "round-2")) >= 2)
        again.process.kill()
        again.end(-9)
        start("dpo", killed).end()
        again = Counter(json.dumps(one) for one in chat.asked)
        # None whose answer was kept is paid for twice.
        assert sorted(again) == asked and again.total() - len(asked) == on_their_way
    ours, theirs = folder / "rounds_killed", folder / "rounds_whole"
    assert exported(ours) == exported(theirs) == exported(theirs / "round-2")
    for number in (1, 2):
        assert timeless(ours / f"round-{number}") == timeless(theirs / f"round-{number}")
        assert responses_of(ours, number) == responses_of(theirs, number)
        pairs = rows_of(theirs / "pairs" / f"round-{number}.jsonl")
        assert f"round {number}, pairs of prompts: kept {len(pairs)} of" in said
        assert pairs == rows_of(ours / "pairs" / f"round-{number}.jsonl")
        check_pairs(pairs, responses_of(theirs, number))
    first, second = ({row["id"] for row in responses_of(theirs, number)} for number in (1, 2))
    assert first and second and not first & second  # each round has prompts of its own
    card = (theirs / "export" / "README.md").read_text()
    assert card.count("round-2") == 0 and "rounds_whole" in card and "prompts.jsonl" in card
    assert "on pairs of its own responses, as short, far ranks them, round 2 of 2" in card
    assert f"base model | `{folder / 'taught' / 'export'}`" in card
    for verb in (["report", theirs], ["export", theirs, folder / "exported"]):
        assert f"is a run of 2 rounds, each with a folder. Give one of them, such as {theirs / 'round-2'}" in start(
            *verb
        ).end(1)
    assert (
        safetensors.numpy.load_file(theirs / "round-1" / "export" / "model.safetensors")["model.norm.weight"].dtype
        == np.float32
    )
    assert "is complete, all 2 rounds, and is left as it is" in start("dpo", whole).end()


def check_pairs(pairs, rows):
    """Each pair is of the prompt's own responses, with the highest and the lowest reward of those that have one."""
    by_id = {row["id"]: row for row in rows}
    for pair in pairs:
        responses = by_id[pair["id"]]["responses"]
        rewards = {one["text"]: one["reward"] for one in responses if one["reward"] is not None}
        assert rewards[pair["chosen"][0]["content"]] == pair["chosen_reward"] == max(rewards.values())
        assert rewards[pair["rejected"][0]["content"]] == pair["rejected_reward"] == min(rewards.values())
        assert pair["chosen_reward"] > pair["rejected_reward"]
        for one in responses:
            values = [source["value"] for source in one["sources"].values()]
            if one["reward"] is not None:
                assert one["reward"] == pytest.approx(0.1 * values[0] + values[1]) and not one["cut_off"]


@pytest.mark.parametrize("kind", ["pairwise", "rubric_judge"])
def test_all_are_compared_with_all_as_two_at_a_time(folder, kind):
    """Each two responses, with the draws of a comparison of its own, by the one rubric of their prompt."""
    model = {"model": str(folder / "reference"), "sampling": {"max_new_tokens": 5}}
    generator = {"generator": str(folder / "reference"), "max_rubric_tokens": 6} if kind == "rubric_judge" else {}
    (inner,) = opened(folder, {"kind": kind, **model, **generator})
    every = [responses_to("yes", None, "no", index=index) for index in range(2)]
    found = collected(RoundRobin(inner), *every)
    for index, one in enumerate(every):
        alone = {}
        for number, (member, other) in enumerate([(0, 1), (0, 2), (1, 2)]):
            record = replace(one.record, index=3 * one.record.index + number)
            of_two = replace(one, record=record, answers=[one.answers[member]], baseline=one.answers[other])
            inner.of_one_prompt = 1
            alone[member, other] = collected(inner, of_two)[index][0].said
        assert found[index][0].said == f"beside response 2:\n{alone[0, 1]}\n\nbeside response 3:\n{alone[0, 2]}"
        assert NO_ANSWER in alone[1, 2] and NO_BASELINE in alone[0, 1] and alone[0, 2] != alone[0, 1]
        assert [worth.value for worth in found[index]] == [None] * 3  # nothing that random weights write can be read


@pytest.mark.long
def test_a_round_is_a_run_on_pairs_that_are_given(folder, started):
    """And held-out pairs are read as the data say, whose columns may have other names than the pairs that are made."""
    rows = rows_of(folder / "prompts.jsonl")
    (folder / "asks.jsonl").write_text("".join(json.dumps({"ask": row["prompt"], "n": 1}) + "\n" for row in rows))
    held = [
        {"ask": "Say rain.", "chosen": "Rain.", "rejected": "No"},
        {"ask": "Say tea.", "chosen": "Tea.", "rejected": "No"},
    ]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    heldout = {"path": str(folder / "held.jsonl"), "eval_every": 2}
    sources = [{"kind": "function", "function": "my_rewards:longest"}]
    own = {"rounds": 1, "prompts": "all", "min_gap": 2.0}
    data = {"path": str(folder / "asks.jsonl"), "columns": {"prompt": "ask"}}
    made = config_of(folder, "made", sources, data=data, heldout=heldout, on_policy=own)
    start = start_in(folder, started)
    said = start("dpo", made, "--dry-run", "--run.steps", "0", "--run.epochs", "3").end()
    assert "1 round of at most 18 steps" in said and "policy: decode: arrays" in said and "update: arrays" in said
    assert not (folder / "made").exists()
    start("dpo", made).end()
    path = folder / "made" / "pairs" / "round-1.jsonl"
    pairs = rows_of(path)
    assert pairs and all(pair["chosen_reward"] - pair["rejected_reward"] >= 2 for pair in pairs)
    given = config_of(folder, "given", [], data={"path": str(path)}, on_policy=None)
    started("dpo", given).end()
    assert exported(folder / "given") == exported(folder / "made")
    ours, theirs = lines_of(folder / "made" / "round-1"), lines_of(folder / "given")
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert "eval/loss" in ours[-1] and "eval/loss" not in theirs[-1]


@pytest.mark.long
def test_eight_devices_and_two_processes_learn_as_one(folder, started):
    start = start_in(folder, started)
    sources = [ordinal(folder), short(weight=0.1)]
    more = {"optimizer": {"learning_rate": 1e-5}, "pairs_per_step": 4}
    start("dpo", config_of(folder, "own_one", sources, **more)).end()
    eight = config_of(folder, "own_eight", sources, **more, mesh=CUBE)
    start("dpo", eight, XLA_FLAGS=f"{FLAGS} --xla_force_host_platform_device_count=8").end()
    run_as_two(start, "dpo", config_of(folder, "own_pod", sources, **more, mesh={**CUBE, "distributed": "auto"}))
    for number in (1, 2):
        for ours in ("own_eight", "own_pod"):
            # In the first step no response is likelier than under the reference, but for rounding: accuracy is chance.
            each = [lines_of(folder / name / f"round-{number}") for name in (ours, "own_one")]
            losses, theirs = ([(line["loss"], line["grad_norm"]) for line in lines] for lines in each)
            np.testing.assert_allclose(losses, theirs, rtol=1e-3)
            assert texts_of(folder / ours, number) == texts_of(folder / "own_one", number)


@pytest.mark.parametrize(
    "own, words",
    [
        ({"sources": [], "responses": 5}, "on_policy.rounds is set, and on_policy.sources is empty"),
        ({"responses": 1}, "on_policy.responses is 1; allowed is 2 or more"),
        ({"sampling": {"temperature": 0.0}}, "on_policy.sampling.temperature is 0; allowed for dpo is above 0"),
        (
            {"rounds": 13},
            "12 usable prompts, 0 in each of on_policy.rounds 13, make no 8 pairs, as many as pairs_per_step",
        ),
        ({"sampling": {"max_new_tokens": 2000}}, "on_policy.sampling.max_new_tokens is 2000, and data.max_completion_"),
        ({"sources": [{"kind": "judge"}]}, "on_policy.sources.0 names no model"),
    ],
)
def test_what_cannot_be_is_refused(folder, capsys, own, words):
    config = config_of(folder, "own_wrong", [ordinal(folder)], on_policy=own, pairs_per_step=8)
    assert main(["dpo", str(config)]) in (1, 2)
    assert words in capsys.readouterr().err


def test_what_makes_no_pair_is_said_and_a_changed_setting_refused(folder, started):
    start = start_in(folder, started)
    config = config_of(folder, "far_apart", [short()], on_policy={"min_gap": 50.0})
    said = start("dpo", config).end(1)
    assert "round 1: no pair comes of the responses: kept 0 of 6; dropped" in said
    assert "no gap of on_policy.min_gap" in said and "is kept in" in said
    said = start("dpo", config, "--on_policy.min_gap", "0").end(1)
    assert "far_apart holds another run: on_policy.min_gap is 50.0 there and 0.0 here" in said
