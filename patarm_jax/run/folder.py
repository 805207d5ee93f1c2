"""What every training story begins and ends with: its state, its folder, and what its checkpoints belong to."""

import contextlib
import dataclasses
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from patarm_jax.config import GRPOConfig, ModelSection, RunSection, SFTConfig, to_yaml
from patarm_jax.data.pipeline import EncodedPair, batches_per_epoch, digest_of
from patarm_jax.files import check_writable, is_writable, read_json_object, write_json, write_text, writing
from patarm_jax.locks import hold_folder
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.sharding import TRAIN_RULES, batch_shards
from patarm_jax.model.transformer import abstract_params
from patarm_jax.run.checkpoint import Checkpoints, open_checkpoints
from patarm_jax.run.checkpoint_files import metrics_of, steps_in
from patarm_jax.run.export import ModelCardFacts, write_export
from patarm_jax.run.metrics import MetricsWriter, compilations, open_metrics
from patarm_jax.run.open_model import EXPORT, Model, load_params, weights_digest
from patarm_jax.run.peers import COMPILING, agree, arrive, told
from patarm_jax.run.process import say
from patarm_jax.run.programs import Program
from patarm_jax.run.records import schedule_change
from patarm_jax.run.soundness import refuse_ruined
from patarm_jax.run.watch import Watch
from patarm_jax.run.whose import REFERENCE, START, WEIGHTS, notes_no_digests, refuse_another_run, with_known_start
from patarm_jax.train.steps import TrainState, abstract_state, init_state
from patarm_jax.types import LearntNothing, UsageError, UserError

CHECKPOINTS, ROLLOUTS, CONFIG = "checkpoints", "rollouts", "config.yaml"
MARK = ".patarm_run.json"  # in a run folder: what must not change between its processes
_BESIDE = (".log", ".out", ".err", ".txt", ".yaml", ".yml", ".sh")  # what people keep in the folder of a run

# ------------------------------------------------------------------------------------------------------------- state


def new_state(section: ModelSection, model: Model, mesh: Mesh, seed: int, optimizer: Any) -> TrainState:
    """The state before the first step: float32 master weights and moments, sharded."""
    shardings = state_shardings(model.arch, mesh, optimizer)
    params = load_params(section, model, mesh, seed, TRAIN_RULES, jnp.float32)
    return jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(params)


def state_shape(arch: Architecture, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and shardings of the state, for restoring and for compiling ahead of time."""
    return abstract_state(abstract_params(arch, mesh), optimizer, mesh)


def state_shardings(arch: Architecture, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """Where each part of the state lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, state_shape(arch, mesh, optimizer))


# --------------------------------------------------------------------------------------------------------------- run


def check_folder(section: RunSection) -> None:
    """Refuses a run folder that cannot be written or holds something else, before anything is read."""
    folder = _folder(section)
    if not _is_archive(folder):
        check_writable(folder, folder=True)
    if not (folder / MARK).exists() and not steps_in(folder / CHECKPOINTS) and (foreign := _foreign(folder)):
        raise UserError(
            f"run.folder {folder} is not empty and is not a run's: it holds {', '.join(foreign[:3])}"
            f"{' and more' if len(foreign) > 3 else ''}. Give another run folder, or remove what is there."
        )


@contextlib.contextmanager
def hold_run(section: RunSection) -> Iterator[None]:
    """Keeps every other run out of the folder while the block runs; entered before anything there is read or written.

    Of several processes the first one holds it. An archive is only looked at.
    """
    folder = _folder(section)
    is_held = jax.process_index() == 0 and not _is_archive(folder)
    with hold_folder(folder, say) if is_held else contextlib.nullcontext():
        if jax.process_count() > 1:
            _see_one_folder(folder)
        yield


def _is_archive(folder: Path) -> bool:
    """Whether a run has been finished there, and nothing can be written any more."""
    return (folder / EXPORT).is_dir() and not is_writable(folder)


def is_complete(
    config: SFTConfig | GRPOConfig,
    model: Model,
    records: Sequence[EncodedPair],
    steps: int,
    reference: Model | None = None,
) -> bool:
    """Whether this run was finished and put away: nothing can be written there, or its checkpoints are gone.

    Raises:
        UserError: when another run was, or when this one is to go on from there.
    """
    folder = _folder(config.run)
    saved, mark = steps_in(folder / CHECKPOINTS), read_json_object(folder / MARK)
    if not (folder / EXPORT).is_dir() or mark is None or (saved and is_writable(folder)):
        return False
    whose = with_known_start(fingerprint(config, model, records, reference), mark)
    refuse_another_run(str(folder), expected=json.loads(json.dumps(whose)), got=mark, what="holds another run")
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


def _folder(section: RunSection) -> Path:
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


