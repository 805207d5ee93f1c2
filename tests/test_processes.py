"""Several processes of one run: what differs between them is refused, and what happens to one ends all, in a sentence.

Real processes on this machine, two and four, with CPU devices of their own.
"""

import contextlib
import fcntl
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from patarm_jax.config.load import override
from patarm_jax.config.recipes import SFTConfig
from patarm_jax.config.sections import MeshSection
from patarm_jax.run.joining import Place, find_place
from patarm_jax.run.peers import start_processes
from patarm_jax.types import UsageError
from tests.flags import FLAGS
from tests.runs import VAIN, Started, config_file, exported, judgements, lines_of, timeless

MESH = {"data": 2, "fsdp": -1, "distributed": "auto"}
PROMPTLY = 30  # seconds from a fault to the end of every process


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Pod:
    """The processes of one run: `more[i]` are further arguments of the i-th, a number of processes shares 4 devices."""

    def __init__(self, environment, recipe, config, *common, processes=2, more=(), numbers=None, port=None):
        self.port = port or free_port()
        flags = f"{FLAGS} --xla_force_host_platform_device_count={4 // processes}"
        joined = ["--mesh.coordinator", f"127.0.0.1:{self.port}", "--mesh.processes", processes]
        self.all = [
            Started(
                environment, recipe, config, *common, *joined, "--mesh.process_id", number,
                *(more[number] if number < len(more) else ()), XLA_FLAGS=flags,
            )
            for number in (range(processes) if numbers is None else numbers)
        ]  # fmt: skip

    def until(self, happened):
        while not happened():
            for one in self.all:
                assert one.process.poll() is None, one.end(one.process.returncode)
            time.sleep(0.02)

    def end(self, *codes, since=None):
        """What each said, when all have ended with these codes, and promptly where there was a fault."""
        said = [one.end(code) for one, code in zip(self.all, codes, strict=True)]
        if since is not None:
            took = time.monotonic() - since
            print(f"all had ended after {took:.1f} s: {codes}")  # `pytest -s` shows it
            assert took < PROMPTLY, said
        return said

    def send(self, number, which):
        os.kill(self.all[number].process.pid, which)
        return time.monotonic()


def sentences(said):
    """The lines that say how it ended; nothing of Python's or C++'s stacks is among what was said."""
    assert "Traceback" not in said and "Check failure" not in said and "Fatal" not in said, said
    return [line for line in said.splitlines() if line.startswith("patarm: ")]


def pod_config(world, name, recipe, **sections):
    # Without held-out pairs, whose programs would take longest to compile.
    return config_file(world, name, recipe, **{"mesh": MESH, "run": {"steps": 6}, "heldout": {"path": ""}, **sections})


# ------------------------------------------------------------------------------------------------- what they compare


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("optimizer.learning_rate", ("0.01", "0.1")),
        pytest.param("run.seed", ("0", "7"), marks=pytest.mark.long),
        pytest.param("pairs_per_step", ("4", "8"), marks=pytest.mark.long),
        pytest.param("run.steps", ("6", "5"), marks=pytest.mark.long),
        pytest.param("run.checkpoint_every", ("2", "3"), marks=pytest.mark.long),
        pytest.param("mesh.tensor", ("1", "2"), marks=pytest.mark.long),
    ],
)
def test_processes_with_other_settings_are_refused(world, environment, setting, values):
    config = pod_config(world, "other-settings", "sft")
    pod = Pod(environment, "sft", config, more=[[f"--{setting}", value] for value in values])
    first, second = (f"{setting} is {value} on process {number}" for number, value in enumerate(values))
    for said in pod.end(2, 2):
        assert len(sentences(said)) == 1 and first.split(" is ")[0] in said
        assert f"is {values[0]} on process 0 and {values[1]} on process 1" in said, (said, first, second)
    assert not (world / "other-settings" / "config.yaml").exists()


@pytest.mark.long
def test_processes_that_read_other_data_are_refused(world, environment):
    text = (world / "pairs.jsonl").read_text()
    (world / "changed.jsonl").write_text(text.replace("I like", "I liked", 1))
    (world / "copied.jsonl").write_text(text)
    config = pod_config(world, "other-data", "sft", run={"steps": 2})  # the first one's learning rate is 0
    pod = Pod(environment, "sft", config, more=[[], ["--data.path", world / "changed.jsonl"]])
    for said in pod.end(2, 2):
        assert "the processes differ in what they read: pairs is" in said
    pod = Pod(environment, "sft", config, more=[[], ["--data.path", world / "copied.jsonl"]])
    pod.end(0, 0)  # a path may be each machine's own


