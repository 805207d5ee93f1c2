"""`patarm judge`: judges of one response and of two, with and without a generator, here and behind endpoints."""

import json

import pyarrow.parquet
import pytest

from patarm_jax.cli import main
from tests.chat_server import FORM, GOOD, completion, served, settings
from tests.test_evaluate import world  # noqa: F401  # a fixture
from tests.test_rubric_judge import RUBRIC_TEXT, both, pairs  # noqa: F401  # a fixture


def judge(folder, *more, output="judged.jsonl"):
    defaults = {"--input": folder / "pairs.jsonl", "--output": folder / output}
    servers = [word for word in more if str(word).endswith("endpoint.url")]
    defaults |= {server.replace("url", "concurrency"): 4 for server in servers}
    return ["judge", *settings(defaults, more)]


def rows_of(folder, output="judged.jsonl"):
    return [json.loads(line) for line in (folder / output).read_text().splitlines()]


def choices_of(row):
    return {place: [one["choice"] for one in judgements] for place, judgements in row["judgements"].items()}


def test_two_models_behind_an_endpoint_judge_a_file(pairs, capsys):  # noqa: F811
    """The rubrics of six prompts decide; each of seven pairs is compared in both orders by three votes."""
    with served(always=both()) as (url, chat):
        command = judge(pairs, "--endpoint.url", url, "--generator.endpoint.url", url, "--votes", 3)
        command += ["--judge", "rubric_judge"]
        assert main(command) == 0
        assert len(chat.asked) == 6 + 7 * 2 * 3
    assert main(command) == 0  # what is there needs no server
    assert main([*command, "--dry-run"]) == 0
    assert len(chat.asked) == 6 + 7 * 2 * 3
    for row in rows_of(pairs):
        assert (row["wins_chosen"], row["wins_rejected"], row["prefers"]) == (6, 0, "chosen")
        assert row["rubric"] == RUBRIC_TEXT
        assert choices_of(row) == {"chosen first": ["A"] * 3, "rejected first": ["B"] * 3}
    said = capsys.readouterr().err
    assert "The chosen response was chosen more often in 100.0 % of the pairs" in said
    assert (
        "50.0 % of its choices went to the response that stood first; 100.0 % of the pairs were decided alike" in said
    )
    assert sorted(path.name for path in pairs.iterdir()) == ["judged.jsonl", "pairs.jsonl"]


def test_what_is_decided_in_one_order_alone_is_a_tie(pairs):  # noqa: F811
    with served(always=lambda request: (200, completion(FORM.format("A")))) as (url, _):
        assert main(judge(pairs, "--endpoint.url", url, "--judge", "pairwise")) == 0
    (row, *_) = rows_of(pairs)
    assert (row["wins_chosen"], row["wins_rejected"], row["prefers"]) == (1, 1, "tie")
    assert "rubric" not in row


def test_a_pair_without_a_readable_choice_is_decided_for_neither(pairs):  # noqa: F811
    with served(always=lambda request: (200, completion("I cannot say."))) as (url, _):
        assert main(judge(pairs, "--endpoint.url", url, "--judge", "pairwise")) == 0
    assert {(row["wins_chosen"], row["wins_rejected"], row["prefers"]) for row in rows_of(pairs)} == {(None,) * 3}


def test_scores_come_from_an_endpoint_too(pairs):  # noqa: F811
    """A pointwise judge that goes by a generator's rubric in place of the primary ones."""

    def answer(request):
        user = request["messages"][-1]["content"]
        if "<response>" not in user:
            return 200, completion(RUBRIC_TEXT)
        good = GOOD in user[user.index("<response>") :]
        return 200, completion(FORM.format(8 if good and RUBRIC_TEXT in user else 3))

    with served(always=answer) as (url, _):
        assert main(judge(pairs, "--endpoint.url", url, "--generator.endpoint.url", url, "--votes", 2)) == 0
    for row in rows_of(pairs):
        assert (row["score_chosen"], row["score_rejected"], row["prefers"]) == (8, 3, "chosen")
        assert row["rubric"] == RUBRIC_TEXT


def test_what_never_came_is_asked_for_again_and_nothing_is_written_before(pairs, capsys):  # noqa: F811
    with served("500", "500", always=both()) as (url, _):
        command = judge(pairs, "--endpoint.url", url, "--endpoint.tries", 1, "--judge", "pairwise")
        assert main(command) == 1
    assert "2 of 14 judgements never came, the first one because" in capsys.readouterr().err
    assert not (pairs / "judged.jsonl").exists()
    with served(always=both()) as (url, chat):
        again = judge(pairs, "--endpoint.url", url, "--endpoint.tries", 1, "--judge", "pairwise")
        assert main(again) == 0
        assert len(chat.asked) == 2
    assert len(rows_of(pairs)) == 7


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_a_file_is_judged_as_the_evaluation_of_it_judges(pairs, world, kind):  # noqa: F811
    shared = ["--judge", kind, "--votes", "2", "--seed", "3"]
    shared += ["--model.dtype", "float32", "--sampling.max_new_tokens", "6"]
    here = ["--input", str(pairs / "pairs.jsonl"), "--output", str(pairs / "judged.jsonl")]
    assert main(["judge", str(world / "judge"), *here, *shared]) == 0
    there = ["--data", str(pairs / "pairs.jsonl"), "--output", str(pairs / "out")]
    assert main(["eval", "pairs", "--model", str(world / "judge"), *there, *shared]) in (0, 1)
    table = pyarrow.parquet.read_table(pairs / "out" / "judgements.parquet").to_pylist()
    ours = [one for row in rows_of(pairs) for judgements in row["judgements"].values() for one in judgements]
    assert [one["text"] for one in ours] == [row["text"] for row in table]
    assert len({one["text"] for one in ours}) > 14


@pytest.mark.parametrize(
    "given, words",
    [
        (["--judge", "rubric_judge"], "no model is named that writes the rubrics. Give --generator with its folder"),
        (["--judge", "scalar", "--generator", "g"], "a scalar judge reads no rubric of one"),
        (["--judge", "pairwise", "--expected-score"], "a pairwise judge writes no score from 0 to 10"),
        (["--endpoint.url", "http://127.0.0.1:1/v1"], "both a model and --endpoint.url are given"),
        (["--mesh.distributed", "auto", "--generator.endpoint.url", "http://h/v1"], "is asked by one process"),
    ],
)
def test_what_cannot_be_is_refused(pairs, capsys, given, words):  # noqa: F811
    assert main(["judge", "m", *judge(pairs, *given)[1:]]) == 2
    assert words in capsys.readouterr().err
