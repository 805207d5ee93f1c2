"""Preference-Aware Reward, what it is compared with, format penalty and group advantages, as pure functions of arrays.

Everything speaks [P, 2, G]: P pairs, side 0 chosen and 1 rejected, G judgements of each response. Nothing here knows
about text. All functions work under `jit`, `vmap` and, where a derivative has a meaning, `grad`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from patarm_jax.types import Status

MarginFn = Callable[[jax.Array], jax.Array]
Opponent = Literal["mean", "every", "one"]
Loser = Literal["zero", "minus"]
Tie = Literal["zero", "lost"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rewards:
    """What judgements earn, all of one shape, float32."""

    earned: jax.Array  # for the score or choice: PAR, or what stands in its place
    format: jax.Array
    length: jax.Array  # what is lost near the limit of tokens
    total: jax.Array  # the sum of the three


# ------------------------------------------------------------------------------------------------------------ margins


def graded(delta: jax.Array, threshold: float = 2.0, low: float = 1.2, high: float = 1.4) -> jax.Array:
    """f(δ) = high if δ > threshold else low, for a positive margin δ of any shape (PaTaRM, the graded margin)."""
    return jnp.where(delta > threshold, high, low)


def constant(delta: jax.Array, value: float = 1.3) -> jax.Array:
    """f(δ) = value, for a positive margin δ of any shape (PaTaRM, the constant margin)."""
    return jnp.full_like(delta, value)


def linear(delta: jax.Array, offset: float = 1.0, scale: float = 0.1) -> jax.Array:
    """f(δ) = offset + scale·δ, for a positive margin δ of any shape."""
    return offset + scale * delta


def tanh(delta: jax.Array, offset: float = 1.0, scale: float = 0.5, width: float = 2.0) -> jax.Array:
    """f(δ) = offset + scale·tanh(δ / width), for a positive margin δ of any shape."""
    return offset + scale * jnp.tanh(delta / width)


def power(delta: jax.Array, scale: float = 1.0, exponent: float = 0.5) -> jax.Array:
    """f(δ) = scale·δ^exponent, for a positive margin δ of any shape."""
    return scale * delta**exponent


MARGINS: dict[str, Callable[..., jax.Array]] = {
    "graded": graded,
    "constant": constant,
    "linear": linear,
    "tanh": tanh,
    "power": power,
}


# ------------------------------------------------------------------------------------------------------------ rewards


def in_all(earned: jax.Array, status: jax.Array, length: jax.Array | float = 0.0) -> Rewards:
    """What judgements earn for scores or choices, with the format penalty by their statuses, and that for length."""
    penalty, length = format_reward(status), jnp.broadcast_to(jnp.asarray(length, jnp.float32), earned.shape)
    return Rewards(earned, penalty, length, earned + penalty + length)


def preference_aware_reward(
    scores: jax.Array,
    valid: jax.Array,
    margin_fn: MarginFn = graded,
    opponent: Opponent = "mean",
    loser: Loser = "zero",
    draws: jax.Array | None = None,
    tie: Tie = "zero",
) -> jax.Array:
    """Rewards each judgement whose score lies on its own side of the other side's.

        δ(c, i) = sᶜᵢ − o        δ(r, j) = o − sʳⱼ        with o an opponent, a score of the other side
        R = f(δ) if δ > 0        and 0 if not, or with the loser "minus" −f(−δ) if δ < 0

    The opponent "mean" is the mean of the other side, as the method has it: o = s̄ʳ for the chosen side, s̄ᶜ for the
    rejected one. "every" is each judgement of the other side in turn, and R the mean over them. "one" is one of them.

    Opponents are valid judgements only. A judgement that is not valid earns 0, and so does every judgement of a pair
    one of whose sides has no valid judgement. A tie earns 0 or, with the tie "lost", what a loss does: f is then asked
    for a margin of 0 as well.

    Args:
        scores: [P, 2, G], in 0 … 10; ignored (NaN included) where not valid.
        valid: [P, 2, G] bool.
        margin_fn: f, of the positive margin, elementwise.
        opponent: what a judgement's score is compared with.
        loser: what it earns on the wrong side.
        draws: for the opponent "one", [P, 2, G] evenly drawn from [0, 1): of the n valid judgements of the other side,
            in their order, the one numbered ⌊draw·n⌋ from 0.
        tie: what equal scores earn.

    Returns:
        [P, 2, G] float32.

    Source: PaTaRM (arXiv 2510.24235), the PAR equations, which the defaults equal. Printed there, the rejected side's
    margin is sʳⱼ − s̄ᶜ, which is negative whenever it is rewarded; f is meant of, and given here, the positive margin.
    """
    _expect_pairs(scores, valid)
    if loser not in ("zero", "minus"):
        raise ValueError(f"loser must be zero or minus, got {loser!r}")
    scores = jnp.where(valid, scores, 0.0).astype(jnp.float32)
    theirs, met = _opponents(scores, valid, opponent, draws)  # [P, 2, G or 1, n]
    sign = jnp.array([1.0, -1.0])[:, None, None]  # the chosen side should lie above, the rejected below
    margin = _to_decimals(sign * (scores[..., None] - theirs))
    met = met & valid[..., None]
    behind = (margin <= 0) if tie == "lost" else (margin < 0)
    won, lost = met & (margin > 0), met & behind & (loser == "minus")
    # f sees 1 where nothing is rewarded, so that no f, however it divides, can bring a NaN into the gradient.
    earned = margin_fn(jnp.where(won | lost, jnp.abs(margin), 1.0))
    earned = jnp.where(won, earned, jnp.where(lost, -earned, 0.0))
    return earned.sum(axis=-1) / jnp.maximum(met.sum(axis=-1), 1)


def _opponents(
    scores: jax.Array, valid: jax.Array, opponent: Opponent, draws: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Scores of the other side [P, 2, G or 1, n], and whether a judgement meets them, of the same shape."""
    other, its = scores[:, ::-1], valid[:, ::-1]
    count = its.sum(axis=-1, keepdims=True)
    if opponent == "mean":
        mean = other.sum(axis=-1, keepdims=True) / jnp.maximum(count, 1)
        return mean[..., None], (count > 0)[..., None]
    if opponent == "every":
        return other[:, :, None], its[:, :, None]
    if opponent != "one":
        raise ValueError(f"opponent must be mean, every or one, got {opponent!r}")
    if draws is None or draws.shape != scores.shape:
        raise ValueError(f"the opponent one needs draws of the scores' shape {scores.shape}")
    number = jnp.minimum(jnp.floor(draws * count).astype(jnp.int32), count - 1)  # float32 may round up to n
    rank = jnp.cumsum(its, axis=-1) - 1
    return other[:, :, None], its[:, :, None] & (rank[:, :, None] == number[..., None])


