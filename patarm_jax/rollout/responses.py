"""Responses of a policy, and what others say of them.

Sources are offered the responses to a prompt as soon as they are written, so that those who are asked elsewhere think
while the policy still samples; then each gives its values for all of them.

    R prompts · G responses to each · K sources
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from patarm_jax.arrays import Params
from patarm_jax.config.policy import PolicyConfig
from patarm_jax.data.pipeline import EncodedPair, PairBatch
from patarm_jax.files import one_line
from patarm_jax.judge.parse import answer_of
from patarm_jax.model.sharding import fetch, gather, gather_json, process_in
from patarm_jax.reward import Rewards, combined_rewards
from patarm_jax.rollout.judging import Judge, judge, judge_all, requests_of, written_ids
from patarm_jax.rollout.rewards import lost_for_length
from patarm_jax.rollout.rounds import Phase, Round
from patarm_jax.rollout.schedule import Finished, Group, stacked
from patarm_jax.types import Judgement, Preference, Status, UserError

NO_ANSWER = "no answer stands behind the thinking"
NO_BASELINE = "the response that it is compared with has no answer behind its thinking"


@dataclass(frozen=True)
class Responses:
    """The responses to one prompt."""

    index: int  # of the prompt, among this process's of the step
    record: EncodedPair
    answers: Sequence[str | None]  # [G] as sources see them; None where there is none
    texts: Sequence[str]  # [G] all that was written
    ids: Sequence[Sequence[int]]  # [G] its tokens
    baseline: str | None = None  # the policy's greedy response, where a source compares with it and it has an answer

    @property
    def preference(self) -> Preference:
        """The prompt."""
        return self.record.preference


@dataclass(frozen=True)
class Worth:
    """What a source says of a response."""

    value: float | None  # None where it says nothing
    said: str = ""  # a judgement, or why there is no value
    # Of a judge of two: the share of comparisons that it wins standing first and second; None where there is none.
    orders: tuple[float | None, ...] = ()
    beats: tuple[int, ...] | None = None  # where all of a group are compared: the members that it beats in both orders


class Source(Protocol):
    """Says what responses are worth."""

    @property
    def name(self) -> str:
        """In metrics."""

    def offer(self, responses: Responses) -> None:
        """Takes the responses to one prompt, to be judged now or when they are collected."""

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """What all responses are worth that were offered since the last time, by the index of their prompt; [G] each.

        All processes call it together.

        Args:
            key: of the round, from which judgements here draw.
            step: of the run.
        """

    def settle(self) -> None:
        """Takes what has failed since the last time as final: it has been learnt from, or told."""


# From values [K, R, G] and lengths [R, G] to rewards and whether there are any, both [R, G].
Combine: TypeAlias = Callable[[jax.Array, jax.Array], tuple[Rewards, jax.Array]]


def make_response_rewards(config: PolicyConfig) -> Combine:
    """The jitted function that makes rewards of what sources say."""
    weights = jnp.array([source.weight for source in config.reward.sources], jnp.float32)

    def rewards(values: jax.Array, lengths: jax.Array) -> tuple[Rewards, jax.Array]:
        earned, valid = combined_rewards(values, weights, config.reward.combine)
        lost = lost_for_length(config, lengths) * valid
        nothing = jnp.zeros_like(earned)
        return Rewards(earned, nothing, nothing + lost, earned + lost), valid

    return jax.jit(rewards)


@dataclass(frozen=True)
class Rewarding:
    """Who rewards responses, and how."""

    config: PolicyConfig
    sources: Callable[[], Sequence[Source]]  # whose weights are loaded when they are first asked
    combine: Combine


@dataclass(frozen=True)
class Said:
    """Responses, and what sources say of them."""

    finished: Finished  # this process's
    responses: Sequence[Responses]  # this process's, in the order of their prompts
    of_sources: Mapping[str, Mapping[int, list[Worth]]]  # this process's
    worth: Mapping[str, np.ndarray]  # everyone's values [R, G] by source, NaN where it says nothing
    lengths: np.ndarray  # [R, G] everyone's tokens
    truncated: np.ndarray  # [R, G] everyone's, whether they were cut off
    without: np.ndarray  # [R, G] everyone's, whether they have no answer behind their thinking


def ask_sources(
    policy: Judge,
    greedy: Judge | None,
    sources: Sequence[Source],
    sees_thinking: bool,
    step: int,
    weights: Params,
    records: Sequence[EncodedPair],
    key: jax.Array,
    phase: Phase,
    prompts: int | None = None,
) -> Said:
    """Responses to some prompts, and what sources say of them.

    Args:
        policy: from `make_judge`.
        greedy: the same with its likeliest words and groups of one, where a source compares with these; or None.
        sources: all are asked about all responses.
        sees_thinking: whether they see the thinking too.
        step: of the run.
        weights: of the policy.
        records: this process's prompts; all processes have equally many.
        key: of the responses, and of judgements here.
        phase: times a part of the step by its name.
        prompts: so many of all processes' records are prompts, the first ones; those behind are copies, by which
            processes share evenly, and which no source is asked about. None: all are.
    """
    every: list[Responses] = []
    groups: list[Group] = []
    requests, first = requests_of(records), process_in(policy.engine.mesh)[0] * len(records)
    with phase("sample"):
        baselines: list[str | None] = [None] * len(records)
        if greedy is not None:
            _, found = judge_all(greedy, weights, requests, key)
            baselines = [_seen(one.text, sees_thinking) for (one,) in found]
        for written in judge(policy, weights, requests, key):
            texts = [one.text for one in written.judgements]
            index, ids = written.group.index, written_ids(written.group)
            is_copy = prompts is not None and first + index >= prompts
            answers = [None if is_copy else _seen(text, sees_thinking) for text in texts]
            every.append(Responses(index, records[index], answers, texts, ids, baselines[index]))
            groups.append(written.group)
            for source in sources:
                source.offer(every[-1])
        every.sort(key=lambda one: one.index)
        finished = stacked(sorted(groups, key=lambda group: group.index))
    with phase("judge"):
        of_sources = {source.name: source.collect(key, step) for source in sources}
    mine = {
        name: np.array([[_number(one) for one in worth[index]] for index in range(len(records))], np.float32)
        for name, worth in of_sources.items()
    }
    without = np.array([[answer is None for answer in responses.answers] for responses in every])
    numbers = (finished.lengths, finished.truncated, without, *mine.values())
    lengths, truncated, without, *values = gather(policy.engine.mesh, numbers)
    worth = dict(zip(mine, values, strict=True))
    return Said(finished, every, of_sources, worth, lengths, truncated, without)


def sample_responses(
    policy: Judge,
    greedy: Judge | None,
    rewarding: Rewarding,
    step: int,
    weights: Params,
    pairs: PairBatch,
    key: jax.Array,
    phase: Phase,
) -> Round:
    """Responses to a batch of prompts, and what they earn.

    Arguments as of `rounds.sample_round` and `ask_sources`.

    Raises:
        UserError: when more of the responses than reward.max_failed are not judged.
    """
    mesh, group, config = policy.engine.mesh, policy.engine.group, rewarding.config
    seen = config.reward.sees_thinking
    said = ask_sources(policy, greedy, rewarding.sources(), seen, step, weights, pairs.records, key, phase)
    with phase("reward"):
        refuse_many_failures(said, mesh, f"step {step}", "reward.max_failed", config.reward.max_failed)
        for source in rewarding.sources():
            source.settle()
        values = np.stack(list(said.worth.values()))
        rewards, _ = fetch(rewarding.combine(jnp.asarray(values), jnp.asarray(said.lengths)))
    requests, lengths = requests_of(pairs.records), said.lengths
    return Round(
        pairs=pairs,
        requests=requests,
        finished=said.finished,
        judgements=[[Judgement(text, Status.OK, "") for text in one.texts] for one in said.responses],
        numbers=np.where(np.isnan(values).any(axis=0), np.nan, rewards.total),
        status=np.full(lengths.shape, int(Status.OK), np.int32),
        lengths=lengths,
        truncated=said.truncated,
        rewards=jax.tree.map(lambda part: part.reshape(len(pairs.ids), 1, group), rewards),
        worth=said.worth,
        said=[
            "\n\n".join(f"{name}: {_told(worth[index][member])}" for name, worth in said.of_sources.items())
            for index in range(len(requests))
            for member in range(group)
        ],
    )


def _seen(text: str, sees_thinking: bool) -> str | None:
    """What sources see of a response; None where no answer stands behind its thinking."""
    answer = answer_of(text)
    return text if answer and sees_thinking else answer


def _number(worth: Worth) -> float:
    return np.nan if worth.value is None else worth.value


def _told(worth: Worth) -> str:
    value = "none" if worth.value is None else f"{worth.value:g}"
    return f"{value}\n{worth.said}" if worth.said else value


def refuse_many_failures(said: Said, mesh: jax.sharding.Mesh, where: str, setting: str, most: float) -> None:
    """Refuses to learn from responses of which too few are judged; that one has no answer is its own fault.

    Args:
        said: of the responses.
        mesh: of all processes.
        where: what they are the responses of, to begin the sentence with.
        setting: that says how large a share may be without a reward.
        most: which is this.

    Raises:
        UserError: when there are more.
    """
    by_source = {name: np.isnan(values) & ~said.without for name, values in said.worth.items()}
    failed = np.any(list(by_source.values()), axis=0)
    if failed.mean() > most:
        name = max(by_source, key=lambda name: int(by_source[name].sum()))  # the worst
        reasons = [one.said for every in said.of_sources[name].values() for one in every if one.value is None]
        reasons = gather_json(mesh, [reason for reason in reasons if reason != NO_ANSWER][:1]) or ["nobody says"]
        raise UserError(
            f"{where}: {failed.sum():,} of {failed.size:,} responses have no reward, more than {setting} {most:g} "
            f"allows; {name} says nothing of {by_source[name].sum():,}, first because: "
            f"{one_line(reasons[0])[:300]}. What was saved before is whole, and answers that came are kept: when that "
            "is put right, run the same command again to go on."
        )


def without_answers(responses: Responses) -> dict[int, Worth]:
    """Of the members of a group that have no answer, what every source says of them."""
    return {member: Worth(None, NO_ANSWER) for member, answer in enumerate(responses.answers) if answer is None}
