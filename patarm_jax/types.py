"""The nouns every room speaks of: preferences, judgements, batches of arrays, and the user's mistakes.

Nothing here computes. Array fields carry their shape; the axis letters are

    P preference pairs · 2 sides (0 chosen, 1 rejected) · G rollouts per response · R = 2·P responses
    B rows · T tokens · M predicted tokens · Tp prompt tokens · Tc completion tokens
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, TypedDict

import jax

CHOSEN, REJECTED = 0, 1

Domain = Literal["chat", "math", "code", "safety", "instruction_following"]
RubricMode = Literal["adaptive", "primary", "generated"]
Benchmark = Literal["rewardbench", "rewardbench2", "rm-bench", "judgebench", "llmbar", "rmb", "ppe", "pairs"]
# How a judge is asked: for a score of each response, which of two is better, for a score without rubrics (what a
# general model is asked as a baseline); scalar: a Bradley-Terry head gives the score, and nothing is written.
JudgeKind = Literal["pointwise", "pairwise", "baseline", "scalar"]
# Whether the chat template of a server that is not seen writes `<think>` itself; auto: as its answers show.
OpensThinking = Literal["auto", "yes", "no"]


class UserError(Exception):
    """Something the user can mend. The message says what was got, what is allowed and what to do."""

    exit_code = 1


class LearntNothing(UserError):
    """A run came to its end, and nothing was learnt in it."""


class UsageError(UserError):
    """A command line or a config that cannot be meant."""

    exit_code = 2


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """One (prompt, chosen, rejected): the record that is never torn apart."""

    id: str
    prompt: Conversation  # all turns before the response, the last one the user's
    chosen: str
    rejected: str
    domain: Domain
    source: str


class Status(IntEnum):
    """How reading a judgement went. The integers are what `reward.format_reward` takes."""

    OK = 0
    BAD_SCORE = 1  # the tags stand in order, but what is inside <answer> is no valid score (or choice)
    BAD_TAGS = 2  # a tag is missing, repeated or out of order


@dataclass(frozen=True)
class Judgement:
    """What was read from the text a judge wrote about a response."""

    text: str
    status: Status
    reason: str  # why it failed; empty when status is OK
    score: float | None = None  # pointwise: 0 ≤ score ≤ 10, None unless status is OK
    choice: Literal["A", "B"] | None = None  # pairwise, None unless status is OK
    thinking: str = ""
    generated_rubrics: str = ""
    evaluation: str = ""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Encoded prompts, right-padded."""

    tokens: jax.Array  # [R, Tp] int32
    lengths: jax.Array  # [R] int32, ≥ 1
    rows: jax.Array  # [R] int32, the row id that sampling keys are folded from


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