@pytest.mark.long
def test_run_folders_that_are_not_shared_are_refused(world, environment):
    config = pod_config(world, "shared-not", "sft")
    pod = Pod(environment, "sft", config, more=[[], ["--run.folder", world / "another"]])
    said = pod.end(1, 1)
    assert "of process 1 is not the folder of process 0" in said[1] and "on storage that they share" in said[1]
    assert "process 1 (" in said[0] and "is not the folder of process 0" in said[0]
    assert not lines_of(world / "shared-not")


# ------------------------------------------------------------------------------------------------------------ joining


SLURM = {
    "SLURM_JOB_ID": "70000", "SLURM_STEP_NODELIST": "node[003-004],other", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "settings", "place"),
    [
        ({}, {"coordinator": "a:80", "processes": 3, "process_id": 2}, Place("a", 80, 3, 2, None)),
        ({}, {"coordinator": "[::1]:80", "processes": 1, "process_id": 0}, Place("::1", 80, 1, 0, None)),
        (SLURM, {}, Place("node003", 61440 + 70000 % 4096, 16, 9, [1])),
        (SLURM, {"coordinator": "b:81"}, Place("b", 81, 16, 9, [1])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1,2"}, {}, Place("node003", 61440 + 70000 % 4096, 16, 9, [0, 1, 2])),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "c:82"}, {}, Place("c", 82, 16, 9, [1])),
        (SLURM | {"JAX_COORDINATOR_PORT": "83"}, {}, Place("node003", 83, 16, 9, [1])),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.0.0.5,10.1.0.5:34911", "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "JAX_COORDINATOR_PORT": "84",
            },
            {},
            Place("10.0.0.5", 84, 4, 3, [1]),
        ),
    ],
)  # fmt: skip
def test_where_a_process_stands_is_found(monkeypatch, environ, settings, place):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_LOCAL")):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find_place(MeshSection(distributed="auto", **settings)) == place


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "nothing here says mesh.coordinator and mesh.processes and mesh.process_id"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "mesh.coordinator is a. Give the host and port"),
        ({"coordinator": "a:0", "processes": 2, "process_id": 0}, "mesh.coordinator is a:0. Give the host and port"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "mesh.process_id is 2 and mesh.processes is 2"),
    ],
)
def test_a_place_that_cannot_be_is_refused(settings, sentence):
    with pytest.raises(UsageError) as refused:
        find_place(MeshSection(distributed="auto", **settings))
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"coordinator": "a:1"}, "--mesh.coordinator ''"),
        ({"processes": 2}, "--mesh.processes 0"),
        ({"process_id": 0}, "--mesh.process_id -1"),
    ],
)
def test_processes_that_were_not_told_to_join_are_refused(settings, remedy):
    """Each would run alone, all in one folder."""
    config = SFTConfig(mesh=MeshSection(**settings))
    with pytest.raises(UsageError) as refused:
        start_processes(config)
    assert "mesh.distributed is none" in str(refused.value) and remedy in str(refused.value)
    start_processes(override(config, shlex.split(remedy)))


def test_who_does_not_come_is_named(world, environment):
    config = pod_config(world, "absent", "sft")
    pod = Pod(environment, "sft", config, processes=4, numbers=[2, 0], more=[["--mesh.join_seconds", 8]])
    for said in pod.end(1, 1):
        assert "missing processes 1, 3 of 4 after 8 s (mesh.join_seconds)" in "".join(sentences(said))


@pytest.mark.long
def test_process_0_that_does_not_come_is_named(world, environment):
    pod = Pod(environment, "sft", pod_config(world, "absent", "sft"), "--mesh.join_seconds", 2, numbers=[1])
    (said,) = pod.end(1)
    assert f"process 0 is not reached at 127.0.0.1:{pod.port} after 2 s (mesh.join_seconds)" in said


@pytest.mark.long
def test_a_number_that_is_given_twice_is_refused(world, environment):
    pod = Pod(environment, "sft", pod_config(world, "twice", "sft"), processes=4, numbers=[0, 1, 1])
    for said in pod.end(1, 1, 1):
        assert len(sentences(said)) == 1
        assert "two processes are number 1: " in said and "Give each its own mesh.process_id" in said


