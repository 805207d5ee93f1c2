"""The rounds of judgements of a step, and the batch that is made of them.

Most algorithms learn from one round: all judgements of the step's pairs. DAPO leaves out groups whose judgements all
earn the same, since they teach nothing, and samples further pairs until the groups that are left fill a batch.

A round has this process's part in text and tokens, and everyone's in numbers; so every process chooses the same groups,
and the batch is the same on any number of them.

    P pairs · S questions about each · G judgements of each question · R = P·S
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from patarm_jax.arrays import Params
from patarm_jax.config.training import ReinforcedConfig
from patarm_jax.data.pipeline import PairBatch
from patarm_jax.model.sharding import fetch, gather, process_in
from patarm_jax.reward import Rewards
from patarm_jax.rollout.judging import Judge, judge_all, numbers_of, requests_of, rubrics_of
from patarm_jax.rollout.rewards import RewardFn, opponent_draws
from patarm_jax.rollout.schedule import Finished, Request
from patarm_jax.types import Judgement, Status

Phase: TypeAlias = Callable[[str], AbstractContextManager[None]]  # times a part of a step by its name
_LATER_ROUNDS = 2**32 - 2  # counted down from: no completion's id, from which its key is folded


@dataclass(frozen=True)
class JudgedBy:
    """What was judged by a sampled rubric."""

    rubric: str  # as the judge was shown it
    verdicts: Sequence[Judgement]  # of the pair in one order, or of each response


@dataclass(frozen=True)
class Written:
    """A rubric as a generator wrote it."""

    shown: str  # what a judge is shown of it
    status: Status  # of all that was written


@dataclass(frozen=True)
class Round:
    """Judgements of some pairs and what they earn."""

    pairs: PairBatch
    requests: Sequence[Request]  # this process's
    finished: Finished  # this process's
    judgements: Sequence[Sequence[Judgement]]  # this process's, [r][G]
    numbers: np.ndarray  # [R, G] everyone's scores, or 1 for a right choice and 0 for a wrong one; NaN where not valid
    status: np.ndarray  # [R, G] everyone's
    lengths: np.ndarray  # [R, G] everyone's tokens
    truncated: np.ndarray  # [R, G] everyone's, whether they were cut off
    rewards: Rewards  # everyone's, [P, S, G]; numpy's
    by: Sequence[JudgedBy] = ()  # this process's, [r·G], of rubrics: what earns each of them its reward
    rubrics: Mapping[str, Written] = field(default_factory=dict)  # by a pair's id, what it was judged by; everyone's
    shortened: float = 0.0  # the share of everyone's rubrics that lost their end where a judge was shown them
    # Of a policy: everyone's values by each source [R, G], NaN where it says nothing, and what this process's say.
    worth: Mapping[str, np.ndarray] = field(default_factory=dict)
    said: Sequence[str] = ()  # [r·G]

    @property
    def longest_prompt(self) -> int:
        """Tokens, of everyone's."""
        return self.pairs.longest_prompt

    @property
    def rewarded(self) -> np.ndarray:
        """[R, G] bool, whether everyone's samples have a reward; those of a judge always have one."""
        if not self.worth:
            return np.ones(self.status.shape, bool)
        return ~np.isnan(np.stack(list(self.worth.values()))).any(axis=0)

    @property
    def total(self) -> np.ndarray:
        """[R, G], what everyone's judgements earn."""
        return np.asarray(self.rewards.total).reshape(self.status.shape)


