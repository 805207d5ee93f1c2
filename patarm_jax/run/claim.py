"""Whose a run folder is: refused, held and marked before anything is written into it."""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from patarm_jax.config.load import to_yaml
from patarm_jax.config.sections import RunSection
from patarm_jax.config.training import RunConfig
from patarm_jax.files import check_writable, is_writable, read_json_object, write_json, write_text, writing
from patarm_jax.locks import hold_folder
from patarm_jax.run.checkpoint_files import steps_in
from patarm_jax.run.open_model import EXPORT
from patarm_jax.run.peers import agree, told
from patarm_jax.run.process import say
from patarm_jax.run.whose import refuse_another_run, with_known_start
from patarm_jax.types import UsageError, UserError

CHECKPOINTS, ROLLOUTS, CONFIG = "checkpoints", "rollouts", "config.yaml"
MARK = ".patarm_run.json"  # in a run folder: what must not change between its processes
_BESIDE = (".log", ".out", ".err", ".txt", ".yaml", ".yml", ".sh")  # what people keep in the folder of a run


@contextlib.contextmanager
def claimed(section: RunSection) -> Iterator[None]:
    """Keeps every other run out of the folder while the block runs; entered before anything there is read or written.

    A folder that cannot be written, or that holds something else, is refused. Of several processes the first one holds
    it. An archive is only looked at.
    """
    check_folder(section)
    folder = folder_of(section)
    is_held = jax.process_index() == 0 and not _is_archive(folder)
    with hold_folder(folder, say) if is_held else contextlib.nullcontext():
        if jax.process_count() > 1:
            _see_one_folder(folder)
        yield


def check_folder(section: RunSection) -> None:
    """Refuses a run folder that cannot be written or holds something else, before anything is read."""
    folder = folder_of(section)
    if not _is_archive(folder):
        check_writable(folder, folder=True)
    if not (folder / MARK).exists() and not steps_in(folder / CHECKPOINTS) and (foreign := _foreign(folder)):
        raise UserError(
            f"run.folder {folder} is not empty and is not a run's: it holds {', '.join(foreign[:3])}"
            f"{' and more' if len(foreign) > 3 else ''}. Give another run folder, or remove what is there."
        )


def _is_archive(folder: Path) -> bool:
    """Whether a run has made its model there, or one of its models, and nothing can be written any more."""
    made = (folder / EXPORT).is_dir() or any(folder.glob(f"*/{EXPORT}"))
    return made and not is_writable(folder)


def is_complete(section: RunSection, fingerprint: Mapping[str, object], steps: int) -> bool:
    """Whether this run was finished and put away: nothing can be written there, or its checkpoints are gone.

    Raises:
        UserError: when another run was, or when this one is to go on from there.
    """
    folder = folder_of(section)
    saved, mark = steps_in(folder / CHECKPOINTS), read_json_object(folder / MARK)
    if not (folder / EXPORT).is_dir() or mark is None or (saved and is_writable(folder)):
        return False
    whose = with_known_start(fingerprint, mark)
    refuse_another_run(str(folder), expected=whose, got=mark, what="holds another run")
    done = max(saved, default=_last_step(folder))
    if done < steps:
        check_writable(folder, folder=True)
        raise UserError(
            f"{folder} holds a finished run of {done} steps, whose checkpoints are gone: the {steps} steps of this one "
            "cannot go on from there. Give another run folder."
        )
    say(f"{folder} is complete, {done} of {steps} steps, and is left as it is: {folder / EXPORT}")
    return True


def _last_step(folder: Path) -> int:
    """The last step that the metrics tell of; 0 where there are none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        return int(json.loads((folder / "metrics.jsonl").read_bytes().splitlines()[-1])["step"])
    return 0


def folder_of(section: RunSection) -> Path:
    """The run folder of a config."""
    if not section.folder:
        raise UsageError("run.folder is empty. Name the folder that the run is to write, such as runs/judge.")
    return Path(section.folder).expanduser()


def _foreign(folder: Path) -> list[str]:
    """What no one but another program, or a run before its first checkpoint, leaves in a folder."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    empty = [] if names != [CHECKPOINTS] or any((folder / CHECKPOINTS).iterdir()) else [CHECKPOINTS]
    return [
        name
        for name in names
        if name not in (*empty, "lost+found")
        and not (name.endswith(_BESIDE) and name != "config.yaml")
        and not name.startswith(".")
    ]


def _see_one_folder(folder: Path, patience: float = 90.0) -> None:
    """Waits until every process sees in the run folder what process 0 sees there, and refuses folders that are not one.

    Process 0 leaves a name, which all must see; then all must see the same checkpoints, from the last of which they are
    to go on.

    Args:
        folder: as this process calls it.
        patience: seconds, within which network file systems show what another machine wrote.
    """
    name = f".patarm_shared-{secrets.token_hex(8)}" if jax.process_index() == 0 and is_writable(folder) else ""
    if name:
        with writing(folder):
            write_text(folder / name, "")
    name, *there = json.loads(told("what the run folder holds", json.dumps([name, *_in_folder(folder)])))
    until = time.monotonic() + patience
    while (name and not (folder / name).exists()) or _in_folder(folder) != there:
        if time.monotonic() > until:
            raise UserError(
                f"run.folder {folder} of process {jax.process_index()} is not the folder of process 0: what that one "
                f"sees there is not to be seen here after {patience:.0f} s. Give all processes one folder, on storage "
                "that they share."
            )
        if folder.is_dir():
            os.listdir(folder)  # network file systems then ask anew
        time.sleep(0.2)
    agree("that they see one run folder", {})  # then it can go
    if name and jax.process_index() == 0:
        (folder / name).unlink()


def _in_folder(folder: Path) -> list[object]:
    """By what a run goes on: its checkpoints, and whether it has an export."""
    return [steps_in(folder / CHECKPOINTS), (folder / EXPORT).is_dir()]


def refuse_another_begun(folder: Path, whose: Mapping[str, object]) -> None:
    """Refuses a folder in which another run was begun, also when it has saved no checkpoint."""
    found = read_json_object(folder / MARK)
    if found is not None and not steps_in(folder / CHECKPOINTS):
        where = f"{folder}, where no checkpoint is saved yet,"
        refuse_another_run(where, expected=whose, got=found, what="holds another run")


def write_mark(folder: Path, config: RunConfig, whose: Mapping[str, object], keep_config: bool) -> None:
    """Whose folder this is, and the resolved config, complete."""
    if jax.process_index() == 0:
        with writing(folder / MARK):
            write_json(folder / MARK, dict(whose))
        if keep_config and (folder / CONFIG).is_file():
            return
        with writing(folder / CONFIG):
            write_text(folder / CONFIG, to_yaml(config))
