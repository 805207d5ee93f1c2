"""Losses that compare the two sides of a pair, as sums over pairs, so that micro-batches add up exactly."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from patarm_jax.arrays import Array
from patarm_jax.train.losses import Loss, Mean


def bradley_terry(rewards: jax.Array, margins: Array, there: jax.Array, centring: float = 0.0) -> Loss:
    """Minus the log-probability that the chosen response of a pair is preferred.

        −log σ(r_chosen − r_rejected − margin) + centring · (r_chosen + r_rejected)²,   in the mean over pairs

    Equals: TRL's `RewardTrainer.compute_loss`, with its `center_rewards_coefficient`.

    Args:
        rewards: [..., 2] float32, of the chosen and of the rejected response.
        margins: [...], 0 where there are none.
        there: [...] bool, False where there is no pair; it counts for nothing.
        centring: the weight of the second term; it changes no difference of rewards, which the first leaves free.

    Returns:
        The loss, and by name: accuracy (a tie is wrong), margin (the mean difference), and the mean reward of each
        side.
    """
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    gap = chosen - rejected
    each = jax.nn.softplus(margins - gap) + centring * (chosen + rejected) ** 2
    count = there.sum().astype(jnp.float32)

    def mean(values: jax.Array) -> Mean:
        return jnp.where(there, values, 0.0).sum(), count

    return Loss(mean(each), {"loss": mean(each)} | _sides(rewards, mean))


def ordinal(logprobs: jax.Array) -> Loss:
    """Minus the log-probability that a score drawn for the chosen response is above one drawn for the rejected.

        −log Σ_{a > b} p_chosen(a)·p_rejected(b),   p the probabilities of the scores among themselves

    The reward of a response is the expected score Σ s·p(s). Source: OPRM, the ordinal probabilistic reward model.

    Args:
        logprobs: [P, 2, S] float32, of the scores 0 … S−1 of the chosen and of the rejected response.

    Returns:
        The loss in the mean over pairs, and by name what `bradley_terry` gives; and outside, the probability that lies
        on none of the scores.
    """
    pairs, _, scores = logprobs.shape
    own = jax.nn.log_softmax(logprobs, axis=-1)
    above = jnp.tril(jnp.ones((scores, scores), bool), -1)  # [a, b]: whether a > b
    joint = jnp.where(above, own[:, 0, :, None] + own[:, 1, None, :], -jnp.inf)
    each = -jax.nn.logsumexp(joint, axis=(1, 2))
    rewards = jnp.exp(own) @ jnp.arange(scores, dtype=jnp.float32)
    outside = 1.0 - jnp.exp(logprobs).sum(axis=-1)

    def mean(values: jax.Array) -> Mean:
        return values.sum(), jnp.float32(pairs)

    return Loss(mean(each), {"loss": mean(each), "outside": mean(outside.mean(axis=-1))} | _sides(rewards, mean))


def dpo(
    logprobs: jax.Array,
    mask: jax.Array,
    reference: Array,
    sft_weights: Array,
    beta: float,
    smoothing: float = 0.0,
    sft: float = 0.0,
) -> Loss:
    """Direct preference optimisation: which of two responses a policy is to make likelier, beside a reference.

        z = β·[(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)]
        loss = −(1 − ε)·log σ(z) − ε·log σ(−z) + sft · w·Σ −log π(token of the chosen response),   mean over pairs

    Equals: TRL's `DPOTrainer` with loss_type sigmoid, and its sum with `sft` where w is pairs / chosen tokens of the
    batch. ε is cDPO's; TRL's sigmoid takes no notice of its label_smoothing.

    Args:
        logprobs: [P, 2, T] float32, of the chosen and of the rejected response's tokens.
        mask: [P, 2, T] bool.
        reference: [P, 2], sums of their log-probs under the reference.
        sft_weights: w, [P].
        beta: β.
        smoothing: ε, the probability that a preference is the wrong way round.
        sft: the weight of the last term.

    Returns:
        The loss, and by name what `bradley_terry` gives of the rewards β·(log π − log π_ref), the sums of log-probs of
        each side, and the cross entropy of chosen tokens.

    Source: arXiv 2305.18290; smoothing: E. Mitchell, "A note on DPO with noisy preferences", 2023.
    """
    each = jnp.where(mask, logprobs, 0.0)
    sums = each.sum(axis=-1)
    rewards = beta * (sums - reference)
    z = rewards[:, 0] - rewards[:, 1]
    loss = (1 - smoothing) * jax.nn.softplus(-z) + smoothing * jax.nn.softplus(z)
    pairs = jnp.float32(len(z))

    def mean(values: jax.Array) -> Mean:
        return values.sum(), pairs

    crossed = -sums[:, 0]
    total = mean(loss + sft * sft_weights * crossed)
    return Loss(
        total,
        {
            "loss": total,
            "dpo_loss": mean(loss),
            "sft_loss": (crossed.sum(), mask[:, 0].sum().astype(jnp.float32)),
            "logps/chosen": mean(sums[:, 0]),
            "logps/rejected": mean(sums[:, 1]),
        }
        | _sides(rewards, mean),
    )


def _sides(rewards: jax.Array, mean: Callable[[jax.Array], Mean]) -> dict[str, Mean]:
    """What rewards [..., 2] say of the pairs: how often the chosen one is higher, by how much, and each in the mean."""
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    return {
        "accuracy": mean((chosen > rejected).astype(jnp.float32)),
        "margin": mean(chosen - rejected),
        "rewards/chosen/mean": mean(chosen),
        "rewards/rejected/mean": mean(rejected),
    }
