"""A judge that several processes ask: each its share, one output, the bytes of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patarm_jax.ask.answers import Kind, Question, no_answer, open_answers, take_in
from patarm_jax.ask.shared import done_by_all, my_share, shared_answers
from patarm_jax.types import Message, UserError
from tests.flags import FLAGS
from tests.toys import small_world


def question(number):
    return Question(str(number), number, [Message(role="user", content="?")])


def add(path, identity, *numbers):
    with open_answers(path, identity) as answers:
        answers.add(no_answer(question(number), 0, Kind.REFUSED, "no") for number in numbers)


def test_a_failure_here_does_not_hide_what_came_elsewhere(tmp_path):
    """Else it would be asked, and paid for, again; what came here stays as it is."""
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    for path, kinds in ((here, (Kind.FAILED, Kind.REFUSED)), (there, (Kind.REFUSED, Kind.TOO_LONG, Kind.FAILED))):
        with open_answers(path, {}) as answers:
            answers.add(no_answer(question(number), 0, kind, path.stem) for number, kind in enumerate(kinds))
    with open_answers(here, {}) as answers:
        take_in(answers, [here, there], {})
        found = {number: answers.known.get((question(number).key, 0)) for number in range(3)}
    assert (found[0].kind, found[0].reason) == (Kind.REFUSED, "there")
    assert (found[1].kind, found[1].reason) == (Kind.REFUSED, "here")
    assert found[2] is None


def test_what_killed_processes_have_written_is_taken_in(tmp_path):
    path = tmp_path / "answers[1].jsonl"
    add(path, {"name": "a"}, 0)
    for process in (1, 2):
        add(tmp_path / f".answers[1].jsonl.process-{process}", {"name": "a"}, process, 10 + process)
    (tmp_path / ".answers[1].jsonl.process-3").write_text('{"judge"')  # killed in its first line
    with shared_answers(path, {"name": "a"}) as answers:
        assert sorted(question for question, _ in answers.known) == sorted(question(n).key for n in (0, 1, 2, 11, 12))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 6 and len({line["question"] for line in lines[1:]}) == 5
    add(tmp_path / ".answers[1].jsonl.process-1", {"name": "b"}, 3)
    with pytest.raises(UserError, match="holds answers of another evaluation"), shared_answers(path, {"name": "a"}):
        pass


def test_a_process_alone_has_everything():
    assert my_share([3, 1, 2]) == [3, 1, 2] and done_by_all(True) and not done_by_all(False)


# ---- Real processes ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


def start(command, process=None, processes=2, port=0, devices=2):
    """A patarm of its own; `process`: one of several."""
    joined = ["--mesh.distributed", "auto", "--mesh.coordinator", f"127.0.0.1:{port}", "--mesh.processes", processes]
    joined += ["--mesh.process_id", process]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
    }
    arguments = [*command, *(joined if process is not None else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "patarm_jax", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(process, code=0):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


SETTINGS = ("--model.weights", "random", "--model.dtype", "float32", "--sampling.max_new_tokens", 6, "--votes", 2)


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_judge_as_one(world, processes):
    def judge(output):
        command = ["judge", world / "model", "--input", world / "pairs.jsonl", "--output", output]
        return [*command, *SETTINGS, "--data.max_prompt_tokens", 575]  # which most questions are longer than

    alone, together = world / f"alone-{processes}.jsonl", world / f"together-{processes}.jsonl"
    ended(start(judge(alone)))
    port = free_port()
    running = [start(judge(together), process, processes, port) for process in range(processes)]
    said = [ended(process) for process in running]
    assert together.read_bytes() == alone.read_bytes()
    kinds = {one["kind"] for line in alone.read_text().splitlines() for one in json.loads(line)["judgements"]["chosen"]}
    assert {"TOO_LONG", "CUT"} <= kinds
    assert [text.count("done: ") for text in said] == [1] + [0] * (processes - 1)
    assert not list(world.glob(".together*"))
    assert "answers to be asked for: 0" in ended(start([*judge(together), "--dry-run"]))


@pytest.mark.long
def test_processes_that_were_killed_are_gone_on_from(world):
    """By one process, which asks nothing twice."""

    def evaluate(output):
        command = ["eval", "pairs", "--model", world / "model", "--data", world / "pairs.jsonl"]
        return [*command, "--output", output, *SETTINGS, "--sampling.rows", 2]

    folder, port = world / "killed", free_port()
    running = [start(evaluate(folder), process, 2, port) for process in range(2)]
    files = [folder / "answers.jsonl", folder / ".answers.jsonl.process-1"]
    while not all(file.exists() and file.read_bytes().count(b"\n") > 4 for file in files):
        assert all(process.poll() is None for process in running), [process.communicate()[0] for process in running]
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (folder / "results.json").exists()
    said = ended(start(evaluate(folder)), 0)
    assert "of 24 questions are answered" in said
    assert not list(folder.glob(".answers*"))
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == len({(line["question"], line["vote"]) for line in lines}) == 48

    ended(start(evaluate(world / "whole")))
    port = free_port()
    running = [start(evaluate(world / "together"), process, 2, port) for process in range(2)]
    said = [ended(process) for process in running]
    for name in ("results.json", "summary.md", "judgements.parquet", "units.parquet"):
        whole = (world / "whole" / name).read_bytes()
        assert (folder / name).read_bytes().replace(b"killed", b"whole") == whole, name
        assert (world / "together" / name).read_bytes() == whole, name
    assert "summary.md" in said[0] and "summary.md" not in said[1]