@pytest.mark.long
def test_a_port_that_is_taken_is_said(world, environment):
    with socket.create_server(("", 0)) as taken:
        pod = Pod(environment, "sft", pod_config(world, "port", "sft"), numbers=[0], port=taken.getsockname()[1])
        (said,) = pod.end(1)
    assert f"process 0 cannot listen on port {pod.port}: Address already in use" in said
    assert said.count("is in use, perhaps by an earlier run that is ending") == 1


@pytest.mark.long
def test_a_process_that_is_stopped_while_it_joins_says_so(world, environment):
    pod = Pod(environment, "sft", pod_config(world, "stopped", "sft"), processes=4, numbers=[0, 1])
    pod.until(lambda: all("waits for process" in one.so_far() for one in pod.all))
    since = pod.send(0, signal.SIGTERM)
    said = pod.end(143, 1, since=since)
    assert sentences(said[0]) == [
        "patarm: process 0 was asked to stop while it waited for the others. Nothing had begun."
    ]
    assert "process 0 ended before all had joined: process 0 was asked to stop" in said[1]


def test_process_0_that_ends_while_others_join_is_said(world, environment):
    pod = Pod(environment, "sft", pod_config(world, "gone", "sft"), processes=4, numbers=[0, 1])
    pod.until(lambda: all("waits for process" in one.so_far() for one in pod.all))
    since = pod.send(0, signal.SIGKILL)
    said = pod.end(-signal.SIGKILL, 1, since=since)
    assert "process 0 ended before all had joined: it was killed." in said[1]


# -------------------------------------------------------------------------------------------- one ends, and all with it


FAULTS = {
    "worker killed": (1, signal.SIGKILL, r"process 1 of \d is gone or frozen"),
    "worker frozen": (1, signal.SIGSTOP, r"process 1 of \d is gone or frozen"),
    "first killed": (0, signal.SIGKILL, r"process 0 of \d is gone or frozen"),
    "first frozen": (0, signal.SIGSTOP, r"process 0 of \d is gone or frozen"),
}


@pytest.fixture(scope="module")
def uninterrupted(world, environment):
    """(recipe, processes) → the folder of a run that nothing happened to."""
    done = {}

    def folder(recipe, processes):
        if (recipe, processes) not in done:
            name = f"whole-{recipe}-{processes}"
            Pod(environment, recipe, pod_config(world, name, recipe), processes=processes).end(
                *[VAIN[recipe]] * processes
            )
            done[recipe, processes] = world / name
        return done[recipe, processes]

    return folder


def assert_equal_runs(folder, whole):
    assert timeless(folder) == timeless(whole)
    assert exported(folder) == exported(whole)
    assert judgements(folder) == judgements(whole)


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("recipe", "processes"), [("sft", 2), ("grpo", 2), ("grpo", 4)])
def test_a_process_that_is_lost_ends_all_and_the_restart_ends_alike(
    world, environment, uninterrupted, recipe, processes, fault
):
    number, which, sentence = FAULTS[fault]
    name = f"{fault}-{recipe}-{processes}".replace(" ", "-")
    config = pod_config(world, name, recipe)
    pod = Pod(environment, recipe, config, processes=processes)
    pod.until(lambda: len(lines_of(world / name)) >= 3)
    since = pod.send(number, which)
    lost = pod.all.pop(number)
    for said in pod.end(*[1] * (processes - 1), since=since):
        assert len(sentences(said)) == 1 and re.search(sentence, said), said
        assert "Start the same command again on all of them" in said
    lost.process.send_signal(signal.SIGKILL)  # also of one that is frozen
    lost.end(-signal.SIGKILL)
    Pod(environment, recipe, config, processes=processes, port=pod.port).end(*[VAIN[recipe]] * processes)
    assert_equal_runs(world / name, uninterrupted(recipe, processes))


