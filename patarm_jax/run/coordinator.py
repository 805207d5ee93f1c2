"""Where the processes of a run meet; process 0 starts `python -m patarm_jax.run.coordinator PORT PROCESSES HEARTBEAT`.

It is a process of its own so that it outlives process 0: JAX ends every process within a second, by a signal and with a
C++ stack, when the coordination service is gone, and then none could say what happened. First it keeps a lobby on the
port: processes say who they are, as lines of JSON, and learn who is missing. When all are there, JAX's service takes
the same port. Nothing of JAX is imported before, and no device is ever touched.
"""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

BYE = "bye"  # from process 0, when all have ended well; without it, it died
LINGERS = 10.0  # seconds beyond the heartbeat that it stays for the others, which by then have heard of the end
# Seconds for which a refusal is told to those that come after it, and for which a process that cannot take part looks
# for the others: hosts that are started together come a few apart.
LATE = 20.0
PORT_PATIENCE = 40.0  # as long as the coordinator of a run that has just failed may hold the port


@dataclass
class Lobby:
    """Who has come so far."""

    processes: int
    here: dict[int, tuple[asyncio.StreamWriter, str]] = field(default_factory=dict)  # id → connection, who it is
    empty: asyncio.Event = field(default_factory=asyncio.Event)  # nobody is left, when all had come

    @property
    def missing(self) -> list[int]:
        """The ids of those that have not come, or have gone again."""
        return [one for one in range(self.processes) if one not in self.here]

    def refusal(self, hello: Mapping[str, object]) -> str:
        """Why a process cannot take part; empty when it can."""
        number, who = hello["process"], hello["who"]
        if "failed" in hello:
            return f"process {number} ({who}) ended: {hello['failed']}"
        if hello["processes"] != self.processes:
            return (
                f"process 0 was started for {self.processes} processes, and process {number} ({who}) for "
                f"{hello['processes']}. Give all the same mesh.processes."
            )
        if number in self.here:
            return (
                f"two processes are number {number}: {self.here[number][1]} and {who}. Give each its own "
                "mesh.process_id, from 0 on, and end what is left of an earlier start."
            )
        return ""

    def tell_all(self, message: Mapping[str, object]) -> None:
        """Sends a line to each process that is here."""
        for writer, _ in self.here.values():
            _send(writer, message)


def _send(writer: asyncio.StreamWriter, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):
        writer.write(json.dumps(message).encode() + b"\n")


async def gather(listening: socket.socket, lobby: Lobby, parent: asyncio.Future[str]) -> bool:
    """Waits until all are there; False when they cannot be, which each has been told.

    Args:
        listening: where they come.
        lobby: empty.
        parent: is done with the last words of process 0, should that end.
    """
    complete: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    told: set[int] = set()  # who has heard of a refusal
    all_told = asyncio.Event()

    def tell(numbers: Iterable[int]) -> None:
        told.update(numbers)
        if told.issuperset(range(lobby.processes)):
            all_told.set()

    def decide(refusal: str) -> None:
        if not complete.done():
            complete.set_result(refusal)

    async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = json.loads(await reader.readline())
            refusal = complete.result() if complete.done() else lobby.refusal(hello)
        except (ValueError, KeyError, TypeError, OSError):  # something else found this port
            writer.close()
            return
        if refusal:
            _send(writer, {"refused": refusal})
            tell([hello["process"]])
            decide(refusal)
            return
        lobby.here[hello["process"]] = writer, hello["who"]
        lobby.tell_all({"missing": lobby.missing})
        if not lobby.missing:
            decide("")
        with contextlib.suppress(OSError):
            await reader.read()  # ends when the process does
        del lobby.here[hello["process"]]
        if not complete.done():
            lobby.tell_all({"missing": lobby.missing})
        elif not lobby.here:
            lobby.empty.set()

    server = await asyncio.start_server(receive, sock=listening)
    parent.add_done_callback(lambda _: decide(f"process 0 ended before all had joined: {parent.result()}"))
    refusal = await complete
    if refusal:
        lobby.tell_all({"refused": refusal})
        tell([0, *lobby.here])
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(all_told.wait(), LATE)  # for those that come only now
    server.close()
    return not refusal


def listen(port: int, patience: float) -> socket.socket:
    """A socket that nothing else listens on; raises OSError when another program keeps the port."""
    until, has_told = time.monotonic() + patience, False
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
        if not has_told:
            has_told = _tell({"waiting": port})
        time.sleep(1)


def _tell(message: Mapping[str, object]) -> bool:
    """Tells process 0, which has started this process."""
    with contextlib.suppress(OSError):
        print(json.dumps(message), flush=True)
    return True


async def serve(port: int, processes: int, heartbeat: int) -> None:
    """The lobby, then the service, until process 0 has ended."""
    loop = asyncio.get_running_loop()
    parent: asyncio.Future[str] = loop.create_future()

    def read_parent() -> None:
        last_words = sys.stdin.buffer.readline().decode(errors="replace").strip()
        loop.call_soon_threadsafe(parent.set_result, last_words or "it was killed.")

    threading.Thread(target=read_parent, daemon=True).start()
    try:
        listening = listen(port, PORT_PATIENCE)
    except OSError as error:
        _tell({"refused": os.strerror(error.errno) if error.errno else str(error)})
        return
    _tell({"listening": port})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads what the service says from now on
    lobby = Lobby(processes)
    if not await gather(listening, lobby, parent):
        return
    from jaxlib import _jax  # JAX's public way to this service starts it inside process 0

    service = _jax.get_distributed_runtime_service(
        f"[::]:{port}" if socket.has_dualstack_ipv6() else f"0.0.0.0:{port}",
        processes,
        heartbeat_timeout=heartbeat,
        shutdown_timeout=1,
        recoverable=True,  # a lost process is told to those who ask, and aborts no other
    )
    lobby.tell_all({"go": True})
    if await parent != BYE:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(lobby.empty.wait(), heartbeat + LINGERS)
    del service


def main() -> None:
    """Runs until process 0 has ended, whatever signals its group is sent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    port, processes, heartbeat = map(int, sys.argv[1:])
    asyncio.run(serve(port, processes, heartbeat))
    os._exit(0)


if __name__ == "__main__":
    main()
