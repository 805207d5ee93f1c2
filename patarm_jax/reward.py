"""Preference-Aware Reward, format penalty and group advantages, as pure functions of arrays.

Everything speaks [P, 2, G]: P pairs, side 0 chosen and 1 rejected, G judgements of each response. Nothing here knows
about text. All functions work under `jit`, `vmap` and, where a derivative has a meaning, `grad`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from patarm_jax.types import Status

MarginFn = Callable[[jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rewards:
    """What judgements earn, all [P, 2, G] float32."""

    par: jax.Array
    format: jax.Array
    total: jax.Array  # par + format


def graded(delta: jax.Array) -> jax.Array:
    """f(δ) = 1.4 if δ > 2 else 1.2, for a positive margin δ of any shape (PaTaRM, the graded margin)."""
    return jnp.where(delta > 2.0, 1.4, 1.2)


def constant(delta: jax.Array) -> jax.Array:
    """f(δ) = 1.3 for a positive margin δ of any shape (PaTaRM, the constant margin)."""
    return jnp.full_like(delta, 1.3)


MARGINS: dict[str, MarginFn] = {"graded": graded, "constant": constant}


@partial(jax.jit, static_argnums=2)
def judgement_rewards(scores: jax.Array, status: jax.Array, margin_fn: MarginFn = graded) -> Rewards:
    """PAR plus the format penalty, from scores and statuses [P, 2, G]."""
    par, penalty = preference_aware_reward(scores, status == Status.OK, margin_fn), format_reward(status)
    return Rewards(par, penalty, par + penalty)


def preference_aware_reward(scores: jax.Array, valid: jax.Array, margin_fn: MarginFn = graded) -> jax.Array:
    """Rewards each judgement whose score lies on its own side of the other side's mean.

        R(c, i) = 1[sᶜᵢ > s̄ʳ]·f(sᶜᵢ − s̄ʳ)        R(r, j) = 1[sʳⱼ < s̄ᶜ]·f(s̄ᶜ − sʳⱼ)

    Means are over valid judgements only. A judgement that is not valid earns 0, and so does every judgement of a pair
    one of whose sides has no valid judgement. A tie earns 0.

    Args:
        scores: [P, 2, G], in 0 … 10; ignored (NaN included) where not valid.
        valid: [P, 2, G] bool.
        margin_fn: f, of the positive margin, elementwise.

    Returns:
        [P, 2, G] float32.

    Source: PaTaRM (arXiv 2510.24235), the PAR equations. Printed there, the rejected side's margin is sʳⱼ − s̄ᶜ, which
    is negative whenever it is rewarded; f is meant of, and given here, the positive margin.
    """
    _expect_pairs(scores, valid)
    scores = jnp.where(valid, scores, 0.0).astype(jnp.float32)
    count = valid.sum(axis=-1, keepdims=True)
    mean = scores.sum(axis=-1, keepdims=True) / jnp.maximum(count, 1)
    sign = jnp.array([1.0, -1.0])[:, None]  # the chosen side should lie above, the rejected below
    margin = _to_decimals(sign * (scores - mean[:, ::-1]))
    rewarded = (margin > 0) & valid & (count[:, ::-1] > 0)
    # f sees 1 where nothing is rewarded, so that no f, however it divides, can bring a NaN into the gradient.
    return jnp.where(rewarded, margin_fn(jnp.where(rewarded, margin, 1.0)), 0.0)


def format_reward(status: jax.Array) -> jax.Array:
    """0 for a well-formed judgement, −1.0 for a bad score, −1.5 for bad tags.

    Args:
        status: int, any shape, values of `types.Status`.

    Returns:
        float32, same shape.

    Source: PaTaRM, R_format.
    """
    return jnp.where(status == Status.BAD_TAGS, -1.5, jnp.where(status == Status.BAD_SCORE, -1.0, 0.0))


def group_advantages(
    rewards: jax.Array,
    group_by: Literal["response", "pair"] = "response",
    ddof: int = 1,
    eps: float = 1e-6,
    normalise_std: bool = True,
) -> jax.Array:
    """How much better a judgement did than its group.

        A = (r − mean) / (std + ε)        without `normalise_std`: A = r − mean

    Args:
        rewards: [P, 2, G].
        group_by: the group is the G judgements of one response, or all 2·G of the pair.
        ddof: std = √(Σ(r − mean)² / (n − ddof)); 1 as torch and verl. A group of one has no spread, so A = 0.
        eps: ε.
        normalise_std: False for Dr. GRPO.

    Returns:
        [P, 2, G] float32. A group of equal rewards gives exactly 0.
    """
    if rewards.ndim != 3 or rewards.shape[1] != 2:
        raise ValueError(f"rewards must be [P, 2, G], got {rewards.shape}")
    sizes = {"response": rewards.shape[2], "pair": 2 * rewards.shape[2]}
    if group_by not in sizes:
        raise ValueError(f"group_by must be one of {', '.join(sizes)}, got {group_by!r}")
    groups = rewards.astype(jnp.float32).reshape(-1, sizes[group_by])
    centred, equal, count = centred_within(groups, jnp.ones(groups.shape, bool))
    return (normalised(centred, equal, count, ddof, eps) if normalise_std else centred).reshape(rewards.shape)


def centred_within(groups: jax.Array, member: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How far members lie from their group's mean.

    Rounding can set the mean of equal rewards beside them; what is equal is measured without it.

    Args:
        groups: [N, n] float32; 0 where there is no member.
        member: [N, n] bool.

    Returns:
        r − mean [N, n], 0 for what is no member; whether all members are equal [N, 1]; how many there are [N, 1].
    """
    count = member.sum(axis=1, keepdims=True)
    mean = groups.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    low = jnp.where(member, groups, jnp.inf).min(axis=1, keepdims=True)
    high = jnp.where(member, groups, -jnp.inf).max(axis=1, keepdims=True)
    equal = low >= high
    return jnp.where(member & ~equal, groups - mean, 0.0), equal, count


def normalised(centred: jax.Array, equal: jax.Array, count: jax.Array, ddof: int, eps: float) -> jax.Array:
    """What `centred_within` gives, divided by std + ε."""
    variance = jnp.square(centred).sum(axis=1, keepdims=True) / jnp.maximum(count - ddof, 1)
    return centred / (jnp.sqrt(jnp.where(equal, 1.0, variance)) + eps)


@jax.custom_jvp
def _to_decimals(margin: jax.Array) -> jax.Array:
    """A margin within rounding of a number of four decimals becomes that number.

    Scores are decimals, their float32 means are not quite: eight times 7.3 has a mean beside 7.3. What is left of
    rounding would turn a tie into a win, and a margin of 2 into more than 2.
    """
    decimal = jnp.round(margin * 1e4) / 1e4
    return jnp.where(jnp.abs(margin - decimal) < 1e-5, decimal, margin)


@_to_decimals.defjvp
def _to_decimals_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _to_decimals(*primals), tangents[0]


def _expect_pairs(scores: jax.Array, valid: jax.Array) -> None:
    if scores.ndim != 3 or scores.shape[1] != 2 or scores.shape != valid.shape:
        raise ValueError(f"scores and valid must both be [P, 2, G], got {scores.shape} and {valid.shape}")
