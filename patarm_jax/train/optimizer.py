"""AdamW with warm-up, decay and clipping, from the config."""

import jax
import optax

from patarm_jax.config.sections import OptimizerSection
from patarm_jax.types import UserError


def make_schedule(section: OptimizerSection, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then constant, linear or cosine down to `final_fraction` of it at `steps`."""
    peak, final = section.learning_rate, section.learning_rate * section.final_fraction
    rest = max(steps - section.warmup_steps, 1)
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, section.final_fraction),
    }
    if section.decay not in decay:
        raise UserError(f"optimizer.decay is {section.decay!r}; allowed are {', '.join(decay)}.")
    warmup = optax.linear_schedule(0.0, peak, section.warmup_steps)
    # Jitted, for it is also asked for by itself: a dozen little programs otherwise.
    return jax.jit(optax.join_schedules([warmup, decay[section.decay]()], [section.warmup_steps]))


def make_optimizer(section: OptimizerSection, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW; norm weights are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(section.clip_norm),
        optax.adamw(
            make_schedule(section, steps),
            b1=section.beta1,
            b2=section.beta2,
            eps=section.epsilon,
            weight_decay=section.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: optax.Params) -> optax.Params:
    """True for every weight but the norms'."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in path[-1].key, params)
