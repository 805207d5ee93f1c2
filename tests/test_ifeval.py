"""IFEval: lm-eval's checker on recorded responses gives the recorded verdicts; policies here and behind a server."""

import io
import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="IFEval's checker is an extra")

from patarm_jax.cli import main
from patarm_jax.evaluate.ifeval import Task, Verdict, check, open_checker, shares, shares_by_instruction
from patarm_jax.evaluate.responded import Response
from tests.chat_server import completion, served

DATA = Path(__file__).parents[2] / "shared" / "data"
there = pytest.mark.skipif(not (DATA / "ifeval").is_dir(), reason="the recorded verdicts lie beside the checkout")
ROWS = [
    {"key": 1, "prompt": "Say tea without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2,
        "prompt": "Say rice in two words and small letters.",
        "instruction_id_list": ["length_constraints:number_words", "change_case:english_lowercase"],
        "kwargs": [{"relation": "at least", "num_words": 2}, {}],
    },
]


@pytest.fixture(autouse=True)
def sentences(monkeypatch):
    """What the sentence splitter needs: from beside the checkout, else what is installed here or can be had."""
    import nltk

    if (DATA / "nltk_data").is_dir():
        monkeypatch.setenv("NLTK_DATA", str(DATA / "nltk_data"))
        nltk.data.path.insert(0, str(DATA / "nltk_data"))
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()):
            pytest.skip("NLTK's punkt_tab is not here and cannot be downloaded")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# ---- Recorded verdicts ----------------------------------------------------------------------------------------------


