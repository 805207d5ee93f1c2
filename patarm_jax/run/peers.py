"""The other processes of a run, watched: when one is lost, stuck, stopped or wrong, every process ends and says why.

Two threads watch while the main thread works. One asks JAX's coordination service who is alive, which hears of each
process from a thread that needs no Python: a process that is busy is alive, one that is frozen or killed is not. The
other reads the last words of those that ended with an error, and where everyone is. A process ends by `os._exit`: one
that waits in a collective for a process that is gone cannot be ended otherwise, and JAX's own end would wait for all.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import jaxlib

from patarm_jax import __version__
from patarm_jax.config.load import shared_settings
from patarm_jax.config.recipes import EvalConfig, JudgeConfig, RubricsConfig
from patarm_jax.config.scoring import PolicyEvalConfig
from patarm_jax.config.sections import MeshSection
from patarm_jax.config.training import RunConfig
from patarm_jax.run.joining import dismiss, find_place, join, listed
from patarm_jax.run.process import note_signals, print_aside
from patarm_jax.types import UsageError, UserError

_ROOT = "patarm"
_NAMED_EVERY = 60.0  # seconds
_LOOK_EVERY = 1.0  # seconds
COMPILING, ASKING = "compiling", "asking"  # what a place begins with where waiting long is no sign of anything
_RESUME = "Start the same command again on all of them: the run goes on from its last checkpoint."
# How a collective, or the coordination service, tells that another process is gone.
_LOST = ("Gloo", "gloo", "NCCL", "nccl", "Connection closed", "Connection reset", "Socket closed", "UNAVAILABLE")


@dataclass(frozen=True)
class Position:
    """Where a process is: it has come past `count` places, and stands at the last of them."""

    count: int = 0
    where: str = "starting"


@dataclass
class _Waiting:
    """How long one process has been behind."""

    position: Position
    since: float
    said: float


@dataclass
class Peers:
    """This process among the others."""

    client: Any
    process: int
    processes: int
    heartbeat: int
    stall_seconds: float
    coordinator: subprocess.Popen[bytes] | None  # process 0's child that runs the service; None in the others
    position: Position = Position()
    arrived: float = field(default_factory=time.monotonic)
    gathered: int = 0  # how often values were exchanged
    is_ending: bool = False
    stop_asked: bool = False  # by any process
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    ends: threading.Lock = field(default_factory=threading.Lock)

    def watch(self) -> None:
        """Starts the two threads."""
        for target in (self._watch_lives, self._watch_words):
            threading.Thread(target=target, daemon=True, name=target.__name__).start()

    # --------------------------------------------------------------------------------------------------- agreement

    def gather(self, what: str, value: str) -> list[str]:
        """The value of each process, on every one, when all have come here; not by the devices, so as long as it takes.

        Args:
            what: they come for, as those are told who wait for another.
            value: of this process.
        """
        self.gathered += 1
        self.arrive(what)
        number = self.gathered
        # Process 0 reads all and tells all: were each to read all, a thousand would send a million requests.
        self._set(f"values/{number}/{self.process}", value)
        if self.process == 0:
            values = [self._get(f"values/{number}/{one}") for one in range(self.processes)]
            self._set(f"gathered/{number}", json.dumps(values))
            return values
        return [str(one) for one in json.loads(self._get(f"gathered/{number}"))]

    def agree(self, what: str, values: Mapping[str, object]) -> None:
        """Refuses, on every process alike, to go on when these differ between processes.

        Args:
            what: is compared, such as "their settings".
            values: by name; JSON.

        Raises:
            UsageError: naming the first value that differs, and on which processes.
        """
        mine = json.dumps(dict(values), sort_keys=True)
        # Most are alike: of each process a digest is read, and the values of those alone that differ.
        self._set(f"compared/{self.gathered}/{self.process}", mine)
        number = self.gathered
        digests = self.gather(f"comparing {what}", hashlib.sha256(mine.encode()).hexdigest())
        if len(set(digests)) > 1:
            unlike = [digests.index(one) for one in dict.fromkeys(digests)]
            raise UsageError(
                _difference(what, digests, {one: json.loads(self._get(f"compared/{number}/{one}")) for one in unlike})
            )

    def told(self, what: str, value: str) -> str:
        """The value that process 0 gives, on every process."""
        return self.gather(what, value)[0]

    # ----------------------------------------------------------------------------------------------------- position

    def arrive(self, where: str) -> None:
        """Notes that this process has come to a place in the program that all processes pass in the same order."""
        self.position = Position(self.position.count + 1, where)
        self.arrived = time.monotonic()

    def get_on(self, where: str) -> None:
        """Notes that this process is getting on at a place where it does what the others do not wait for yet."""
        self.position = Position(self.position.count, where)

    def ask_to_stop(self) -> None:
        """Tells the others that this process was asked to stop."""
        self.stop_asked = True
        self._set(f"stop/{self.process}", "")

    # --------------------------------------------------------------------------------------------------------- ends

    def end(self, code: int) -> NoReturn:
        """Ends well, together with the others: process 0 last, since where they meet is its own."""
        self.gather("the end", "")
        self._set(f"done/{self.process}", "")
        self.is_ending = True
        self._wait_for_others("done")
        if self.process == 0:
            self._wait_for_others("bye")
            time.sleep(0.5)  # for the last to be gone
            dismiss(self.coordinator)
        else:
            self._set(f"bye/{self.process}", "")
        _exit(code)

    def fail(self, error: BaseException, said: str, code: int) -> NoReturn:
        """Ends because of an error here, and leaves its sentence to the others.

        An error that only says that another process is gone waits for the watching threads, which know which.
        """
        if _tells_of_a_lost_process(error):
            time.sleep(self.heartbeat + 5)
        known = isinstance(error, (UserError, KeyboardInterrupt, BrokenPipeError))
        where = "" if known else "".join(traceback.format_exception(error))
        with self.ends:
            self.is_ending = True
            self._leave(said, code, where)

    def _leave(self, said: str, code: int, where: str = "") -> NoReturn:
        """Says why, to the others and here, and ends; `self.ends` is held."""
        with contextlib.suppress(Exception):
            self._set(f"left/{self.process}", json.dumps({"said": said, "code": code, "host": socket.gethostname()}))
        printing = print_aside(f"{where}patarm: {said}")
        if self.process == 0:  # where this process ends with its machine or container, so does the place where all meet
            self._wait_for_others("heard", "left")
        printing.join(2)
        os._exit(code)

    def _wait_for_others(self, *words: str) -> None:
        """Until each of the others has said one of these, or may be taken for dead."""
        until, others = time.monotonic() + self.heartbeat + 5, set(range(self.processes)) - {self.process}
        with contextlib.suppress(Exception):
            while time.monotonic() < until and not others <= {one for word in words for one in self._all(word)}:
                time.sleep(0.1)

    def _end_because(self, sentence: str, code: int = 1) -> None:
        with self.ends:
            if not self.is_ending:
                with contextlib.suppress(Exception):
                    self._set(f"heard/{self.process}", "")
                _exit(code, f"\npatarm: {sentence}")

    # ----------------------------------------------------------------------------------------------------- watching

    def _watch_lives(self) -> None:
        failing_since: float | None = None
        while not self.is_ending:
            try:
                alive = self.client.get_live_nodes(list(range(self.processes)))
            except Exception as error:
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > self.heartbeat:
                    self._end_because(
                        f"the machine of process 0, where all meet, does not answer: {_brief(error)}. {_RESUME}"
                    )
                time.sleep(_LOOK_EVERY)
                continue
            failing_since = None
            lost = [one for one in range(self.processes) if one not in alive]
            if lost:
                time.sleep(2 * _LOOK_EVERY)  # one that ended with an error has left its sentence, which says more
                lost = [one for one in lost if one not in self._all("done")]
            if lost:
                self._end_because(
                    f"{listed(lost)} of {self.processes} {'is' if len(lost) == 1 else 'are'} gone or frozen "
                    f"(mesh.heartbeat_seconds {self.heartbeat}). {_RESUME}"
                )
                return
            time.sleep(_LOOK_EVERY)

    def _watch_words(self) -> None:
        told = Position()
        while not self.is_ending:
            with contextlib.suppress(Exception):  # the other thread tells that the service is gone
                for process, text in self._all("left").items():
                    if process != self.process:
                        word = json.loads(text)
                        self._end_because(f"process {process} ({word['host']}) ended: {word['said']}", word["code"])
                self.stop_asked = self.stop_asked or bool(self._all("stop"))
                if self.position != told:
                    told = self.position
                    self._set(f"at/{self.process}", json.dumps(dataclasses.astuple(told)))
                self._look_for_stragglers()
            time.sleep(_LOOK_EVERY)

    def _look_for_stragglers(self) -> None:
        """Names processes that have long been behind this one, and ends when it is too long."""
        mine, now, patience = self.position, time.monotonic(), min(_NAMED_EVERY, self.stall_seconds)
        if now - self.arrived < patience:
            self.waiting.clear()
            return
        there = {one: Position(*json.loads(text)) for one, text in self._all("at").items()}
        for process in range(self.processes):
            position = there.get(process, Position())
            if position.count >= mine.count:
                self.waiting.pop(process, None)
                continue
            seen = self.waiting.get(process)
            if seen is None or seen.position != position:
                since = self.arrived if seen is None else now
                self.waiting[process] = seen = _Waiting(position, since, -math.inf)
            waited = now - seen.since
            what = (
                f"process {process} has been at “{position.where}” for {waited:.0f} s, while process {self.process} "
                f"waits for it at “{mine.where}”"
            )
            if waited > self.stall_seconds and not position.where.startswith((COMPILING, ASKING)):
                with self.ends:
                    if not self.is_ending:
                        self.is_ending = True
                        self._leave(f"{what}: longer than mesh.stall_minutes. {_RESUME}", 1)
            if waited >= patience and now - seen.said >= _NAMED_EVERY:
                seen.said = now
                if not any(there[one].count >= mine.count for one in range(self.process) if one in there):
                    print_aside(f"\n{what}")  # the first of those that wait says it

    # -------------------------------------------------------------------------------------------------- what is said

    def _set(self, key: str, value: str) -> None:
        self.client.key_value_set(f"{_ROOT}/{key}", value, allow_overwrite=True)

    def _get(self, key: str) -> str:
        """Waits for it in steps, so that signals are heard."""
        while True:
            try:
                return self.client.blocking_key_value_get(f"{_ROOT}/{key}", 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _all(self, folder: str) -> dict[int, str]:
        """Process → what it has set."""
        found = self.client.key_value_dir_get(f"{_ROOT}/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in found}


def _difference(what: str, digests: list[str], values: Mapping[int, Mapping[str, object]]) -> str:
    """The first name in which processes differ, with each value and who has it.

    >>> _difference("their settings", ["a", "b", "a"], {0: {"seed": 0}, 1: {"seed": 7}})
    'the processes differ in their settings: seed is 0 on processes 0, 2 and 7 on process 1. Start all of them alike.'
    """
    names = dict.fromkeys(name for each in values.values() for name in each)
    name = next(name for name in names if len({json.dumps(each.get(name)) for each in values.values()}) > 1)
    who: dict[str, list[int]] = {}
    for first, each in values.items():
        shown = repr(each[name]) if name in each else "absent"
        who.setdefault(shown, []).extend(one for one, digest in enumerate(digests) if digest == digests[first])
    said = " and ".join(f"{shown} on {listed(sorted(ones))}" for shown, ones in who.items())
    return f"the processes differ in {what}: {name} is {said}. Start all of them alike."


def _tells_of_a_lost_process(error: BaseException) -> bool:
    chain: BaseException | None = error
    while chain is not None:
        if not isinstance(chain, UserError) and any(word in str(chain) for word in _LOST):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:160].rstrip(".")


def _exit(code: int, last_words: str = "") -> NoReturn:
    print_aside(last_words).join(2)
    os._exit(code)


# ------------------------------------------------------------------------------------------------- of this one process

_peers: list[Peers] = []  # a process joins others once in its life


def start_processes(
    config: RunConfig | JudgeConfig | EvalConfig | PolicyEvalConfig | RubricsConfig, **more: object
) -> None:
    """Joins the other processes, before any device is touched, where the config says that there are any.

    Args:
        config: of a recipe; its section `mesh` says how.
        more: what all must have alike besides the config.

    Raises:
        UserError: when they are not found, do not come, or were started otherwise than this one.
    """
    section: MeshSection = config.mesh
    if section.distributed == "none":
        _refuse_unused(section)
        return
    if _peers:
        return
    from jax._src import distributed  # for the client of the coordination service: there is no public way to it

    is_called = jax.distributed.is_initialized()  # by a program that has joined its processes, and ends them, itself
    coordinator = None if is_called else join(find_place(section), section.join_seconds, section.heartbeat_seconds)
    state, stall_seconds = distributed.global_state, 60 * section.stall_minutes
    peers = Peers(
        client=state.client,
        process=state.process_id,
        processes=state.num_processes,
        heartbeat=section.heartbeat_seconds,
        stall_seconds=stall_seconds,
        coordinator=coordinator,
    )
    _peers.append(peers)
    if not is_called:
        peers.watch()
        note_signals()  # after JAX has set its own handler of SIGTERM
    versions = {
        "version of jax": jax.__version__,
        "version of jaxlib": jaxlib.__version__,
        "version of patarm_jax": __version__,
        "sources of patarm_jax": _sources(),
    }
    peers.agree("their settings", shared_settings(config) | more | versions)
    arrive("finding the devices")
    device = jax.local_devices()[0]
    peers.agree("their devices", {"number": jax.local_device_count(), "kind": device.device_kind})
    arrive("reading the model and the data")


def _refuse_unused(section: MeshSection) -> None:
    """Processes that were to join, and were not told to, would each run alone, all in one folder."""
    unset = MeshSection()
    for name, none in (("coordinator", "''"), ("processes", "0"), ("process_id", "-1")):
        if (value := getattr(section, name)) != getattr(unset, name):
            raise UsageError(
                f"mesh.{name} is {value}, and mesh.distributed is none, so this process would run alone. Add "
                f"--mesh.distributed auto, or --mesh.{name} {none}."
            )


def _sources() -> str:
    """Tells the code that runs here from any other of the same version, such as a checkout that was changed."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def agree(what: str, values: Mapping[str, object]) -> None:
    """`Peers.agree`; of a process that is alone, nothing."""
    for peers in _peers:
        peers.agree(what, values)