def _in_folder(folder: Path) -> list[Any]:
    """By what a run goes on: its checkpoints, and whether it has an export."""
    return [steps_in(folder / CHECKPOINTS), (folder / EXPORT).is_dir()]


def _claim(folder: Path, whose: Mapping[str, Any]) -> None:
    """Refuses a folder in which another run was begun, also when it has saved no checkpoint."""
    found = read_json_object(folder / MARK)
    if found is not None and not steps_in(folder / CHECKPOINTS):
        where = f"{folder}, where no checkpoint is saved yet,"
        refuse_another_run(where, expected=json.loads(json.dumps(whose)), got=found, what="holds another run")


def _write_mark(folder: Path, config: SFTConfig | GRPOConfig, whose: Mapping[str, Any], keep_config: bool) -> None:
    """Whose folder this is, and the resolved config, complete."""
    if jax.process_index() == 0:
        with writing(folder / MARK):
            write_json(folder / MARK, dict(whose))
        if keep_config and (folder / CONFIG).is_file():
            return
        with writing(folder / CONFIG):
            write_text(folder / CONFIG, to_yaml(config))


def number_of_steps(section: RunSection, records: Sequence[EncodedPair], pairs_per_step: int) -> tuple[int, int]:
    """(steps, epochs) of a run."""
    per_epoch = batches_per_epoch(len(records), pairs_per_step)
    steps = section.steps or per_epoch * section.epochs
    return steps, math.ceil(steps / max(per_epoch, 1))


def check_batch(mesh: Mesh, rows: int, micro_batches: int, what: str) -> None:
    """Refuses a batch that the mesh or the micro-batches cannot share evenly."""
    shards = batch_shards(mesh)
    if micro_batches < 1 or rows % micro_batches or rows // micro_batches % shards:
        raise UsageError(
            f"{what} gives {rows} rows, which micro_batches {micro_batches} × {shards} devices (mesh.data × mesh.fsdp) "
            f"cannot share evenly. Make it a multiple of {max(micro_batches, 1) * shards}, or change the mesh."
        )


def fingerprint(
    config: SFTConfig | GRPOConfig, model: Model, records: Sequence[EncodedPair], reference: Model | None = None
) -> dict[str, Any]:
    """What must not change between a checkpoint and its continuation; placement, logging and batching may.

    Args:
        config: of the run.
        model: what training starts from.
        records: the pairs that are trained on.
        reference: what the KL is measured from; None where there is no KL.
    """
    settings, network = dataclasses.asdict(config), dataclasses.asdict(model.arch)
    del network["scalar_head"]  # nothing trains one
    free = ("model", "mesh", "data", "run", "heldout", "micro_batches", "packing")
    kept = {name: settings[name] for name in settings if name not in free}
    for section, name in (("sampling", "rows"), ("policy", "reference")):  # the latter is known by its weights
        if section in kept:
            del kept[section][name]
    return {
        "recipe": type(config).__name__,
        "model": network | {"dtype": config.model.dtype},
        "data": digest_of(records),
        "seed": config.run.seed,
        **kept,
        WEIGHTS: _weights_of(config, model, reference),
    }


def _weights_of(config: SFTConfig | GRPOConfig, model: Model, reference: Model | None) -> dict[str, dict[str, str]]:
    found = {START: {"path": config.model.path, "digest": weights_digest(model)}}
    if isinstance(config, GRPOConfig) and reference is not None:
        digest = found[START]["digest"] if reference is model else weights_digest(reference)
        found[REFERENCE] = {"path": config.policy.reference or config.model.path, "digest": digest}
    return found


@dataclass(frozen=True)
class Run:
    """A run folder that is being written."""

    folder: Path
    steps: int  # of the whole run
    done: int  # steps that were done before this process began
    section: RunSection
    checkpoints: Checkpoints
    writer: MetricsWriter

    def save_when_due(
        self,
        step: int,
        state: TrainState,
        data_state: dict[str, Any],
        stopping: bool,
        evaluated: Mapping[str, float] | None = None,
    ) -> None:
        """A checkpoint every so many steps, when it was evaluated, at the end, and when the run is to stop."""
        if stopping or evaluated or step == self.steps or step % self.section.checkpoint_every == 0:
            self.checkpoints.save(step, state, data_state, evaluated or None)
        else:
            self.checkpoints.check()


def compile_ahead(mesh: Mesh, programs: Mapping[str, Program]) -> None:
    """Compiles jitted functions before they are called: it may take minutes, and says so beforehand."""
    begun, before = time.perf_counter(), dict(compilations().counts)
    say(f"compiling {', '.join(programs)} …")
    arrive(f"{COMPILING} {', '.join(programs)}")
    with jax.set_mesh(mesh):
        for program, arguments in programs.values():
            program.lower(*arguments).compile()
    after = compilations().counts
    compiled, read = (after[name] - before[name] for name in ("time/compiled_programs", "time/programs_from_disk"))
    from_disk = f", {read:.0f} of {compiled:.0f} from what was kept on disk" if read else ""
    say(f"compiled in {time.perf_counter() - begun:.1f} s{from_disk}")