@there
def test_every_recorded_verdict_of_gpt4_is_the_checkers(tmp_path, capsys):
    """540 of the prompts have one; its numbers are 77.22 and 83.77 strict, 79.63 and 85.58 loose."""
    recorded = {rule: lines(DATA / "ifeval" / f"podtech_eval_results_{rule}.jsonl") for rule in ("strict", "loose")}
    folder = tmp_path / "gpt4"
    folder.mkdir()
    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in recorded["strict"]]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(DATA / "ifeval" / "input_data.jsonl")
    assert main(["eval", "ifeval", "--data", data, "--output", str(folder)]) == 0
    for rule, theirs in recorded.items():
        ours = {row["prompt"]: row for row in lines(folder / "official" / f"eval_results_{rule}.jsonl")}
        assert len(ours) == len(theirs) == 540
        for row in theirs:
            assert ours[row["prompt"]]["follow_instruction_list"] == row["follow_instruction_list"], row["prompt"]
            assert ours[row["prompt"]]["follow_all_instructions"] == row["follow_all_instructions"]
    found = json.loads((folder / "results.json").read_text())
    numbers = [round(100 * found[name], 2) for name in ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose")]
    assert numbers == [77.22, 83.77, 79.63, 85.58] and found["items"] == 540
    said = capsys.readouterr()
    assert "1 of 541 prompts have no response" in said.err and "77.22" in said.out
    assert "| **77.22**" in (folder / "summary.md").read_text()


@there
def test_recorded_verdicts_of_another_model_but_for_what_the_checker_draws():
    """Of one instruction it draws a letter, in place of '#'."""
    checker = open_checker()
    recorded = {
        rule: {
            row["prompt"]: row["follow_instruction_list"]
            for row in lines(DATA / "ifeval" / f"mifeval_en_gpt-4o-2024-08-06_{rule}.jsonl")
        }
        for rule in ("strict", "loose")
    }
    responses = {
        row["prompt"]: row["response"] for row in lines(DATA / "ifeval" / "mifeval_en_gpt-4o-2024-08-06_strict.jsonl")
    }
    unlike = []
    for row in lines(DATA / "ifeval" / "input_data.jsonl"):
        if row["prompt"] not in responses:
            continue
        task = Task(str(row["key"]), row["prompt"], tuple(row["instruction_id_list"]), tuple(row["kwargs"]))
        verdict = check(checker, task, responses[row["prompt"]])
        if (list(verdict.strict), list(verdict.loose)) != tuple(
            recorded[rule][row["prompt"]] for rule in ("strict", "loose")
        ):
            unlike.append(row["key"])
    assert unlike == [1122]


# ---- Numbers --------------------------------------------------------------------------------------------------------


def test_shares_are_a_plain_loops():
    tasks = [Task("1", "", ("a:x", "b:y"), ({}, {})), Task("2", "", ("a:x",), ({},)), Task("3", "", ("a:z",), ({},))]
    verdicts = [Verdict((True, False), (True, True)), Verdict((True,), (True,)), Verdict((False,), (False,))]
    found = {name: share.value for name, share in shares(verdicts).items()}
    expected = {"prompt_strict": 1 / 3, "inst_strict": 2 / 4, "prompt_loose": 2 / 3, "inst_loose": 3 / 4}
    assert found == pytest.approx(expected)
    kinds = shares_by_instruction(tasks, verdicts)
    strict = {name: rules["strict"] for name, rules in kinds.items()}
    assert {name: share.count for name, share in strict.items()} == {"a": 3, "b": 1, "a:x": 2, "a:z": 1, "b:y": 1}
    followed = {"a": 2 / 3, "b": 0.0, "a:x": 1.0, "a:z": 0.0, "b:y": 0.0}
    assert {name: share.value for name, share in strict.items()} == pytest.approx(followed)
    assert all(share.low <= share.value <= share.high for share in shares(verdicts).values())


def test_thinking_is_cut_off_before_the_checker_looks():
    every = [
        Response("<think>a, b</think> tea"),
        Response("<think>tea", True),
        Response(" tea\n"),
        Response("tea, te", True),
    ]
    assert [one.answer for one in every] == ["tea", "", " tea\n", "tea, te"]
    assert [one.is_lost_in_thought for one in every] == [False, True, False, False]


# ---- Policies -------------------------------------------------------------------------------------------------------


def test_a_policy_behind_a_server_is_asked_once_and_taken_up(tmp_path, capsys):
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = {"Say tea without commas.": "<think>tea, then</think>\ntea", ROWS[1]["prompt"]: "<think>rice and"}

    def answer(request):
        text = words[request["messages"][-1]["content"]]
        return 200, completion(text, finish="length" if text.endswith("and") else "stop")

    command = ["eval", "ifeval", "--data", str(tmp_path / "tasks.jsonl"), "--output", str(tmp_path / "out")]
    with served(always=answer) as (url, chat):
        assert main([*command, "--endpoint.url", url, "--name", "tea"]) == 0
        assert len(chat.asked) == 2
        first = json.loads((tmp_path / "out" / "results.json").read_text())
        assert main([*command, "--endpoint.url", url, "--name", "tea"]) == 0 and len(chat.asked) == 2  # kept
    assert (first["prompt_strict"], first["inst_strict"]) == (0.5, 1 / 3)
    assert (first["cut_off_in_thought"], first["without_answer"], first["model"]) == (1, 1, "tea")
    printed = " ".join(capsys.readouterr().out.split())
    assert "cut off inside their thinking (raise sampling.max_new_tokens): 1; cut off in all: 1." in printed
    kept = lines(tmp_path / "out" / "responses.jsonl")
    assert [row["response"] for row in kept] == list(words.values()) and [row["cut_off"] for row in kept] == [
        False,
        True,
    ]
    copied = ["eval", "ifeval", "--data", str(tmp_path / "tasks.jsonl"), "--output", str(tmp_path / "copied")]
    assert main([*copied, "--responses", str(tmp_path / "out" / "responses.jsonl"), "--name", "tea"]) == 0
    again = json.loads((tmp_path / "copied" / "results.json").read_text())
    assert again == first
    own = (tmp_path / "copied" / "responses.jsonl").read_text()
    assert main([*copied, "--limit", "1"]) == 0 and (tmp_path / "copied" / "responses.jsonl").read_text() == own
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert main([*command[:-1], str(tmp_path / "other"), "--endpoint.url", url]) == 1
    assert "other holds thesis.tex. Name another folder as --output" in capsys.readouterr().err
    assert main(["eval", "infobench", "--output", str(tmp_path / "out"), "--endpoint.url", url]) == 1
    assert "out holds an evaluation on ifeval. Name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, arguments, said",
    [
        ({"kwargs": []}, [], "has 1 instructions and kwargs of 0"),
        (
            {"instruction_id_list": ["punctuation:no_dash"]},
            [],
            "the instruction 'punctuation:no_dash', which the checker",
        ),
        ({"instruction_id_list": "no_comma"}, [], "is no row of ifeval"),
        ({}, [], "nothing says who responds"),
        ({}, ["--votes", "2"], "--votes is of judges' benchmarks"),
        ({}, ["--model", "a", "--responses", "b"], "--model and --responses are given. Give one"),
        ({}, ["--data.domain", "math"], "data.domain is given, and ifeval has its own format"),
        (
            {},
            ["--responses", "RESPONSES"],
            "is no response: it has prompt, answer. Needed are",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, row, arguments, said):
    (tmp_path / "tasks.jsonl").write_text(json.dumps(ROWS[0] | row) + "\n")
    (tmp_path / "responses.jsonl").write_text('{"prompt": "Rice?", "answer": "18"}\n')
    arguments = [str(tmp_path / "responses.jsonl") if word == "RESPONSES" else word for word in arguments]
    command = ["eval", "ifeval", "--data", str(tmp_path / "tasks.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*command, *arguments]) in (1, 2)
    assert said in capsys.readouterr().err
