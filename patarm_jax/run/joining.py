"""How the processes of a run find each other: nothing is begun before all are there, and who is missing is named."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from patarm_jax.config.sections import MeshSection
from patarm_jax.run.coordinator import BYE, LATE, PORT_PATIENCE
from patarm_jax.run.process import print_aside
from patarm_jax.types import UsageError, UserError

_SAID_EVERY = 30.0  # seconds between two lines on who is missing
_SAYING = 5.0  # seconds that one word to process 0, and its answer, may take
_REACHED_AGAIN = 1.0  # seconds between two attempts to reach process 0


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, and where they meet."""

    host: str
    port: int
    processes: int
    process: int
    devices: list[int] | None  # the devices of this machine that this process takes; None: all

    @property
    def address(self) -> str:
        """host:port, an IPv6 host in brackets, as JAX wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_place(section: MeshSection) -> Place:
    """From the config and, where it is silent, from what started the processes: Slurm, Open MPI, Kubernetes, a TPU.

    JAX's own variables hold too: JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_PORT, and JAX_LOCAL_DEVICE_IDS, without which
    Slurm's and Open MPI's processes take one GPU each.

    Raises:
        UsageError: when something is still unknown, or cannot be.
    """
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks; there is no public way

    named = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    try:
        address, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            section.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
            section.processes or None,
            None if section.process_id < 0 else section.process_id,
            [int(one) for one in named.split(",")] if named else None,
            None,
            section.join_seconds,
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise _unknown(" ".join(str(error).split())[:300].rstrip(".")) from error
    lacking = [
        name
        for name, value in (("coordinator", address), ("processes", processes), ("process_id", process))
        if value is None
    ]
    if lacking or address is None or processes is None or process is None:
        names = " and ".join(f"mesh.{name}" for name in lacking)
        raise _unknown(f"nothing here says {names}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"mesh.coordinator is {address}. Give the host and port of process 0, such as host-0:8476.")
    if not 0 <= process < processes:
        raise UsageError(
            f"mesh.process_id is {process} and mesh.processes is {processes}; allowed is 0 to {processes - 1}."
        )
    return Place(
        host=host.strip("[]"),
        port=int(port),
        processes=processes,
        process=process,
        devices=None if devices is None else list(devices),
    )


def _unknown(what: str) -> UsageError:
    return UsageError(
        f"mesh.distributed is auto and the other processes were not found: {what}. "
        "Set mesh.coordinator, mesh.processes and mesh.process_id, or mesh.distributed to none."
    )


def join(place: Place, join_seconds: float, heartbeat: int) -> subprocess.Popen[bytes] | None:
    """Returns when all processes are there and know each other; process 0 gets the coordinator that it started.

    Raises:
        UserError: when they do not come in time, or this process is asked to stop before.
    """
    coordinator: subprocess.Popen[bytes] | None = None
    try:
        with _told_to_stop(place):
            if place.process == 0:
                coordinator = _start_coordinator(place, heartbeat)
            _wait_in_lobby(place, join_seconds)
            _initialize(place, heartbeat)
    except BaseException as error:
        dismiss(coordinator, str(error) or "it was stopped.")  # the others are told so
        raise
    return coordinator


def tell_why_absent(section: MeshSection, sentence: str) -> None:
    """Tells those that wait for this process why it does not come, as far as they can be found in LATE seconds."""
    with contextlib.suppress(UserError, OSError):
        place = find_place(section)
        if place.process == 0:
            dismiss(_start_coordinator(place, section.heartbeat_seconds), sentence)
            return
        began, is_said = time.monotonic(), False
        while time.monotonic() < began + LATE:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((place.host, place.port), timeout=5) as connection,
            ):
                connection.sendall(json.dumps(_hello(place) | {"failed": sentence}).encode() + b"\n")
                connection.settimeout(_SAYING)
                connection.recv(4096)  # the same words, which all hear now
                return
            if not is_said and time.monotonic() > began + _SAYING:
                print_aside(f"process {place.process} cannot take part; it looks for process 0, to say so: {sentence}")
                is_said = True
            time.sleep(_REACHED_AGAIN)


def _hello(place: Place) -> dict[str, object]:
    return {
        "process": place.process,
        "processes": place.processes,
        "who": f"{socket.gethostname()}, pid {os.getpid()}",
    }


def dismiss(coordinator: subprocess.Popen[bytes] | None, last_words: str = BYE) -> None:
    """Ends the coordinator: at once with BYE, when nobody needs it any more."""
    if coordinator is not None and coordinator.stdin is not None:
        with contextlib.suppress(OSError):
            coordinator.stdin.write(" ".join(last_words.split()).encode() + b"\n")
            coordinator.stdin.close()


def _start_coordinator(place: Place, heartbeat: int) -> subprocess.Popen[bytes]:
    """A child that keeps the port; UserError when it cannot."""
    command = [sys.executable, "-m", "patarm_jax.run.coordinator"]
    started = subprocess.Popen(
        [*command, str(place.port), str(place.processes), str(heartbeat)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C at the terminal is not meant for it
    )
    assert started.stdout is not None
    for line in started.stdout:
        message = json.loads(line)
        if "listening" in message:
            return started
        if "refused" in message:
            raise UserError(
                f"process 0 cannot listen on port {place.port}: {message['refused']}. Give another port in "
                "mesh.coordinator (for Slurm, in the environment as JAX_COORDINATOR_PORT), or end what uses this one."
            )
        print_aside(
            f"port {place.port} is in use, perhaps by an earlier run that is ending; trying for {PORT_PATIENCE:.0f} s"
        )
    said = " ".join(started.stderr.read().decode(errors="replace").split())[-300:] if started.stderr else ""
    raise UserError(f"process 0 could not start the program that the others are to find ({' '.join(command)}): {said}")


class Terminated(UserError):
    """SIGTERM before there was anything to save; the exit code is the shell's for it, so that a scheduler sees it."""

    exit_code = 128 + signal.SIGTERM


