"""One writer at a time: real processes, killed and forked, in the same folders and files."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patarm_jax.cli import main
from patarm_jax.files import LOCK, is_occupied
from patarm_jax.locks import hold_folder, hold_output
from patarm_jax.types import UserError
from tests.flags import FLAGS
from tests.toys import small_world, write_recipes, write_run

ROOT = Path(__file__).parents[1]
# Holds what is named, says so, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from patarm_jax import locks
with getattr(locks, sys.argv[1])(Path(sys.argv[2]), print, 1.0):
    print("held", flush=True)
    {meanwhile}
    time.sleep(600)
"""


def started(how, path, meanwhile="", before=()):
    """A process that holds `path`; it is waited for."""
    command = [*before, sys.executable, "-c", HOLDER.format(meanwhile=meanwhile), how, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    said = []
    while not said or said[-1] != "held\n":
        said.append(process.stdout.readline())
        assert said[-1], "it has ended"
    return process, said[:-1]


def ended(process):
    process.kill()
    process.wait()
    process.stdout.close()


HOLDS = {"hold_folder": hold_folder, "hold_output": hold_output}


@pytest.mark.parametrize("how", HOLDS)
def test_a_second_one_is_told_who_has_it_and_a_killed_one_leaves_nothing(how, tmp_path):
    place, hold = tmp_path / "new" / "x", HOLDS[how]
    first, said = started(how, place)
    assert said == []
    with pytest.raises(UserError) as refused, hold(place, print):
        pass
    who = rf"{place} is being written by another process, pid {first.pid} on {re.escape(socket.gethostname())} since "
    assert re.match(
        who + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\. Wait until it has ended, stop it, or name another pl",
        str(refused.value),
    )
    assert refused.value.exit_code == 1
    ended(first)
    with hold(place, print):
        assert list(tmp_path.rglob(f"*{LOCK}"))
    assert not list(tmp_path.rglob(f"*{LOCK}"))


@pytest.mark.parametrize(
    "meanwhile",
    [
        "import subprocess; subprocess.Popen(['sleep', '600'])",
        "import os; os.fork() or time.sleep(600)",
    ],
    ids=["started", "forked"],
)
def test_no_child_inherits_a_lock(meanwhile, tmp_path):
    first, _ = started("hold_folder", tmp_path / "x", meanwhile + "; print('held', flush=True)")
    assert first.stdout.readline() == "held\n"
    children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 1
    try:
        first.send_signal(signal.SIGKILL)
        first.wait()
        until = time.monotonic() + 20  # a forked child lets go when it is first given the processor
        while True:
            try:
                with hold_folder(tmp_path / "x", print):
                    os.kill(int(children[0]), 0)  # it lives
                break
            except UserError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
    finally:
        os.kill(int(children[0]), signal.SIGKILL)
        first.stdout.close()


def test_a_file_system_without_locks_is_said_once(tmp_path):
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("strace, which makes locks fail, is not there or not permitted")
    trace = [strace, "-f", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:error=ENOLCK"]
    process, said = started("hold_folder", tmp_path / "x", "sys.exit()", trace)
    assert said == [
        f"{tmp_path / 'x'} is on a file system without locks: nothing keeps a second process from writing there too\n"
    ]
    process.stdout.close()
    assert process.wait() == 0
    assert not (tmp_path / "x").exists()  # nothing was written


def test_a_lock_of_another_machine_is_waited_for(tmp_path, capsys):
    """That machine may be gone, and a shared file system takes its locks back after a while."""
    process, _ = started("hold_folder", tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 5, "host": "node3", "since": "long ago"}))
    begun, said = time.monotonic(), []
    with pytest.raises(UserError, match="pid 5 on node3 since long ago"), hold_folder(tmp_path, said.append, 1.5):
        pass
    assert time.monotonic() - begun > 1.5
    assert len(said) == 1 and "waiting up to 2 s, in case that machine is gone" in said[0]
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({process.pid}, 9)"])
    with hold_folder(tmp_path, said.append, 60):
        assert process.wait() == -signal.SIGKILL
    assert killer.wait() == 0
    process.stdout.close()


