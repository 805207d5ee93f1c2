"""What a run writes is exact, readable by others, and the same after a resume as without one."""

import itertools
import json
import math
import os
import pty
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from tensorboardX.proto import event_pb2

from patarm_jax.run import metrics
from patarm_jax.run.metrics import open_metrics
from patarm_jax.run.progress import progress
from patarm_jax.run.rollouts import SCHEMA, RolloutRow, show_judgements, write_rollouts
from patarm_jax.run.timing import Timer
from patarm_jax.types import Status, UserError


def write_steps(folder, steps, done=0, **others):
    writer = open_metrics(folder, done, **{"tensorboard": False, "wandb_project": "", "config": {}} | others)
    for step in steps:
        seconds = {"time/step": 0.5 + done}
        writer.write(step, {"reward": 0.1 * step, "loss": jnp.float32(step) / 3, "pairs": np.int32(step)} | seconds)
    writer.close()
    return folder / "metrics.jsonl"


def without_time(path):
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
        for line in path.read_text().splitlines()
    ]


# ------------------------------------------------------------------------------------------------------------- lines


def test_a_line_is_exact_and_sorted(tmp_path):
    path = write_steps(tmp_path / "run", [1, 2])
    third, two_thirds = float(np.float32(1) / 3), float(np.float32(2) / 3)
    assert path.read_text() == (
        f'{{"step": 1, "loss": {third!r}, "pairs": 1, "reward": 0.1, "time/step": 0.5}}\n'
        f'{{"step": 2, "loss": {two_thirds!r}, "pairs": 2, "reward": 0.2, "time/step": 0.5}}\n'
    )


def test_what_is_not_finite_is_null(tmp_path):
    writer = open_metrics(tmp_path, 0, tensorboard=True, wandb_project="", config={})
    writer.write(1, {"a": math.nan, "b": jnp.inf, "c": -np.inf, "d": 0.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 0.0}\n'
    assert scalars(tmp_path) == [("d", 1, 0.0)]


@pytest.mark.parametrize("half", ["", '{"step": 6, "lo', '{"step": 4}'])
def test_resumed_equals_uninterrupted(half, tmp_path):
    whole = write_steps(tmp_path / "whole", range(1, 7))
    cut = write_steps(tmp_path / "cut", range(1, 6))  # the last checkpoint was at step 3
    with cut.open("a") as stream:
        stream.write(half)  # killed while writing
    write_steps(tmp_path / "cut", range(4, 7), done=3)
    assert without_time(cut) == without_time(whole)
    assert [path.name for path in cut.parent.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_begins_an_empty_file(tmp_path):
    write_steps(tmp_path, range(1, 6))
    assert len(without_time(write_steps(tmp_path, [1]))) == 1


def test_a_line_that_is_no_metrics_is_refused_by_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2 is not metrics"):
        write_steps(tmp_path, [3], done=2)


def test_a_killed_run_loses_no_line(tmp_path):
    writer = open_metrics(tmp_path, 0, tensorboard=False, wandb_project="", config={})
    writer.write(1, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'  # and nothing was closed
    writer.close()


def test_a_full_disk_is_one_sentence(tmp_path):
    writer = open_metrics(tmp_path, 0, tensorboard=False, wandb_project="", config={})
    with open("/dev/full", "ab", buffering=0) as full:
        with pytest.raises(UserError, match=r"cannot write /dev/full: No space left on device; .*\. Free some space"):
            metrics.MetricsWriter(full, None, None).write(1, {"loss": 1.0})
    writer.close()


def test_other_processes_write_and_show_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path, [1, 2], tensorboard=True, wandb_project="no such module is imported")
    with progress(2) as report:
        report(1, {"loss": 1.0})
    show_judgements(1, ROWS)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------- TensorBoard and W&B


def events(folder):
    """Everything in a run's event files, read as the records they are: length, crc, event, crc."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder):
    return [(value.tag, event.step, value.simple_value) for event in events(folder) for value in event.summary.value]


def test_tensorboard_hides_the_steps_that_are_done_again(tmp_path):
    write_steps(tmp_path, [4, 5], done=3, tensorboard=True)
    starts = [event.step for event in events(tmp_path) if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [4]


def test_tensorboard_has_the_same_numbers(tmp_path):
    path = write_steps(tmp_path, [1, 2], tensorboard=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = [(k, line["step"], float(np.float32(v))) for line in lines for k, v in line.items() if k != "step"]
    assert scalars(tmp_path) == expected


@pytest.mark.parametrize("set_back", [0, 86_400 * 400])
def test_event_files_are_read_in_the_order_they_were_written(set_back, tmp_path, monkeypatch):
    """TensorBoard reads them in the order of their names, and a start hides the steps read before it."""
    theirs = tmp_path / "tensorboard" / f"events.out.tfevents.{int(time.time()) - 5}.node1.17.0"  # an earlier version's
    theirs.parent.mkdir()
    theirs.write_bytes(b"")
    for done in (0, 2, 3):  # within a second, or less
        write_steps(tmp_path, range(done + 1, done + 3), done=done, tensorboard=True)
        now = time.time() - set_back
        monkeypatch.setattr(time, "time", lambda now=now: now)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4
    starts = [event.step for event in events(tmp_path) if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [1, 3, 4]
    assert [step for tag, step, _ in scalars(tmp_path) if tag == "reward"] == [1, 2, 3, 4, 4, 5]


def test_tensorboard_shows_every_step_after_the_clock_was_set_back(tmp_path, monkeypatch):
    """By TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_steps(tmp_path, range(1, 7), tensorboard=True)
    before = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: before)
    write_steps(tmp_path, range(5, 9), done=4, tensorboard=True)
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [each.step for each in read.Scalars("reward")] == list(range(1, 9))


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **arguments):
            self.arguments, self.logged, self.finished = arguments, [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values["reward"]))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **arguments: Run(**arguments)))
    write_steps(tmp_path, [1], wandb_project="judges", config={"seed": 3})
    write_steps(tmp_path, [2], done=1, wandb_project="judges", config={"seed": 3})
    first, second = runs
    assert first.arguments == second.arguments
    assert first.arguments["project"] == "judges" and first.arguments["config"] == {"seed": 3}
    assert first.logged + second.logged == [(1, 0.1), (2, 0.2)]
    assert first.finished and second.finished


