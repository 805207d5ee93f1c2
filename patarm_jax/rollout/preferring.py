"""Which two of a policy's responses to a prompt make a pair that it learns from."""

from dataclasses import dataclass

import numpy as np

ONE_REWARD = "fewer than two whole responses with a reward"
ALL_EQUAL = "all rewards are equal"
UNLIKE = "no two texts that differ and whose preference is the same in both orders"
SMALL_GAP = "no gap of on_policy.min_gap"
ROUNDING = 1e-6  # the mean of the same votes in another order is no other reward


@dataclass(frozen=True)
class Pair:
    """Two members of a group."""

    chosen: int
    rejected: int


def preferred_pair(rewards: np.ndarray, agreed: np.ndarray, min_gap: float) -> Pair | str:
    """The two responses that are furthest apart, of those whose order all judges of two agree on.

        argmax over (i, j) of r_i − r_j, where i beats j by every judge of two

    Without judges of two these are the best and the worst. The first of equals is taken: draws are in no order.

    Args:
        rewards: [G], NaN where there is none or where the response was cut off.
        agreed: [G, G] bool, whether the texts differ and all judges of two prefer the first index to the second in
            both orders.
        min_gap: by which the two must differ at least.

    Returns:
        The pair, or why there is none.

    >>> rewards = np.array([3.0, 8.0, np.nan, 5.0])
    >>> preferred_pair(rewards, np.ones((4, 4), bool), 0.0)
    Pair(chosen=1, rejected=0)
    >>> preferred_pair(rewards, np.ones((4, 4), bool), 6.0)
    'no gap of on_policy.min_gap'
    """
    there = ~np.isnan(rewards)
    if there.sum() < 2:
        return ONE_REWARD
    gaps = np.where(there[:, None] & there, rewards[:, None] - rewards, -np.inf)
    if gaps.max() <= ROUNDING:
        return ALL_EQUAL
    of_agreed = np.where(agreed, gaps, -np.inf)
    if of_agreed.max() <= ROUNDING:
        return UNLIKE
    if of_agreed.max() < min_gap - ROUNDING:
        return SMALL_GAP
    chosen, rejected = np.unravel_index(int(of_agreed.argmax()), gaps.shape)
    return Pair(int(chosen), int(rejected))
