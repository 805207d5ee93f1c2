"""The nouns of arrays: prompts, completions and batches, with their shapes. Nothing here computes.

The axis letters are

    P preference pairs · 2 sides (0 chosen, 1 rejected) · G rollouts per response · R = 2·P responses
    B rows · T tokens · M predicted tokens · Tp prompt tokens · Tc completion tokens
"""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Encoded prompts, right-padded."""

    tokens: jax.Array  # [R, Tp] int32
    lengths: jax.Array  # [R] int32, ≥ 1
    sample_ids: jax.Array  # [R] int32, which sampling keys are folded from


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Completions:
    """What the sampler returns: G completions of each of R prompts, right-padded."""

    tokens: jax.Array  # [R, G, Tc] int32
    lengths: jax.Array  # [R, G] int32, the end token included
    logprobs: jax.Array  # [R, G, Tc] float32, log π(token) at the sampling temperature, 0 past the end
    truncated: jax.Array  # [R, G] bool, cut off before an end token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seats:
    """Which prompt a row that is being written reads: each of r prompts has G seats, and a row sits on one of them.

    Rows and prompts lie on W devices that share the batch; a row sits with a prompt of its own device.
    """

    seat: jax.Array  # [W, b] int32, prompt·G + rollout, counted within the device
    row: jax.Array  # [W, r·G] int32, who sits there, counted within the device; b: nobody
    age: jax.Array  # [W, b] int32, tokens the row has written before


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SFTBatch:
    """Prompts with their judgements, one sequence or several behind one another in a row, right-padded."""

    tokens: jax.Array  # [B, T] int32
    starts: jax.Array  # [B, T] int32, where in its row the sequence of a token begins
    read: jax.Array  # [B, M] int32, the places of the tokens whose states predict a judgement's token
    targets: jax.Array  # [B, M] int32, the tokens they predict: those of all judgements in the row, end tokens included
    counts: jax.Array  # [B] int32, how many of the M are there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GRPOBatch:
    """The rollouts of P pairs with everything one policy update needs."""

    prompt_tokens: jax.Array  # [P, 2, Tp] int32
    prompt_lengths: jax.Array  # [P, 2] int32
    completion_tokens: jax.Array  # [P, 2, G, Tc] int32
    completion_lengths: jax.Array  # [P, 2, G] int32, the end token included
    old_logprobs: jax.Array  # [P, 2, G, Tc] float32, under the policy that sampled
    ref_logprobs: jax.Array | None  # [P, 2, G, Tc] float32, under the reference; None when kl_coef is 0
    advantages: jax.Array  # [P, 2, G] float32