REMEDIES = "Run `wandb login` once or set WANDB_API_KEY; WANDB_MODE=offline keeps everything in the run folder"


def test_weights_and_biases_without_a_key(tmp_path, monkeypatch):
    class UsageError(Exception):
        """As wandb's, which derives from Exception."""

    def init(**arguments):
        assert not sys.stdin.isatty()  # else it would ask for the key
        raise UsageError("No API key configured. Use `wandb login` to log in.\n")

    before = sys.stdin
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError) as refused:
        write_steps(tmp_path, [1], wandb_project="judges")
    said = str(refused.value)
    assert said.startswith("run.wandb_project is 'judges', and Weights & Biases cannot be used: No API key configured.")
    assert REMEDIES in said and "\n" not in said and sys.stdin is before


@pytest.mark.parametrize("terminal", [False, True])
def test_the_real_weights_and_biases_without_a_key(terminal, tmp_path):
    """It fails with a reason instead of asking, at a terminal too; offline it needs no key."""
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    code = textwrap.dedent(f"""
        from pathlib import Path
        from patarm_jax.run.metrics import open_metrics
        from patarm_jax.types import UserError
        try:
            writer = open_metrics(Path({str(tmp_path / "run")!r}), 0, tensorboard=False, wandb_project="p", config={{}})
            writer.write(1, {{"loss": 1.0}})
            writer.close()
            print("written")
        except UserError as error:
            print("refused:", error)
        """)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    kept |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = {}
    for mode in ("online", "offline"):
        ours, theirs = pty.openpty() if terminal else (None, subprocess.DEVNULL)
        done[mode] = subprocess.run(
            [sys.executable, "-c", code], env={**kept, "WANDB_MODE": mode}, stdin=theirs, stderr=theirs,
            stdout=subprocess.PIPE, text=True, timeout=100,
        ).stdout  # fmt: skip
        if terminal:
            os.close(ours)
            os.close(theirs)
    assert "refused: run.wandb_project is 'p'" in done["online"] and REMEDIES in done["online"]
    assert "written" in done["offline"] and list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_without_wandb_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"'judges' and wandb is not installed. Run `pip install 'patarm-jax\[wandb\]'`"
    ):
        write_steps(tmp_path, [1], wandb_project="judges")


# ------------------------------------------------------------------------------------------------- time


def test_phases_add_up(monkeypatch):
    monkeypatch.setattr(metrics.time, "perf_counter", itertools.count(0, 1.5).__next__)
    timer = Timer()
    for name in ("sample", "update", "sample"):
        with timer.phase(name):
            pass
    assert timer.seconds == {"time/sample": 3.0, "time/update": 1.5}


# --------------------------------------------------------------------------------------------------------- judgements

ROWS = [
    RolloutRow("p1", "chosen", "<answer>8</answer>", Status.OK, 8.0, 1.4, 0.7),
    RolloutRow("p1", "rejected", "Größe \N{CJK UNIFIED IDEOGRAPH-4E2D}\n[red]", Status.BAD_TAGS, None, -1.5, -0.7),
]


def test_rollouts_come_back_from_parquet(tmp_path):
    path = write_rollouts(tmp_path / "rollouts", 10, ROWS)
    assert path == tmp_path / "rollouts" / "step_000010.parquet"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    back = [
        RolloutRow(**row | {"status": Status[row["status"]]}) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]
    assert back == ROWS
    assert pyarrow.parquet.read_schema(write_rollouts(tmp_path, 11, [])).equals(SCHEMA)


def test_rollouts_on_a_full_disk_leave_nothing_and_keep_what_was_there(small_disk):
    kept = write_rollouts(small_disk, 1, ROWS)
    noise = "".join(map(chr, np.random.default_rng(0).integers(0x4E00, 0x9000, 4_000_000)))
    with pytest.raises(
        UserError, match=r"cannot write .*step_000002.parquet: No space left on device; .*\. Free some space"
    ):
        write_rollouts(small_disk, 2, [RolloutRow("p", "chosen", noise, Status.OK, 1.0, 1.0, 1.0)])
    assert list(small_disk.iterdir()) == [kept]
    assert pyarrow.parquet.read_table(kept).num_rows == 2


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_shown_judgements(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    hostile = RolloutRow("p2", "chosen", "\x1b[31mred\x07 " + "x" * 50 + " 7", Status.OK, 7.0, 0.0, 0.0)
    show_judgements(12, [*ROWS, hostile], characters=30)
    shown = capsys.readouterr().out
    assert "judgements at step 12" in shown
    assert "[red]" in shown and "BAD_TAGS" in shown and "-1.50" in shown
    assert "\x1b" not in shown and "\x07" not in shown
    assert "�[31mred� xxxxxxxxxx … xxxxxxxx 7" in shown
    assert max(map(len, shown.splitlines())) <= 100
