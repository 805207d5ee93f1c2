"""Losses that compare the two sides of a pair, as sums over pairs, so that micro-batches add up exactly."""

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

    metrics = {
        "loss": mean(each),
        "accuracy": mean((gap > 0).astype(jnp.float32)),
        "margin": mean(gap),
        "rewards/chosen/mean": mean(chosen),
        "rewards/rejected/mean": mean(rejected),
    }
    return Loss(metrics["loss"], metrics)
