"""A whole build behind a server of our own small judge, killed in every stage: same bytes, and nothing paid twice."""

import contextlib
import json
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest
import yaml

from patarm_jax.config.load import to_yaml
from patarm_jax.demo.settings import DemoSizes, demo_configs
from patarm_jax.demo.story import make_data
from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.judge.forms import CLASSIFY, POINTWISE
from tests.chat_server import ENVIRONMENT
from tests.test_data import everything

pytestmark = pytest.mark.long
PAIRS = 24
ASKING = ("classify", "judge", "teach")
STAGES = ("read", "clean", "deduplicate", "decontaminate", "classify", "judge", "select", "teach", "write")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The folder of the demo's SFT judge, after as many steps as its form takes, beside the pairs it has read."""
    folder = tmp_path_factory.mktemp("served")
    sizes = DemoSizes(train_pairs=3200, sft_steps=300)
    make_data(folder, 0, sizes)
    write_untrained_model(folder / "model", folder / "data" / "train.jsonl", 0, (POINTWISE, CLASSIFY))
    (folder / "sft.yaml").write_text(to_yaml(demo_configs(folder, 0, sizes)[0]))
    command = [sys.executable, "-m", "patarm_jax", "sft", str(folder / "sft.yaml")]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return folder / "sft"


@contextlib.contextmanager
def serving(judge, asked):
    """The address of a server of the judge, which writes down in a file what it is asked."""
    command = [sys.executable, "-m", "tests.judge_server", str(judge), str(asked)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.stdin.close()


def config(folder, data, url):
    endpoint = {"url": url, "concurrency": 1, "tries": 1}
    settings = {
        "folder": str(folder / "run"),
        "sources": [{"data": {"path": str(data)}, "licence": "mit", "name": "demo"}],
        "stages": [
            {"kind": "read"},
            {"kind": "clean", "max_prompt_chars": 2000},
            {"kind": "deduplicate", "near": 0.9},
            {"kind": "decontaminate", "benchmarks": {"own": str(data.with_name("benchmark.jsonl"))}},
            {"kind": "classify", "endpoint": endpoint, "rules": {"math": "sum|[0-9]"}},
            {"kind": "judge", "endpoint": endpoint, "votes": 2},
            {"kind": "select"},
            {"kind": "teach", "endpoint": endpoint, "min_gap": 0.0, "seed": 1},  # else it would ask as the judge did
            {"kind": "write", "heldout": 0.2},
        ],
    }
    folder.mkdir(exist_ok=True)
    (folder / "data.yaml").write_text(yaml.safe_dump(settings))
    return folder / "data.yaml"


def start(path):
    command = [sys.executable, "-m", "patarm_jax", "data", "build", str(path)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def killed_in(path, stage, after):
    """Starts a build, and kills it so many seconds after it has begun a stage; whether the stage was not whole then."""
    begun = [f"{number:02}-{name}: " for number, name in enumerate(STAGES, 1)][STAGES.index(stage) :]
    with start(path) as build:
        for line in build.stderr:
            if line.startswith(tuple(begun)) and "is there" not in line:  # it, or a later one
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            build.wait(after)
        build.send_signal(signal.SIGKILL)
        build.stderr.close()
        build.wait()
    return not list((path.parent / "run").glob(f"*-{stage}/report.json"))


def made(folder):
    """What a build has made, without its answers, which stand in the order in which they came."""
    every = everything(folder / "run")
    answers = ("config", "answers", "pointwise")
    return {path: data for path, data in every.items() if path.stem not in answers}


def test_killed_in_every_stage(judge, tmp_path):
    pytest.importorskip("datasketch")
    rows = (judge.parent / "data" / "train.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows[:PAIRS]) + "\n")
    (tmp_path / "benchmark.jsonl").write_text(rows[3] + "\n")
    data = tmp_path / "pairs.jsonl"
    with serving(judge, tmp_path / "whole.jsonl") as url:
        with start(config(tmp_path / "whole", data, url)) as build:
            said = build.stderr.read()
        assert build.returncode == 0, said
    with serving(judge, tmp_path / "killed.jsonl") as url:
        path, rng, killed = config(tmp_path / "killed", data, url), random.Random(0), Counter()
        for stage in STAGES:
            lasts = 0.8 if stage in ASKING else 0.01  # seconds
            for _ in range(3):
                killed[stage] += killed_in(path, stage, rng.uniform(0.0, lasts))
        with start(path) as build:
            said = build.stderr.read()
        assert build.returncode == 0, said
    assert all(killed[stage] for stage in ASKING) and killed.total() > len(STAGES)
    asked = [(tmp_path / name).read_text().splitlines() for name in ("whole.jsonl", "killed.jsonl")]
    whole, again = map(Counter, asked)
    assert set(whole) == set(again) and set(whole.values()) == {1}
    assert sum(again.values()) - len(again) <= killed.total()  # what was under way, one at a time
    assert made(tmp_path / "killed") == made(tmp_path / "whole")
    counts_add_up(tmp_path / "whole" / "run")


def counts_add_up(run):
    before = PAIRS
    for number, stage in enumerate(STAGES, 1):
        report = json.loads((run / f"{number:02}-{stage}" / "report.json").read_text())
        assert report["rows"] == before == report["kept"] + sum(report["dropped"].values())
        before = report["kept"]
    assert before > PAIRS / 2 and (run / "09-write" / "README.md").exists()
