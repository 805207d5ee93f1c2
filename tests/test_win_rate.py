"""`patarm eval win-rate`: a judge of two in both orders; what it says is counted, and nothing is asked twice."""

import itertools
import json

import numpy as np
import pytest

from patarm_jax.cli import main
from patarm_jax.evaluate.proportions import limits
from patarm_jax.evaluate.responded import PromptTask, Response
from patarm_jax.evaluate.win_rate import Comparison, Scored
from patarm_jax.recipes.policy_responses import write_responses
from patarm_jax.types import Preference
from tests.chat_server import FORM, completion, served
from tests.test_ifeval import lines

PROMPTS = [f"Topic {n}" for n in range(6)]
BASELINE = ["short", "a longer one", "", "same", "much longer than that", "x"]
POLICY = ["longer one", "short", "here", "same", "<think>hm</think>short", "<think>lost in tho"]


def test_outcomes_are_a_plain_loop():
    votes = [True, False, None]
    for first in itertools.product(votes, repeat=2):
        for second in itertools.product(votes, repeat=2):
            chosen = [*first, *second]
            wins, losses = chosen.count(True), chosen.count(False)
            unread = first == (None, None) or second == (None, None)  # one order alone may only like the place
            expected = 0.5 if unread or wins == losses else float(wins > losses)
            assert Comparison(first, second).outcome == expected
            assert Comparison(first, second).is_unread == unread


def test_numbers_are_those_of_the_outcomes():
    rng = np.random.default_rng(0)
    outcomes = rng.choice([0.0, 0.5, 1.0], size=40).tolist()
    votes = {1.0: ([True], [True]), 0.0: ([False], [False]), 0.5: ([True], [False])}
    task = PromptTask(Preference("1", ({"role": "user", "content": "Hi"},), "", "", "chat", ""))
    side = [Response("text")] * 40
    compared = [Comparison(*votes[one]) for one in outcomes]
    scored = Scored("p", "b", "j", [task] * 40, side, side, compared)
    found = scored.numbers
    assert found["win_rate"].value == pytest.approx(np.mean(outcomes))
    assert found["wins"].value + found["ties"].value + found["losses"].value == pytest.approx(1)
    low, high = limits(np.array(outcomes), np.ones(40)).interval
    assert (found["win_rate"].low, found["win_rate"].high) == pytest.approx((float(low), float(high)))
    ties = outcomes.count(0.5)
    assert scored.first_chosen == pytest.approx((40 + ties) / 80)  # a tie chose the first in both orders


