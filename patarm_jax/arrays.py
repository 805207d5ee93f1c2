"""The nouns of arrays: prompts, rollouts and batches, with their shapes. Nothing here computes.

The axis letters are

    R prompts · G rollouts per prompt · B rows · T tokens · M predicted tokens · Tp prompt tokens · Tc completion tokens
    P pairs · S scores
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.typing import DTypeLike

Array: TypeAlias = jax.Array | np.ndarray  # on devices, or numpy's on the host before it travels there
Tree: TypeAlias = Any  # arrays in tuples, dicts and dataclasses within one another: what JAX calls a pytree
Params: TypeAlias = Tree  # the weights of a network


def abstract(shape: tuple[int, ...], dtype: DTypeLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """What stands for an array until there is one: programs are compiled for it. It has a shape and no values."""
    stands_for: Tree = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return stands_for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Encoded prompts, right-padded."""

    tokens: jax.Array  # [R, Tp] int32
    lengths: jax.Array  # [R] int32, ≥ 1
    sample_ids: jax.Array  # [R] int32, which sampling keys are folded from


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Beginnings:
    """Where prompts find the keys of what they begin with: in the place of a prompt that begins alike."""

    place: Array  # [W, n] int32, counted within the device
    lengths: Array  # [R] int32, tokens that are taken from there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seats:
    """Which prompt a row that is being written reads: each of r prompts has G seats, and a row sits on one of them.

    Rows and prompts lie on W devices that share the batch; a row sits with a prompt of its own device.
    """

    seat: jax.Array  # [W, b] int32, prompt·G + rollout, counted within the device
    row: jax.Array  # [W, r·G] int32, who sits there, counted within the device; b: nobody
    age: jax.Array  # [W, b] int32, tokens the row has written before; −1: it writes nothing any more


@dataclass(frozen=True, order=True)
class SFTShape:
    """Sizes of an SFT batch that all processes agree on."""

    rows: int  # B, of one process
    width: int  # T
    targets: int  # M

    @property
    def tokens(self) -> int:
        """How large the batch is."""
        return self.rows * self.width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SFTBatch:
    """Prompts with their judgements, one sequence or several behind one another in a row, right-padded."""

    tokens: Array  # [B, T] int32
    starts: Array  # [B, T] int32, where in its row the sequence of a token begins
    read: Array  # [B, M] int32, the places of the tokens whose states predict a judgement's token
    targets: Array  # [B, M] int32, the tokens they predict: those of all judgements in the row, end tokens included
    counts: Array  # [B] int32, how many of the M are there


@dataclass(frozen=True, order=True)
class ComparedShape:
    """Sizes of a batch of compared pairs that all processes agree on."""

    rows: int  # B, of one process
    width: int  # T
    pairs: int  # P, of a row

    @property
    def tokens(self) -> int:
        """How large the batch is."""
        return self.rows * self.width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ComparedPairs:
    """Pairs that a reward model compares: both conversations of up to P pairs behind one another in a row."""

    tokens: Array  # [B, T] int32
    starts: Array  # [B, T] int32, where in its row the conversation of a token begins
    last: Array  # [B, P, 2] int32, the places of the last tokens of the chosen and of the rejected response
    margins: Array  # [B, P] float32, by how much the chosen response's reward is to exceed the other's
    counts: Array  # [B] int32, how many of the P are there


@dataclass(frozen=True, order=True)
class ScoredShape:
    """Sizes of a batch of pairs whose scores are asked for, that all processes agree on."""

    pairs: int  # P, of one process
    width: int  # Tp
    continuation: int  # Tc

    @property
    def tokens(self) -> int:
        """How large the batch is."""
        return 2 * self.pairs * self.width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoredPairs:
    """Pairs with both questions for a score, and how each of S scores would go on behind them."""

    prompt_tokens: Array  # [P, 2, Tp] int32, of the chosen and of the rejected response, up to where the score begins
    prompt_lengths: Array  # [P, 2] int32
    score_tokens: Array  # [P, S, Tc] int32, the same for every pair
    score_lengths: Array  # [P, S] int32


@dataclass(frozen=True, order=True)
class PreferredShape:
    """Sizes of a batch of preferences that all processes agree on."""

    pairs: int  # P, of one process
    width: int  # Tp
    completion: int  # Tc

    @property
    def tokens(self) -> int:
        """How large the batch is."""
        return self.pairs * (self.width + 2 * self.completion)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferredPairs:
    """P prompts with two responses each, and what the reference says of them. The first axis is never cut apart."""

    prompt_tokens: Array  # [P, Tp] int32
    prompt_lengths: Array  # [P] int32
    completion_tokens: Array  # [P, 2, Tc] int32, of the chosen and of the rejected response
    completion_lengths: Array  # [P, 2] int32, the end token included
    reference: Array  # [P, 2] float32, the sum of each response's log-probs under the reference
    sft_weights: Array  # [P] float32, by which a chosen token's cross entropy counts beside its pair


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollouts:
    """R prompts with G rollouts each, and what an update needs to know of them. The first axis is never cut apart."""

    prompt_tokens: Array  # [R, Tp] int32
    prompt_lengths: Array  # [R] int32
    completion_tokens: Array  # [R, G, Tc] int32
    completion_lengths: Array  # [R, G] int32, the end token included
    old_logprobs: Array  # [R, G, Tc] float32, under the policy that sampled
    ref_logprobs: Array | None  # [R, G, Tc] float32, under the reference; None where nothing is measured from one
    advantages: Array  # [R, G] float32, or [R, G, Tc] where tokens have their own
    sampler_logprobs: Array | None = None  # [R, G, Tc] float32, where old_logprobs are the trainer's and not these
