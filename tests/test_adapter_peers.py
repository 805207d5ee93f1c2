"""The adapters inside the trainers that they are for, each in its own environment of tests/peers/setup.sh."""

import json
import math
import os
import statistics
import subprocess
from pathlib import Path

import pytest

from patarm_jax.demo.tokenizer import write_untrained_model
from patarm_jax.demo.world import make_world, write_pairs
from patarm_jax.judge.parse import answer_of
from tests.chat_server import FORM, completion, served

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".venv-peers"
pytestmark = [pytest.mark.long, pytest.mark.peers]


def asked_of(request):
    return (
        request["messages"][-1]["content"]
        .split("\n<response>\n")[-1]
        .removesuffix("\n</response>")
        .replace("&lt;", "<")
    )


def score_of(response):
    """What the server's judge gives; now and then nothing that could be read."""
    number = sum(response.encode()) % 11
    return None if number == 3 else float(number)


def judges(request):
    score = score_of(asked_of(request))
    return 200, completion("I cannot say." if score is None else FORM.format(int(score)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    write_pairs(folder / "pairs.jsonl", make_world(1, 20, 10).train)
    write_untrained_model(folder / "model", folder / "pairs.jsonl", 1)
    return folder / "model"


def run(peer, model, url, folder, read=""):
    python = PEERS / peer.replace("trl", "torch") / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: tests/peers/setup.sh makes it")
    script = ROOT / "tests" / "peers" / f"{peer}_adapter.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(word) for word in (python, script, model, url, folder)]
    done = subprocess.run(command, input=read, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_trl_takes_two_steps(model, tmp_path):
    with served(always=judges) as (url, handler):
        found = run("trl", model, url, tmp_path)
    assert not found["jax"] and found["moved"]
    assert len(found["given"]) == 2 and all(len(step) == 8 for step in found["given"])
    for step, logged in zip(found["given"], found["log"], strict=True):
        seen = [(text, answer_of(text)) for text, _ in step]
        expected = [None if answer is None else score_of(answer) for _, answer in seen]
        assert [score for _, score in step] == expected
        known = [score for score in expected if score is not None]
        assert logged["rewards/judged/mean"] == pytest.approx(statistics.fmean(known))
        assert logged["judge/without_reward"] == pytest.approx(expected.count(None) / 8)
    asked = [asked_of(request) for request in handler.asked]
    assert len(asked) == len(set(asked))


def test_verl_asks_by_new_and_old_keys(model, tmp_path):
    texts = [text for text in ("rice", "rain", "snow", "hail", "fog") if score_of(text) is not None]
    unread = next(text for text in map(str, range(100)) if score_of(text) is None)
    with served(always=judges) as (url, _):
        found = run("verl", model, url, tmp_path, "\n".join([*texts, unread]))
    expected = [*map(score_of, texts), None]
    assert not found["jax"]
    for way in ("new", "old"):
        assert [one["reward_score"] for one in found[way]] == expected
        assert [one["reward_extra_info"]["judged"] for one in found[way]] == [1.0] * len(texts) + [0.0]
    assert found["before"] == [*expected[:-1], "TypeError"]  # which is why reward_kwargs.missing exists


def test_tunix_takes_a_step(model, tmp_path):
    with served(always=judges) as (url, _):
        found = run("tunix", model, url, tmp_path)
    assert found["steps"] == 1 and found["functions"] == ["reward"]
    (step,) = found["given"]
    assert len(step) == 8
    for text, score in step:
        answer = answer_of(text)
        if answer is not None and score_of(answer) is not None:
            assert score == score_of(answer)
        else:
            assert score != 0 and math.isfinite(score)
