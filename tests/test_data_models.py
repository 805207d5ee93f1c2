"""The stages of `patarm data build` that ask a model, by a real server: what is kept, and that it is asked once."""

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

from patarm_jax.ask.answers import Answer, Kind
from patarm_jax.cli import main
from patarm_jax.config.building import StageSection
from patarm_jax.config.sections import DataSection
from patarm_jax.corpus.judged import accuracy_of, leaks, selected, taught
from patarm_jax.corpus.rows import read_pairs
from patarm_jax.data.judged import read_judged_preferences
from patarm_jax.judge.forms import POINTWISE
from tests.chat_server import FORM, completion, served
from tests.test_data import everything, pair, write_rows
from tests.test_imports import PACKAGE

# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("paired", [True, False])
def test_accuracy_is_a_plain_loop(seed, paired):
    rng = random.Random(seed)
    chosen, rejected = ([rng.choice([None, 3, 5, 7]) for _ in range(8)] for _ in "ab")
    right = count = 0
    for n, one in enumerate(chosen):
        for m, other in enumerate(rejected):
            if (not paired or n == m) and one is not None and other is not None:
                right, count = right + (one > other), count + 1
    expected = right / count if count else None
    assert accuracy_of(chosen, rejected, paired) == expected


def test_selection_by_accuracy():
    rows = [pair(name=str(n), accuracy=n / 8) for n in range(9)]
    found = selected(rows, StageSection("select"))
    assert {one.id: one.part for one in found.kept} == {str(n): "rl" if 1 <= n <= 6 else "sft" for n in range(9)}
    dropped = selected(rows, StageSection("select", rest="drop")).dropped
    assert [(one.pair.id, one.reason) for one in dropped] == [
        ("0", "its accuracy is below 0.125"),
        ("7", "its accuracy is above 0.75"),
        ("8", "its accuracy is above 0.75"),
    ]


def said(score=None, choice=None, text="text"):
    status = "OK" if score is not None or choice is not None else "BAD_TAGS"
    return Answer("q", 0, status, Kind.ANSWER, score, choice, text)


def test_what_a_teacher_says_must_be_right_in_every_form_that_is_asked_for():
    rows = [pair(name=name) for name in ("right", "close", "unread", "leak", "order", "drill")]
    rows[-1] = pair(name="drill", part="rl")
    single = {(one.id, side): said(score=(9.0, 2.0)[side]) for one in rows for side in (0, 1)}
    single["close", 0] = said(score=4.0)
    single["unread", 1] = said()
    single["leak", 1] = said(score=2.0, text="Unlike the chosen response it is wrong.")
    both = {(one.id, order): said(choice="AB"[order]) for one in rows for order in (0, 1)}
    both["order", 1] = said(choice="A")
    section = StageSection("teach", forms=("pointwise", "pairwise"))
    found = taught(rows, section, single, both)
    assert [one.id for one in found.kept] == ["right", "drill"] and found.kept[1].chosen_judgement is None
    assert {one.pair.id: one.reason for one in found.dropped} == {
        "close": "its scores lie not more than 2 apart on the right side",
        "unread": "a judgement of it could not be read",
        "leak": "a judgement quotes the label or the other response",
        "order": "a comparison of it is wrong in one of the orders",
    }
    pointwise = taught(rows, StageSection("teach"), single, {})
    assert [one.id for one in pointwise.kept] == ["right", "order", "drill"]


def test_a_judgement_that_quotes_the_other_response_leaks():
    other = " ".join(f"word{n}" for n in range(20))
    shared = pair(prompt=f"Repeat: {other}")
    assert leaks(f"It should say {other}.", "own", other, pair().prompt)
    assert not leaks(f"It should say {other}.", "own", other, shared.prompt)  # the prompt has it too
    assert not leaks(" ".join(other.split()[:12]), "own", other, pair().prompt)
    assert leaks("The rejected answer", "own", "x", pair().prompt)


# -------------------------------------------------------------------------------------------------------------- build

DIFFICULT = {n: n % 9 for n in range(24)}  # of eight judgements of a chosen response, how many are above 5


def row(number):
    return {"prompt": f"{number}? Is it so?", "chosen": f"good {number}", "rejected": f"bad {number}"}


class Models:
    """A classifier, a judge and a teacher behind one server, which are told apart by their sampling."""

    def __init__(self):
        self.asked = []

    def __call__(self, request):
        user = request["messages"][-1]["content"]
        self.asked.append((request["seed"], request.get("temperature"), user))
        number = int(user.split("<prompt>\n")[1].split("?")[0])
        if "Name the domain" in user:
            return 200, completion(f"<domain>{'code' if number % 2 else 'poetry'}</domain>")
        if "<response_a>" in user:
            first = user.split("<response_a>\n")[1].startswith("good")
            return 200, completion(FORM.format("A" if first or number == 3 else "B"))
        good = "<response>\ngood" in user
        if request.get("temperature") == 0.0:  # the teacher
            return 200, completion("I refuse." if number == 2 and good else FORM.format(9 if good else 2))
        votes = sum(user == other for *_, other in self.asked[:-1])
        return 200, completion(FORM.format((6 if votes < DIFFICULT[number] else 4) if good else 5))


