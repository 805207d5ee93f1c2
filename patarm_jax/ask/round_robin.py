"""A judge of two responses that compares all responses to a prompt with one another, each two in both orders."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np

from patarm_jax.ask.worth_here import JudgeHere
from patarm_jax.rollout.responses import Responses, Worth, without_answers


@dataclass
class RoundRobin:
    """What a response is worth: the mean share of comparisons that it wins, over those whose two orders were read.

    R prompts with G responses are R · G·(G − 1)/2 comparisons of two, each in both orders. The judge is asked about
    each as about a prompt with one response, beside which the other one stands.
    """

    judge: JudgeHere
    waiting: list[Responses] = field(default_factory=list)

    @property
    def name(self) -> str:
        """In metrics."""
        return self.judge.name

    def offer(self, responses: Responses) -> None:
        """Takes the responses to one prompt."""
        self.waiting.append(responses)

    def settle(self) -> None:
        """Nothing fails here that would not fail again."""

    def collect(self, key: jax.Array, step: int) -> Mapping[int, list[Worth]]:
        """What all responses are worth, and which others each of them beats in both orders."""
        every, self.waiting = self.waiting, []
        if not every:
            return {}
        pairs = list(itertools.combinations(range(len(every[0].answers)), 2))
        self.judge.of_one_prompt = len(pairs)
        for one in every:
            for number, (member, other) in enumerate(pairs):
                self.judge.offer(_compared(one, member, other, len(pairs), number))
        compared = self.judge.collect(key, step)
        first = {one.index: one.index * len(pairs) for one in every}
        of_pairs = {index: [compared[start + n][0] for n in range(len(pairs))] for index, start in first.items()}
        found = {one.index: worth_of_group(len(one.answers), pairs, of_pairs[one.index]) for one in every}
        for one in every:
            for member, nothing in without_answers(one).items():
                found[one.index][member] = replace(nothing, beats=())
        return found


def _compared(one: Responses, member: int, other: int, pairs: int, number: int) -> Responses:
    """One comparison: a prompt of its own, whose record's index names its draws."""
    return replace(
        one,
        index=one.index * pairs + number,
        record=replace(one.record, index=one.record.index * pairs + number),
        answers=[one.answers[member]],
        texts=[one.texts[member]],
        ids=[one.ids[member]],
        baseline=one.answers[other],
    )


def worth_of_group(group: int, pairs: Sequence[tuple[int, int]], compared: Sequence[Worth]) -> list[Worth]:
    """What G responses are worth by the comparisons of two."""
    won = np.full((group, group), np.nan)  # by the first index, of comparisons with the second
    beats = np.zeros((group, group), bool)
    said: list[list[str]] = [[] for _ in range(group)]
    for (member, other), worth in zip(pairs, compared, strict=True):
        for one, against in ((member, other), (other, member)):
            said[one].append(f"beside response {against + 1}:\n{worth.said}")
        if worth.value is None:
            continue
        won[member, other], won[other, member] = worth.value, 1 - worth.value
        shares = [share for share in worth.orders if share is not None]
        beats[member, other] = all(share > 0.5 for share in shares)
        beats[other, member] = all(share < 0.5 for share in shares)
    return [
        Worth(
            value=None if np.isnan(won[one]).all() else float(np.nanmean(won[one])),
            said="\n\n".join(said[one]),
            beats=tuple(np.flatnonzero(beats[one]).tolist()),
        )
        for one in range(group)
    ]
