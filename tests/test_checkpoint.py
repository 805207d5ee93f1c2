"""A checkpoint gives back what was saved, bit for bit, or says in a sentence why it does not."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from patarm_jax.run.checkpoint import open_checkpoints
from patarm_jax.run.checkpoint_files import FILES
from patarm_jax.train.steps import TrainState
from patarm_jax.types import UserError

FINGERPRINT = {"model": {"layers": 2, "rope": 1e6}, "data": "0a1b"}
DATA_STATE = {"batches": 17, "nested": {"epoch": [1, 2]}}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a training state is made of: weights, moments with a counter, a step, a random key."""

    params: dict
    moments: optax.OptState
    step: jax.Array
    key: jax.Array


def state(seed=0, rows=8):
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.standard_normal((rows, 6)), jnp.float32),
        "half": jnp.asarray(rng.standard_normal((rows, 3)), jnp.bfloat16),
    }
    moments = optax.adamw(1e-3).init(params)
    return State(params, moments, jnp.int32(seed), jax.random.key(seed))


def abstract(tree, sharding):
    """Rows over `sharding` where there are rows."""
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding if x.ndim else whole), tree)


def rows_over(count):
    mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    return NamedSharding(mesh, PartitionSpec("x"))


def one_device():
    return SingleDeviceSharding(jax.devices()[0])


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if jax.dtypes.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 1), (1, 8), (8, 4), (1, 1)])
def test_restored_equals_saved_on_any_mesh(saved_on, restored_on, tmp_path):
    written, asked = (one_device() if n == 1 else rows_over(n) for n in (saved_on, restored_on))
    original = state(3)
    placed = jax.device_put(original, jax.tree.map(lambda x: x.sharding, abstract(original, written)))
    first = open_checkpoints(tmp_path, 2, FINGERPRINT)
    assert first.latest() is None
    first.save(3, placed, DATA_STATE)
    first.close()

    again = open_checkpoints(tmp_path, 2, FINGERPRINT)
    assert again.latest() == 3
    wanted = abstract(original, asked)
    got, data_state, step = again.restore(wanted)
    assert_same(got, original)
    assert (data_state, step) == (DATA_STATE, 3)
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding == want.sharding
    again.close()


def test_the_best_is_kept_besides_the_last(tmp_path):
    """By its metric, over a restart too; a step without metrics, or with a NaN, is never the best."""
    checkpoints = open_checkpoints(tmp_path, 1, FINGERPRINT, best="eval/x")
    assert checkpoints.best() is None
    for step, value in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, math.nan)):
        checkpoints.save(step, state(step), DATA_STATE, None if value is None else {"eval/x": value, "y": 1.0})
    checkpoints.close()
    assert {folder.name for folder in tmp_path.iterdir()} == {"2", "5"}
    again = open_checkpoints(tmp_path, 1, FINGERPRINT, best="eval/x")
    assert (again.best(), again.latest()) == (2, 5)
    again.save(6, state(6), DATA_STATE, {"eval/x": 0.95})
    again.save(7, state(7), DATA_STATE)
    again.close()
    assert {folder.name for folder in tmp_path.iterdir()} == {"6", "7"}
    without = open_checkpoints(tmp_path, 1, FINGERPRINT)
    assert without.best() is None
    without.close()


