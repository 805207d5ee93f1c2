"""RewardBench's real rows through `patarm eval`: counts, sections and files, against a plain computation beside it.

A judge of known verdicts stands behind a real server: it scores a response by a hash of its text and its prompt's.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet
import pytest

from patarm_jax.cli import main
from patarm_jax.config.sections import DataSection
from patarm_jax.evaluate.catalogue import read_benchmark
from tests.chat_server import FORM, completion, served

# Subsets as RewardBench's own code counts them: rows of the filtered split, save math-prm, which counts 984.
SECTIONS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip
PARTS = {"prompt": "<prompt>\n", "response": "\n</prompt>\n\n<response>\n"}
# A network as small as they come, of Qwen3's own config.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def rows(real_inputs):
    return pyarrow.parquet.read_table(real_inputs / "rewardbench").to_pylist()


def score_of(prompt, response):
    """0 to 10, and None, an answer that cannot be read, for one text in thirty."""
    digest = hashlib.sha256(f"{prompt}\n{response}".encode()).digest()
    return None if digest[0] % 30 == 0 else digest[1] % 11


def key(prompt, response):
    return tuple(text.replace("&lt;", "<").strip() for text in (prompt, response))


@contextmanager
def known(rows):
    """A server that answers from a table of (prompt, response) → score; what is not in it is remembered."""
    table = {
        key(row["prompt"], row[side]): score_of(row["prompt"], row[side])
        for row in rows
        for side in ("chosen", "rejected")
    }
    unknown = []

    def answer(request):
        before, response = request["messages"][-1]["content"].rsplit(PARTS["response"], 1)
        asked = key(before.split(PARTS["prompt"], 1)[1], response.removesuffix("\n</response>"))
        if asked not in table:
            unknown.append(asked)
        score = table.get(asked)
        return 200, completion("I cannot say." if score is None else FORM.format(score))

    with served(always=answer) as (url, chat):
        yield ["--endpoint.url", url, "--endpoint.model", "org/known", "--endpoint.concurrency", 8], chat, unknown


def asked_of(chat):
    return [request["messages"][-1]["content"] for request in chat.asked]


def won(row):
    """1, ½ or 0: by the scores of the table; what cannot be read decides nothing."""
    chosen, rejected = (score_of(row["prompt"], row[side]) for side in ("chosen", "rejected"))
    return 0.5 if None in (chosen, rejected) else (chosen > rejected) + (chosen == rejected) / 2


def plainly(rows):
    """{"strict" | "half": {subset, section or "overall": accuracy}}, with nothing but sums."""
    result = {}
    for rule in ("strict", "half"):
        points = {}
        for row in rows:
            points.setdefault(row["subset"], []).append(won(row) if rule == "half" else float(won(row) == 1))
        found = {f"subset {subset}": sum(each) / len(each) for subset, each in points.items()}
        for section, counts in SECTIONS.items():
            right = sum(found[f"subset {subset}"] * count for subset, count in counts.items())
            found[section] = right / sum(counts.values())
        found["overall"] = sum(found[section] for section in SECTIONS) / 4
        result[rule] = found
    return result


def check(out, rows, asked):
    """All numbers and files of an evaluation by the known judge, of these rows."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    want = plainly(rows)
    for rule, numbers in want.items():
        found = {name: columns["accuracy"] for name, columns in results["scores"][rule].items()}
        assert {name: one["value"] for name, one in found.items()} == pytest.approx(numbers, abs=1e-12)
        assert all(one["low"] <= one["value"] <= one["high"] for one in found.values())
        assert all(one["low"] < one["high"] for one in found.values())
    scores = {side: [score_of(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")}
    assert results["items"] == len(rows) and results["tie_rule"] == "half"
    assert results["answers"] == len(asked) == len(set(asked))
    assert results["ties"] == pytest.approx(sum(won(row) == 0.5 for row in rows) / len(rows), abs=1e-12)

    judgements = pyarrow.parquet.read_table(out / "judgements.parquet").to_pylist()
    assert len(judgements) == 2 * len(rows)
    for side, wanted in scores.items():
        got = [one["score"] for one in judgements if one["side"] == side]
        assert [None if score is None or math.isnan(score) else score for score in got] == wanted
    units = pyarrow.parquet.read_table(out / "units.parquet")
    assert units.num_rows == len({(row["subset"], row["prompt"]) for row in rows})

    about = {"model": "org/known", "model_type": "Generative RM", "chat_template": None}
    official = out / "official"
    board = json.loads((official / "eval-set" / "org" / "known.json").read_text())
    subsets = {subset for counts in SECTIONS.values() for subset in counts}
    accuracy = {subset: want["half"][f"subset {subset}"] for subset in subsets}
    assert board == pytest.approx(about | accuracy, abs=1e-12)
    columns = json.loads((official / "eval-set-scores" / "org" / "known.json").read_text())
    assert columns == about | {
        "results": [won(row) for row in rows],
        "scores_chosen": scores["chosen"],
        "scores_rejected": scores["rejected"],
        "text_chosen": [row["chosen"] for row in rows],
        "text_rejected": [row["rejected"] for row in rows],
        "subset": [row["subset"] for row in rows],
        "id": [row["id"] for row in rows],
    }
    lines = [json.loads(line) for line in (official / "org__known_outputs.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in rows]
    assert all(lines[n][name] == columns[name][n] for n in range(len(rows)) for name in lines[0] if name != "prompt")
    summary = json.loads((official / "org__known.json").read_text())
    assert summary["num_prompts"] == len(rows)
    assert summary["accuracy"] == pytest.approx(sum(map(won, rows)) / len(rows), abs=1e-12)
    assert summary["extra_results"] == pytest.approx(accuracy, abs=1e-12)
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert f"{len(rows):,} items" in text and "is without" not in text
    for name in ("sections", "scores", "calibration"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000


def command(real_inputs, out, *more):
    data = ["eval", "rewardbench", "--data", str(real_inputs / "rewardbench"), "--output", str(out)]
    return [*data, *map(str, more)]


def test_the_real_rows_are_those_of_the_official_counts(rows, real_inputs):
    """23 subsets, of which only math-prm counts for another number than it has; and every row is read as it is."""
    counts = {subset: sum(row["subset"] == subset for row in rows) for subset in {row["subset"] for row in rows}}
    official = {subset: count for section in SECTIONS.values() for subset, count in section.items()}
    assert counts == official | {"math-prm": 447} and len(rows) == 2985
    items, said = read_benchmark("rewardbench", DataSection(path=str(real_inputs / "rewardbench"), split=""))
    assert said.startswith("2,985 items of rewardbench from 2,985 rows")
    assert [(one.subset, one.prompt[0]["content"], one.chosen, one.rejected) for one in items] == [
        (row["subset"], row["prompt"], (row["chosen"],), (row["rejected"],)) for row in rows
    ]
    assert len({one.id for one in items}) == 2985


def test_some_of_the_real_rows_by_a_judge_of_known_verdicts(rows, real_inputs, tmp_path):
    """A quick look of four of each subset: sections weigh them as the whole does."""
    with known(rows) as (endpoint, chat, unknown):
        assert main(command(real_inputs, tmp_path / "out", *endpoint, "--limit", 4 * 23)) == 0
    assert not unknown
    columns = json.loads((tmp_path / "out" / "official" / "eval-set-scores" / "org" / "known.json").read_text())
    judged = set(zip(columns["subset"], columns["id"], strict=True))
    taken = [row for row in rows if (row["subset"], row["id"]) in judged]
    assert 92 <= len(taken) == len(columns["id"]) <= 115  # a prompt's items come together
    check(tmp_path / "out", taken, asked_of(chat))


@pytest.mark.long
def test_all_real_rows_by_a_judge_of_known_verdicts(rows, real_inputs, tmp_path):
    with known(rows) as (endpoint, chat, unknown):
        assert main(command(real_inputs, tmp_path / "out", *endpoint)) == 0
        asked = asked_of(chat)
        assert main(command(real_inputs, tmp_path / "out", *endpoint)) == 0
        assert asked_of(chat) == asked  # nothing is asked again
    assert not unknown
    check(tmp_path / "out", rows, asked)


@pytest.fixture(scope="module")
def untrained(real_inputs, tmp_path_factory):
    """A judge of this machine: the real Qwen3 tokenizer around a small network that was never trained."""
    folder = tmp_path_factory.mktemp("untrained") / "judge"
    shutil.copytree(real_inputs / "qwen3_tokenizer", folder)
    (folder / "Qwen3.generation_config.json").rename(folder / "generation_config.json")
    published = folder / "Qwen3-4B.config.json"
    (folder / "config.json").write_text(json.dumps(json.loads(published.read_text()) | SMALL))
    published.unlink()
    return folder


def check_untrained(real_inputs, folder, out, *more):
    """It writes nothing that can be read: every pair is a tie, none is lost, and no number pretends to know more."""
    local = ["--model", folder, "--model.weights", "random", "--model.dtype", "float32", "--sampling.max_new_tokens", 2]
    # A process of its own has one device, and optimised programs, unlike this one.
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    patarm = [sys.executable, "-m", "patarm_jax", *command(real_inputs, out, *local, "--sampling.rows", 64, *more)]
    done = subprocess.run(patarm, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["valid"] == 0 and results["failed"] == 0 and results["ties"] == 1
    for rule, value in (("strict", 0.0), ("half", 0.5)):
        found = {name: columns["accuracy"] for name, columns in results["scores"][rule].items()}
        assert found.keys() >= {"overall", *SECTIONS} and len(found) == 23 + 4 + 1
        assert all(one["value"] == pytest.approx(value, abs=1e-12) for one in found.values())
        assert all(one["low"] <= one["value"] < one["high"] for one in found.values())
    board = json.loads((out / "official" / "eval-set" / "judge.json").read_text())
    assert {name: value for name, value in board.items() if isinstance(value, float)} == pytest.approx(
        {subset: 0.5 for counts in SECTIONS.values() for subset in counts}
    )
    lines = (out / "official" / "judge_outputs.jsonl").read_text(encoding="utf-8").splitlines()
    judgements = pyarrow.parquet.read_table(out / "judgements.parquet")
    assert results["items"] == len(lines) == judgements.num_rows // 2
    assert set(judgements["status"].to_pylist()) == {"BAD_TAGS"}
    return results


@pytest.mark.long
def test_some_of_the_real_rows_by_a_judge_here(real_inputs, untrained, tmp_path):
    assert check_untrained(real_inputs, untrained, tmp_path / "out", "--limit", 46)["items"] == 46


@pytest.mark.long
def test_all_real_rows_by_a_judge_here(real_inputs, untrained, tmp_path):
    results = check_untrained(real_inputs, untrained, tmp_path / "out")
    assert results["items"] == 2985