def threshold_reward(scores: jax.Array, valid: jax.Array, threshold: float = 5.0) -> jax.Array:
    """1 for a score of the chosen response of at least `threshold`, and for one of the rejected below it; else 0.

    It knows the pair's label and nothing of the other response: what PAR is compared with.

    Args:
        scores: [P, 2, G]; ignored where not valid.
        valid: [P, 2, G] bool; what is not valid earns 0.
        threshold: the score that parts the sides.

    Returns:
        [P, 2, G] float32.
    """
    _expect_pairs(scores, valid)
    is_chosen = jnp.array([True, False])[:, None]
    return (valid & ((scores >= threshold) == is_chosen)).astype(jnp.float32)


def label_reward(scores: jax.Array, valid: jax.Array, labels: jax.Array) -> jax.Array:
    """−((score − label) / 10)²: regression on labels of the scores themselves, which PAR needs none of.

    Scores and labels are tenths here, so that the worst score costs 1, as much as one that cannot be read.

    Args:
        scores: [P, 2, G]; ignored where not valid.
        valid: [P, 2, G] bool; what is not valid earns 0, and its format penalty.
        labels: [P, 2], from 0 to 10.

    Returns:
        [P, 2, G] float32.
    """
    _expect_pairs(scores, valid)
    off = jnp.where(valid, scores - labels[..., None], 0.0).astype(jnp.float32)
    return -jnp.square(off / 10.0)


def accuracy_reward(right: jax.Array, valid: jax.Array, reward: float = 1.0, otherwise: float = 0.0) -> jax.Array:
    """What a pairwise judgement earns: `reward` for the right choice, `otherwise` for the wrong one.

    Args:
        right: [...], 1 for the right choice, 0 for the wrong one; ignored where not valid.
        valid: [...] bool; what is not valid earns 0, and its format penalty.
        reward: for the right choice.
        otherwise: for the wrong one.

    Returns:
        [...] float32.
    """
    return jnp.where(valid, jnp.where(right == 1, reward, otherwise), 0.0)


