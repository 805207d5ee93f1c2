"""`patarm eval best-of-n`: what is kept is what is counted, and nothing is asked twice."""

import itertools
import json
import sys

import numpy as np
import pytest

from patarm_jax.cli import main
from tests.chat_server import FORM, completion, served
from tests.test_ifeval import lines

ANSWERS = {"2 + 2?": ["4", "five", "4", "22"], "3 + 3?": ["6", "7", "", "7"]}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Prompts, and a function that knows what is right."""
    rows = [{"prompt": prompt, "sum": sum} for prompt, sum in (("2 + 2?", "4"), ("3 + 3?", "6"))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = "return [float(one == right) for one, right in zip(completions, sum)]"
    (tmp_path / "sums.py").write_text(f"def is_right(prompts, completions, sum, **more):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("sums", None)


def test_what_the_judge_picks_is_counted_over_n(world, capsys):
    given = {prompt: itertools.count() for prompt in ANSWERS}

    def policy(request):
        prompt = request["messages"][-1]["content"]
        return 200, completion(ANSWERS[prompt][next(given[prompt])])

    def judge(request):  # who likes long answers
        response = request["messages"][-1]["content"].partition("<response>")[2].partition("</response>")[0]
        return 200, completion(FORM.format(min(len(response.strip()), 10)))

    command = ["eval", "best-of-n", "--data", str(world / "prompts.jsonl"), "--output", str(world / "out")]
    with served(always=policy) as (url, asked), served(always=judge) as (judge_url, judged):
        by = ["--endpoint.url", url, "--endpoint.concurrency", "1", "--judge.endpoint.url", judge_url]
        by += ["--n", "4", "--checker", "sums:is_right", "--name", "adder", "--judge.name", "long"]
        assert main([*command, *by]) == 0
        assert (len(asked.asked), len(judged.asked)) == (8, 7)  # an empty response is not judged
        first = json.loads((world / "out" / "results.json").read_text())
        assert main([*command, *by]) == 0 and (len(asked.asked), len(judged.asked)) == (8, 7)
        assert json.loads((world / "out" / "results.json").read_text()) == first
    rows = lines(world / "out" / "responses.jsonl")
    assert [sorted(one["response"] for one in row["responses"]) for row in rows] == [
        sorted(of) for of in ANSWERS.values()
    ]
    found = first["accuracy"]
    for n in (1, 2, 4):
        picked, best, drawn = [], [], []
        for row in rows:
            for some in itertools.combinations(row["responses"], n):
                top = max(-1 if one["score"] is None else one["score"] for one in some)
                equal = [one["right"] for one in some if (-1 if one["score"] is None else one["score"]) == top]
                picked.append(np.mean(equal))
                best.append(any(one["right"] for one in some))
                drawn.append(np.mean([one["right"] for one in some]))
        assert found["picked by long"][str(n)] == pytest.approx(np.mean(picked))
        assert found["best possible"][str(n)] == pytest.approx(np.mean(best))
        assert found["at random"][str(n)] == pytest.approx(np.mean(drawn))
    assert first["without_score"] == 1 and found["majority"]["4"] == 0.5  # 4 twice, and 7 twice
    assert found["majority"]["1"] == found["at random"]["1"] == (2 / 4 + 1 / 4) / 2
    assert "| picked by long |" in capsys.readouterr().out
    assert (world / "out" / "figures" / "best-of-n.svg").is_file()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--n", "1", "--checker", "sums:is_right"], "n is 1; allowed for best-of-n is 2 or more"),
        (["--n", "2"], "checker is '', and best-of-n needs to know what is right"),
        (["--n", "2", "--checker", "sums:is_right"], "best-of-n is picked by a judge, and none is named"),
        (
            ["--n", "2", "--checker", "sums:gone", "--judge.endpoint.url", "http://x/v1"],
            "module 'sums' has no attribute 'gone'",
        ),
        (
            [
                "--n",
                "2",
                "--checker",
                "sums:is_right",
                "--model",
                "gone",
                "--judge-model",
                "away",
                "--judge.votes",
                "2",
            ],
            "model.path gone is not a folder",
        ),
        (["--n", "2", "--checker", "sums:is_right", "--responses", "r.jsonl"], "Give --model"),
    ],
)
def test_what_cannot_be_is_refused(world, capsys, arguments, said):
    command = ["eval", "best-of-n", "--data", str(world / "prompts.jsonl"), "--output", str(world / "out")]
    assert main([*command, *arguments]) in (1, 2)
    assert said in capsys.readouterr().err