def test_only_the_last_are_kept_and_none_is_written_twice(tmp_path):
    checkpoints = open_checkpoints(tmp_path, 2, FINGERPRINT)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), DATA_STATE)
    checkpoints.save(3, state(99), DATA_STATE)
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert_same(checkpoints.restore(abstract(state(), one_device()))[0], state(3))
    checkpoints.close()


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 7, tree), donate_argnums=0)
    original = np.random.default_rng(0).random((4000, 1024), np.float32)
    live = {"w": jnp.asarray(original) * 1}
    overwrite(jax.tree.map(jnp.copy, live))  # compiled, so that nothing delays the donation
    checkpoints = open_checkpoints(tmp_path, 2, FINGERPRINT)
    checkpoints.save(1, live, DATA_STATE)
    jax.block_until_ready(overwrite(live))
    checkpoints.wait()
    got, _, _ = checkpoints.restore({"w": jax.ShapeDtypeStruct(original.shape, original.dtype, sharding=one_device())})
    np.testing.assert_array_equal(got["w"], original)
    checkpoints.close()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fingerprint", "says"),
    [
        ({"model": {"layers": 3, "rope": 1e6}, "data": "0a1b"}, "model.layers is 2 there and 3 here"),
        ({"model": {"layers": 2, "rope": 1e6}, "data": "ffff"}, "data is '0a1b' there and 'ffff' here"),
        ({"model": {"layers": 2, "rope": 1e6}, "taste": "x"}, "taste is absent there and 'x' here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(fingerprint, says, tmp_path):
    mine = open_checkpoints(tmp_path, 2, FINGERPRINT)
    mine.save(5, state(), DATA_STATE)
    mine.close()
    other = open_checkpoints(tmp_path, 2, fingerprint)
    with pytest.raises(UserError, match=f"5 is a checkpoint of another run: {says}.* give another run folder"):
        other.restore(abstract(state(), one_device()))
    other.close()


def test_a_part_of_the_fingerprint_suffices_to_read(tmp_path):
    mine = open_checkpoints(tmp_path, 2, FINGERPRINT | {"sizes": (1, 2)})
    mine.save(5, state(1), DATA_STATE)
    mine.close()
    reader = open_checkpoints(tmp_path, 2, {"model": FINGERPRINT["model"], "sizes": (1, 2)})
    assert_same(reader.restore(abstract(state(), one_device()))[0], state(1))
    reader.close()


def test_a_run_without_a_checkpoint_says_so(tmp_path):
    checkpoints = open_checkpoints(tmp_path, 2, FINGERPRINT)
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        checkpoints.restore(abstract(state(), one_device()))
    checkpoints.close()


def test_another_shape_and_damage_are_said_in_a_sentence(tmp_path):
    checkpoints = open_checkpoints(tmp_path, 2, FINGERPRINT)
    checkpoints.save(1, state(), DATA_STATE)
    checkpoints.close()
    says = rf"cannot restore the checkpoint {tmp_path}/1: .*\. It is damaged, or of another model\. There is none .*"
    assert re.fullmatch(says, python("restore_rows", tmp_path, 16).stdout.strip())
    assert python("restore_rows", tmp_path, 8).stdout == "step 1\n"
    (tmp_path / "1" / FILES).unlink()  # what it tells of is another test's
    for data in (tmp_path / "1" / "state").rglob("d/*"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    assert re.fullmatch(says, python("restore_rows", tmp_path, 8).stdout.strip())


def restore_rows(folder, rows):
    """In a process of its own: orbax leaves the arrays it had not come to yet as coroutines of a closed event loop."""
    checkpoints = open_checkpoints(folder, 2, FINGERPRINT)
    try:
        print("step", checkpoints.restore(abstract(state(rows=int(rows)), one_device()))[2])
    except UserError as error:
        print(error)
    checkpoints.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep checkpoints in .*file/checkpoints: .* Give another run folder"):
        open_checkpoints(tmp_path / "file" / "checkpoints", 2, FINGERPRINT)


# ----------------------------------------------------------------------------------------------- killed, full, several


def test_a_run_killed_while_saving_restarts_from_the_step_before(tmp_path):
    process = python("killed", tmp_path)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.orbax-checkpoint-tmp"]
    checkpoints = open_checkpoints(tmp_path, 2, FINGERPRINT)
    got, data_state, step = checkpoints.restore(abstract(state(), one_device()))
    assert_same(got, state(1))
    assert (data_state, step) == (DATA_STATE, 1)
    checkpoints.save(4, state(4), DATA_STATE)
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "4"]
    checkpoints.close()


def killed(folder):
    """Saves a small step 1, then dies as soon as the folder of a large step 2 is there."""
    checkpoints = open_checkpoints(folder, 2, FINGERPRINT)
    checkpoints.save(1, state(1), DATA_STATE)
    checkpoints.wait()
    checkpoints.save(2, {"w": jnp.asarray(np.random.default_rng(0).random((50_000, 1024), np.float32))}, DATA_STATE)
    while not list(folder.glob("2.*/state.*/ocdbt.process_0")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_is_one_sentence_and_earlier_checkpoints_stay(small_disk, caplog):
    disk, resize = small_disk
    resize("4m")
    checkpoints = open_checkpoints(disk / "run", 2, FINGERPRINT)
    checkpoints.save(1, state(1), DATA_STATE)
    checkpoints.save(2, {"w": jnp.asarray(np.random.default_rng(0).random((2000, 1024), np.float32))}, DATA_STATE)
    with pytest.raises(UserError, match=r"cannot write a checkpoint .*: the disk is full\. .*step 1 is untouched") as e:
        checkpoints.wait()
    assert "\n" not in str(e.value)
    assert not caplog.records  # orbax's own tracebacks
    assert [path.name for path in (disk / "run").iterdir()] == ["1"]
    assert_same(checkpoints.restore(abstract(state(), one_device()))[0], state(1))
    checkpoints.save(3, state(3), DATA_STATE)
    checkpoints.close()
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["1", "3"]


@pytest.mark.long
def test_two_processes_save_what_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workers = [start("worker", tmp_path, address, str(i)) for i in range(2)]
    for worker in workers:
        _, stderr = worker.communicate(timeout=120)
        assert worker.returncode == 0, stderr
    checkpoints = open_checkpoints(tmp_path, 2, FINGERPRINT)
    assert checkpoints.latest() == 2
    assert_same(checkpoints.restore(abstract(state(), one_device()))[0], state(2))
    assert_same(checkpoints.restore(abstract(state(), rows_over(8)))[0], state(2))
    checkpoints.close()


def worker(folder, address, index):
    """One of two processes with four devices each: saves two steps, restores the last and compares its own part."""
    jax.distributed.initialize(address, 2, int(index))
    sharding = rows_over(8)

    def placed(original):
        def place(leaf, like):
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.jit(lambda: jax.random.key(int(original.step)), out_shardings=like.sharding)()
            return jax.make_array_from_callback(leaf.shape, like.sharding, lambda at: np.asarray(leaf)[at])

        return jax.tree.map(place, original, abstract(original, sharding))

    checkpoints = open_checkpoints(folder, 2, FINGERPRINT)
    for step in (1, 2):
        checkpoints.save(step, placed(state(step)), DATA_STATE)
    checkpoints.wait()
    got, data_state, step = checkpoints.restore(abstract(state(), sharding))
    assert (data_state, step) == (DATA_STATE, 2)
    own = [shard.data for leaf in jax.tree.leaves(got) for shard in leaf.addressable_shards]
    expected = [shard.data for leaf in jax.tree.leaves(placed(state(2))) for shard in leaf.addressable_shards]
    assert_same(own, expected)
    checkpoints.close()


def start(function, *arguments):
    """This file in another process, where `function` is called."""
    flags = "--xla_force_host_platform_device_count=4" if function == "worker" else ""
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, function, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def python(function, *arguments):
    process = start(function, *arguments)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


if __name__ == "__main__":
    {"killed": killed, "worker": worker, "restore_rows": restore_rows}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])


def test_the_updates_of_a_checkpoint_are_those_taken(tmp_path):
    """Read without the weights, of the step that is named."""
    params = {"w": jnp.ones((4, 3))}
    checkpoints = open_checkpoints(tmp_path / "checkpoints", 3, FINGERPRINT)
    for step, skipped in ((2, 0), (5, 3)):
        optimizer = optax.adamw(1e-3)
        tried = TrainState(jnp.int32(2 * step), params, optimizer.init(params), jnp.int32(skipped))
        checkpoints.save(step, tried, DATA_STATE)
    checkpoints.close()
    again = open_checkpoints(tmp_path / "checkpoints", 3, {})
    assert (again.updates(2), again.updates(5)) == (4, 7)
