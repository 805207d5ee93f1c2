"""Whole evaluations through the command line: formats, files, resuming, endpoints, and what is said to mistakes."""

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pyarrow.parquet
import pytest

from patarm_jax.ask.answers import Answer, Kind, Question, missing, no_answer, open_answers
from patarm_jax.cli import main
from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from patarm_jax.model.transformer import init_params
from patarm_jax.types import UserError
from tests.benchmark_rows import ROWS, write_rows
from tests.chat_server import BAD, ENVIRONMENT, GOOD, overall, remote, served, settings, write_pairs
from tests.flags import FLAGS
from tests.toys import tiny_model_folder

# ---- Answers --------------------------------------------------------------------------------------------------------


def test_answers_outlive_a_kill(tmp_path):
    question = Question("a/chosen/0", 0, [{"role": "user", "content": "Hi"}])
    path = tmp_path / "answers.jsonl"
    kept = Answer(question.key, 0, "OK", Kind.ANSWER, score=3.0, text="line\u2028separator")
    with open_answers(path, {"judge": "me"}) as answers:
        assert missing(answers.known, [question], 2) == [(question, [0, 1])]
        answers.add([kept, no_answer(question, 1, Kind.FAILED, "no")])
    path.write_bytes(path.read_bytes() + b'{"question": "cut o')  # as a kill leaves it
    with open_answers(path, {"judge": "me"}) as again:
        assert missing(again.known, [question], 2) == [(question, [1])]  # what failed is asked again
        assert again.of(question, 1) == [kept]
    changed = Question("a/chosen/0", 0, [{"role": "user", "content": "Ho"}])
    assert changed.key != question.key
    with pytest.raises(UserError, match="judge is 'me' there and 'you' here"), open_answers(path, {"judge": "you"}):
        pass


# ---- A judge here ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny judge with weights, and RM-Bench's shape in small."""
    root = tmp_path_factory.mktemp("world")
    tiny_model_folder(root / "judge")
    config = read_architecture(root / "judge")
    (root / "judge" / "config.json").unlink()
    (root / "judge" / "generation_config.json").rename(root / "kept.json")
    weights.save(
        jax.tree.map(lambda x: x * 3, init_params(config, jax.random.key(9))), config, root / "saved", dtype="float32"
    )
    for file in (root / "saved").iterdir():
        file.rename(root / "judge" / file.name)
    (root / "kept.json").replace(root / "judge" / "generation_config.json")
    rows = [
        {"id": n, "prompt": f"Topic {n}", "chosen": [f"{GOOD} {n}{k}" for k in range(3)],
         "rejected": [f"{BAD} {n}{k}" * (1 + n) for k in range(3)], "domain": domain}
        for n, domain in enumerate(("chat", "math", "code", "safety-refuse"))
    ]  # fmt: skip
    (root / "rm_bench.json").write_text(json.dumps(rows))
    return root


def local(world, output, *more, benchmark="rm-bench"):
    defaults = {"--model": world / "judge", "--data": world / "rm_bench.json", "--output": world / output}
    defaults |= {"--votes": 2, "--model.dtype": "float32", "--sampling.max_new_tokens": 6}
    return ["eval", benchmark, *settings(defaults, more)]


def files_of(folder):
    """What an evaluation says, times and paths apart."""
    table = pyarrow.parquet.read_table(folder / "judgements.parquet").to_pylist()
    return table, json.loads((folder / "results.json").read_text()), (folder / "summary.md").read_text()


@pytest.fixture(scope="module")
def whole(world):
    assert main(local(world, "whole")) == 0
    return files_of(world / "whole")


def test_any_batch_and_any_devices_give_the_same(world, whole):
    assert main(local(world, "few", "--sampling.rows", 3)) == 0
    assert files_of(world / "few") == whole
    assert main(local(world, "eight", "--mesh.data", 2, "--mesh.fsdp", 4)) == 0
    assert files_of(world / "eight") == whole
    table, results, _ = whole
    assert len(table) == 4 * 6 * 2 and len({row["text"] for row in table}) > 10
    assert results["scores"]["half"]["overall"]["accuracy"]["value"] == 0.5  # it writes nothing that can be read
    assert results["valid"] == 0 and results["ties"] == 1