@contextlib.contextmanager
def _told_to_stop(place: Place) -> Iterator[None]:
    """SIGTERM while waiting is a sentence too."""

    def stop(_number: int, _frame: object) -> None:
        raise Terminated(
            f"process {place.process} was asked to stop while it waited for the others. Nothing had begun."
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Progress:
    """Who is missing, said now and then, and for how long."""

    def __init__(self, place: Place, join_seconds: float) -> None:
        self.place, self.limit = place, join_seconds
        self.begun = self.said = time.monotonic()
        self.missing: list[int] | None = None  # None: process 0 is not reached

    def hear(self, missing: list[int]) -> None:
        """Takes note of who is missing now."""
        if self.missing is None and missing:
            print_aside(f"process {self.place.process} of {self.place.processes} waits for {listed(missing)}")
        self.missing = missing

    def look(self) -> None:
        """Says it when it is time; UserError when the time is over."""
        now = time.monotonic()
        if now - self.begun > self.limit:
            raise UserError(
                f"{self._what()} after {self.limit:.0f} s (mesh.join_seconds). {self._remedy()} "
                "Then start all processes again."
            )
        if now - self.said >= _SAID_EVERY:
            self.said = now
            print_aside(f"process {self.place.process}: {self._what()}; waited {now - self.begun:.0f} s")

    def _what(self) -> str:
        if self.missing is None:
            return f"process 0 is not reached at {self.place.address}"
        return f"missing {listed(self.missing)} of {self.place.processes}"

    def _remedy(self) -> str:
        if self.missing is None:
            return (
                "Start process 0, and see that mesh.coordinator names its host and a port that is open to the others."
            )
        return "Start them with the same mesh.coordinator and mesh.processes, and look at what they say."


def listed(processes: list[int]) -> str:
    """Process ids for a sentence.

    >>> listed([3]), listed([1, 2]), listed(list(range(12)))
    ('process 3', 'processes 1, 2', 'processes 0, 1, 2, 3, 4, 5, 6, 7 and 4 more')
    """
    shown = ", ".join(map(str, processes[:8]))
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return f"process{'es' if len(processes) > 1 else ''} {shown}{more}"


_connections: list[socket.socket] = []  # to the coordinator; it sees by them which processes there still are


def _wait_in_lobby(place: Place, join_seconds: float) -> None:
    """Until the coordinator says that all are there."""
    progress = _Progress(place, join_seconds)
    while True:
        with contextlib.suppress(OSError), contextlib.ExitStack() as closed_again:
            connection = socket.create_connection((place.host, place.port), timeout=5)
            closed_again.callback(connection.close)
            connection.sendall(json.dumps(_hello(place)).encode() + b"\n")
            if _listen(place, connection, progress):
                _connections.append(connection)
                closed_again.pop_all()
                return
        progress.missing = None
        progress.look()
        time.sleep(_REACHED_AGAIN)


def _listen(place: Place, connection: socket.socket, progress: _Progress) -> bool:
    """What the coordinator says; True when all are there, False when the connection is lost."""
    received = b""
    while True:
        progress.look()
        if not select.select([connection], [], [], 1.0)[0]:
            continue
        part = connection.recv(4096)
        if not part and progress.missing is not None:
            raise UserError("process 0 went away while the processes were joining. Start all of them again.")
        if not part:
            return False
        *lines, received = (received + part).split(b"\n")
        for line in lines:
            if _read(place, line, progress):
                return True


def _read(place: Place, line: bytes, progress: _Progress) -> bool:
    try:
        message = dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{place.address} answers, and is not process 0 of a run of this version. Give another port in "
            "mesh.coordinator."
        ) from error
    if "refused" in message:
        raise UserError(message["refused"])
    if "missing" in message:
        progress.hear(message["missing"])
    return "go" in message


def _initialize(place: Place, heartbeat: int) -> None:
    """Joins JAX's service, where all the others are about to be too."""
    # Process 0 would start a service of its own: nobody finds it on this address.
    own: dict[str, Any] = {"coordinator_bind_address": "127.0.0.1:0"} if place.process == 0 else {}
    try:
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            place.devices,
            heartbeat_timeout_seconds=heartbeat,
            initialization_timeout=120,
            **own,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"the processes met and could not join: {reason}. Start all of them again.") from error
