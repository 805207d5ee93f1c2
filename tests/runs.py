"""Whole runs, each a `patarm` of its own process: the small world they train in, and what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import pyarrow.parquet
import pytest
import yaml

from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from patarm_jax.model.transformer import init_params
from tests.flags import FLAGS
from tests.toys import small_world, tiny_model_folder

VAIN = {"sft": 0, "grpo": 1}  # exit codes: no judgement of random weights can be read, so GRPO learns nothing from PAR
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """One CPU device; what one process compiled, no other of these tests need compile again, on any worker."""
    own = tmp_path_factory.getbasetemp()
    compiled = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    compiled.mkdir(exist_ok=True)
    return {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_ENABLE_COMPILATION_CACHE": "1",  # off for what compiles within the tests' own process
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="session")
def started(environment):
    return partial(Started, environment)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model without weights, another with, and a file of preferences."""
    root = small_world(tmp_path_factory.mktemp("world"))
    text = (root / "pairs.jsonl").read_text()
    (root / "heldout.jsonl").write_text(text.replace("pair-", "held-").replace("I like", "I love"))
    config = read_architecture(root / "model")
    tiny_model_folder(root / "reference")
    (root / "reference" / "config.json").unlink()
    (root / "reference" / "generation_config.json").rename(root / "kept.json")
    params = jax.tree.map(lambda x: x * 3, init_params(config, jax.random.key(9)))
    weights.save(params, config, root / "weights", dtype="float32")
    for file in (root / "weights").iterdir():
        file.rename(root / "reference" / file.name)
    (root / "kept.json").replace(root / "reference" / "generation_config.json")
    return root


def config_file(world, name, recipe, **sections):
    base = {
        "model": {"path": str(world / "model"), "weights": "random", "dtype": "float32", "remat": "none"},
        "data": {"path": str(world / "pairs.jsonl"), "missing_judgements": "template"},
        "optimizer": {"learning_rate": 0.01, "warmup_steps": 2, "decay": "linear"},
        "run": {"folder": str(world / name), "steps": 7, "checkpoint_every": 2, "show_every": 4, "tensorboard": False},
        # Five pairs are no multiple of any mesh.
        "heldout": {
            "path": str(world / "heldout.jsonl"), "eval_every": 3, "limit": 5, "votes": 2, "best": "valid",
            "sampling": {"max_new_tokens": 6, "rows": 4},
        },
        "pairs_per_step": 4,
    }  # fmt: skip
    if recipe == "grpo":
        base |= {
            "data": {"path": str(world / "pairs.jsonl")},
            # Against another model the KL gives every token a gradient, so that a wrong draw is a wrong weight.
            "update": {"kl": {"coef": 0.5}, "reference": str(world / "reference"), "updates_per_rollout": 2},
            "sampling": {"max_new_tokens": 8},
            "group_size": 3,
        }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(base), encoding="utf-8")
    return path


class Started:
    """A patarm of its own process, and what it says."""

    def __init__(self, environment, *arguments, **changes):
        self.said = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "patarm_jax", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, env={**environment, **changes}, stdout=self.said, stderr=subprocess.STDOUT
        )

    def until(self, happened):
        """Waits for something this process brings about."""
        while not happened():
            assert self.process.poll() is None, self.end(self.process.returncode)
            time.sleep(0.02)

    def so_far(self):
        """What was said up to now."""
        return os.pread(self.said.fileno(), 1 << 20, 0).decode()

    def end(self, code=0):
        """Waits for the end, which must be with this exit code; gives what was said."""
        got = self.process.wait(timeout=1500)  # on the slowest machine; who waits longer waits in vain
        with self.said:
            self.said.seek(0)
            text = self.said.read()
        assert got == code, text
        return text


def reward_config(world, name, **sections):
    """Of a reward model, which writes nothing: what judges draw and are taught is not in it."""
    heldout = {"path": str(world / "heldout.jsonl"), "eval_every": 3, "limit": 5, "best": "accuracy_half"}
    path = config_file(world, name, "reward_model", **sections)
    base = yaml.safe_load(path.read_text())
    base["heldout"] = sections.get("heldout", heldout)
    del base["data"]["missing_judgements"]
    path.write_text(yaml.safe_dump(base))
    return path


def run_whole_and_killed(started, verb, whole, killed, folder, code=0):
    """Two runs alike, the second of them killed after three steps and started again; both end with this exit code."""
    running, stopped = started(verb, whole), started(verb, killed)
    stopped.until(lambda: len(lines_of(folder)) >= 3)
    stopped.process.send_signal(signal.SIGKILL)
    stopped.end(-signal.SIGKILL)
    started(verb, killed).end(code)
    running.end(code)


def run_as_two(started, verb, config, code=0):
    """One run by two processes of four devices each; the config's mesh is one of eight that are `distributed`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=4"}
    joined = ["--mesh.coordinator", address, "--mesh.processes", "2", "--mesh.process_id"]
    for process in [started(verb, config, *joined, number, **flags) for number in range(2)]:
        process.end(code)


def lines_of(folder):
    path = folder / "metrics.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""  # the last may still be being written
    return [json.loads(line) for line in whole.splitlines()]


def timeless(folder):
    clocks = ("time/", "step_time")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines_of(folder)]


def assert_nearly_equal(folder, other):
    """The same metrics but for rounding; what is null in one is null in the other."""
    for ours, theirs in zip(timeless(folder), timeless(other), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            exact = value is None or isinstance(value, str)
            assert ours[name] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-5)), name


def exported(folder):
    return {p.name: p.read_bytes() for p in (folder / "export").iterdir() if p.name != "README.md"}


def judged_texts(folder):
    return [[row["text"] for row in rows] for _, rows in sorted(judgements(folder).items())]


def judgements(folder):
    return {p.name: pyarrow.parquet.read_table(p).to_pylist() for p in (folder / "rollouts").glob("*")}