STOPS = list(itertools.product(("sft", "grpo"), (signal.SIGTERM, signal.SIGINT), ([1], [0], [0, 1])))


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "which", "who"), STOPS)
def test_a_stop_request_to_any_saves_and_ends_all(world, environment, uninterrupted, recipe, which, who):
    name = f"stop-{recipe}-{which.name}-{len(who)}{who[0]}"
    config = pod_config(world, name, recipe)
    pod = Pod(environment, recipe, config)
    pod.until(lambda: len(lines_of(world / name)) >= 2)
    for number in who:
        since = pod.send(number, which)
    said = pod.end(0, 0, since=since)
    assert "run the command again to resume" in said[0]
    assert 2 <= len(lines_of(world / name)) < 6
    Pod(environment, recipe, config).end(VAIN[recipe], VAIN[recipe])
    assert_equal_runs(world / name, uninterrupted(recipe, 2))


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_request_before_the_first_step_holds(world, environment, uninterrupted, processes):
    """While models and programs are loaded and compiled: also of one process that Slurm alone has started."""
    name = f"early-{processes}"
    config = pod_config(world, name, "sft")
    pod = Pod(environment, "sft", config, processes=processes)
    pod.until(lambda: "attention: " in pod.all[0].so_far())
    pod.send(processes - 1, signal.SIGTERM)
    said = pod.end(*[0] * processes)
    assert "stopped after step 1 of 6" in said[0] and len(lines_of(world / name)) == 1
    Pod(environment, "sft", config, processes=processes).end(*[0] * processes)
    assert_equal_runs(world / name, uninterrupted("sft", processes))


@pytest.mark.long
def test_a_second_interrupt_ends_all_at_once(world, environment, uninterrupted):
    config = pod_config(world, "interrupted", "grpo")
    pod = Pod(environment, "grpo", config)
    pod.until(lambda: len(lines_of(world / "interrupted")) >= 2)
    pod.send(1, signal.SIGINT)
    time.sleep(0.05)
    since = pod.send(1, signal.SIGINT)
    said = pod.end(1, 1, since=since)
    assert "stopped at once" in said[1] and "process 1 (" in said[0] and "ended: stopped at once" in said[0]
    Pod(environment, "grpo", config).end(VAIN["grpo"], VAIN["grpo"])
    assert_equal_runs(world / "interrupted", uninterrupted("grpo", 2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.path", "nowhere.jsonl"], "nowhere.jsonl"),
        pytest.param(["--model.path", "nowhere"], "model.path nowhere is not a folder", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.long)])
def test_an_error_in_one_ends_all_and_says_whose(world, environment, arguments, sentence, number):
    config = pod_config(world, "error", "sft")
    pod = Pod(environment, "sft", config, more=[arguments if one == number else [] for one in range(2)])
    said = pod.end(1, 1)
    assert sentence in said[number] and len(sentences(said[number])) == 1
    other = sentences(said[1 - number])
    assert len(other) == 1 and sentence in other[0] and f"process {number} ({socket.gethostname()}) ended: " in other[0]


@pytest.mark.long
@pytest.mark.parametrize("whose", [[0], [1], [0, 1]])
def test_a_batch_that_is_refused_ends_all(world, environment, whose):
    """Five pairs are no multiple of the four devices."""
    config = pod_config(world, "uneven", "sft")
    pod = Pod(environment, "sft", config, more=[["--pairs_per_step", "5"] if n in whose else [] for n in range(2)])
    codes = [one.process.wait(timeout=PROMPTLY) for one in pod.all]
    said = pod.end(*codes)
    assert all(len(sentences(each)) == 1 for each in said)
    for number in whose:
        assert codes[number] == 2 and "pairs_per_step" in said[number] and "5" in said[number]
    assert 0 not in codes and not (world / "uneven" / "config.yaml").exists()
    if len(whose) == 1:
        assert "pairs_per_step" in said[1 - whose[0]] and f"process {whose[0]}" in said[1 - whose[0]]


@pytest.mark.long
@pytest.mark.parametrize("number", [0, 1])
def test_a_value_that_one_cannot_read_ends_all(world, environment, number):
    """It is refused before that process joins; the others, which come seconds later, hear why it does not come."""
    config = pod_config(world, "unread", "sft")
    unread = Pod(environment, "sft", config, "--optimizer.learning_rate", "fast", numbers=[number])
    time.sleep(8)
    other = Pod(environment, "sft", config, numbers=[1 - number], port=unread.port)
    (said,), (heard,) = unread.end(2), other.end(1)
    assert "learning_rate" in said and len(sentences(said)) == 1
    assert "learning_rate" in sentences(heard)[0] and f"process {number}" in heard