@pytest.fixture
def world(tmp_path):
    rows = [{"prompt": prompt, "response": said} for prompt, said in zip(PROMPTS, BASELINE, strict=True)]
    (tmp_path / "baseline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def policy(request):
    return 200, completion(POLICY[PROMPTS.index(request["messages"][-1]["content"])])


def longer(request):
    """Who likes the longer of two, and of equals the one that stands first."""
    user = request["messages"][-1]["content"]
    first, second = (user.split(f"<response_{name}>\n")[1].split(f"\n</response_{name}>")[0] for name in "ab")
    return 200, completion(FORM.format("A" if len(first) >= len(second) else "B"))


def run(world, url, judge_url, *more, output="out"):
    command = ["eval", "win-rate", "--against", str(world / "baseline.jsonl"), "--output", str(world / output)]
    if url:
        command += ["--endpoint.url", url, "--name", "policy"]
    return main([*command, "--judge.endpoint.url", judge_url, "--judge.name", "long", *more])


def test_both_orders_are_asked_and_counted_and_nothing_twice(world, capsys):
    with served(always=policy) as (url, asked), served(always=longer) as (judge_url, judged):
        assert run(world, url, judge_url) == 0
        assert (len(asked.asked), len(judged.asked)) == (6, 8)  # two have no answer on one side
        shown = capsys.readouterr().out
        assert run(world, url, judge_url) == 0 and (len(asked.asked), len(judged.asked)) == (6, 8)
        assert run(world, url, judge_url, "--judge.votes", "3") == 0 and len(judged.asked) == 24
    found = json.loads((world / "out" / "results.json").read_text())
    # longer, shorter, an answer beside none, equal ones, shorter, none beside an answer
    rows = lines(world / "out" / "comparisons.jsonl")
    assert [row["outcome"] for row in rows] == [1.0, 0.0, 1.0, 0.5, 0.0, 0.0]
    assert rows[3]["chosen_standing_first"] == [True] * 3 and rows[3]["chosen_standing_second"] == [False] * 3
    assert (found["wins"], found["ties"], found["losses"]) == pytest.approx((2 / 6, 1 / 6, 3 / 6))
    assert found["win_rate"] == pytest.approx(2.5 / 6)
    assert found["without_answer"] == [1, 1] and found["first_chosen"] == pytest.approx(5 / 8)
    assert (found["model"], found["baseline"], found["judge"]) == ("policy", "baseline", "long")
    assert "win rate (a tie is ½)" in shown and "41.7" in shown
    assert (
        "Without an answer, which loses: 1 of the policy, 1 of the baseline."
        in (world / "out" / "summary.md").read_text()
    )


def test_a_folder_of_responses_beside_the_folder_of_an_evaluation(world):
    """The baseline is another evaluation's folder, and the policy's responses are a file."""
    (world / "base").mkdir()
    (world / "baseline.jsonl").rename(world / "base" / "responses.jsonl")
    rows = [{"prompt": prompt, "response": said} for prompt, said in zip(PROMPTS, POLICY, strict=True)][:4]
    (world / "ours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "win-rate", "--against", str(world / "base"), "--output", str(world / "out")]
    with served(always=longer) as (judge_url, _):
        assert main([*command, "--responses", str(world / "ours.jsonl"), "--judge.endpoint.url", judge_url]) == 0
    found = json.loads((world / "out" / "results.json").read_text())
    assert (found["items"], found["baseline"], found["model"]) == (4, "base", "ours")


def test_conversations_that_end_alike_are_told_apart(world):
    """The baseline's file names the prompts, and is one that an evaluation has written."""

    def conversation(number):
        said = [("user", f"{number}?"), ("assistant", "Yes."), ("user", "Why?")]
        return [{"role": role, "content": text} for role, text in said]

    write_responses(
        world / "baseline.jsonl",
        [PromptTask(Preference(str(n), tuple(conversation(n)), "", "", "chat", "")) for n in range(2)],
        [Response("because 0"), Response("because 1, and more")],
    )
    asked = []

    def policy(request):
        asked.append(request["messages"])
        return 200, completion("because of that")

    with served(always=policy) as (url, _), served(always=longer) as (judge_url, _):
        assert run(world, url, judge_url) == 0
    assert sorted(map(str, asked)) == sorted(str(conversation(n)) for n in range(2))
    rows = lines(world / "out" / "comparisons.jsonl")
    assert [(row["baseline"], row["outcome"]) for row in rows] == [("because 0", 1.0), ("because 1, and more", 0.0)]
    assert lines(world / "out" / "responses.jsonl")[1]["prompt"] == conversation(1)


def test_a_judge_that_cannot_be_read_makes_ties(world):
    with served(always=policy) as (url, _), served(always="unread") as (judge_url, _):
        assert run(world, url, judge_url) == 0
    text = (world / "out" / "results.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["first_chosen"] is None and "nan" not in (world / "out" / "summary.md").read_text()
    assert found["unread"] == 4 and found["ties"] == pytest.approx(4 / 6)


def test_a_dry_run_asks_nobody(world):
    with served(always=policy) as (url, asked), served(always=longer) as (judge_url, judged):
        assert run(world, url, judge_url, "--dry-run") == 0
        own = str(world / "baseline.jsonl")
        assert run(world, "", judge_url, "--responses", own, "--dry-run") == 0
        assert not asked.asked and not judged.asked
    assert not (world / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["win-rate", "--model", "x", "--judge-model", "y"], "win-rate compares with a baseline, and none is named"),
        (["ifeval", "--model", "x", "--against", "y"], "--against is of judges' benchmarks"),
        (["win-rate", "--model", "x", "--against", "y"], "told by a judge of two, and none is named"),
        (
            ["win-rate", "--model", "x", "--against", "y", "--judge-model", "z", "--judge.kind", "scalar"],
            "judge.kind is scalar, and win-rate compares two responses",
        ),
        (
            ["best-of-n", "--n", "2", "--checker", "ifeval", "--judge-model", "z", "--judge.kind", "pairwise"],
            "picks by",
        ),
        (["win-rate", "--model", "x", "--against", "y", "--judge-model", "z", "--n", "3"], "n is given"),
    ],
)
def test_what_cannot_be_meant_is_said(world, capsys, words, said):
    assert main(["eval", *words, "--output", str(world / "out")]) == 2
    assert said in capsys.readouterr().err


def test_a_baseline_that_is_missing(world, capsys):
    command = ["eval", "win-rate", "--model", "x", "--against", str(world / "gone.jsonl"), "--judge-model", "z"]
    assert main([*command, "--output", str(world / "out")]) == 1
    assert "gone.jsonl" in capsys.readouterr().err


def test_help_lists_the_settings_of_both_kinds(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = capsys.readouterr().out
    assert "--checker" in shown and "--judge.kind" in shown and "--generator.max_new_tokens" in shown
