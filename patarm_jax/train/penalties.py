"""What is taken off a reward, or added to a loss, as pure functions of arrays: the KL to a reference, and length."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Array

KLKind = Literal["k1", "k2", "k3"]


class KLPenalty(NamedTuple):
    """The KL to the reference, and where it is charged."""

    coef: float
    kind: KLKind = "k3"
    place: Literal["loss", "reward"] = "loss"
    by_ratio: bool = False  # in a loss of ratios by token: each estimate times its ratio, as TRL has it from 1.16 on


def estimated_kl(logprobs: Array, ref_logprobs: Array, kind: KLKind) -> jax.Array:
    """An estimate of KL(policy ‖ reference) from each sampled token, by d = ref_logprob − logprob.

        k1 = −d        unbiased, of any sign; as a loss its gradient is 0 in the mean
        k2 = d² / 2    biased, never negative; its gradient is the KL's
        k3 = exp(d) − 1 − d    unbiased and never negative

    Args:
        logprobs: [...].
        ref_logprobs: [...].
        kind: which.

    Returns:
        [...] float32.

    Equals: TRL's k3; verl `kl_penalty` "k1", "k2", "k3" within |d| ≤ 20 and values ≤ 10, where verl cuts its k3 off;
    OpenRLHF `compute_approx_kl` within its ±10.

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    d = jnp.asarray(ref_logprobs - logprobs)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * jnp.square(d)
    if kind != "k3":
        raise ValueError(f"a KL is k1, k2 or k3, got {kind!r}")
    return jnp.expm1(d) - d


def overlong_penalty(lengths: Array, longest: int, buffer: int, factor: float = 1.0) -> jax.Array:
    """What a completion loses that comes near the limit, counted in tokens.

        penalty = min(0, −(length − (longest − buffer)) / buffer)·factor

    Args:
        lengths: [...] tokens, the end token included.
        longest: the limit of new tokens.
        buffer: so many tokens before the limit the penalty begins to grow.
        factor: the penalty at the limit, and beyond it.

    Returns:
        [...] float32, from −factor to 0.

    Equals: verl's DAPORewardManager and OpenRLHF `apply_overlong_penalty` up to the limit, which no completion exceeds.

    Source: DAPO (arXiv 2503.14476) eq. 13.
    """
    beyond = (jnp.asarray(lengths) - (longest - buffer)).astype(jnp.float32) / buffer
    return -factor * jnp.clip(beyond, 0.0, 1.0)