def test_after_an_error_a_folder_stays_held_until_the_process_ends(tmp_path):
    """What saves in the background may still be writing there. This process may go on; another may not."""
    with pytest.raises(ZeroDivisionError), hold_folder(tmp_path / "empty", print):
        raise ZeroDivisionError
    assert not (tmp_path / "empty").exists()  # nothing was written
    with pytest.raises(ZeroDivisionError), hold_folder(tmp_path / "run", print):
        (tmp_path / "run" / "metrics.jsonl").write_text("")
        raise ZeroDivisionError
    code = HOLDER.format(meanwhile="sys.exit()")
    other = [sys.executable, "-c", code, "hold_folder", str(tmp_path / "run")]
    done = subprocess.run(other, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and f"another process, pid {os.getpid()} on" in done.stderr
    with hold_folder(tmp_path / "run", print):
        pass
    assert subprocess.run(other, capture_output=True, cwd=ROOT).returncode == 0


def test_a_lock_is_nothing_that_stands_in_the_way(tmp_path):
    process, _ = started("hold_output", tmp_path)  # an empty folder that is there, as a mounted disk is
    assert (tmp_path / LOCK).is_file() and not is_occupied(tmp_path)
    with pytest.raises(UserError, match="is being written by another"), hold_output(tmp_path, print):
        pass
    ended(process)
    with hold_output(Path("/dev/null"), print), hold_output(Path("/dev/null"), print):
        pass  # a device has no lock
    with hold_output(tmp_path / ("é" * 127), print):  # a name as long as the disk permits
        assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------------------------------------------- every verb


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = small_world(tmp_path_factory.mktemp("world"), 8)
    write_run(root / "run", write_recipes(root, "sft", "grpo", steps=1))
    return root


VERBS = {
    "sft": ["sft", "{root}/sft.yaml", "--run.folder", "{out}"],
    "grpo": ["grpo", "{root}/grpo.yaml", "--run.folder", "{out}"],
    "eval": ["eval", "pairs", "--model", "{root}/model", "--data", "{root}/pairs.jsonl", "--output", "{out}"],
    "demo": ["demo", "--short", "--out", "{out}"],
    "judge": ["judge", "{root}/model", "--input", "{root}/pairs.jsonl", "--output", "{out}"],
    "export": ["export", "{root}/run", "{out}"],
    "report": ["report", "{root}/run", "--out", "{out}"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_writes_is_refused_where_another_writes(verb, world, tmp_path, capsys):
    """Before anything there is read or written."""
    out = tmp_path / "out"
    process, _ = started("hold_folder" if verb in ("sft", "grpo", "eval", "demo") else "hold_output", out)
    try:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([each.format(root=world, out=out) for each in VERBS[verb]]) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("patarm: ")]
        assert len(said) == 1 and f"{out} is being written by another process, pid {process.pid} on" in said[0]
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        ended(process)


@pytest.mark.long
def test_two_runs_in_one_folder(world, tmp_path):
    """The second is refused; of the first nothing is missing, also when it was killed and resumed in between."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "patarm_jax", "sft", f"{world}/sft.yaml", "--run.folder", str(run)]
    command += ["--run.steps", "12", "--run.checkpoint_every", "2"]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": FLAGS}

    def steps():
        path = run / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    for killed in (True, False):
        before = len(steps())
        first = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
        while len(steps()) <= before and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # else it ends before the second one begins
        second = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert second.returncode == 1
        assert f"{run} is being written by another process, pid {first.pid} on" in second.stderr
        first.send_signal(signal.SIGKILL if killed else signal.SIGCONT)
        said = first.communicate()[1]
    assert first.returncode == 0, said
    assert steps() == list(range(1, 13)) and (run / "export" / "model.safetensors").exists()
    assert not (run / LOCK).exists()


def test_a_process_that_failed_holds_a_folder_until_it_ends_and_leaves_nothing(tmp_path):
    (tmp_path / "weights").touch()
    meanwhile = (
        "break_off = (Path(sys.argv[2]) / 'break off')\n    while not break_off.exists(): time.sleep(0.01)\n    oops"
    )
    process, _ = started("hold_folder", tmp_path, meanwhile)
    assert (tmp_path / LOCK).exists()
    (tmp_path / "break off").touch()
    process.communicate()
    assert process.returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["break off", "weights"]


@pytest.mark.long
def test_a_dry_run_takes_no_lock(world, tmp_path, capsys):
    process, _ = started("hold_folder", tmp_path)
    try:
        assert main(["sft", f"{world}/sft.yaml", "--run.folder", str(tmp_path), "--dry-run"]) == 0
    finally:
        ended(process)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