def told(what: str, value: str) -> str:
    """`Peers.told`; of a process that is alone, its own value."""
    return gather(what, value)[0]


def gather(what: str, value: str) -> list[str]:
    """`Peers.gather`; of a process that is alone, its own value."""
    for peers in _peers:
        return peers.gather(what, value)
    return [value]


def stop_asked_of_any(asked: bool) -> bool:
    """Whether this process, or one that it knows of, was asked to stop; told to the others, who need not be here."""
    for peers in _peers:
        if asked and not peers.stop_asked:
            peers.ask_to_stop()
        return peers.stop_asked
    return asked


def wait_to_see(path: Path, setting: str, patience: float = 90.0) -> None:
    """Waits until a file is seen that another process has written: network file systems show it some seconds later.

    Args:
        path: of the file.
        setting: that names the place which all processes must share.
        patience: seconds.

    Raises:
        UserError: when it does not come.
    """
    until = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f"{path} of another process is not to be seen here after {patience:.0f} s. Give all processes one "
                f"{setting}, on storage that they share; run the same command again to go on."
            )
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)  # network file systems then ask anew
        time.sleep(0.2)


def arrive(where: str) -> None:
    """`Peers.arrive`; of a process that is alone, nothing."""
    for peers in _peers:
        peers.arrive(where)


def get_on(where: str) -> None:
    """`Peers.get_on`; of a process that is alone, nothing."""
    for peers in _peers:
        peers.get_on(where)


def end_together(code: int) -> None:
    """Ends this process when all have come to their end; returns where it is alone."""
    for peers in _peers:
        peers.end(code)


def end_all(error: BaseException, said: str, code: int) -> None:
    """Ends this process because of an error, and the others with it; returns where it is alone."""
    for peers in _peers:
        peers.fail(error, said, code)