@pytest.fixture
def world(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [row(n) for n in range(24)])
    return tmp_path


def config(world, url, **changes):
    endpoint = {"url": url, "concurrency": 1, "tries": 1}
    settings = {
        "folder": str(world / "run"),
        "sources": [{"data": {"path": str(world / "pairs.jsonl"), "domain": "chat"}, "licence": "mit", "name": "mine"}],
        "stages": [
            {"kind": "read"},
            {"kind": "classify", "rules": {"math": r"^1\d\?"}, "endpoint": endpoint},
            {"kind": "judge", "endpoint": endpoint, "votes": 8},
            {"kind": "select"},
            {
                "kind": "teach",
                "endpoint": endpoint,
                "sampling": {"temperature": 0.0, "max_new_tokens": 64},
                "forms": ["pointwise", "pairwise"],
            },
            {"kind": "write", "heldout": 0.2},
        ],
    } | changes
    (world / "data.yaml").write_text(yaml.safe_dump(settings))
    return world / "data.yaml"


def build(world, url, *more, **changes):
    return main(["data", "build", str(config(world, url, **changes)), *more])


def report(world, stage):
    return json.loads((world / "run" / stage / "report.json").read_text())


def test_the_papers_corpora(world, capsys):
    models = Models()
    with served(always=models) as (url, _):
        assert build(world, url) == 0
        first = len(models.asked)
        assert build(world, url) == 0 and len(models.asked) == first
    sorted_ = report(world, "02-classify")
    assert sorted_["classified"] == {"by a rule": 10, "by the model": 7, "could not be classified": 7}
    assert sorted_["kept_of"] == {"mine": {"chat": 7, "code": 7, "math": 10}} and sorted_["model"] == "served-judge"
    judged = read_pairs(world / "run" / "03-judge" / "rows.parquet")
    assert {one.id: one.accuracy for one in judged} == {
        f"mine/pairs.jsonl:{n + 1}": DIFFICULT[n] / 8 for n in range(24)
    }
    parts = {one.id: one.part for one in read_pairs(world / "run" / "04-select" / "rows.parquet")}
    drill = {f"mine/pairs.jsonl:{n + 1}" for n in range(24) if 1 <= DIFFICULT[n] <= 6}
    assert {name for name, part in parts.items() if part == "rl"} == drill
    teach = report(world, "05-teach")
    # of 0, 7, 8, 9, 16, 17, 18 none is number 2 or 3, so that all are taught
    assert teach["kept"] == 24 and not teach["dropped"]
    written = world / "run" / "06-write"
    for name in ("sft_train", "sft_heldout"):
        section = DataSection(path=str(written / f"{name}.jsonl"), split="", missing_judgements="error")
        assert all(
            one.judgements[0].endswith("<answer>9</answer>") for one in read_judged_preferences(section, POINTWISE)[0]
        )
    assert "rl_train" in (written / "README.md").read_text()
    asked = [user for *_, user in models.asked]
    assert sum("Name the domain" in user for user in asked) == 14
    assert len(models.asked) == 14 + 24 * 2 * 8 + 7 * 4 == len(set(models.asked))


def test_a_teacher_that_is_wrong_is_counted_and_left_out(world):
    stages = yaml.safe_load(config(world, "").read_text())["stages"]
    stages = [stages[0], stages[4], stages[5]]
    with served(always=Models()) as (url, _):
        stages[1]["endpoint"]["url"] = url
        assert build(world, url, stages=stages) == 0
    assert report(world, "02-teach")["dropped"] == {
        "a judgement of it could not be read": 1,
        "a comparison of it is wrong in one of the orders": 1,
    }


def test_in_parts_the_same_rows_and_nothing_asked_twice(world):
    with served(always=Models()) as (url, _):
        assert build(world, url, folder=str(world / "whole")) == 0
        models = Models()
    with served(always=models) as (url, _):
        stages = yaml.safe_load(config(world, url).read_text())["stages"]
        del stages[2:4]  # whose judge counts its calls
        assert build(world, url, stages=stages, folder=str(world / "alone")) == 0
        alone = len(models.asked)
        assert build(world, url, stages=stages[:1]) == 0
        for shard in ("1/2", "2/2"):
            assert build(world, url, "--shard", shard, stages=stages[:2]) == 0
        assert not (world / "run" / "02-classify" / "report.json").exists()
        assert build(world, url, stages=stages[:2]) == 0
        for shard in ("2/3", "1/3", "3/3"):
            assert build(world, url, "--shard", shard, stages=stages) == 0
        assert build(world, url, stages=stages) == 0
        assert len(models.asked) == 2 * alone
    for stage in ("02-classify", "03-teach", "04-write"):
        for name in ("rows.parquet", "dropped.jsonl"):
            assert (world / "run" / stage / name).read_bytes() == (world / "alone" / stage / name).read_bytes()


