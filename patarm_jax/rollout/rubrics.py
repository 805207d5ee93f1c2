"""Rubrics that a generator writes: one for each pair, to judge by, or a group, which a frozen judge rewards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from patarm_jax.arrays import Params
from patarm_jax.config.rubric_arm import TurnConfig
from patarm_jax.data.pipeline import EncodedPair, PairBatch
from patarm_jax.judge.criteria import shown_rubric
from patarm_jax.model.sharding import fetch, gather, gather_json
from patarm_jax.reward import Rewards, checked_rubric_reward, checklist_reward, verdict_reward
from patarm_jax.rollout.judging import Judge, judge_all, numbers_of, places_of, requests_of, rubrics_of
from patarm_jax.rollout.rewards import RewardFn, lost_for_length
from patarm_jax.rollout.rounds import JudgedBy, Phase, Round, Written, sample_round
from patarm_jax.types import Status

_RUBRICS = 2**32 - 3  # no completion's id, from which the key of the rubrics of a step is folded


def write_rubrics(
    generator: Judge, weights: Params, share: Sequence[EncodedPair], key: jax.Array, number: int
) -> list[Written]:
    """One rubric for each of some records, on every process.

    Args:
        generator: with groups of one.
        weights: of it.
        share: this process's part of the records, see `evaluate.heldout.share_of`.
        key: that sampled rubrics draw from.
        number: of the records; the rest of what is written is padding.
    """
    _, rubrics = judge_all(generator, weights, requests_of(share), key)
    mine = [[shown_rubric(rubric.text), int(rubric.status)] for (rubric,) in rubrics]
    every = gather_json(generator.engine.mesh, mine)[:number]
    return [Written(shown, Status(status)) for shown, status in every]


@dataclass(frozen=True)
class FrozenJudge:
    """A judge that says what rubrics are worth, by one greedy judgement of the pair, or of each response."""

    judge: Judge  # greedy, with groups of one
    weights: Callable[[], Params]
    # A pair as it reads it by a rubric: in the pair's order or, where it reads one response, each.
    ruled: Callable[[EncodedPair, str], EncodedPair]


def sample_rubrics(
    generator: Judge,
    reward: RewardFn,
    by: FrozenJudge,
    weights: Params,
    pairs: PairBatch,
    key: jax.Array,
    phase: Phase,
) -> Round:
    """A group of rubrics for the prompt of each pair, and what they earn: 1 where the judge by one prefers the chosen.

    Arguments as of `sample_round`; `by` is the judge.
    """
    mesh = generator.engine.mesh
    with phase("sample"):
        requests = requests_of(pairs.records)
        finished, rubrics = judge_all(generator, weights, requests, key)
    with phase("judge"):
        group = generator.engine.group
        ruled = [
            by.ruled(record, shown_rubric(rubric.text))
            for record, of_it in zip(pairs.records, rubrics, strict=True)
            for rubric in of_it
        ]
        _, verdicts = judge_all(by.judge, by.weights(), requests_of(ruled), key, rubrics_of(ruled))
    with phase("reward"):
        numbers, _ = numbers_of(verdicts, places_of(ruled), by.judge.form)
        numbers = numbers.reshape(len(ruled), -1)
        of_each = [verdicts[number : number + numbers.shape[1]] for number in range(0, len(verdicts), numbers.shape[1])]
        right = _which_is_right(numbers)
        whole = [shown_rubric(rubric.text) for of_it in rubrics for rubric in of_it]
        shortened = [text != record.preference.rubric for text, record in zip(whole, ruled, strict=True)]
        status = np.array([[int(rubric.status) for rubric in of_it] for of_it in rubrics], np.int32)
        mine = (right.reshape(-1, group), status, finished.lengths, finished.truncated, np.array(shortened))
        right, status, lengths, truncated, cut = gather(mesh, mine)
        one_each = (len(pairs.ids), 1, group)
        arrays = (x.reshape(one_each) for x in (right, status, lengths))
        rewards = fetch(reward(*arrays, None, None))
    return Round(
        pairs=pairs,
        requests=requests,
        finished=finished,
        judgements=rubrics,
        numbers=right,
        status=status,
        lengths=lengths,
        truncated=truncated,
        rewards=rewards,
        shortened=float(cut.mean()),
        by=[
            JudgedBy(record.preference.rubric, [verdict for (verdict,) in verdicts])
            for record, verdicts in zip(ruled, of_each, strict=True)
        ],
    )


def _which_is_right(numbers: np.ndarray) -> np.ndarray:
    """[N] 1 where the chosen response is preferred, 0 where it is not, NaN where nothing can be read.

    Args:
        numbers: [N, 1] that already, or [N, 2] scores of the chosen and the rejected response.
    """
    if numbers.shape[1] == 1:
        return numbers[:, 0]
    chosen, rejected = numbers.T
    return np.where(np.isnan(chosen + rejected), np.nan, chosen > rejected).astype(np.float32)


def sample_by_rubrics(
    judge: Judge,
    reward: RewardFn,
    rubrics: Mapping[str, Written],
    weights: Params,
    pairs: PairBatch,
    key: jax.Array,
    phase: Phase,
) -> Round:
    """Judgements of a batch of pairs which show rubrics that were written before, and what they earn.

    Arguments as of `sample_round`; `rubrics` are those of all pairs by their ids.
    """
    return replace(sample_round(judge, reward, weights, pairs, key, phase), rubrics=rubrics)


@dataclass(frozen=True)
class WritingGenerator:
    """A generator that writes one rubric for each pair before a judge is sampled."""

    generator: Judge  # with groups of one
    weights: Callable[[], Params]
    # The pair as the judge reads it by a rubric, in the pair's order, and what is kept of the rubric.
    ruled: Callable[[EncodedPair, str], tuple[EncodedPair, str]]


def sample_by_new_rubrics(
    judge: Judge,
    reward: RewardFn,
    by: WritingGenerator,
    weights: Params,
    pairs: PairBatch,
    key: jax.Array,
    phase: Phase,
) -> Round:
    """Judgements of a batch of pairs by rubrics that are written for them now, and what they earn.

    Arguments as of `sample_round`; `by` is the generator.
    """
    mesh = judge.engine.mesh
    with phase("sample"):
        requests = requests_of(pairs.records)
        _, rubrics = judge_all(by.generator, by.weights(), requests, jax.random.fold_in(key, _RUBRICS))
        ruled = [
            by.ruled(record, shown_rubric(rubric.text))
            for record, (rubric,) in zip(pairs.records, rubrics, strict=True)
        ]
        mine = [
            (record.preference.id, kept, int(rubric.status), record.lengths)
            for (record, kept), (rubric,) in zip(ruled, rubrics, strict=True)
        ]
        every = gather_json(mesh, mine)
        batch = PairBatch(
            records=tuple(record for record, _ in ruled),
            ids=pairs.ids,
            lengths=tuple((prompt, completion) for *_, lengths in every for prompt, completion in lengths),
        )
    found = sample_round(judge, reward, weights, batch, key, phase)
    return replace(found, rubrics={pair: Written(kept, Status(status)) for pair, kept, status, _ in every})


def make_verdict_rewards(config: TurnConfig) -> RewardFn:
    """The jitted function that rewards a batch of judgements by rubrics, or of rubrics, called as `make_rewards`'s."""
    earned = {
        ("rubric_judge", "rubric_judge"): verdict_reward,
        ("rubric", "rubric_judge"): verdict_reward,
        ("checklist", "checklist"): checklist_reward,
        ("rubric", "checklist"): checked_rubric_reward,
    }[config.judge, config.beside]

    def rewards(
        right: jax.Array, status: jax.Array, lengths: jax.Array, _draws: jax.Array, _labels: jax.Array
    ) -> Rewards:
        found = earned(right, status == Status.OK, config.format_reward)
        lost = lost_for_length(config, lengths)
        return Rewards(found.earned, found.format, found.length + lost, found.total + lost)

    return jax.jit(rewards)
