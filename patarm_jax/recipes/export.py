"""A checkpoint of a run as a Hugging Face folder, without waiting for the run to finish."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from patarm_jax.config.load import load_run, override, refuse_rounds
from patarm_jax.config.rubric_arm import Role, RubricArmConfig
from patarm_jax.config.sections import MeshSection
from patarm_jax.config.training import TrainConfig
from patarm_jax.files import check_writable, is_occupied, occupied_error, read_json_object
from patarm_jax.judge.forms import FORMS
from patarm_jax.locks import hold_output
from patarm_jax.model.lora import abstract_parts
from patarm_jax.model.sharding import make_mesh
from patarm_jax.run.card import card_of
from patarm_jax.run.checkpoint import open_checkpoints
from patarm_jax.run.checkpoint_files import best_of, metrics_of, steps_in
from patarm_jax.run.claim import CHECKPOINTS, MARK
from patarm_jax.run.export import export_trained
from patarm_jax.run.metrics import read_metrics
from patarm_jax.run.open_model import load_parts, open_model
from patarm_jax.run.process import say
from patarm_jax.run.whose import START, refuse_another_start
from patarm_jax.types import BY_RUBRICS, UsageError, UserError

_ROLE_OF: dict[str, str] = {"rubric": "generator", **dict.fromkeys(BY_RUBRICS, "judge")}


def main(
    checkpoint: Path,
    out: Path,
    best: bool = False,
    lora: Literal["merged", "adapter"] | None = None,
    role: Role | None = None,
) -> None:
    """Writes `out` from a run folder's newest checkpoint, from its best one, or from RUN/checkpoints/STEP.

    Args:
        checkpoint: the run, or one of its checkpoints.
        out: the folder; must not exist, or be empty.
        best: whether it is the checkpoint that the held-out pairs chose.
        lora: of a run with adapters, what is written; None: as its config says.
        role: of a run that trains two models together, which of them; None of any other.
    """
    out = out.expanduser()
    if is_occupied(out):
        raise occupied_error(out)
    check_writable(out, folder=True)
    with hold_output(out, say):
        _export(checkpoint, out, best, lora, role)


def _export(
    checkpoint: Path, out: Path, best: bool, lora: Literal["merged", "adapter"] | None, role: Role | None
) -> None:
    if is_occupied(out):  # by one that ended just now
        raise occupied_error(out)
    folder, step = _run_and_step(checkpoint.expanduser())
    config, name = _trained(folder, step, role)
    if lora is not None:
        if not config.lora.rank:
            raise UsageError(f"{folder} has trained all weights, and no adapters. Leave --lora out.")
        config = override(config, ["--lora.export", lora])
    if not (steps := steps_in(folder / CHECKPOINTS)) or step not in (None, *steps):
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{folder} holds {which}. Let the run save one, or name another step.")
    if best:
        step = _best(folder, config, step)
    model = open_model(config.model, config.judge, new_head=FORMS[config.judge].has_score_head)
    if config.lora.rank:
        begun = _ROLE_OF.get(config.judge, START)
        refuse_another_start(folder, read_json_object(folder / MARK) or {}, model, begun)
    mesh = make_mesh(MeshSection())
    checkpoints = open_checkpoints(folder / CHECKPOINTS, 1, {}, on_damaged=config.run.on_damaged, say=say)
    shapes, _ = abstract_parts(model.arch, mesh, config.lora, config.model.dtype)
    params, step = checkpoints.restore_params(shapes, step, name)
    _, frozen = load_parts(config, model, mesh, shapes, begins=False)
    updates, measured = checkpoints.updates(step, name), metrics_of(folder / CHECKPOINTS / str(step))
    card = replace(card_of(config, model), steps=updates, measured=measured)
    export_trained(out, config, model, mesh, params, frozen, card)
    say(f"step {step} of {folder}: {out}")


def _trained(folder: Path, step: int | None, role: Role | None) -> tuple[TrainConfig, str]:
    """What a model of a checkpoint was trained by, and its name there; empty where the checkpoint has but one.

    Of a run of phases it is the config of the checkpoint's phase.
    """
    config = load_run(folder)
    if isinstance(config, TrainConfig):
        refuse_rounds(folder, config)
        if role:
            raise UsageError(f"{folder} has trained one model, and no {role} beside it. Leave --role out.")
        return config, ""
    assert isinstance(config, RubricArmConfig)
    steps = steps_in(folder / CHECKPOINTS)
    wanted = max(steps, default=0) if step is None else step
    for line in read_metrics(folder / "metrics.jsonl"):
        if line["step"] == wanted:
            of_step: Role = "judge" if line["phase"].startswith("judge") else "generator"
            together = bool(config.is_joint and line["round"])
            if together and role is None:
                raise UsageError(
                    f"the checkpoint of step {wanted} of {folder} holds both models. Say which of them with "
                    "--role judge or --role generator."
                )
            if not together and role not in (None, of_step):
                raise UsageError(
                    f"the checkpoint of step {wanted} of {folder} holds the {of_step} alone. Name a checkpoint of the "
                    f"{role}'s phases, or take {folder / str(role)}."
                )
            role = role or of_step
            trained = config.turn_of(role) if line["round"] else config.warmup_of(role)
            return trained, role if together else ""
    raise UserError(
        f"{folder / 'metrics.jsonl'} says nothing of step {wanted}, so that it is not known which of the two models "
        "its checkpoint holds. Name another checkpoint."
    )


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
    metric = config.best_metric
    found = best_of(folder / CHECKPOINTS, metric)
    if found is None:
        raise UserError(
            f"no checkpoint of {folder} was judged on held-out pairs, so none is the best. Leave --best out for the "
            "newest one, or name pairs with heldout.path when the run is started."
        )
    value = metrics_of(folder / CHECKPOINTS / str(found))[metric]
    say(f"best on the held-out pairs: step {found}, {metric} {value:.4g}")
    return found