def test_killed_at_random_moments_nothing_is_paid_twice(world):
    models = Models()

    def slow(request):
        time.sleep(0.01)
        return models(request)

    with served(always=slow) as (url, _):
        stages = yaml.safe_load(config(world, url).read_text())["stages"]
        stages[2]["votes"], stages[2]["seed"] = 2, 3
        path = config(world, url, stages=stages)
        command = [sys.executable, "-m", "patarm_jax", "data", "build", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
        rng, killed = random.Random(0), 0
        while True:
            with subprocess.Popen(
                command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            ) as run:
                enough = len(models.asked) + rng.randrange(10, 60)  # by what was asked: a slow machine gets on as well
                while run.poll() is None and len(models.asked) < enough:
                    time.sleep(0.002)
                if run.returncode is not None:
                    break
                run.send_signal(signal.SIGKILL)
                killed += 1
        assert run.returncode == 0 and killed > 2
        # What was under way when it was killed, one at a time, is asked again.
        assert len(models.asked) - len(set(models.asked)) <= killed
        again = {path: data for path, data in everything(world / "run").items() if path.suffix == ".parquet"}
        assert len(again) == 6 + 4


def test_a_server_that_fails_stops_the_stage_with_everything_kept(world, capsys):
    models, dead = Models(), []

    def failing(request):
        return (500, {"error": "gone"}) if dead or len(models.asked) >= 60 else models(request)

    with served(always=failing) as (url, _):
        assert build(world, url) == 1
        assert "did not answer the last" in capsys.readouterr().err
        kept = len((world / "run" / "03-judge" / "answers.jsonl").read_text().splitlines())
        assert kept >= 40 and not (world / "run" / "03-judge" / "report.json").exists()
    with served(always=models) as (url, _):
        stages = yaml.safe_load(config(world, url).read_text())["stages"]
        assert build(world, url, stages=stages) == 0
    assert len(models.asked) == len(set(models.asked))


def test_a_full_disk_stops_a_stage_with_everything_kept(world, small_disk, capsys):
    disk, resize = small_disk
    models = Models()
    noise = random.Random(0)
    rows = [
        row(n) | {"chosen": "good " + "".join(chr(noise.randrange(0x4E00, 0x9000)) for _ in range(900))}
        for n in range(24)
    ]
    write_rows(world / "pairs.jsonl", rows)
    with served(always=models) as (url, _):
        stages = yaml.safe_load(config(world, url).read_text())["stages"]
        stages[2]["votes"] = 4
        where = {"folder": str(disk / "run"), "stages": stages}
        resize("160k")
        assert build(world, url, **where) == 1
        said = capsys.readouterr().err
        assert "cannot write" in said and "No space left on device" in said and "Traceback" not in said
        whole = sorted(path.parent.name for path in (disk / "run").glob("*/report.json"))
        assert whole and whole[0] == "01-read" and "06-write" not in whole
        asked = len(models.asked)
        resize("8m")
        assert build(world, url, **where) == 0
        assert asked and len(models.asked) - len(set(models.asked)) <= 1  # what found no room was lost
    assert json.loads((disk / "run" / "06-write" / "report.json").read_text())["rows"] == 24


def test_another_model_is_refused(world, capsys):
    with served(always=Models()) as (url, _):
        stages = yaml.safe_load(config(world, url).read_text())["stages"][:3]
        assert build(world, url, stages=stages) == 0
        stages[2]["endpoint"] = stages[2]["endpoint"] | {"model": "other"}
        assert build(world, url, stages=stages) == 1
    assert "03-judge was made by served-judge, and here the model is other. Remove" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, words",
    [
        ({"kind": "judge"}, "a stage judge names no model"),
        ({"kind": "teach", "model": {"path": "x"}, "endpoint": {"url": "http://x/v1"}}, "names two models"),
        ({"kind": "classify", "rules": {"poetry": "x"}}, "rules names the domain 'poetry'"),
        ({"kind": "classify", "rules": {"math": "("}}, "rules.math is no regular expression"),
        ({"kind": "select"}, "no judge stands before it"),
        ({"kind": "clean", "votes": 3}, "votes is set, and a stage of kind clean does not use it"),
    ],
)
def test_stages_that_cannot_be_meant(world, capsys, stage, words):
    assert build(world, "", stages=[{"kind": "read"}, stage]) == 2
    assert words in capsys.readouterr().err


def test_shards_that_cannot_be_meant(world, capsys):
    assert build(world, "", "--shard", "3/2", stages=[{"kind": "read"}]) == 2
    assert "--shard is 3/2; allowed is i/n" in capsys.readouterr().err
    assert Path(world / "pairs.jsonl").exists()
