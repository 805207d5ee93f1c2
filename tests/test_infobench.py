"""InFoBench: the recorded numbers, a chat that grows, and what a judge says that is neither yes nor no."""

import json

import pytest

from patarm_jax.cli import main
from patarm_jax.evaluate.infobench import Task, ask_all, score, verdict_of
from patarm_jax.evaluate.responded import Response
from tests.chat_server import completion, served
from tests.test_ifeval import DATA, lines, there

ROWS = [
    {
        "id": "post",
        "input": "A poem about rain.",
        "instruction": "Choose a title.",
        "decomposed_questions": ["Is it a title?", "Is it short?"],
        "subset": "Easy_set",
    },
    {
        "id": "tea",
        "input": "",
        "instruction": "Praise tea in three lines.",
        "decomposed_questions": ["Does it praise tea?", "Has it three lines?", "Does it rhyme?"],
        "subset": "Hard_set",
    },
]
RESPONSES = {"Choose a title.\n\nA poem about rain.": "<think>rain?</think> Rain", "Praise tea in three lines.": "Tea!"}


@there
def test_recorded_verdicts_come_to_the_recorded_numbers(tmp_path, capsys):
    """GPT-4's answers by a GPT-4 judge: 1,971 of 2,250 questions."""
    file = DATA / "infobench" / "infobench_en_500_gpt4_eval.jsonl"
    out = tmp_path / "out"
    assert main(["eval", "infobench", "--data", str(file), "--output", str(out), "--name", "gpt-4"]) == 0
    found, rows = json.loads((out / "results.json").read_text()), lines(file)
    assert (found["drfr"], found["items"], found["judge"]) == (1971 / 2250, 500, "recorded")
    for name, subset in (("easy", "Easy_set"), ("hard", "Hard_set")):
        said = [one for row in rows if row["subset"] == subset for one in row["eval"]]
        assert found[name] == sum(said) / len(said)
    ours = lines(out / "official" / "infobench_eval.jsonl")
    assert [(row["output"].strip(), row["eval"]) for row in ours] == [
        (row["output"].strip(), row["eval"]) for row in rows
    ]
    assert "87.60" in capsys.readouterr().out


def test_every_question_stands_behind_what_was_said_before():
    tasks = [
        Task(row["id"], row["instruction"], row["input"], row["subset"], tuple(row["decomposed_questions"]))
        for row in ROWS
    ]
    responses = [Response(text) for text in RESPONSES.values()]
    chats = {}

    def say(asked):
        chats.update(asked)
        return [f"{'YES' if name.endswith('1') else 'Perhaps'} to {name}" for name, _ in asked]

    verdicts = ask_all(say, tasks, responses)
    assert verdicts == [(True, None), (True, None, None)]
    last = chats["tea/3"]
    assert [turn["role"] for turn in last] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == "Text:\nTea!\n\nQuestion:\nDoes it praise tea?"
    assert [turn["content"] for turn in last[2:]] == [
        "YES to tea/1", "Has it three lines?", "Perhaps to tea/2", "Does it rhyme?",
    ]  # fmt: skip
    assert chats["post/1"][1]["content"] == "Input:\nA poem about rain.\n\nText:\nRain\n\nQuestion:\nIs it a title?"
    scored = score("p", "j", tasks, responses, verdicts)
    assert {name: share.value for name, share in scored.numbers.items()} == {
        "drfr": 2 / 5,
        "easy": 1 / 2,
        "hard": 1 / 3,
    }
    assert scored.unread == 3
    assert ask_all(lambda asked: None, tasks, responses) is None


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("Yes.", True),
        ("**NO**, it does not", False),
        ("Note that YES", True),
        ("It is so: NO", False),
        ("Both YES and NO", None),
        ("", None),
    ],
)
def test_answers_are_read_by_their_beginning_or_by_the_only_word(text, verdict):
    assert verdict_of(text) is verdict


def test_a_policy_and_its_judge_behind_servers(tmp_path, capsys):
    """The first question fails once; nothing is asked twice of either, and the judge stands beside the number."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def judge(request):
        assert request["temperature"] == 0 and request["messages"][0]["role"] == "system"
        return 200, completion("NO" if "rhyme" in request["messages"][-1]["content"] else "Yes, it does.")

    def policy(request):
        return 200, completion(RESPONSES[request["messages"][-1]["content"]])

    out = tmp_path / "out"
    command = ["eval", "infobench", "--data", str(tmp_path / "rows.jsonl"), "--output", str(out)]
    with served(always=policy) as (url, asked), served("500", always=judge) as (judge_url, judged):
        by = [
            "--endpoint.url",
            url,
            "--judge.endpoint.url",
            judge_url,
            "--judge.name",
            "wise",
            "--judge.endpoint.tries",
            "1",
        ]
        assert main([*command, *by]) == 1
        assert "answers of the judge never came" in capsys.readouterr().err
        assert main([*command, *by]) == 0
        assert (len(asked.asked), len(judged.asked)) == (2, 5 + 1)
        assert main([*command, *by]) == 0 and len(judged.asked) == 6
    found = json.loads((out / "results.json").read_text())
    assert (found["drfr"], found["easy"], found["hard"], found["judge"]) == (4 / 5, 1.0, 2 / 3, "wise")
    assert "judged by wise" in (out / "summary.md").read_text()
    again = tmp_path / "again"
    data = ["--data", str(out / "official" / "infobench_eval.jsonl"), "--output", str(again)]
    assert main(["eval", "infobench", *data]) == 0
    assert json.loads((again / "results.json").read_text())["drfr"] == 4 / 5


@pytest.mark.parametrize(
    "row, arguments, said",
    [
        ({}, ["--responses", "RESPONSES"], "infobench is scored by a judge, and none is named"),
        ({}, [], "nothing says who responds"),
        ({"eval": [True]}, [], "has 2 questions and 1 answers in eval"),
        ({"subset": "Soft_set"}, [], "is no row of infobench"),
        ({"decomposed_questions": []}, [], "has no decomposed_questions"),
        ({}, ["--judge.name", "x"], "settings of a judge are given, and no judge"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, row, arguments, said):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0] | row) + "\n")
    (tmp_path / "responses.jsonl").write_text(json.dumps({"prompt": next(iter(RESPONSES)), "response": "Rain"}) + "\n")
    arguments = [str(tmp_path / "responses.jsonl") if word == "RESPONSES" else word for word in arguments]
    command = ["eval", "infobench", "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*command, *arguments]) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_policy_and_its_judge_here(world, capsys):
    """What random weights write is neither yes nor no; a second start asks neither of the two again."""
    (world / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    limits = ["--sampling.max_new_tokens", "6", "--judge.sampling.max_new_tokens", "4", "--thinking", "false"]
    models = ["--model", str(world / "reference"), "--judge.model.path", str(world / "reference"), *limits]
    command = ["eval", "infobench", "--data", str(world / "rows.jsonl"), "--output", str(world / "info"), *models]
    assert main(command) == 0
    found = json.loads((world / "info" / "results.json").read_text())
    assert (found["drfr"], found["unread"], found["cut_off"], found["model"]) == (0.0, 5, 2, "reference")
    kept = {path.name: path.read_bytes() for path in (world / "info").iterdir() if path.is_file()}
    assert len(kept["judgements.jsonl"].splitlines()) == 1 + 5 and len(kept["answers.jsonl"].splitlines()) == 1 + 2
    capsys.readouterr()
    assert main(command) == 0
    assert kept == {path.name: path.read_bytes() for path in (world / "info").iterdir() if path.is_file()}
    assert "neither yes nor no, which count as no: 5." in " ".join(capsys.readouterr().out.split())