@dataclass(frozen=True)
class Chosen:
    """The judgements of a step that are learnt from: this process's in tokens, everyone's in numbers."""

    requests: Sequence[Request]
    finished: Finished
    rewards: np.ndarray  # [R, G] everyone's
    lengths: np.ndarray  # [R, G] everyone's tokens; 0 where a batch is not full
    valid: np.ndarray  # [R, G] bool everyone's, False there and where a sample has no reward
    # Of everyone's R prompts, (round, prompt in it) that each is; (-1, 0) where a batch is not full.
    places: np.ndarray  # [R, 2]

    def of_round(self, number: int, values: np.ndarray, size: int) -> np.ndarray:
        """What is known of everyone's chosen prompts [R, …], as prompts of a round [size, …]; NaN of the others."""
        found = np.full((size, *values.shape[1:]), np.nan, np.float32)
        here = self.places[:, 0] == number
        found[self.places[here, 1]] = values[here]
        return found


@dataclass(frozen=True)
class Reinforced:
    """What a step has sampled, and what it has learnt from."""

    rounds: Sequence[Round]
    chosen: Chosen
    advantages: np.ndarray  # [R, G] of what is chosen


def sample_round(
    judge: Judge,
    reward: RewardFn,
    weights: Params,
    pairs: PairBatch,
    key: jax.Array,
    phase: Phase,
) -> Round:
    """Judgements of a batch of pairs, and what they earn.

    Args:
        judge: from `make_judge`.
        reward: from `make_rewards`.
        weights: of the judge.
        pairs: this process's part of the batch, of which every process has one.
        key: of this round.
        phase: times a part of the step by its name.
    """
    mesh, group, requests = judge.engine.mesh, judge.engine.group, requests_of(pairs.records)
    with phase("sample"):
        finished, judgements = judge_all(judge, weights, requests, key, rubrics_of(pairs.records))
    with phase("reward"):
        questions = [(record, place) for record in pairs.records for place in record.places]
        labels = np.array([(record.preference.labels or (0.0, 0.0))[place] for record, place in questions], np.float32)
        draws = opponent_draws(key, np.array([request.sample_id for request in requests]), group)
        known = numbers_of(judgements, [place for _, place in questions], judge.form)
        mine = (*known, finished.lengths, finished.truncated, draws, labels)
        numbers, status, lengths, truncated, draws, labels = gather(mesh, mine)
        by_pair = (len(pairs.ids), len(numbers) // len(pairs.ids), group)
        arrays = (x.reshape(by_pair) for x in (numbers, status, lengths, draws))
        rewards = fetch(reward(*arrays, labels.reshape(by_pair[:2])))
    return Round(
        pairs=pairs,
        requests=requests,
        finished=finished,
        judgements=judgements,
        numbers=numbers,
        status=status,
        lengths=lengths,
        truncated=truncated,
        rewards=rewards,
    )


def key_of(seed: int, step: int, number: int = 0) -> jax.Array:
    """The key that a round of a step draws from; a pair that comes again in a later round is judged anew."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, _LATER_ROUNDS - number) if number else key


def tokens_of(each: Round) -> int:
    """All that a round read and wrote, the prompts once for each judgement, as TRL counts them."""
    group = each.status.shape[-1]
    return group * sum(prompt for prompt, _ in each.pairs.lengths) + int(each.lengths.sum())


def wants_another(config: ReinforcedConfig, rounds: Sequence[Round]) -> bool:
    """Whether groups are still missing of a step's batch, and another round may be sampled for them."""
    most = config.algorithm_settings.get("dapo.max_rounds", 1)
    return len(rounds) < most and len(with_spread(rounds, config.prompts_per_group)) < len(rounds[0].status)


def chosen_of(config: ReinforcedConfig, mesh: Mesh, rounds: Sequence[Round]) -> Chosen:
    """What a step learns from: with DAPO the groups with a spread, else all that was sampled."""
    if "dapo.max_rounds" in config.algorithm_settings:
        return refilled(mesh, rounds, config.prompts_per_group)
    (only,) = rounds
    return _all_of(only)


def _all_of(only: Round) -> Chosen:
    """A batch of all the judgements of one round."""
    rows = len(only.status)
    return Chosen(
        requests=only.requests,
        finished=only.finished,
        rewards=only.total,
        lengths=only.lengths,
        valid=only.rewarded,
        places=np.stack([np.zeros(rows, int), np.arange(rows)], axis=1),
    )


def with_spread(rounds: Sequence[Round], prompts_per_group: int) -> np.ndarray:
    """[n, 2] the (round, prompt) of the groups whose judgements do not all earn the same, in the order of sampling."""
    found = []
    for number, each in enumerate(rounds):
        size = prompts_per_group * each.total.shape[-1]
        groups, rewarded = each.total.reshape(-1, size), each.rewarded.reshape(-1, size)
        high, low = np.where(rewarded, groups, -np.inf).max(axis=-1), np.where(rewarded, groups, np.inf).min(axis=-1)
        kept = np.flatnonzero(high > low)
        prompts = (kept[:, None] * prompts_per_group + np.arange(prompts_per_group)).reshape(-1)
        found.append(np.stack([np.full(len(prompts), number), prompts], axis=1))
    return np.concatenate(found)


def refilled(mesh: Mesh, rounds: Sequence[Round], prompts_per_group: int) -> Chosen:
    """A batch as large as a round, of the first groups that have a spread; where they are too few, it is not full.

    A place that is left over holds a prompt with empty completions: it counts in no sum and in no mean.
    """
    rows = len(rounds[0].status)
    taken = with_spread(rounds, prompts_per_group)[:rows]
    places = np.concatenate([taken, np.tile([-1, 0], (rows - len(taken), 1))])
    mine, processes = process_in(mesh)
    share = places[mine * rows // processes : (mine + 1) * rows // processes]
    everyone = [_everyone(mesh, each) for each in rounds]
    group, width = rounds[0].finished.tokens.shape[1:]
    nobody = _Sampled(
        prompt=np.zeros(1, np.int32),
        sample_id=0,
        tokens=np.zeros((group, width), np.int32),
        logprobs=np.zeros((group, width), np.float32),
        lengths=np.zeros(group, np.int32),
        truncated=np.zeros(group, bool),
    )
    written = [nobody if number < 0 else everyone[number][prompt] for number, prompt in share]
    rewards, lengths = np.zeros((rows, group), np.float32), np.zeros((rows, group), np.int32)
    rewarded = np.zeros((rows, group), bool)
    for row, (number, prompt) in enumerate(taken):
        rewards[row], lengths[row] = rounds[number].total[prompt], rounds[number].lengths[prompt]
        rewarded[row] = rounds[number].rewarded[prompt]
    return Chosen(
        requests=[Request(one.prompt, one.sample_id) for one in written],
        finished=Finished(
            tokens=np.stack([one.tokens for one in written]),
            lengths=np.stack([one.lengths for one in written]),
            logprobs=np.stack([one.logprobs for one in written]),
            truncated=np.stack([one.truncated for one in written]),
        ),
        rewards=rewards,
        lengths=lengths,
        valid=rewarded,
        places=places,
    )


@dataclass(frozen=True)
class _Sampled:
    """One prompt and its completions."""

    prompt: np.ndarray
    sample_id: int
    tokens: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray


def _everyone(mesh: Mesh, each: Round) -> list[_Sampled]:
    """The prompts and completions of all processes; a chosen group may be another process's to learn from."""
    longest = each.pairs.longest_prompt
    prompts = np.zeros((len(each.requests), longest), np.int32)
    for row, request in zip(prompts, each.requests, strict=True):
        row[: len(request.tokens)] = request.tokens
    sizes = np.array([[len(request.tokens), request.sample_id] for request in each.requests])
    finished = each.finished
    arrays = (prompts, sizes, finished.tokens, finished.logprobs, finished.lengths, finished.truncated)
    return [
        _Sampled(prompt[:size], int(sample), tokens, logprobs, lengths, truncated)
        for prompt, (size, sample), tokens, logprobs, lengths, truncated in zip(*gather(mesh, arrays), strict=True)
    ]
