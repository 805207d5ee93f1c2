"""The launch scripts, with a scheduler's variables and stand-ins for its commands; the runs are real processes."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_recipes import FLAGS, config_file, exported, lines_of, timeless
from tests.toys import small_world

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))

# What the scripts call, as far as they call it. Notes are kept in the folder NOTES.
STAND_INS = {
    "srun": """#!{python}
import itertools, os, pathlib, subprocess, sys, threading
command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
notes = pathlib.Path(os.environ["NOTES"])
(notes / "srun").write_text(" ".join(sys.argv[1:]))
(notes / "settings").write_text("\\n".join(f"{{k}}={{v}}" for k, v in os.environ.items()))
step = {{"SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"], "SLURM_STEP_NUM_NODES": "1"}}
tasks = [
    subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={{**os.environ, **step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}},
    )
    for i in range(int(os.environ["SLURM_NTASKS"]))
]
(notes / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
def label(i, task):
    for line in task.stdout:
        print(f"{{i}}: {{line}}", end="", flush=True)
threads = [threading.Thread(target=label, args=one) for one in enumerate(tasks)]
for one in threads: one.start()
for one in threads: one.join()
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
""",
    "scontrol": """#!/bin/sh
case "$1 $2" in
  "show hostnames") echo "$3" ;;
  *) echo "$@" >>"$NOTES/scontrol" ;;
esac
""",
    "squeue": """#!/bin/sh
cat "$NOTES/state"
""",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One CPU device in each process, and the environment that the tests run in."""
    bin_ = tmp_path_factory.mktemp("bin")
    for name, text in STAND_INS.items():
        (bin_ / name).write_text(text.format(python=sys.executable) if name == "srun" else text)
        (bin_ / name).chmod(stat.S_IRWXU)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    return kept | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "VENV": sys.prefix,
        "EXTRAS": "",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FLAGS,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


class Slurm:
    """A job of two processes on this machine."""

    def __init__(self, environment, notes):
        self.notes, self.environment = notes, environment
        notes.mkdir()
        (notes / "state").write_text("RUNNING\n")
        (notes / "scontrol").touch()

    def submit(self, *command, **more):
        """A process of the script, as Slurm starts it: a copy that lies elsewhere."""
        copy = self.notes / "slurm_script"
        shutil.copy(ROOT / "launch" / "slurm_gpu.sbatch", copy)
        job = {
            "NOTES": str(self.notes),
            "SLURM_JOB_ID": str(free_port() - PORTS),
            "SLURM_JOB_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": "2",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }
        self.log = self.notes / "log"
        with self.log.open("a") as log:
            return subprocess.Popen(
                ["bash", copy, *map(str, command)], env={**self.environment, **job, **more}, cwd="/", stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def signal(self, number):
        """To the processes, not to the script."""
        for task in (self.notes / "tasks").read_text().split():
            os.kill(int(task), number)

    @property
    def requeued(self):
        return (self.notes / "scontrol").read_text().split()[::2].count("requeue")

    def end(self, script, code):
        assert script.wait(timeout=400) == code, self.log.read_text()
        return self.log.read_text()


PORTS = 65535 - 2**12 + 1  # the first that JAX takes under Slurm and Open MPI, which tell it of none


def free_port():
    for port in range(PORTS + os.getpid() % 4000, PORTS + 4096):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def run_config(world, name, **run):
    """Seven steps of SFT over two processes, one device each."""
    return config_file(world, name, "sft", heldout={"path": ""}, run=run)


def wait_for_steps(world, name, steps, script):
    while len(lines_of(world / name)) < steps:
        assert script.poll() is None
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(world, environment, tmp_path_factory):
    """An uninterrupted run under Slurm."""
    slurm = Slurm(environment, tmp_path_factory.mktemp("whole") / "notes")
    script = slurm.submit("sft", run_config(world, "whole"))
    return slurm, slurm.end(script, 0), world / "whole"


@pytest.mark.long
def test_a_slurm_job_runs_to_its_end(whole):
    slurm, said, folder = whole
    assert f"is finished: {folder / 'export'}" in said and "0: done: " in said
    assert slurm.requeued == 0
    assert (slurm.notes / "srun").read_text().endswith("whole.yaml --mesh.distributed auto")
    settings = dict(line.partition("=")[::2] for line in (slurm.notes / "settings").read_text().splitlines())
    assert "JAX_LOCAL_DEVICE_IDS" not in settings  # one process per GPU: JAX takes SLURM_LOCALID


@pytest.mark.long
def test_a_preempted_slurm_job_is_queued_again_and_ends_like_an_uninterrupted_one(world, environment, whole, tmp_path):
    slurm, config = Slurm(environment, tmp_path / "notes"), run_config(world, "preempted")
    script = slurm.submit("sft", config)
    wait_for_steps(world, "preempted", 3, script)
    slurm.signal(signal.SIGTERM)
    said = slurm.end(script, 0)
    assert "stopped after step" in said and "was stopped and is queued again" in said
    assert slurm.requeued == 1 and not (world / "preempted" / "export").exists()

    said = slurm.end(slurm.submit("sft", config, SLURM_RESTART_COUNT="1"), 0)
    assert "start 2: patarm sft" in said and "is finished" in said and slurm.requeued == 1
    assert timeless(world / "preempted") == timeless(whole[2])
    assert exported(world / "preempted") == exported(whole[2])

    # A finished run has nothing left to do, and is not queued again; raised, it goes on, and is.
    assert "is complete" in slurm.end(slurm.submit("sft", config), 0) and slurm.requeued == 1
    script = slurm.submit("sft", config, "--run.steps", 200)
    wait_for_steps(world, "preempted", 9, script)
    slurm.signal(signal.SIGTERM)
    slurm.end(script, 0)
    assert slurm.requeued == 2


@pytest.mark.long
def test_what_is_cancelled_or_too_often_started_is_not_queued_again(world, environment, tmp_path):
    slurm, config = Slurm(environment, tmp_path / "notes"), run_config(world, "cancelled", steps=200)
    for state, more, code, says in (
        ("COMPLETING", {}, 0, "was cancelled and is not queued again; submit it again to resume"),
        ("RUNNING", {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}, 1, "was started 4 times and is not queued"),
    ):
        (slurm.notes / "state").write_text(state + "\n")
        before = len(lines_of(world / "cancelled"))
        script = slurm.submit("sft", config, **more)
        wait_for_steps(world, "cancelled", before + 2, script)
        slurm.signal(signal.SIGTERM)
        assert says in slurm.end(script, code)
    assert slurm.requeued == 0


@pytest.mark.long
def test_a_slurm_job_that_fails_is_not_queued_again(world, environment, tmp_path):
    slurm = Slurm(environment, tmp_path / "notes")
    command = ["sft", run_config(world, "failing"), "--data.path", "/nowhere.jsonl"]
    assert "has failed with code 1 and is not queued again" in slurm.end(slurm.submit(*command), 1)
    assert slurm.requeued == 0


def test_a_command_that_cannot_be_meant_starts_nothing(world, environment, tmp_path):
    slurm = Slurm(environment, tmp_path / "notes")
    assert "no command is given" in slurm.end(slurm.submit(), 2)
    said = slurm.end(slurm.submit("sft", run_config(world, "mistaken"), "--run.sed", "1"), 2)
    assert "Did you mean --run.seed" in said
    assert "is not the checkout of patarm_jax" in slurm.end(slurm.submit("sft", SLURM_SUBMIT_DIR=str(tmp_path)), 2)
    assert not (slurm.notes / "srun").exists() and slurm.requeued == 0


def test_one_process_of_a_node_takes_all_its_gpus_and_asks_no_proxy_for_the_others(environment, tmp_path):
    slurm = Slurm(environment | {"http_proxy": "http://proxy:3128", "no_proxy": "localhost"}, tmp_path / "notes")
    more = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "0"}
    slurm.submit("eval", "--help", **more).wait()  # which is no run
    settings = (slurm.notes / "settings").read_text().splitlines()
    assert {"JAX_LOCAL_DEVICE_IDS=0,1,2,3", "no_proxy=localhost,127.0.0.1"} <= set(settings)