@pytest.mark.long
def test_a_disk_that_fails_in_the_middle_ends_all(world, environment, uninterrupted, tmp_path):
    """Another program fills the disk under the run; then there is room again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        config = pod_config(world, "disk", "grpo", run={"steps": 6, "folder": str(folder / "run")})
        pod = Pod(environment, "grpo", config)
        pod.until(lambda: len(lines_of(folder / "run")) >= 3)
        with contextlib.suppress(OSError), (folder / "other").open("wb", buffering=0) as other:
            while other.write(bytes(1 << 16)):
                pass
        since = time.monotonic()
        said = pod.end(1, 1, since=since)
        assert "No space left on device" in said[0] or "disk is full" in said[0], said[0]
        assert f"process 0 ({socket.gethostname()}) ended: " in said[1]
        (folder / "other").unlink()
        Pod(environment, "grpo", config).end(VAIN["grpo"], VAIN["grpo"])
        assert_equal_runs(folder / "run", uninterrupted("grpo", 2))
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.long
def test_a_failed_export_ends_all(world, environment):
    config = pod_config(world, "no-export", "sft", run={"steps": 2})
    (world / "no-export").mkdir()
    pod = Pod(environment, "sft", config)
    pod.until(lambda: (world / "no-export" / "config.yaml").exists())
    (world / "no-export" / "export").write_text("a file where a folder is to be")
    said = pod.end(1, 1)
    assert f"process 0 ({socket.gethostname()}) ended: " in said[1] and "export" in said[1]
    (world / "no-export" / "export").unlink()
    Pod(environment, "sft", config).end(0, 0)
    assert (world / "no-export" / "export" / "model.safetensors").exists()


@pytest.mark.long
def test_a_process_that_keeps_the_others_waiting_is_named_and_ends_all(world, environment):
    """Process 0 hangs in printing: nobody reads the pipe that it writes to, and it is full."""
    config = pod_config(world, "stuck", "sft")
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    port = free_port()
    flags = {**environment, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=2"}
    joined = [f"--mesh.coordinator=127.0.0.1:{port}", "--mesh.processes=2", "--mesh.stall_minutes=0.1"]
    command = [sys.executable, "-m", "patarm_jax", "sft", str(config), *joined, "--mesh.process_id=0"]
    stuck = subprocess.Popen(command, env=flags, stdout=writing, stderr=writing)
    other = Started(environment, "sft", config, *joined, "--mesh.process_id=1", XLA_FLAGS=flags["XLA_FLAGS"])
    said = other.end(1)
    assert re.search(
        r"process 0 has been at “[^”]+” for \d+ s, while process 1 waits for it at “[^”]+”: longer than mesh.stall",
        said,
    )
    assert stuck.wait(timeout=PROMPTLY) == 1
    os.close(reading)
    os.close(writing)


@pytest.mark.long
def test_a_damaged_checkpoint_is_seen_by_all(world, environment, uninterrupted):
    """One of them cannot know alone: all stop, or all go back, together."""
    config = pod_config(world, "damaged", "grpo", run={"steps": 6, "keep_checkpoints": 3})
    Pod(environment, "grpo", config).end(VAIN["grpo"], VAIN["grpo"])
    folder = world / "damaged"
    shutil.rmtree(folder / "export")
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    for said in Pod(environment, "grpo", config).end(1, 1):
        assert len(sentences(said)) == 1 and "cannot restore the checkpoint" in said and "run.on_damaged" in said
    said = Pod(environment, "grpo", config, "--run.on_damaged", "previous").end(VAIN["grpo"], VAIN["grpo"])
    assert f"the damaged checkpoint of step {newest.name} is kept as" in said[0]
    assert exported(folder) == exported(uninterrupted("grpo", 2))


# ------------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.long
def test_a_dry_run_of_two_prints_once(world, environment):
    config = pod_config(world, "dry", "grpo")
    said = Pod(environment, "grpo", config, "--dry-run").end(0, 0)
    assert said[0].count("learning_rate: 0.01") == 1
    (update,) = (line for line in said[0].splitlines() if line.startswith("update: "))
    shapes = re.findall(r"\[[^]]*\]", update)
    assert re.match(r"update: arrays \[8, \d+\], ", update) and len(set(shapes)) == len(shapes) > 1
    assert "learning_rate" not in said[1] and "GiB" not in said[1]
    assert not (world / "dry").exists()
