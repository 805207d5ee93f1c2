"""AdamW with warm-up, decay and clipping, from the config."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from patarm_jax.config.sections import OptimizerSection
from patarm_jax.rounding import round_at_random
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
    """Clipping by the global norm, then AdamW; norm weights and biases are not decayed."""
    adam = optax.scale_by_adam(b1=section.beta1, b2=section.beta2, eps=section.epsilon)
    adamw = optax.chain(
        adam if section.moments == "float32" else kept_in_bfloat16(adam),
        optax.add_decayed_weights(section.weight_decay, _decayed),
        optax.scale_by_learning_rate(make_schedule(section, steps)),
    )
    return optax.chain(optax.clip_by_global_norm(section.clip_norm), adamw)


def kept_in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moving averages are kept in bfloat16, and computed in float32 from one update to the next.

    They are rounded up or down at random, each with the probability that keeps the mean: rounded to the nearest, a
    second moment with β₂ 0.999 would stand still, since what an update adds to it is less than half of bfloat16's last
    place (2⁻⁹ of it). The draws depend on the number of updates alone, and not on how many devices share the moments.

    From the moments that are kept, an update is computed as in float32. Rounding changes what is kept by less than 2⁻⁷
    of it, so that the next update's moments m and v differ by |Δm| ≤ 2⁻⁷·β₁·|m before| and |Δv| ≤ 2⁻⁷·β₂·v before from
    those of unrounded ones. Over many updates the differences add up like a random walk that each moment's decay draws
    back: with β₂ 0.999 the second moment of a weight ends some 4 % off, and updates 2 % in norm.
    """

    def init(params: optax.Params) -> optax.OptState:
        return _with_floats(adam.init(params), lambda moment, _: moment.astype(jnp.bfloat16))

    def update(
        gradient: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        wide = _with_floats(state, lambda moment, _: moment.astype(jnp.float32))
        updates, wide = adam.update(gradient, wide, params)
        key = jax.random.key(wide.count)
        return updates, _with_floats(wide, lambda moment, n: round_at_random(moment, jax.random.fold_in(key, n)))

    return optax.GradientTransformation(init, update)


def _with_floats(state: optax.OptState, change: Callable[[jax.Array, int], jax.Array]) -> optax.OptState:
    """The state with another array in place of each that is no counter; they are numbered."""
    leaves, tree = jax.tree.flatten(state)
    changed = [change(x, n) if jnp.issubdtype(x.dtype, jnp.floating) else x for n, x in enumerate(leaves)]
    return jax.tree.unflatten(tree, changed)


def _decayed(params: optax.Params) -> optax.Params:
    """True for every weight but the norms' and biases."""

    def decayed(path: tuple[jax.tree_util.DictKey, ...], _: jax.Array) -> bool:
        name = path[-1].key
        return "norm" not in name and not name.endswith("_bias")

    return jax.tree_util.tree_map_with_path(decayed, params)
