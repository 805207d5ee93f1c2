"""A checkpoint of a run as a Hugging Face folder, without waiting for the run to finish."""

from pathlib import Path

import jax.numpy as jnp

from patarm_jax.config import GRPOConfig, MeshSection, SFTConfig, load, read_yaml
from patarm_jax.files import check_writable, is_occupied, occupied_error
from patarm_jax.model.qwen3 import abstract_params
from patarm_jax.model.sharding import make_mesh
from patarm_jax.recipes.export import ModelCardFacts, write_export
from patarm_jax.recipes.model import open_model
from patarm_jax.recipes.process import say
from patarm_jax.recipes.run import CHECKPOINTS
from patarm_jax.train.checkpoint import open_checkpoints
from patarm_jax.train.checkpoint_files import steps_in
from patarm_jax.types import UserError


def main(checkpoint: Path, out: Path) -> None:
    """Writes `out` from the newest checkpoint of a run folder, or from RUN/checkpoints/STEP."""
    out = out.expanduser()
    if is_occupied(out):
        raise occupied_error(out)
    check_writable(out, folder=True)
    folder, step = _run_and_step(checkpoint.expanduser())
    config = _config(folder / "config.yaml")
    if not (steps := steps_in(folder / CHECKPOINTS)) or step not in (None, *steps):
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{folder} holds {which}. Let the run save one, or name another step.")
    model = open_model(config.model)
    mesh = make_mesh(MeshSection())
    checkpoints = open_checkpoints(folder / CHECKPOINTS, 1, {}, on_damaged=config.run.on_damaged, say=say)
    params, step = checkpoints.restore_params(abstract_params(model.config, mesh, dtype=jnp.float32), step)
    updates = checkpoints.updates(step)
    reward = f"PAR with the {config.reward.margin} margin" if isinstance(config, GRPOConfig) else ""
    card = ModelCardFacts(config.model.path, config.recipe, config.data.path, None, updates, reward, config.rubrics)
    write_export(out, params, model.config, model.tokenizer, card, config.model.dtype)
    say(f"step {step} of {folder}: {out}")


def _run_and_step(path: Path) -> tuple[Path, int | None]:
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is neither a run nor a checkpoint of one. Give RUN or RUN/{CHECKPOINTS}/STEP.")
    return path, None


def _config(path: Path) -> SFTConfig | GRPOConfig:
    return load(GRPOConfig, path) if read_yaml(path).get("recipe") == "grpo" else load(SFTConfig, path)
