"""What earlier starts of a run have written down of it, and what a new start changes."""

from pathlib import Path

from patarm_jax.config.load import read_yaml
from patarm_jax.config.training import TrainConfig
from patarm_jax.train.optimizer import make_schedule


def schedule_change(config: TrainConfig, written: Path, done: int, steps: int, per_epoch: int) -> str:
    """Says that a run's learning rates are others than they were to be, as its length has changed; empty if not.

    Args:
        config: of this start.
        written: the config.yaml of the one before.
        done: steps.
        steps: of the whole run, now.
        per_epoch: steps.
    """
    section = config.optimizer
    if section.decay == "constant" or not 0 < done < steps or not written.is_file():
        return ""
    before = read_yaml(written).get("run", {})
    planned = before.get("steps") or per_epoch * before.get("epochs", 0)
    if planned in (0, steps):
        return ""
    each = config.updates_per_step
    was, now = (float(make_schedule(section, length * each)(done * each)) for length in (planned, steps))
    return (
        f"the run was to have {planned:,} steps and is now to have {steps:,}: the {section.decay} decay of the "
        f"learning rate follows the new length from here on, {now:.3g} at step {done + 1:,} instead of {was:.3g}"
    )