def verdict_reward(right: jax.Array, valid: jax.Array, form: float = 0.0) -> Rewards:
    """What Rubric-ARM's models earn, a judge for its verdict and a generator for that by its rubric.

        R = 1[o = o*] + form · 1[valid]

    Args:
        right: [...], 1 where the verdict prefers the chosen response; all else, NaN included, earns nothing.
        valid: [...] bool, whether what was written, judgement or rubric, is in form.
        form: what that earns.

    Source: Rubric-ARM (arXiv 2602.01511), which does not publish `form`; others take 1 for the judge.
    """
    earned, format = (right == 1).astype(jnp.float32), jnp.where(valid, form, 0.0).astype(jnp.float32)
    return Rewards(earned, format, jnp.zeros_like(earned), earned + format)


def checklist_reward(scores: jax.Array, valid: jax.Array, form: float = 0.0) -> Rewards:
    """What a judge earns for checklists of both responses: ±1 against the mean of the other side, a tie as a loss.

        R = PAR(f = 1, loser = minus, tie = lost) + form · 1[valid]        of one that is not valid −1

    Args:
        scores: [P, 2, G]; ignored where not valid.
        valid: [P, 2, G] bool.
        form: what a checklist in form earns besides.

    Source: RUBRIC-ARROW (arXiv 2605.29156), which states ±1; that what is out of form loses is our reading of it.
    """
    par = preference_aware_reward(scores, valid, lambda margin: constant(margin, 1.0), loser="minus", tie="lost")
    earned = jnp.where(valid, par, -1.0)
    format = jnp.where(valid, form, 0.0).astype(jnp.float32)
    return Rewards(earned, format, jnp.zeros_like(earned), earned + format)


def checked_rubric_reward(right: jax.Array, valid: jax.Array, form: float = 0.0) -> Rewards:
    """What a generator earns for a rubric by which both responses were checked.

        R = 1 if the chosen response's score is the higher, else −1, and −1 for a rubric out of form; + form · 1[valid]

    Args:
        right: [...], 1 where the chosen response's score is the higher; all else, NaN included, loses.
        valid: [...] bool, whether the rubric is in form.
        form: what that earns besides.

    Source: RUBRIC-ARROW (arXiv 2605.29156).
    """
    earned = jnp.where(valid & (right == 1), 1.0, -1.0).astype(jnp.float32)
    format = jnp.where(valid, form, 0.0).astype(jnp.float32)
    return Rewards(earned, format, jnp.zeros_like(earned), earned + format)


def combined_rewards(
    values: jax.Array, weights: jax.Array, combine: Literal["sum", "gdpo"] = "sum", eps: float = 1e-4
) -> tuple[jax.Array, jax.Array]:
    """What responses earn by several sources, and whether they have a reward at all.

        sum     r = Σ_k w_k·v_k
        gdpo    n_k = (v_k − mean_k) / (std_k + ε) in each group;  s = Σ_k w_k·n_k;  r = (s − mean(s)) / (std(s) + ε)

    A response that some source says nothing of has no reward: it counts in no mean, and never as 0.

    Args:
        values: [K, R, G], NaN where a source says nothing.
        weights: [K].
        combine: how.
        eps: ε; standard deviations have ddof 1.

    Returns:
        rewards [R, G] float32, 0 where there is none; whether there is one [R, G] bool.

    Source: "sum" as in TRL, save that there a missing one of several counts as 0; GDPO as TRL's `normalize_then_sum`,
    whose deviations over the batch are those of its rows.
    """
    valid = ~jnp.isnan(values).any(axis=0)
    known = jnp.where(valid, values.astype(jnp.float32), 0.0)
    if combine == "gdpo":
        known = jax.vmap(lambda of_one: normalised(*centred_within(of_one, valid), ddof=1, eps=eps))(known)
    total = jnp.where(valid, jnp.einsum("k,krg->rg", weights.astype(jnp.float32), known), 0.0)
    if combine == "gdpo":
        flat, member = total.reshape(1, -1), valid.reshape(1, -1)
        total = normalised(*centred_within(flat, member), ddof=1, eps=eps).reshape(total.shape)
    return total, valid


def format_reward(status: jax.Array) -> jax.Array:
    """0 for a well-formed judgement, −1.0 for a bad score, −1.5 for bad tags.

    Args:
        status: int, any shape, values of `types.Status`.

    Returns:
        float32, same shape.

    Source: PaTaRM, R_format.
    """
    return jnp.where(status == Status.BAD_TAGS, -1.5, jnp.where(status == Status.BAD_SCORE, -1.0, 0.0))


# --------------------------------------------------------------------------------------------------------- advantages


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
