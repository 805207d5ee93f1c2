"""A checkpoint of a run as a Hugging Face folder, without waiting for the run to finish."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp

from patarm_jax.config.load import load_run
from patarm_jax.config.recipes import TrainConfig
from patarm_jax.config.sections import MeshSection
from patarm_jax.files import check_writable, is_occupied, occupied_error
from patarm_jax.judge.forms import FORMS
from patarm_jax.locks import hold_output
from patarm_jax.model.sharding import make_mesh
from patarm_jax.model.transformer import abstract_params
from patarm_jax.run.checkpoint import open_checkpoints
from patarm_jax.run.checkpoint_files import best_of, metrics_of, steps_in
from patarm_jax.run.claim import CHECKPOINTS
from patarm_jax.run.export import card_of, write_export
from patarm_jax.run.open_model import open_model
from patarm_jax.run.process import say
from patarm_jax.types import UsageError, UserError


def main(checkpoint: Path, out: Path, best: bool = False) -> None:
    """Writes `out` from a run folder's newest checkpoint, from its best one, or from RUN/checkpoints/STEP."""
    out = out.expanduser()
    if is_occupied(out):
        raise occupied_error(out)
    check_writable(out, folder=True)
    with hold_output(out, say):
        _export(checkpoint, out, best)


def _export(checkpoint: Path, out: Path, best: bool) -> None:
    if is_occupied(out):  # by one that ended just now
        raise occupied_error(out)
    folder, step = _run_and_step(checkpoint.expanduser())
    config = load_run(folder)
    if not (steps := steps_in(folder / CHECKPOINTS)) or step not in (None, *steps):
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{folder} holds {which}. Let the run save one, or name another step.")
    if best:
        step = _best(folder, config, step)
    model = open_model(config.model, config.judge, new_head=not FORMS[config.judge].writes)
    mesh = make_mesh(MeshSection())
    checkpoints = open_checkpoints(folder / CHECKPOINTS, 1, {}, on_damaged=config.run.on_damaged, say=say)
    params, step = checkpoints.restore_params(abstract_params(model.arch, mesh, dtype=jnp.float32), step)
    updates, measured = checkpoints.updates(step), metrics_of(folder / CHECKPOINTS / str(step))
    card = replace(card_of(config, model), steps=updates, measured=measured)
    write_export(out, params, model.arch, model.tokenizer, card, config.model.dtype)
    say(f"step {step} of {folder}: {out}")


def _run_and_step(path: Path) -> tuple[Path, int | None]:
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is neither a run nor a checkpoint of one. Give RUN or RUN/{CHECKPOINTS}/STEP.")
    return path, None


def _best(folder: Path, config: TrainConfig, step: int | None) -> int:
    """The step that the held-out pairs chose."""
    if step is not None:
        raise UsageError(f"--best and the checkpoint of step {step} are both given. Give the run folder, or no --best.")
    metric = f"eval/{config.heldout.best}"
    found = best_of(folder / CHECKPOINTS, metric)
    if found is None:
        raise UserError(
            f"no checkpoint of {folder} was judged on held-out pairs, so none is the best. Leave --best out for the "
            "newest one, or name pairs with heldout.path when the run is started."
        )
    value = metrics_of(folder / CHECKPOINTS / str(found))[metric]
    say(f"best on the held-out pairs: step {found}, {metric} {value:.4g}")
    return found