@pytest.mark.long
def test_a_stopped_evaluation_goes_on(world, whole):
    environment = ENVIRONMENT | {"XLA_FLAGS": FLAGS}
    command = [sys.executable, "-m", "patarm_jax", *local(world, "parted", "--sampling.rows", 2)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    answers = world / "parted" / "answers.jsonl"
    while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") > 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1 and "of 24 questions; run the command again to resume" in said
    before = answers.read_bytes()
    assert main(local(world, "parted", "--sampling.rows", 2)) == 0
    assert answers.read_bytes().startswith(before)
    assert files_of(world / "parted") == whole
    assert main(local(world, "parted", "--sampling.rows", 2)) == 0  # nothing is left to ask
    assert answers.read_bytes().count(b"\n") == 1 + 48


@pytest.mark.long
def test_a_limit_asks_nothing_that_the_whole_does_not(world, whole, capsys):
    assert main(local(world, "limited", "--limit", 2)) == 0
    few = files_of(world / "limited")[0]
    assert len(few) == 2 * 6 * 2 and all(row in whole[0] for row in few)
    assert main(local(world, "limited")) == 0
    assert files_of(world / "limited")[0] == whole[0]
    assert main(local(world, "limited", "--limit", 2)) == 0
    assert "the results of 4 items make room for those of 2; without --limit they come back" in capsys.readouterr().err
    assert len(files_of(world / "limited")[0]) == 2 * 6 * 2


def test_how_much_was_written_is_kept(whole):
    table, results, _ = whole
    assert all(1 <= row["tokens"] <= 6 and (row["tokens"] == 6 or not row["cut"]) for row in table)
    assert 0 < results["cut"] == sum(row["cut"] for row in table) / len(table)


def test_a_judge_is_known_by_what_it_is_and_not_by_its_place(world, whole, capsys):
    shutil.copytree(world / "judge", world / "moved")
    shutil.copytree(world / "whole", world / "again")
    command = local(world, "again", "--model", world / "moved", "--name", "org/judge")
    assert main(command) == 0
    assert "24 of 24 questions are answered" in capsys.readouterr().err
    assert (world / "again" / "answers.jsonl").read_bytes() == (world / "whole" / "answers.jsonl").read_bytes()
    assert files_of(world / "again")[1]["model"] == "org/judge" and whole[1]["model"] == "judge"
    template = world / "moved" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|> ", 1))
    assert main(command) == 1
    assert "holds answers of another evaluation: weights is" in capsys.readouterr().err
    (world / "moved" / "model.safetensors").unlink()
    (world / "moved" / "model.safetensors").symlink_to(world / "nowhere")
    assert main(command) == 1
    assert "cannot read" in (said := capsys.readouterr().err) and "model.safetensors" in said


@pytest.mark.long
def test_more_votes_keep_those_there_are(world, whole):
    """And are those that would have been drawn at once, also when raising them was stopped in the middle."""
    whole_lines = (world / "whole" / "answers.jsonl").read_bytes().splitlines()
    assert main(local(world, "votes", "--votes", 1)) == 0
    first = (world / "votes" / "answers.jsonl").read_bytes()
    assert {line for line in whole_lines if b'"vote": 0' in line} == set(first.splitlines()[1:])
    assert main(local(world, "votes")) == 0
    both = (world / "votes" / "answers.jsonl").read_bytes()
    assert both.startswith(first) and sorted(both.splitlines()) == sorted(whole_lines)
    assert files_of(world / "votes") == whole
    lines = both.splitlines(keepends=True)
    (world / "votes" / "answers.jsonl").write_bytes(b"".join(lines[:-9]))  # nine second votes are lacking
    assert main(local(world, "votes", "--votes", 3)) == 0
    assert main(local(world, "three", "--votes", 3)) == 0
    assert files_of(world / "votes") == files_of(world / "three")


def test_another_judges_answers_are_not_gone_on_with(world, whole, capsys):
    assert main(local(world, "whole", "--sampling.temperature", 0.5)) == 1
    assert "temperature is 1.0 there and 0.5 here" in capsys.readouterr().err


def test_a_dry_run_says_what_it_will_cost(world, capsys):
    assert main(local(world, "dry", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert "answers to be asked for: 48, to 24 questions" in said and f"completion tokens: {24 * 2 * 6} at most" in said
    assert not (world / "dry").exists()


@pytest.mark.long
def test_a_question_too_long_is_counted_and_asked_when_it_fits(world, capsys):
    assert main(local(world, "short", "--dry-run")) == 0
    longest = int(
        re.search(r"(\S+) at most", capsys.readouterr().out.partition("prompt tokens")[2])[1].replace(",", "")
    )
    assert main(local(world, "short", "--data.max_prompt_tokens", longest - 1)) == 0
    table, results, summary = files_of(world / "short")
    too_long = [row for row in table if row["kind"] == "TOO_LONG"]
    assert 0 < len(too_long) < len(table) and results["counts"]["too_long"] == len(too_long)
    assert results["failed"] == 0 and results["counts"]["unreadable"] >= len(too_long)
    assert all(f"longer than data.max_prompt_tokens {longest - 1}" in row["reason"] for row in too_long)
    assert f" {len(too_long)} were too long to ask." in summary
    # With room for them they are asked, and the others not again.
    assert main(local(world, "short")) == 0
    _, results, _ = files_of(world / "short")
    assert results["counts"]["too_long"] == 0


# ---- An endpoint ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path)


def test_two_runs_do_not_write_one_folder(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_answers(path, {"judge": "me"}):
        with pytest.raises(UserError, match="is being written by another process"), open_answers(path, {"judge": "me"}):
            pass
    with open_answers(path, {"judge": "me"}):
        pass
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"a": 1}\n{"b": 2}')
    with pytest.raises(UserError, match="holds no answers of a judge"), open_answers(foreign, {"judge": "me"}):
        pass
    assert foreign.read_text() == '{"a": 1}\n{"b": 2}'
    for text in ("of someone else", '{"judge": "me"}\n'):
        foreign.write_text(text)
        with pytest.raises(UserError, match="holds no answers of a judge"), open_answers(foreign, {"judge": "me"}):
            pass
        assert foreign.read_text() == text
    foreign.write_text('{"judge": {"na')  # killed while it began
    with open_answers(foreign, {"judge": "me"}):
        pass
    assert json.loads(foreign.read_text()) == {"judge": {"judge": "me"}}


def test_what_is_asked_in_the_same_words_is_asked_once(tmp_path):
    """Three responses in three pairs are three questions; a judge of pairs has six, for orders differ."""
    rows = [
        {"prompt": "Hi", "chosen": GOOD if i == 0 else f"{BAD} {i}", "rejected": f"{BAD} {j}", "domain": "chat"}
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    with served() as (url, chat):
        assert main(remote(tmp_path, url)) == 0
        assert len(chat.asked) == 3
        table = pyarrow.parquet.read_table(tmp_path / "out" / "judgements.parquet").to_pylist()
        assert [row["score"] for row in table] == [9, 2, 9, 2, 2, 2]
        assert overall(tmp_path)[0]["answers"] == 3 and overall(tmp_path)[1] == pytest.approx(2 / 3)


def test_a_finished_evaluation_needs_no_server(pairs, capsys):
    with served() as (url, _):
        assert main(remote(pairs, url)) == 0
    before = files_of(pairs / "out")
    assert main(remote(pairs, url)) == 0
    assert files_of(pairs / "out") == before
    assert main(remote(pairs, url, "--votes", 2, "--endpoint.tries", 1)) == 1  # the rest failed, and is asked again
    assert overall(pairs)[0]["failed"] == 12
    assert main(remote(pairs, url, "--dry-run", output="later")) == 0  # one that is not up yet
    said = capsys.readouterr().out
    assert "answers to be asked for: 12, to 12 questions" in said and "prompt tokens: about" in said
    assert not (pairs / "later").exists()
    assert main(remote(pairs, url, "--votes", 3, "--dry-run")) == 0  # what is there is not asked again
    assert "answers to be asked for: 24, to 12 questions" in capsys.readouterr().out
    answers = pairs / "out" / "answers.jsonl"
    with answers.open("a") as file:
        file.write('{"question": "half a li')
    before = answers.read_bytes()
    with answers.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as an evaluation that is under way has it
        assert main(remote(pairs, url, "--votes", 3, "--dry-run")) == 0
    assert answers.read_bytes() == before  # a plan touches nothing


def test_judges_are_compared(pairs, capsys):
    with served() as (url, _):
        assert main(remote(pairs, url)) == 0
        assert main(remote(pairs, url, "--against", pairs / "out", "--judge", "pairwise", output="two")) == 0
        results, _ = overall(pairs, "two")
        found = results["against"]["strict/overall/accuracy"]
        away = 1 - 0.025 ** (1 / 6)  # both have six of six right, which leaves room for as much
        assert (found["value"], found["p_value"]) == (0, 1) and found["interval"] == pytest.approx([-away, away])
        assert "## Against" in (pairs / "two" / "summary.md").read_text()
        assert main(remote(pairs, url, "--against", pairs, output="three")) == 1
        rows = (pairs / "pairs.jsonl").read_text().replace("Topic", "Matter")
        (pairs / "pairs.jsonl").write_text(rows)  # the same ids, other texts
        assert main(remote(pairs, url, "--against", pairs / "out", output="four")) == 1
        assert "lacks 6 of our 6 items" in (said := capsys.readouterr().err)
    assert "holds no finished evaluation" in said


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_rewardbench_files(tmp_path):
    rows = [
        ROWS["rewardbench"] | {"subset": name, "id": n} for n, name in enumerate(("donotanswer", "math-prm", "hep-go"))
    ]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    with served() as (url, _):
        assert main(remote(tmp_path, url, benchmark="rewardbench")) == 0
    official = tmp_path / "out" / "official"
    board = json.loads((official / "eval-set" / "served-judge.json").read_text())
    assert board == {
        "model": "served-judge", "model_type": "Generative RM", "chat_template": None,
        "donotanswer": 1.0, "math-prm": 1.0, "hep-go": 1.0,
    }  # fmt: skip
    rows_ = json.loads((official / "eval-set-scores" / "served-judge.json").read_text())
    assert rows_ == {
        "model": "served-judge", "model_type": "Generative RM", "chat_template": None, "results": [1.0] * 3,
        "scores_chosen": [9.0] * 3, "scores_rejected": [2.0] * 3, "text_chosen": [GOOD] * 3, "text_rejected": [BAD] * 3,
        "subset": ["donotanswer", "math-prm", "hep-go"], "id": [0, 1, 2],
    }  # fmt: skip
    with served() as (url, _):
        named = ["--name", "../org/judge"]
        assert main(remote(tmp_path, url, *named, benchmark="rewardbench", output="named")) == 0
    files = {
        path.relative_to(tmp_path / "named" / "official").as_posix() for path in tmp_path.glob("named/official/**/*")
    }
    assert {"eval-set/org/judge.json", "eval-set-scores/org/judge.json", "..__org__judge.json"} <= files
    summary = json.loads((official / "served-judge.json").read_text())
    assert list(summary) == [
        "accuracy", "num_prompts", "model", "ref_model", "tokenizer", "chat_template", "extra_results",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (official / "served-judge_outputs.jsonl").read_text().splitlines()]
    assert list(lines[0])[:6] == [
        "prompt",
        "results",
        "scores_chosen",
        "scores_rejected",
        "text_chosen",
        "text_rejected",
    ]
    assert [(line["scores_chosen"], line["scores_rejected"], line["id"]) for line in lines] == [
        (9.0, 2.0, 0), (9.0, 2.0, 1), (9.0, 2.0, 2)
    ]  # fmt: skip
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "| Skywork-Reward-Llama-3.1-8B | scalar | 92.5 |" in text and "tie = ½, official" in text
    for name in ("sections", "scores", "calibration"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / "figures" / f"{name}.svg").read_text().rstrip().endswith("</svg>")


def test_rm_bench_files(tmp_path, capsys):
    rows = [
        ROWS["rm-bench"] | {"id": n, "domain": domain}
        for n, domain in enumerate(("chat", "math", "code", "safety-refuse"))
    ]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    with served() as (url, _):
        assert main(remote(tmp_path, url, benchmark="rm-bench")) == 0
    official = tmp_path / "out" / "official"
    written = json.loads((official / "total_dataset_served-judge.json").read_text())
    assert written == [row | {"score_chosen": [9.0] * 3, "score_rejected": [2.0] * 3} for row in rows]
    final = json.loads((official / "final_result.json").read_text())
    keys = ["chat", "math", "code", "safety", "hard_acc", "normal_acc", "easy_acc", "total_avg_acc"]
    assert list(final) == keys and set(final.values()) == {1.0}


def test_a_part_of_rm_bench_has_no_totals(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", ROWS["rm-bench"])
    with served() as (url, _):
        assert main(remote(tmp_path, url, benchmark="rm-bench")) == 0
    assert json.loads((tmp_path / "out" / "official" / "final_result.json").read_text()) == {"code": 1.0}


def test_an_answer_that_never_came_wins_nothing(tmp_path):
    """On RewardBench 2, where an unreadable one is rated lowest; every number of the summary says the same."""
    rows = [
        ROWS["rewardbench2"] | {"id": str(n), "prompt": f"Topic {n}", "rejected": [f"{BAD} {k}" for k in range(3)]}
        for n in range(4)
    ]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    with served("", "500") as (url, _):  # of the first item a rejected response
        alone = ["--endpoint.concurrency", 1, "--endpoint.tries", 1]
        assert main(remote(tmp_path, url, *alone, benchmark="rewardbench2")) == 1
    results, half = overall(tmp_path, rule="half")
    assert half == pytest.approx((3 + 0.5) / 4) and overall(tmp_path)[1] == 0.75  # it shares the first place
    assert results["ties"] == 1 / 12 and results["length"]["chosen shorter"]["strict"] == 11 / 12
    with served("", "unread") as (url, _):
        command = remote(tmp_path, url, "--endpoint.concurrency", 1, benchmark="rewardbench2", output="unread")
        assert main(command) == 0
    assert overall(tmp_path, "unread")[1] == 1.0


def test_ties_of_rewardbench2_are_not_for_pairwise_judges(tmp_path, capsys):
    ties = {"subset": "Ties", "chosen": [GOOD] * 2, "rejected": [BAD]}
    rows = [ROWS["rewardbench2"], *(ROWS["rewardbench2"] | ties | {"id": i} for i in ("ref:1", "tied:1"))]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    with served() as (url, _):
        assert main(remote(tmp_path, url, "--judge", "pairwise", benchmark="rewardbench2")) == 0
        assert "2 of Ties are left out" in capsys.readouterr().err
        assert main(remote(tmp_path, url, benchmark="rewardbench2", output="pointwise")) == 0
    results, value = overall(tmp_path, "pointwise", "half")
    assert results["scores"]["half"]["Ties"]["accuracy"]["value"] == pytest.approx(1.01)  # what the formula's best is
    assert value == pytest.approx((1 + 1.01) / 2)


# ---- Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["eval", "mmlu", "--output", "x"], 2, "unknown benchmark mmlu. Use one of rewardbench,"),
        (["eval", "pairs", "--model", "m", "--data", "x.jsonl"], 2, "no output is named"),
        (["eval", "llmbar", "--model", "{judge}", "--output", "{new}"], 2, "llmbar is not on the Hub"),
        (["eval", "pairs", "--output", "{new}"], 2, "model.path is empty"),
        (["eval", "pairs", "--output", "{file}", "--model", "m"], 2, "is a file. Name a folder"),
        (["eval", "pairs", "--output", "{new}", "--judge", "fair"], 2, "judge"),
        (["eval", "pairs", "--output", "{new}", "--votes", "0"], 2, "votes is 0; allowed is 1 to 1024"),
        (
            ["eval", "pairs", "--output", "{new}", "--model", "m", "--endpoint.url", "http://x/v1"],
            2,
            "both a model and --endpoint.url",
        ),
    ],
)
def test_a_mistake_gets_one_sentence(world, tmp_path, capsys, arguments, code, words):
    names = {"judge": world / "judge", "new": tmp_path / "new", "file": world / "rm_bench.json"}
    assert main([word.format(**names) for word in arguments]) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
