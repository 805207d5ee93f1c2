"""Whole evaluations through the command line: formats, files, resuming, endpoints, and what is said to mistakes."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import jax
import pyarrow.parquet
import pytest

from patarm_jax.cli import main
from patarm_jax.config import DataSection
from patarm_jax.evaluate.answers import Answer, Question, missing, open_answers
from patarm_jax.evaluate.benchmarks import limited, read_benchmark
from patarm_jax.evaluate.scoring import plan
from patarm_jax.model import weights
from patarm_jax.model.config import read_config
from patarm_jax.model.qwen3 import init_params
from patarm_jax.types import UserError
from tests.toys import tiny_model_folder

GOOD, BAD = "a good answer", "a bad answer, and a longer one"
FORM = "<think>hm</think><generate_rubrics>none</generate_rubrics><eval>so</eval><answer>{}</answer>"

# One row of each official format, in which the good response is the right one.
ROWS = {
    "rewardbench": {
        "prompt": "Hi", "chosen": GOOD, "chosen_model": "a", "rejected": BAD, "rejected_model": "b",
        "subset": "donotanswer", "id": 7,
    },
    "rewardbench2": {
        "id": "3", "prompt": "Hi", "chosen": [GOOD], "rejected": [BAD] * 3, "num_correct": 1, "num_incorrect": 3,
        "total_completions": 4, "models": ["m"] * 4, "subset": "Precise IF", "additional_metadata": None,
    },
    "rm-bench": {"id": "code/4", "prompt": "Hi", "chosen": [GOOD] * 3, "rejected": [BAD] * 3, "domain": "code"},
    "judgebench": {
        "pair_id": "u1", "original_id": None, "source": "livebench-math", "question": "Hi", "response_model": "m",
        "response_A": BAD, "response_B": GOOD, "label": "B>A",
    },
    "llmbar": {"input": "Hi", "output_1": BAD, "output_2": GOOD, "label": 2},
    "rmb": {
        "pair_uid": "9", "conversation_input": [{"role": "user", "content": "Hi", "language": "English"}],
        "chosen": {"llm_name": "a", "answer": GOOD}, "reject": {"llm_name": "b", "answer": BAD},
        "category_path": "Pairwise_set/Helpfulness/Code/Documentation",
    },
    "ppe": {
        "question_id": "q", "model_a": "a", "model_b": "b", "winner": "model_b", "prompt": "Hi", "response_1": BAD,
        "response_2": GOOD, "language": "English", "is_code": True,
    },
    "pairs": {"prompt": "Hi", "chosen": GOOD, "rejected": BAD, "domain": "math", "source": "mine"},
}  # fmt: skip
SUBSETS = {
    "rewardbench": ("donotanswer", "safety"),
    "rewardbench2": ("Precise IF", "instruction_following"),
    "rm-bench": ("code", "code"),
    "judgebench": ("livebench-math", "math"),
    "llmbar": ("Natural", "chat"),
    "rmb": ("Helpfulness/Code", "code"),
    "ppe": ("human-code", "code"),
    "pairs": ("mine", "math"),
}


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(path=str(path), split="")


# ---- Formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", ROWS)
def test_the_official_form_is_read(benchmark, tmp_path):
    section = write_rows(tmp_path / "Natural.jsonl", ROWS[benchmark])
    (item,), _ = read_benchmark(benchmark, section)
    assert set(item.chosen) == {GOOD} and set(item.rejected) == {BAD}
    assert (item.subset, item.domain) == SUBSETS[benchmark]
    assert [dict(turn) for turn in item.prompt] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("benchmark", [name for name in ROWS if name != "pairs"])
def test_a_row_of_another_form_is_named(benchmark, tmp_path):
    """Row and field, and what it looks like instead."""
    other = "llmbar" if benchmark != "llmbar" else "rewardbench"
    section = write_rows(tmp_path / "Natural.jsonl", ROWS[benchmark], ROWS[other])
    with pytest.raises(UserError, match=rf"Natural.jsonl:2 is no row of {benchmark}: .*It looks like .*{other}"):
        read_benchmark(benchmark, section)


@pytest.mark.parametrize(
    ("benchmark", "change", "words"),
    [
        ("rewardbench", {"subset": "mine"}, ":1: subset is 'mine'; allowed is one of alpacaeval-easy"),
        ("rewardbench", {"chosen": 3}, "Expected `str`, got `int`, in chosen"),
        ("rewardbench2", {"chosen": []}, "chosen is no response"),
        ("rewardbench2", {"chosen": [GOOD] * 2}, "2 responses; allowed is one, save in the subset Ties"),
        ("rewardbench2", {"subset": "Ties"}, "id is '3'; allowed is ref:NUMBER or tied:NUMBER"),
        ("rewardbench2", {"subset": "Ties", "id": "ref:3"}, "Ties 3 has no tied"),
        ("rewardbench2", {"subset": "Ties", "id": "tied:3", "chosen": [GOOD] * 2}, "Ties 3 has no ref"),
        ("rm-bench", {"rejected": [BAD]}, "rejected is 1 responses; allowed is three"),
        ("rm-bench", {"domain": "cooking"}, "'cooking'; allowed is one of chat"),
        ("judgebench", {"label": "A=B"}, "label is 'A=B'; allowed is A>B or B>A"),
        ("llmbar", {"label": 0}, "label is 0; allowed is 1 or 2"),
        ("rmb", {"category_path": "x/y"}, "category_path is 'x/y'"),
        ("rewardbench", {"prompt": "\ud83d"}, "half a character"),
    ],
)
def test_a_wrong_value_is_named(benchmark, change, words, tmp_path):
    section = write_rows(tmp_path / "Natural.jsonl", ROWS[benchmark] | change)
    with pytest.raises(UserError) as error:
        read_benchmark(benchmark, section)
    assert words in str(error.value)


def test_conflict_pairs_of_ppe_belong_to_their_question(tmp_path):
    row = {"question_id": 5, "prompt": "Hi", "scores": [False, True, True, False]}
    row |= {"sampled_conflict_pairs": [[0, 1], [2, 3]], **{f"response_{n}": f"text {n}" for n in range(1, 5)}}
    items, _ = read_benchmark("ppe", write_rows(tmp_path / "PPE-MMLU-Pro-Best-of-K.jsonl", row))
    assert [(one.chosen, one.rejected) for one in items] == [(("text 2",), ("text 1",)), (("text 3",), ("text 4",))]
    assert len({one.group for one in items}) == 1 and {one.subset for one in items} == {"mmlu_pro"}


def test_pairs_of_one_prompt_are_one_unit(tmp_path):
    """Of RMB and of files of pairs too, where a prompt has many."""
    rows = [ROWS["rmb"] | {"pair_uid": n, "chosen": {"answer": f"{GOOD} {n}"}} for n in range(3)]
    other = [{"role": "user", "content": "Ho"}]
    items, _ = read_benchmark("rmb", write_rows(tmp_path / "x.jsonl", *rows, rows[0] | {"conversation_input": other}))
    assert plan("rmb", items).units == ((0, 1, 2), (3,))
    pairs = [ROWS["pairs"] | {"chosen": f"{GOOD} {n}"} for n in range(3)]
    items, _ = read_benchmark("pairs", write_rows(tmp_path / "y.jsonl", *pairs, ROWS["pairs"] | {"prompt": "Ho"}))
    assert plan("pairs", items).units == ((0, 1, 2), (3,))
    assert len(limited(items, 1)) == 3  # a prompt comes whole


def test_votes_for_neither_are_left_out(tmp_path):
    rows = [ROWS["ppe"], ROWS["ppe"] | {"winner": "tie (bothbad)"}]
    items, report = read_benchmark("ppe", write_rows(tmp_path / "x.jsonl", *rows))
    assert len(items) == 1 and "1 rows prefer neither" in report


def test_a_domain_may_be_chosen_by_subset(tmp_path):
    path = str(tmp_path / "Natural.jsonl")
    write_rows(Path(path), ROWS["llmbar"])
    section = DataSection(path=path, split="", source_domains={"Natural": "instruction_following"})
    assert read_benchmark("llmbar", section)[0][0].domain == "instruction_following"
    with pytest.raises(UserError, match="Natural is 'poetry'"):
        read_benchmark("llmbar", DataSection(path=path, split="", source_domains={"Natural": "poetry"}))


def test_settings_without_effect_are_refused(tmp_path):
    path = tmp_path / "Natural.jsonl"
    write_rows(path, ROWS["llmbar"])
    for given, words in (
        ({"source_domains": {"natural": "math"}}, "source_domains names natural, which is no subset here. Use Natural"),
        ({"domain": "math"}, "data.domain is given, and llmbar has its own format"),
        ({"drop_sources": ("Natural",)}, "data.drop_sources is given"),
        ({"columns": {"chosen": ("output_1",)}}, "data.columns is given"),
    ):
        with pytest.raises(UserError, match=words):
            read_benchmark("llmbar", DataSection(path=str(path), split="", **given))


def test_pairs_are_read_as_training_reads_them(tmp_path):
    """Domains by source, columns of other names, sources left out."""
    rows = [{"q": "Hi", "chosen": GOOD, "rejected": BAD, "source": source} for source in ("x", "y", "z")]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    section = DataSection(
        path=str(tmp_path / "pairs.jsonl"), columns={"prompt": ("q",)}, domain="chat", drop_sources=("z",),
        source_domains={"x": "Instruction-Following"},
    )  # fmt: skip
    items, _ = read_benchmark("pairs", section)
    assert [(one.subset, one.domain) for one in items] == [("x", "instruction_following"), ("y", "chat")]


@pytest.mark.parametrize(
    ("name", "subset"),
    [
        ("PPE-GPQA-Best-of-K.jsonl", "gpqa"),
        ("PPE-MMLU-Pro-Best-of-K/data/train-00000.jsonl", "mmlu_pro"),
        ("mbpp_plus_best_of_k.jsonl", "mbpp_plus"),
        ("mathias/ifeval.jsonl", "ifeval"),
    ],
)
def test_the_subset_of_ppe_stands_in_a_name(name, subset, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    row = {"question_id": 1, "prompt": "Hi", "scores": [True, False], "sampled_conflict_pairs": [[1, 0]],
           "response_1": GOOD, "response_2": BAD}  # fmt: skip
    (one,), _ = read_benchmark("ppe", write_rows(tmp_path / name, row))
    assert one.subset == subset and one.chosen == (GOOD,)


def test_of_a_repository_only_the_benchmark_is_read(tmp_path):
    """RM-Bench's folder holds all rows twice; LLMBar's other folders hold other things."""
    for name in ("chat_filtered.json", "total_dataset.json"):
        (tmp_path / name).write_text(json.dumps([ROWS["rm-bench"] | {"domain": "chat"}]))
    assert len(read_benchmark("rm-bench", DataSection(path=str(tmp_path), split=""))[0]) == 1
    (tmp_path / "chat_filtered.json").unlink()
    assert len(read_benchmark("rm-bench", DataSection(path=str(tmp_path), split=""))[0]) == 1
    for folder in ("Dataset/LLMBar/Adversarial/GPTOut", "Dataset/CaseStudy/Base_9"):
        (tmp_path / "repo" / folder).mkdir(parents=True)
        (tmp_path / "repo" / folder / "dataset.json").write_text(json.dumps([ROWS["llmbar"]]))
    items, _ = read_benchmark("llmbar", DataSection(path=str(tmp_path / "repo"), split=""))
    assert [one.subset for one in items] == ["GPTOut"]


@pytest.mark.parametrize(
    ("benchmark", "files", "read"),
    [
        ("rewardbench", ["data/filtered-00000-of-00001.jsonl", "data/raw-00000-of-00001.jsonl"], 1),
        ("judgebench", ["data/claude-00000-of-00001.jsonl", "data/gpt-00000-of-00001.jsonl"], 1),
        ("judgebench", ["data/x,response_model=claude-3-5.jsonl", "data/x,response_model=gpt-4o.jsonl"], 1),
        ("judgebench", ["data/x,response_model=gpt-4o.jsonl", "outputs/x,response_model=gpt-4o,judge=y.jsonl"], 1),
        (
            "ppe",
            ["PPE-Human-V1/data/test-00000-of-00001.jsonl", "PPE-MBPP-Plus-Best-of-K/data/train-00000-of-00001.jsonl"],
            2,
        ),
    ],
)
def test_of_a_copied_repository_the_official_split_is_read(benchmark, files, read, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / name, ROWS[benchmark])
    items, said = read_benchmark(benchmark, DataSection(path=str(tmp_path), split=""))
    assert len(items) == read and ("not read: " in said) == (read < len(files))


@pytest.mark.parametrize(
    ("benchmark", "path", "wanted"),
    [
        ("rewardbench", "", ("allenai/reward-bench", "filtered")),
        ("judgebench", "", ("ScalerLab/JudgeBench", "gpt")),
        ("ppe", "", ("lmarena-ai/PPE-Human-Preference-V1", "test")),
        ("ppe", "lmarena-ai/PPE-MATH-Best-of-K", ("lmarena-ai/PPE-MATH-Best-of-K", "train")),
    ],
)
def test_the_hub_is_asked_for_the_official_split(benchmark, path, wanted, monkeypatch):
    """No network here: what datasets is asked for is seen, and given from a list."""
    asked = []
    row = ROWS[benchmark]
    if path:
        row = {"question_id": 1, "prompt": "Hi", "scores": [True, False], "sampled_conflict_pairs": [[1, 0]],
               "response_1": GOOD, "response_2": BAD}  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or [row])
    assert len(read_benchmark(benchmark, DataSection(path=path, split=""))[0]) == 1
    assert asked == [wanted]


def test_ids_are_unique_whatever_they_look_like(tmp_path):
    rows = [ROWS["judgebench"] | {"pair_id": name} for name in ("a", "a#2", "a", "a")]
    items, _ = read_benchmark("judgebench", write_rows(tmp_path / "x.jsonl", *rows))
    assert len({one.id for one in items}) == 4


def test_the_real_files_are_read(real_inputs):
    llmbar, _ = read_benchmark("llmbar", DataSection(path=str(real_inputs / "llmbar"), split=""))
    counts = {"Neighbor": 134, "Natural": 100, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
    assert Counter(one.subset for one in llmbar) == counts  # RewardBench's own
    rm_bench, _ = read_benchmark("rm-bench", DataSection(path=str(real_inputs / "rm_bench"), split=""))
    counts = {"safety-refuse": 284, "code": 228, "safety-response": 157, "chat": 129}
    assert Counter(one.subset for one in rm_bench) == counts
    assert len({one.id for one in rm_bench}) == 798


def test_a_limit_takes_any_rows_and_not_the_first(tmp_path):
    rows = [ROWS["rewardbench"] | {"id": n, "prompt": f"Topic {n}"} for n in range(100)]
    items, _ = read_benchmark("rewardbench", write_rows(tmp_path / "x.jsonl", *rows))
    taken = [int(one.id.split("/")[1]) for one in limited(items, 20)]
    assert taken == sorted(taken) and taken[-1] > 60 and len(set(taken)) == 20


def test_rubrics_of_rmb(tmp_path):
    """By scenario; chat where a scenario is not named, safety for harmlessness."""
    paths = ("Helpfulness/Reasoning/x", "Helpfulness/Cooking/x", "Harmlessness/S3/x", "Helpfulness/Code/x")
    rows = [ROWS["rmb"] | {"category_path": f"Pairwise_set/{path}"} for path in paths]
    items, _ = read_benchmark("rmb", write_rows(tmp_path / "x.jsonl", *rows))
    assert [one.domain for one in items] == ["math", "chat", "safety", "code"]


def test_a_limit_takes_from_every_subset_and_a_larger_one_takes_the_same_and_more(real_inputs):
    items, _ = read_benchmark("llmbar", DataSection(path=str(real_inputs / "llmbar"), split=""))
    few, more = limited(items, 20), limited(items, 50)
    assert len(few) == 20 and {one.id for one in few} < {one.id for one in more}
    assert set(Counter(one.subset for one in few).values()) == {4}
    assert [one.id for one in few] == [one.id for one in items if one in few]
    assert limited(items, 0) == limited(items, 10_000) == items


# ---- Answers --------------------------------------------------------------------------------------------------------


def test_answers_outlive_a_kill(tmp_path):
    question = Question("a/chosen/0", 0, [{"role": "user", "content": "Hi"}])
    path = tmp_path / "answers.jsonl"
    kept = Answer(question.key, 0, "OK", score=3.0, text="line\u2028separator")
    with open_answers(path, {"judge": "me"}) as answers:
        assert missing(answers.known, [question], 2) == [(question, [0, 1])]
        answers.add([kept, Answer(question.key, 1, "FAILED", reason="no")])
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
    config = read_config(root / "judge")
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
    return [
        "eval", benchmark, "--model", str(world / "judge"), "--data", str(world / "rm_bench.json"),
        "--output", str(world / output), "--votes", "2", "--model.dtype", "float32",
        "--sampling.max_new_tokens", "6", *map(str, more),
    ]  # fmt: skip


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


def test_a_stopped_evaluation_goes_on(world, whole):
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "patarm_jax", *local(world, "parted", "--sampling.rows", 2)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    answers = world / "parted" / "answers.jsonl"
    while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") > 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1 and "of 24 questions; the same command goes on from there" in said
    before = answers.read_bytes()
    assert main(local(world, "parted", "--sampling.rows", 2)) == 0
    assert answers.read_bytes().startswith(before)
    assert files_of(world / "parted") == whole
    assert main(local(world, "parted", "--sampling.rows", 2)) == 0  # nothing is left to ask
    assert answers.read_bytes().count(b"\n") == 1 + 48


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


def test_a_question_too_long_is_failed_and_counted(world, capsys):
    assert main(local(world, "short", "--dry-run")) == 0
    longest = int(
        re.search(r"(\S+) at most", capsys.readouterr().out.partition("prompt tokens")[2])[1].replace(",", "")
    )
    assert main(local(world, "short", "--data.max_prompt_tokens", longest - 1)) == 0
    table, results, summary = files_of(world / "short")
    failed = [row for row in table if row["status"] == "FAILED"]
    assert 0 < len(failed) < len(table) and results["failed"] == len(failed)
    assert all(f"longer than max_prompt_tokens {longest - 1}" in row["reason"] for row in failed)
    assert f"{len(failed)} answers never came" in summary


# ---- An endpoint ----------------------------------------------------------------------------------------------------


class Chat(BaseHTTPRequestHandler):
    """A chat server that knows the good answer, and fails as its `plan` says before it answers."""

    plan: list  # what to do to the next requests: "429", "500", "nonsense", "empty", "slow", "hang up", "400"
    asked: list
    times: list
    retry_after = "0.1"
    lock = threading.Lock()

    def do_GET(self):
        self.reply(200, {"data": [{"id": "served-judge"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.asked.append(request)
            self.times.append(time.monotonic())
            do = self.plan.pop(0) if self.plan else ""
        if do in ("slow", "slower"):
            time.sleep(1.5 if do == "slow" else 4)
        if do == "trickle":  # a byte now and then, without an end
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b" ")
                    time.sleep(0.1)
            return
        if do == "hang up":
            self.connection.close()
            return
        if do in ("429", "500", "400", "401", "403"):
            self.reply(int(do), {"error": do}, **({"Retry-After": self.retry_after} if do == "429" else {}))
        elif do == "quota":
            self.reply(429, {"error": {"code": "insufficient_quota"}})
        elif do in ("cut", "nothing"):
            said = answer_to(request)
            said["choices"][0]["finish_reason"] = "length"
            said["choices"][0]["message"] = {"content": "<think>hm" if do == "cut" else ""}
            self.reply(200, said)
        elif do == "nested":
            self.reply(200, b"[" * 100_000)
        elif "tokens" in do:
            said = answer_to(request)
            count = {"tokens without end": 1e999, "tokens beyond count": 2**31, "no tokens": None}[do]
            said["usage"]["completion_tokens"] = count
            self.reply(200, said)
        elif do == "unread":
            self.reply(200, {"choices": [{"message": {"content": "I cannot say."}, "finish_reason": "stop"}]})
        elif do == "nonsense":
            self.reply(200, None)
        elif do == "empty":
            self.reply(200, {"choices": []})
        elif do == "thinks":  # thinking of the model's own, and the whole form behind it
            said = answer_to(request)
            message = said["choices"][0]["message"]
            message["content"] = f"<think>{message['reasoning_content']}</think>{message['content']}"
            message["reasoning_content"] = "Let me see."
            self.reply(200, said)
        else:
            self.reply(200, answer_to(request))

    def reply(self, status, content, **headers):
        data = b"<html>" if content is None else content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(data)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def answer_to(request):
    user = request["messages"][-1]["content"]
    if "<response_a>" in user:
        said = FORM.format("A" if user.index(GOOD) < user.index(BAD) else "B")
    else:
        said = FORM.format(9 if GOOD in user else 2)
    thinking, rest = said.removeprefix("<think>").split("</think>")
    message = {"role": "assistant", "content": rest, "reasoning_content": thinking}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"completion_tokens": 12}}


@contextmanager
def served(*plan):
    handler = type("Handler", (Chat,), {"plan": list(plan), "asked": [], "times": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"prompt": f"Topic {n}", "chosen": f"{GOOD} {n}", "rejected": f"{BAD} {n}", "domain": "chat"} for n in range(6)
    ]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    return tmp_path


def remote(folder, url, *more, output="out", benchmark="pairs"):
    return [
        "eval", benchmark, "--data", str(folder / "pairs.jsonl"), "--output", str(folder / output),
        "--endpoint.url", url, "--endpoint.concurrency", "4", *map(str, more),
    ]  # fmt: skip


def overall(folder, output="out", rule="strict"):
    results = json.loads((folder / output / "results.json").read_text())
    return results, results["scores"][rule]["overall"]["accuracy"]["value"]


@pytest.mark.parametrize("judge", ["pointwise", "pairwise"])
def test_an_endpoint_judges(pairs, judge):
    with served() as (url, chat):
        assert main(remote(pairs, url, "--judge", judge, "--votes", 3)) == 0
    results, value = overall(pairs)
    assert value == 1.0 and results["valid"] == 1.0 and results["model"] == "served-judge"
    assert len(chat.asked) == 6 * 2 * 3
    assert len({request["seed"] for request in chat.asked}) == len(chat.asked)
    if judge == "pairwise":
        assert results["position"]["same in both orders"] == 1 and results["position"]["chose the first"] == 0.5
    table = pyarrow.parquet.read_table(pairs / "out" / "judgements.parquet").to_pylist()
    assert all(row["text"].startswith("<think>hm</think><generate_rubrics>") and row["tokens"] == 12 for row in table)


def test_what_a_server_is_asked(pairs):
    """The settings of sampling, and seeds that hang on --seed, the question and the vote alone."""

    def requests(*more):
        with served() as (url, chat):
            command = remote(pairs, url, "--endpoint.concurrency", 1, *more, output=f"asked{len(more)}")
            assert main(command) == 0
        return chat.asked

    (request, *_), seeds = requests(), [one["seed"] for one in requests("--votes", 2)]
    assert request | {"seed": 0, "messages": []} == {
        "model": "served-judge", "messages": [], "temperature": 1.0, "top_p": 1.0, "max_tokens": 1024, "seed": 0,
    }  # fmt: skip
    assert [turn["role"] for turn in request["messages"]] == ["system", "user"]
    assert request["seed"] == seeds[0] and seeds[0] != seeds[1]  # of the second vote
    other = ["--seed", 1, "--endpoint.model", "named", "--endpoint.thinking", "off"]
    other += ["--sampling.temperature", 0.6, "--sampling.top_p", 0.95, "--sampling.top_k", 20]
    (request, *_) = requests(*other, "--sampling.max_new_tokens", 64)
    assert request["seed"] not in seeds
    assert request | {"seed": 0, "messages": []} == {
        "model": "named", "messages": [], "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 64, "seed": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def test_what_may_pass_is_tried_again(pairs):
    trouble = ["429", "500", "nonsense", "empty", "hang up", "slow", "trickle"]
    with served(*trouble) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.timeout", 1.0)) == 0
    results, value = overall(pairs)
    assert value == 1.0 and results["failed"] == 0
    assert len(chat.asked) == 12 + len(trouble)


def test_thinking_of_the_models_own_is_not_the_judgements(pairs):
    with served(*["thinks"] * 12) as (url, _):
        assert main(remote(pairs, url)) == 0
    results, value = overall(pairs)
    assert value == 1.0 and results["valid"] == 1.0


def test_a_server_that_refuses_everything_gives_no_result(pairs, capsys):
    with served(*["400"] * 100) as (url, _):
        assert main(remote(pairs, url)) == 1
    said = capsys.readouterr().err
    assert "no question was answered, the first one because: refused: 400" in said
    assert not (pairs / "out" / "results.json").exists()


def test_a_busy_server_is_waited_for(pairs):
    """That it is busy is no try, however often it says so."""
    with served(*["429"] * 8) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.tries", 1, "--endpoint.concurrency", 2)) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == 20


@pytest.mark.parametrize("said", ["3", "a date", "Fri, 31 Dec 1999 23:59:59 GMT", "soon", "nan", "inf", "-1"])
def test_as_long_as_the_server_says(pairs, said):
    """By seconds or by a date: longer than the one to two seconds that are waited anyhow."""
    with served("429") as (url, chat):
        chat.retry_after = formatdate(time.time() + 300, usegmt=True) if said == "a date" else said
        command = remote(pairs, url, "--endpoint.concurrency", 1)
        if said == "a date":  # a minute at most, which no test waits for
            process = subprocess.Popen([sys.executable, "-m", "patarm_jax", *command], env=ENVIRONMENT)
            while not chat.asked:
                time.sleep(0.02)
            time.sleep(4)
            assert len(chat.asked) == 1
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 1
            return
        assert main(command) == 0
        assert overall(pairs)[1] == 1.0
        first, second = chat.times[:2]
        assert (second - first >= 3) == (said == "3")


def test_why_nothing_comes_is_told(pairs, capsys):
    with served("429", "429", "500") as (url, _):
        assert main(remote(pairs, url, "--endpoint.concurrency", 3)) == 0
    said = capsys.readouterr().err
    assert said.count("trying again, ") == 1 and "requests under way: 429: " in said  # once a minute


def test_money_that_is_spent_does_not_come_by_waiting(pairs, capsys):
    with served(*["quota"] * 20) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 2)) == 1
    assert "insufficient_quota" in capsys.readouterr().err and len(chat.asked) <= 4


def test_what_is_cut_off_or_empty_is_an_answer(pairs):
    """It is paid for, kept, and told of."""
    with served("cut", "nothing") as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
        assert len(chat.asked) == 12
    results, _ = overall(pairs)
    assert (results["failed"], results["valid"], results["cut"]) == (0, 10 / 12, 2 / 12)
    table = pyarrow.parquet.read_table(pairs / "out" / "judgements.parquet").to_pylist()
    assert [(row["status"], row["cut"], row["tokens"]) for row in table[:3]] == [
        ("BAD_TAGS", True, 12), ("BAD_TAGS", True, 12), ("OK", False, 12),
    ]  # fmt: skip
    assert "cut off at the limit of new tokens 16.7 %" in (pairs / "out" / "summary.md").read_text()


def test_only_a_busy_server_is_given_up_by_the_clock(pairs):
    """A broken one gets all its tries, however long they take; the record says how often it was asked."""
    alone = ["--endpoint.concurrency", 1, "--endpoint.busy", 0.5]
    with served(*["500"] * 3) as (url, chat):
        assert main(remote(pairs, url, *alone, "--endpoint.tries", 4)) == 0
    assert overall(pairs)[0]["failed"] == 0 and len(chat.asked) == 15
    with served(*["429"] * 2) as (url, chat):
        assert main(remote(pairs, url, *alone, output="busy")) == 0
    assert overall(pairs, "busy")[0]["failed"] == 1
    table = pyarrow.parquet.read_table(pairs / "busy" / "judgements.parquet").to_pylist()
    assert [row["reason"] for row in table if row["status"] == "FAILED"] == ['after 2 requests: 429: {"error": "429"}']


def test_one_refusal_among_answers_is_that_questions_own(pairs):
    with served("", "", "", "403") as (url, _):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
    assert overall(pairs)[0]["failed"] == 1
    with served("403") as (url, _):  # nor is it another time, when it is the first that is asked
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
    assert overall(pairs)[0]["failed"] == 1


def test_those_under_way_tell_whether_a_refusal_is_for_all(pairs, capsys):
    """The first answer that comes is a refusal; nothing that was paid for meanwhile is lost."""
    with served("403", *["slow"] * 3) as (url, chat):
        assert main(remote(pairs, url)) == 0
        assert overall(pairs)[0]["failed"] == 1 and len(chat.asked) == 12
    with served(*["403"] * 50) as (url, chat):
        assert main(remote(pairs, url, output="all")) == 1
        assert "answers 403" in capsys.readouterr().err and len(chat.asked) <= 4
        chat.plan.clear()
        assert main(remote(pairs, url, output="all")) == 0
    assert overall(pairs, "all")[1] == 1.0


def test_what_is_paid_for_is_kept_when_the_key_goes(pairs, capsys):
    with served("", "slow", "slow", "401") as (url, chat):
        assert main(remote(pairs, url)) == 1
        assert "answers 401" in capsys.readouterr().err
        kept = (pairs / "out" / "answers.jsonl").read_text().count('"status": "OK"')
        assert kept >= 3
        assert main(remote(pairs, url)) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == kept + 1 + (12 - kept)


@pytest.mark.parametrize("odd", ["tokens without end", "tokens beyond count", "no tokens", "nested"])
def test_odd_numbers_of_a_server_break_nothing(pairs, odd):
    with served(odd) as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == 12 + (odd in ("tokens without end", "nested"))


def test_many_questions_may_be_refused_where_others_are_answered(pairs):
    """So long that the model cannot read them, say; what was never asked comes before what was refused."""
    alone = ["--endpoint.concurrency", 1, "--votes", 3]
    with served("", *["400"] * 30) as (url, chat):
        assert main(remote(pairs, url, *alone)) == 0
    assert overall(pairs)[0]["failed"] == 30 and len(chat.asked) == 36
    with served() as (url, chat):
        assert main(remote(pairs, url, "--endpoint.concurrency", 1, "--votes", 4)) == 0
    new = 12  # the fourth votes
    before = [json.loads(line) for line in (pairs / "out" / "answers.jsonl").read_text().splitlines()[1:]]
    assert [one["vote"] for one in before[36 : 36 + new]] == [3] * new and len(chat.asked) == new + 30


def test_a_server_that_went_away_stops_the_evaluation(pairs, capsys):
    with served("", "", *["500"] * 100) as (url, chat):
        command = remote(pairs, url, "--endpoint.concurrency", 1, "--votes", 4)
        assert main([*command, "--endpoint.tries", "1"]) == 1
        assert "did not answer the last 21 questions, the last one after 1 requests: 500" in capsys.readouterr().err
        assert len(chat.asked) == 23
        chat.plan.clear()
        assert main(command) == 0
    assert overall(pairs)[1] == 1.0 and len(chat.asked) == 23 + 46


def test_what_fails_again_for_the_same_reason_is_not_written_again(pairs):
    for _ in range(2):
        with served(*["400"] * 2) as (url, _chat):
            assert main(remote(pairs, url, "--endpoint.concurrency", 1)) == 0
    lines = (pairs / "out" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 12


def test_two_runs_do_not_write_one_folder(tmp_path):
    path = tmp_path / "answers.jsonl"
    with open_answers(path, {"judge": "me"}):
        with pytest.raises(UserError, match="another process is writing"), open_answers(path, {"judge": "me"}):
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


def test_what_never_comes_is_failed_counted_and_asked_again(pairs):
    with served(*["500"] * 2, "400") as (url, chat):
        assert main(remote(pairs, url, "--endpoint.tries", 1, "--endpoint.concurrency", 1)) == 0
    results, value = overall(pairs)
    assert results["failed"] == 3 and results["valid"] == 0.75 and value < 1  # never a score of 0: a tie
    assert overall(pairs, rule="half")[1] > value
    with served() as (url, chat):
        assert main(remote(pairs, url)) == 0
        assert len(chat.asked) == 3  # the others are paid for
        assert overall(pairs)[1] == 1.0
        assert main(remote(pairs, url, "--votes", 2)) == 0
        assert len(chat.asked) == 3 + 12  # more votes keep those there are
        assert main(remote(pairs, url, "--votes", 2)) == 0
        assert len(chat.asked) == 3 + 12


def test_a_stopped_evaluation_pays_for_nothing_twice(pairs):
    with served(*["slower"] * 100) as (url, chat):
        command = [sys.executable, "-m", "patarm_jax", *remote(pairs, url)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(chat.asked) < 5:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1 and "of 12 answers; the same command goes on from there" in said
        assert re.search("waiting for [1-4] answers that are under way, 600 s at most", said)
        paid = len(chat.asked)  # what was under way was waited for
        assert 5 <= paid < 12 and (pairs / "out" / "answers.jsonl").read_text().count("\n") == 1 + paid
        chat.plan.clear()
        assert main(remote(pairs, url)) == 0
        assert len(chat.asked) == 12 and overall(pairs)[1] == 1.0


def test_a_key_that_is_missing_stops_everything(pairs, capsys):
    with served(*["401"] * 20) as (url, chat):
        assert main(remote(pairs, url)) == 1
    assert "401" in capsys.readouterr().err and len(chat.asked) <= 8


def test_a_key_is_sent(pairs, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with served() as (url, chat):
        seen = []
        original = chat.do_POST

        def noting(self):
            seen.append(self.headers["Authorization"])
            original(self)

        chat.do_POST = noting
        assert main(remote(pairs, url, "--endpoint.api_key_env", "MY_KEY")) == 0
    assert set(seen) == {"Bearer secret"}


def test_a_server_that_is_gone(pairs, capsys):
    assert main(remote(pairs, "http://127.0.0.1:9/v1", "--endpoint.tries", 1)) == 1
    assert "does not list its models: cannot reach the server" in capsys.readouterr().err
    assert main(remote(pairs, "127.0.0.1:9", "--endpoint.tries", 1)) == 1
    assert "endpoint.url is no address" in capsys.readouterr().err
    assert main(remote(pairs, "127.0.0.1:9", "--endpoint.model", "named")) == 1
    assert "endpoint.url is no address" in capsys.readouterr().err


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
    assert main(remote(pairs, url, "--votes", 2, "--endpoint.tries", 1)) == 0  # the rest failed, and is asked again
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
    with served("", "400") as (url, _):  # of the first item a rejected response
        assert main(remote(tmp_path, url, "--endpoint.concurrency", 1, benchmark="rewardbench2")) == 0
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
            "both --model and --endpoint.url",
        ),
    ],
)
def test_a_mistake_gets_one_sentence(world, tmp_path, capsys, arguments, code, words):
    names = {"judge": world / "judge", "new": tmp_path / "new", "file": world / "rm_bench.json"}
    assert main([word.format(**names) for word in arguments]) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
