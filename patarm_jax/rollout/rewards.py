"""What judgements earn by the settings of a run: arrays in, `Rewards` out."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import numpy as np

from patarm_jax.arrays import Array
from patarm_jax.config.recipes import GRPOConfig
from patarm_jax.config.training import ReinforcedConfig
from patarm_jax.reward import (
    MarginFn,
    Rewards,
    accuracy_reward,
    in_all,
    label_reward,
    preference_aware_reward,
    threshold_reward,
)
from patarm_jax.train.penalties import overlong_penalty
from patarm_jax.types import Status

# From what judgements are worth as numbers, whether they are valid, draws of opponents and labels.
_Earned: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
RewardFn: TypeAlias = Callable[..., Rewards]


def make_rewards(config: GRPOConfig, margin: MarginFn) -> RewardFn:
    """The jitted function that rewards a batch of judgements.

    It takes, P pairs with S questions about each and G judgements of each question,

        numbers [P, S, G]     scores, or 1 for the right choice and 0 for the wrong one; ignored where not valid
        status  [P, S, G]     of `types.Status`
        lengths [P, S, G]     tokens
        draws   [P, S, G]     from `opponent_draws`
        labels  [P, S]        of the scores, where they are learnt from

    Args:
        config: whose reward it is.
        margin: f of PAR.
    """
    earned = _earned(config, margin)

    def rewards(
        numbers: jax.Array, status: jax.Array, lengths: jax.Array, draws: jax.Array, labels: jax.Array
    ) -> Rewards:
        return in_all(earned(numbers, status == Status.OK, draws, labels), status, lost_for_length(config, lengths))

    return jax.jit(rewards)


def lost_for_length(config: ReinforcedConfig, lengths: jax.Array) -> jax.Array | float:
    """What an algorithm takes off samples that come near the limit of tokens; DAPO does."""
    settings = config.algorithm_settings
    buffer, factor = settings.get("dapo.overlong_buffer", 0), settings.get("dapo.overlong_factor", 0.0)
    return overlong_penalty(lengths, config.sampling.max_new_tokens, buffer, factor) if buffer else 0.0


def _earned(config: GRPOConfig, margin: MarginFn) -> _Earned:
    reward = config.reward
    if config.judge == "pairwise":
        right, wrong = reward.accuracy.right, reward.accuracy.wrong
        return lambda numbers, valid, _draws, _labels: accuracy_reward(numbers, valid, right, wrong)
    if reward.kind == "threshold":
        return lambda numbers, valid, _draws, _labels: threshold_reward(numbers, valid)
    if reward.kind == "labels":
        return lambda numbers, valid, _draws, labels: label_reward(numbers, valid, labels)
    par = partial(preference_aware_reward, margin_fn=margin, opponent=reward.opponent, loser=reward.loser)
    return lambda numbers, valid, draws, _labels: par(numbers, valid, draws=draws)


def opponent_draws(key: jax.Array, sample_ids: Array, group: int) -> np.ndarray:
    """A number evenly from [0, 1) for each judgement, [R, G]: which one of the other side it is compared with.

    Args:
        key: of the step.
        sample_ids: [R], of the requests; a row draws the same in whatever company.
        group: G.
    """
    return np.asarray(_drawn(jax.random.fold_in(key, _OPPONENTS), jax.numpy.asarray(sample_ids), group))


_OPPONENTS = 2**32 - 1  # no sample id, from which the keys of completions are folded


@partial(jax.jit, static_argnums=2)
def _drawn(key: jax.Array, sample_ids: jax.Array, group: int) -> jax.Array:
    return jax.vmap(lambda sample: jax.random.uniform(jax.random.fold_in(key, sample), (group,)))(sample_ids)
