"""Pairs as a judge compares them by a generator's rubric: what it is shown of the rubric, and in which order."""

import dataclasses
import hashlib

import numpy as np

from patarm_jax.config.sections import DataSection
from patarm_jax.data.limits import Room
from patarm_jax.data.pipeline import EncodedPair, encode_pair
from patarm_jax.data.tokenizer import Tokenizer
from patarm_jax.judge.criteria import criteria_of, render_criteria
from patarm_jax.judge.forms import RUBRIC_JUDGE, Form


def with_rubric(
    tokenizer: Tokenizer, record: EncodedPair, rubric: str, section: DataSection, room: Room, form: Form = RUBRIC_JUDGE
) -> EncodedPair:
    """A pair as the judge reads it by a rubric, in both questions; its preference holds what is shown of it.

    A rubric that is longer than its place loses lines from its end until it fits, so that no pair is lost by it; where
    nothing of it fits, the judge is asked without.

    Args:
        tokenizer: of the judge.
        record: of a pair that fits without a rubric.
        rubric: from `shown_rubric`.
        section: the limits of the config.
        room: what the judge has positions for.
        form: of the judge.
    """
    lines = rubric.split("\n")
    while True:
        preference = dataclasses.replace(record.preference, rubric="\n".join(lines))
        pair = encode_pair(tokenizer, record.index, preference, "adaptive", form)
        if not lines or not room.excess(pair.longest_prompt, section.max_prompt_tokens):
            return pair
        lines.pop()


def place_of(seed: int, round_number: int, pair: str) -> int:
    """Which response stands first where a pair is shown in one order: 0 for the chosen one, 1 for the rejected.

    >>> [place_of(0, 1, f"pair-{number}") for number in range(8)]
    [0, 0, 1, 0, 0, 0, 0, 0]
    """
    return _drawn(seed, round_number, pair)[0] & 1


def without_some(rubric: str, share: float, seed: int, round_number: int, pair: str) -> str:
    """A rubric without some of its criteria, each left out at random; one that is out of form stays as it is.

    At least one criterion stays: without any the judge would be asked another question.

    Args:
        rubric: as the judge would be shown it.
        share: with which probability a criterion is left out.
        seed: of the run.
        round_number: of the round.
        pair: its id.

    Source: rubric dropout (arXiv 2608.11669).
    """
    criteria = criteria_of(rubric)
    if not share or not criteria:
        return rubric
    rng = np.random.default_rng(list(_drawn(seed, round_number, f"dropout {pair}")))
    draws = rng.random(len(criteria))
    kept = [one for one, draw in zip(criteria, draws, strict=True) if draw >= share]
    return render_criteria(kept or [criteria[int(draws.argmax())]])


def _drawn(seed: int, round_number: int, what: str) -> bytes:
    return hashlib.sha256(f"{seed} {round_number} {what}".encode()).digest()