@pytest.mark.long
def test_processes_of_open_mpi_find_each_other(world, environment, whole):
    """By the variables of mpirun as JAX reads them."""
    job = (free_port() - PORTS) * 2**12
    said = []
    for process in [
        subprocess.Popen(
            [sys.executable, "-m", "patarm_jax", "sft", run_config(world, "mpi"), "--mesh.distributed", "auto"],
            env={
                **environment,
                "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]:  # fmt: skip
        said.append(process.communicate(timeout=400)[0])
        assert process.returncode == 0, said
    assert "done: " in said[0] and "done: " not in said[1]
    assert timeless(world / "mpi") == timeless(whole[2])
    assert exported(world / "mpi") == exported(whole[2])


@pytest.mark.long
def test_a_host_of_a_tpu_slice(world, environment, tmp_path):
    """Alone, on CPUs: it logs, refuses a second one, passes a stop on, and resumes."""
    config, name = run_config(world, "tpu", steps=200), socket.gethostname()
    alone = ["--mesh.coordinator", f"127.0.0.1:{free_port()}", "--mesh.processes", "1", "--mesh.process_id", "0"]
    command = ["bash", ROOT / "launch" / "tpu_pod.sh", "sft", config, *alone]
    settings = {**environment, "LOGS": str(tmp_path)}
    with (tmp_path / "shown").open("w") as shown:
        script = subprocess.Popen(command, env=settings, cwd="/", stdout=shown, stderr=subprocess.STDOUT)
        wait_for_steps(world, "tpu", 3, script)
        second = subprocess.run(command, env=settings, capture_output=True, text=True)
        run = (tmp_path / f"tpu-{name}.pid").read_text().strip()
        assert second.returncode == 1 and f"a run is going on here already, process {run}" in second.stderr
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=200) == 0
    said = (tmp_path / "shown").read_text()
    assert f"its log is {tmp_path}" in said or f"/{tmp_path}/tpu-{name}.log" in said
    assert "stopped after step" in said and "stopped after step" in (tmp_path / f"tpu-{name}.log").read_text()
    done = len(lines_of(world / "tpu"))
    command += ["--run.steps", str(done + 1)]
    again = subprocess.run(list(map(str, command)), env=settings, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{done} of {done + 1} steps are done" in again.stdout and "stopped after step" not in again.stdout
    assert json.loads((world / "tpu" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == done + 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_clean(name):
    checker = shutil.which("shellcheck")
    command = [checker, "-x"] if checker else ["bash", "-n"]  # at least it can be read
    done = subprocess.run([*command, f"launch/{name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