def begin_or_resume(
    config: SFTConfig | GRPOConfig,
    model: Model,
    records: Sequence[EncodedPair],
    iterator: Any,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    steps: int,
    reference: Model | None = None,
) -> tuple[Run, TrainState]:
    """Opens the run folder; the state is the last checkpoint's, and the iterator stands where it stood then."""
    folder, keep = _folder(config.run), config.run.keep_checkpoints
    best = f"eval/{config.heldout.best}" if config.heldout.path else ""
    noted = read_json_object(folder / MARK)
    whose = with_known_start(fingerprint(config, model, records, reference), noted)
    weights = {f"weights ({role})": one["digest"] for role, one in whose[WEIGHTS].items()}  # of any path
    agree(
        "what they read", {"number of pairs": len(records), "pairs": whose["data"], "model": whose["model"], **weights}
    )
    begun = noted is not None or steps_in(folder / CHECKPOINTS)
    if begun and notes_no_digests(noted or {}):
        say(f"{folder} was begun by a version that did not note which weights it had; they are assumed to be the same")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, whose)
    checkpoints = open_checkpoints(folder / CHECKPOINTS, keep, whose, best, config.run.on_damaged, say)
    done = 0
    if checkpoints.latest() is None:
        state = new_state(config.model, model, mesh, config.run.seed, optimizer)
    else:
        state, data_state, done = checkpoints.restore(state_shape(model.arch, mesh, optimizer))
        if done < steps:  # else nothing is read any more, and it may be past the end of fewer epochs
            iterator.set_state(data_state)
        agree("the checkpoint they go on from", {"step": done})
        where, remedy = f"{folder / CHECKPOINTS / str(done)}", "Remove that checkpoint, or give another run.folder"
        refuse_ruined(state.params, where, remedy)
        say(f"{folder}: {done} of {steps} steps are done")
        per_epoch = batches_per_epoch(len(records), config.pairs_per_step)
        if change := schedule_change(config, folder / CONFIG, done, steps, per_epoch):
            say(change)
    # Not before the checkpoint has turned out to be of this run; where nothing is left to do, what was done stands.
    _write_mark(folder, config, whose, keep_config=done >= steps)
    writer = open_metrics(
        folder,
        done,
        tensorboard=config.run.tensorboard,
        wandb_project=config.run.wandb_project,
        config=dataclasses.asdict(config),
    )
    return Run(folder, steps, done, config.run, checkpoints, writer), state


def finish(
    run: Run, step: int, state: TrainState, model: Model, card: ModelCardFacts, dtype: str, watch: Watch
) -> bool:
    """Exports a run that has done all its steps; False when it was stopped before.

    Raises:
        UserError: when the run stopped because too many updates were skipped.
        LearntNothing: when the run came to its end in vain.
    """
    run.checkpoints.wait()  # the last evaluation may be the best, and its checkpoint on its way to disk
    best = run.checkpoints.best()
    run.checkpoints.close()
    run.writer.close()
    if best is not None:
        say(f"best on the held-out pairs: {run.folder / CHECKPOINTS / str(best)}, which `patarm export` takes")
    if watch.stop:
        raise UserError(
            f"stopped at step {step} of {run.steps}: {watch.stop} A changed setting needs a run.folder of its own. The "
            f"last sound weights are saved as {run.folder / CHECKPOINTS / str(step)}, which `patarm export` takes."
        )
    if step < run.steps:
        say(f"stopped after step {step} of {run.steps}, saved in {run.folder}; run the command again to resume")
        return False
    export = run.folder / EXPORT
    arrive("writing the export")
    if watch.untouched:
        raise LearntNothing(
            f"{run.folder}: {watch.verdict} Nothing is exported: the weights are those that the run began with."
        )
    complete = run.done >= run.steps and told("whether there is an export", str(export.is_dir())) == "True"
    if not complete:
        # Of the state: it may have done more steps than are asked for now, and skipped updates.
        updates, measured = int(state.step) - int(state.skipped), metrics_of(run.folder / CHECKPOINTS / str(step))
        card = dataclasses.replace(card, steps=updates, measured=measured)
        # What is there is of this run when it was shorter.
        write_export(export, state.params, model.arch, model.tokenizer, card, dtype, replace=True)
    if watch.verdict:
        raise LearntNothing(f"{run.folder}: {watch.verdict} {export} may be no better than what it began with.")
    more = f" with {run.done} steps, more than the {run.steps} asked for" if run.done > run.steps else ""
    say(
        f"{run.folder} is complete{more}. Raise run.steps or run.epochs to train on." if complete else f"done: {export}"
    )
    return True
