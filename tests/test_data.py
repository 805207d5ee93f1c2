"""`patarm data`: what each stage keeps and why, that it is made once, and that stages that do not fit are refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from patarm_jax.cli import main
from patarm_jax.config.building import StageSection
from patarm_jax.config.sections import DataSection
from patarm_jax.corpus.near import NearDuplicates
from patarm_jax.corpus.rows import Pair, read_pairs
from patarm_jax.corpus.stages import OVERLAPS, clean, decontaminate, deduplicate
from patarm_jax.corpus.texts import runs_of, words_of
from patarm_jax.data.pairs import prompt_key
from patarm_jax.data.preferences import read_preferences
from tests.test_imports import PACKAGE

SHARED = Path(__file__).parents[2] / "shared" / "data"
STORY = (
    "Once upon a time a baker in a small town by the sea made bread of such kind that people came from far away to buy "
    "it, and every morning they stood in a long line before his door, talking of the weather and of their children."
)


def pair(prompt="Rice?", chosen="Eighteen minutes.", rejected="Three hours.", name="1", **more):
    turns = ({"role": "user", "content": prompt},)
    base = {"domain": "chat", "source": "s", "corpus": "c", "licence": "mit", "origin": "file:1"}
    return Pair(id=name, prompt=turns, chosen=chosen, rejected=rejected, **base | more)


# ------------------------------------------------------------------------------------------------------------- stages


def test_clean_by_length_and_language():
    pytest.importorskip("langdetect")
    from patarm_jax.corpus.languages import open_languages

    german = "Der Reis braucht achtzehn Minuten, und danach ruht er noch ein wenig unter dem Deckel."
    english = "The rice needs eighteen minutes, and then it rests a little under the lid."
    rows = [
        pair(f"How long does rice take? {english}", english, "x" * 30),
        pair(f"Wie lange braucht Reis? {german}", german, "x" * 30),
        pair("How long? " * 20, english, "x" * 30),
        pair("How long does it take to cook rice?", english, "x" * 300),
        pair("How long does it take to cook rice?", english, "x"),
        pair("12 34", "56", "78 90 12 34 56 78 90"),
    ]
    limits = StageSection("clean", language="en", max_prompt_chars=150, max_response_chars=200, min_response_chars=2)
    found = clean(rows, limits, open_languages())
    assert found.kept == rows[:1]
    assert [one.reason for one in found.dropped] == [
        "in de, not in en",
        "prompt of more than 150 characters",
        "response of more than 200 characters",
        "response of less than 2 characters",
        "in no language that is known, not in en",
    ]


def test_duplicates_exact_turned_and_near():
    pytest.importorskip("datasketch")
    near = STORY.replace("small town", "little town")
    rows = [
        pair(name="1"),
        pair(" Rice?\n", name="2"),  # white space apart
        pair(chosen="Three hours.", rejected="Eighteen minutes.", name="3"),
        pair(rejected="Two hours.", name="4"),  # another pair of the same prompt
        pair("A story.", STORY, "No.", name="5"),
        pair("A story.", near, "No.", name="6"),
        pair("a STORY", STORY.upper(), "no", name="7"),  # case and punctuation apart
    ]
    found = deduplicate(rows, StageSection("deduplicate", near=0.7))
    assert [one.id for one in found.kept] == ["1", "4", "5"]
    assert [(one.pair.id, one.reason, one.about) for one in found.dropped] == [
        ("2", "repeats an earlier row", "1"),
        ("3", "repeats an earlier row, with chosen and rejected exchanged", "1"),
        ("6", "nearly repeats an earlier row", "5"),
        ("7", "nearly repeats an earlier row", "5"),
    ]
    strict = deduplicate(rows, StageSection("deduplicate", near=1.0))
    assert [one.id for one in strict.kept] == ["1", "4", "5", "6"]


def exact_jaccard(first, second, shingle=5):
    one, other = (set(runs_of(words_of(text), shingle)) for text in (first, second))
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_a_plain_loop(seed):
    """MinHash only proposes: whatever is found is at the threshold or above it, and nearly nothing above is missed."""
    pytest.importorskip("datasketch")
    rng = random.Random(seed)
    words = [f"w{n}" for n in range(400)]
    texts = [" ".join(rng.choices(words, k=60)) for _ in range(40)]
    for text in texts[:40]:
        changed = text.split()
        for place in rng.sample(range(60), rng.randint(0, 6)):
            changed[place] = rng.choice(words)
        texts.append(" ".join(changed))
    index = NearDuplicates(0.7, 5)
    missed = 0
    for number, text in enumerate(texts):
        expected = [n for n in range(number) if exact_jaccard(texts[n], text) >= 0.7]
        found = index.find(text)
        assert found in (*expected, None)
        missed += bool(expected) and found is None
        index.add(text)
    assert missed <= 1


def test_texts_without_words_are_no_duplicates_of_one_another():
    rows = [pair(mark, "!", "?", name=mark) for mark in ("…", "—")]
    assert deduplicate(rows, StageSection("deduplicate", near=1.0)).kept == rows


def test_a_paraphrase_is_no_duplicate_unless_the_threshold_is_low():
    pytest.importorskip("datasketch")
    paraphrase = (
        "In a little seaside place there lived a man whose loaves were so good that folk travelled for days to have "
        "one; at dawn they queued at his shop and spoke about rain, sun and their sons and daughters."
    )
    near = STORY.replace("made bread", "baked bread")
    assert exact_jaccard(STORY, paraphrase) < 0.05 < 0.7 < exact_jaccard(STORY, near) < 0.9
    for threshold, expected in ((0.95, [None, None]), (0.7, [0, None])):
        index = NearDuplicates(threshold, 5)
        index.add(STORY)
        assert [index.find(near), index.find(paraphrase)] == expected


def test_overlaps_with_benchmarks():
    pytest.importorskip("datasketch")
    first, words = " ".join(STORY.split()[:13]), STORY.split()
    changed = " ".join("other" if place % 10 == 9 else word for place, word in enumerate(words))
    rows = [
        pair(STORY, name="exact"),
        pair(f"Go on: {first}, and he", name="run"),
        pair(f"Go on, in words of your own, and no longer: {' '.join(STORY.split()[:12])}", name="shorter run"),
        pair(changed, name="near"),
        pair("Rice?", name="other"),
    ]
    section = StageSection("decontaminate", benchmarks={"a": "", "b": ""}, near=0.25)
    longer = f"Tell, as if to a child that would not go to sleep, with a wolf in it and a king: {first}"
    found = decontaminate(rows, section, {"a": [STORY], "b": [longer, "Beans?"]})
    assert [one.id for one in found.kept] == ["shorter run", "other"]
    assert {one.pair.id: (one.reason, one.about) for one in found.dropped} == {
        "exact": (OVERLAPS["exact"], "a, b"),
        "run": (OVERLAPS["ngram"], "a, b"),
        "near": (OVERLAPS["near"], "a"),
    }
    assert found.counts == {"a": {"exact": 1, "ngram": 1, "near": 1}, "b": {"exact": 0, "ngram": 2, "near": 0}}
    off = decontaminate(rows, StageSection("decontaminate", benchmarks={"a": ""}, ngram=0, near=1.0), {"a": [STORY]})
    assert [one.pair.id for one in off.dropped] == ["exact"]


# -------------------------------------------------------------------------------------------------------------- build


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def world(tmp_path):
    rng = random.Random(0)
    words = "rice beans bread water salt oven pan table spoon fire".split()
    rows = []
    for number in range(60):
        text = " ".join(rng.choices(words, k=20))
        rows.append({"prompt": f"{number}? {text}", "chosen": f"yes {text}", "rejected": f"no {text} {number}"})
    rows += [rows[3], {**rows[5], "chosen": ""}, {**rows[7], "chosen": rows[7]["rejected"]}]
    write_rows(tmp_path / "first.jsonl", rows)
    write_rows(tmp_path / "second.jsonl", [rows[4], {**rows[9], "prompt": "Another one?"}])
    write_rows(tmp_path / "benchmark.jsonl", [{"prompt": rows[11]["prompt"]}, {"prompt": "Who?"}])
    return tmp_path


def config(world, **changes):
    settings = {
        "folder": str(world / "run"),
        "sources": [
            {"data": {"path": str(world / "first.jsonl"), "domain": "chat"}, "licence": "mit", "name": "first"},
            {"data": {"path": str(world / "second.jsonl"), "domain": "math"}, "licence": "apache-2.0"},
        ],
        "stages": [
            {"kind": "read"},
            {"kind": "clean", "max_response_chars": 1000},
            {"kind": "deduplicate", "near": 1.0},
            {"kind": "decontaminate", "benchmarks": {"mine": str(world / "benchmark.jsonl")}, "near": 1.0},
            {"kind": "write", "heldout": 0.2},
        ],
    } | changes
    (world / "data.yaml").write_text(yaml.safe_dump(settings))
    return world / "data.yaml"


def build(world, *more, **changes):
    return main(["data", "build", str(config(world, **changes)), *more])


def report(world, stage):
    return json.loads((world / "run" / stage / "report.json").read_text())


def test_counts_add_up_and_the_set_is_what_training_reads(world, capsys):
    assert build(world) == 0
    stages = [report(world, name) for name in sorted(os.listdir(world / "run")) if name[:1] == "0"]
    assert [one["stage"] for one in stages] == ["read", "clean", "deduplicate", "decontaminate", "write"]
    for before, one in zip([None, *stages], stages, strict=False):
        assert one["kept"] + sum(one["dropped"].values()) == one["rows"]
        assert sum(count for source in one["kept_of"].values() for count in source.values()) == one["kept"]
        assert before is None or before["kept"] == one["rows"]
    assert [one["kept"] for one in stages] == [63, 63, 61, 60, 60]
    assert stages[0]["rows"] == 65 and stages[3]["overlaps"] == {"mine": {"exact": 1, "ngram": 0, "near": 0}}
    dropped = [
        json.loads(line) for line in (world / "run" / "03-deduplicate" / "dropped.jsonl").read_text().splitlines()
    ]
    assert [(one["id"], one["about"]) for one in dropped] == [
        ("first/first.jsonl:61", "first/first.jsonl:4"),
        ("second.jsonl/second.jsonl:1", "first/first.jsonl:5"),
    ]
    written = world / "run" / "05-write"
    train, heldout = (read_pairs(written / f"{name}.parquet") for name in ("train", "heldout"))
    assert len(train) + len(heldout) == 60 and 2 <= len(heldout) <= 25
    assert not {prompt_key(one.prompt) for one in train} & {prompt_key(one.prompt) for one in heldout}
    for name, pairs in (("train", train), ("heldout", heldout)):
        for kind in ("jsonl", "parquet"):
            read, _ = read_preferences(DataSection(path=str(written / f"{name}.{kind}"), split=""))
            assert [(one.id, one.chosen, one.domain) for one in read] == [
                (one.id, one.chosen, one.domain) for one in pairs
            ]
    card = (written / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    assert "| first | mit | 59 |" in card and "| second.jsonl | apache-2.0 | 1 |" in card
    assert "| 03-deduplicate | 2 | repeats an earlier row |" in card
    shown = capsys.readouterr().out
    assert "rows kept by each stage" in shown and "decontaminate" in shown


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_command_makes_nothing_again_and_the_same_bytes(world, capsys):
    assert build(world) == 0
    first = everything(world / "run")
    times = {path: path.stat().st_mtime_ns for path in (world / "run").rglob("*.parquet")}
    assert build(world) == 0
    assert "02-clean: is there, 63 rows" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for stage in ("03-deduplicate", "05-write"):  # made again alone, it fits what is behind it
        for path in (world / "run" / stage).iterdir():
            path.unlink()
    assert build(world) == 0
    assert everything(world / "run") == first


def test_killed_at_any_moment_it_ends_the_same(world):
    assert build(world, folder=str(world / "whole")) == 0
    command = [sys.executable, "-m", "patarm_jax", "data", "build", str(config(world))]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    rng = random.Random(0)
    for stage in range(1, 6):  # by what it says, not by the clock: on a slow machine nothing is begun for seconds
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as run:
            next(line for line in run.stderr if line.startswith(f"{stage:02}-"))
            time.sleep(rng.uniform(0.0, 0.05))
            run.send_signal(signal.SIGKILL)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = everything(world / "whole") | {Path("config.yaml"): b""}
    killed = {path: data for path, data in everything(world / "run").items() if not path.name.startswith(".")}
    assert killed | {Path("config.yaml"): b""} == whole


def test_stages_that_do_not_fit_are_refused(world, capsys):
    assert build(world) == 0
    stages = yaml.safe_load((world / "data.yaml").read_text())["stages"]
    stages[2]["near"] = 0.9
    assert build(world, stages=stages) == 1
    assert "03-deduplicate was made with near 1.0, and here it is 0.9. Remove" in capsys.readouterr().err
    with (world / "second.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "New?", "chosen": "yes", "rejected": "no"}) + "\n")
    assert build(world) == 1
    assert "01-read was made from another second.jsonl than is there now" in capsys.readouterr().err
    for path in (world / "run" / "01-read").iterdir():
        path.unlink()
    assert build(world) == 1
    assert "02-clean was made from another rows.parquet than is there now" in capsys.readouterr().err
    (world / "run" / "01-read" / "rows.parquet").write_bytes(b"")
    assert build(world) == 1
    assert "is not what its report.json tells of" in capsys.readouterr().err


def test_other_benchmark_files_are_refused(world, capsys):
    assert build(world) == 0
    write_rows(world / "benchmark.jsonl", [{"prompt": "Who?"}])
    assert build(world) == 1
    assert "04-decontaminate was made from another mine than is there now" in capsys.readouterr().err


def test_licences_that_may_not_be_mixed(world, capsys):
    sources = yaml.safe_load(config(world).read_text())["sources"]
    sources[1]["licence"] = "cc-by-nc-4.0"
    assert build(world, sources=sources) == 1
    assert "cc-by-nc-4.0 forbids commercial use, and mit does not" in capsys.readouterr().err
    assert (world / "run" / "04-decontaminate" / "report.json").exists()
    assert not (world / "run" / "05-write" / "report.json").exists()
    stages = yaml.safe_load(config(world).read_text())["stages"]
    stages[-1]["mix_licences"] = True
    assert build(world, sources=sources, stages=stages) == 0
    assert "**Licences are mixed.** cc-by-nc-4.0 forbids" in (world / "run" / "05-write" / "README.md").read_text()


def test_a_dry_run_says_what_is_there(world, capsys):
    assert build(world, "--dry-run") == 0
    assert "01-read: is to be made" in capsys.readouterr().out and not (world / "run").exists()
    assert build(world) == 0 and build(world, "--dry-run") == 0
    assert "05-write: is there" in capsys.readouterr().out


def test_show_prints_rows_as_a_person_reads_them(world, capsys):
    assert main(["data", "show", str(world / "first.jsonl"), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("chosen") == 2 and "0? " in shown


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sources": []}, "sources is empty"),
        ({"stages": [{"kind": "clean"}]}, "the first, and no other, must be read"),
        ({"stages": [{"kind": "read"}, {"kind": "write"}, {"kind": "clean"}]}, "write is the end"),
        ({"stages": [{"kind": "read", "near": 0.5}]}, "near is set, and a stage of kind read does not use it"),
        ({"stages": [{"kind": "read"}, {"kind": "decontaminate"}]}, "names no benchmarks"),
        ({"stages": [{"kind": "read"}, {"kind": "dedupe"}]}, "Invalid enum value 'dedupe'"),
        ({"stages": [{"kind": "read"}, {"kind": "deduplicate", "near": 1.5}]}, "near is 1.5"),
        ({"folder": ""}, "no folder is named"),
    ],
)
def test_configs_that_cannot_be_meant(world, capsys, changes, said):
    assert build(world, **changes) == 2
    assert said in capsys.readouterr().err


def test_a_source_with_other_columns_is_told_which_are_missing(world, capsys):
    write_rows(world / "second.jsonl", [{"question": "Rice?", "accepted": "yes", "rejected": "no"}])
    assert build(world) == 1
    assert "has no column chosen" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not SHARED.exists(), reason="the real preferences are not here")
def test_rewardbench_in_real_preferences(tmp_path):
    """249 of 1,601 rows stand there word for word (144 of LLMBar's sets, 105 of PandaLM), and all of LLMBar."""
    pytest.importorskip("datasketch")
    turned = {"prompt": ["input"], "chosen": ["output_1"], "rejected": ["output_2"]}
    settings = {
        "folder": str(tmp_path / "run"),
        "sources": [
            {"data": {"path": str(SHARED / "preferences.jsonl"), "domain": "chat"}, "name": "real"},
            {"data": {"path": str(SHARED / "llmbar"), "domain": "chat", "columns": turned}, "name": "llmbar"},
        ],
        "stages": [
            {"kind": "read"},
            {"kind": "decontaminate", "benchmarks": {"rewardbench": str(SHARED / "rewardbench")}},
        ],
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    assert main(["data", "build", str(tmp_path / "data.yaml")]) == 0
    rows = {one.id: one for one in read_pairs(tmp_path / "run" / "01-read" / "rows.parquet")}
    dropped = (tmp_path / "run" / "02-decontaminate" / "dropped.jsonl").read_text().splitlines()
    exact = [rows[one["id"]] for one in map(json.loads, dropped) if "word for word" in one["reason"]]
    assert sum(one.corpus == "llmbar" for one in exact) == 419
    of_real = [one.source for one in exact if one.corpus == "real"]
    assert len(of_real) == 249
    assert sum("pandalm" in source.lower() for source in of_real) == 105
