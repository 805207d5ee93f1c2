"""All that an evaluation found, as one record: scores with intervals, votes, biases, what could not be read."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patarm_jax.ask.answers import Answer, Kind
from patarm_jax.config.recipes import EvalConfig
from patarm_jax.evaluate.expected import Pair, Spread, spread_of
from patarm_jax.evaluate.items import Item
from patarm_jax.evaluate.outcomes import Choices, Rule, Scores, gaps, position_bias, votes_curve
from patarm_jax.evaluate.proportions import limits
from patarm_jax.evaluate.rubrics import Written
from patarm_jax.evaluate.scoring import TIE_RULES, Strata, measure, numbers, who_won
from patarm_jax.evaluate.statistics import Difference, Measured, Name, TieRule, intervals
from patarm_jax.judge.forms import FORMS

# Edges of the bins of |score gap| in the calibration.
GAPS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, np.inf)


@dataclass(frozen=True)
class Findings:
    """What the answers of a judge say; shares are from 0 to 1, None where there is nothing to take a share of."""

    scores: dict[Name, tuple[float, float, float]]  # (value, low, high)
    # The same names, by majority of votes instead of their mean; empty where the two cannot differ: with one vote, and
    # with a pairwise judge.
    majority: dict[Name, float]
    votes: list[dict[str, Any]]  # per number of votes and rule: the overall accuracy under both tie rules
    answers: int  # to all questions, each once
    valid: float  # the share of answers that could be read
    cut: float  # the share of answers that were cut off at the limit of new tokens
    failed: int  # answers that never came
    # How many answers are of each kind, `answered` to `failed`; of those that came, `unreadable` are without a score or
    # choice, the refused and the too long included.
    counts: dict[str, int]
    # The requests to an endpoint but for their seeds, each with the number of its answers.
    sent: list[dict[str, object]]
    reasons: list[tuple[str, int]]  # why answers could not be read, with their numbers, the most frequent first
    ties: float  # the share of pairs of a chosen and a rejected response of which neither won
    length: dict[str, dict[str, float]]  # accuracy by which of the two responses is longer, in characters
    position: dict[str, float] | None  # how often the first place won; of a pairwise judge alone
    calibration: list[dict[str, float]]  # by |gap| of mean scores: how often its sign is right, with an interval
    histogram: dict[str, object] | None  # how often each score was given to chosen and to rejected responses
    expected: Spread | None = None  # what expected scores did; None where the numbers that were drawn count
    generator: Written | None = None  # what became of a generator's rubrics; None where there is no generator


@dataclass(frozen=True)
class Evaluation:
    """A judge on a benchmark, and what was found."""

    config: EvalConfig
    model: str  # its name
    items: Sequence[Item]
    strata: Strata
    findings: Findings
    measured: Measured
    against: Mapping[Name, Difference] | None = None  # another judge's, by name of the number

    @property
    def official(self) -> TieRule:
        """The tie rule of the benchmark; ties of a reward model that writes nothing are wrong on RewardBench too."""
        layout = self.strata.layout
        return (not FORMS[self.config.judge].writes and layout.official_of_scalar) or layout.official

    @property
    def is_official(self) -> bool:
        """Whether that rule makes our number the benchmark's own; some count a pairwise judge's orders one by one."""
        return FORMS[self.config.judge].responses < 2 or not self.strata.layout.of_pairwise_judges

    @property
    def is_complete(self) -> bool:
        """Whether every answer came."""
        return not self.findings.failed

    @property
    def missing_sections(self) -> list[str]:
        """Sections of the benchmark that were not judged; the overall number is without them."""
        return [name for name in self.strata.layout.sections if Name("strict", name) not in self.findings.scores]

    @property
    def missing_parts(self) -> dict[str, list[str]]:
        """What the data lack of the sections that were judged: beginnings of subsets' names, without the dash."""
        parts = {
            name: [each.rstrip("-") for each in beginnings if not any(s.startswith(each) for s in self.strata.subsets)]
            for name, beginnings in self.strata.layout.sections.items()
            if name not in self.missing_sections
        }
        return {name: lacking for name, lacking in parts.items() if lacking}

    def value(self, name: Name) -> tuple[float, float, float] | None:
        """(value, low, high) of a number, as `findings.scores` names it."""
        return self.findings.scores.get(name)


def find(
    strata: Strata,
    items: Sequence[Item],
    judged: Scores | Choices,
    answers: Sequence[Answer],
    seed: int,
    generator: Written | None = None,
) -> tuple[Findings, Measured]:
    """Everything there is to say, and what was measured of each unit, for comparing with another judge."""
    measured = measure(strata, items, judged)
    both = isinstance(judged, Scores) and judged.votes > 1
    won = who_won(strata, judged)
    longer, pairs = _length_difference(items, won.shape), won[~np.isnan(won)]
    findings = Findings(
        scores=_with_intervals(strata, measured, seed),
        majority=numbers(strata, measure(strata, items, judged, "majority")) if both else {},
        votes=_votes(strata, items, judged, seed),
        answers=len(answers),
        valid=sum(answer.status == "OK" for answer in answers) / len(answers),
        cut=sum(answer.cut for answer in answers) / len(answers),
        failed=sum(not answer.came for answer in answers),
        counts=_counts(answers),
        sent=_sent(answers),
        reasons=Counter(answer.reason for answer in answers if answer.came and answer.reason).most_common(10),
        ties=float((pairs == 0.5).mean()),
        length=_by_length(won, longer),
        position=position_bias(judged) if isinstance(judged, Choices) else None,
        calibration=_calibration(strata, judged) if isinstance(judged, Scores) else [],
        histogram=_histogram(judged) if isinstance(judged, Scores) else None,
        expected=spread_of(_by_question(answers).values()),
        generator=generator,
    )
    return findings, measured


def _by_question(answers: Sequence[Answer]) -> dict[str, list[Pair]]:
    """The readable answers to each question whose scores are expected ones."""
    found: dict[str, list[Pair]] = {}
    for one in answers:
        if one.score is not None and one.outside is not None:
            drawn = one.score if one.drawn is None else one.drawn  # of an ordinal judge, which draws nothing
            found.setdefault(one.question, []).append((one.score, drawn, one.outside))
    return found


_NAMES = {Kind.ANSWER: "answered"}  # the other kinds keep their own names


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    kinds = Counter(answer.kind for answer in answers)
    counts = {_NAMES.get(kind, kind.lower()): kinds[kind] for kind in Kind}
    return counts | {"unreadable": sum(answer.came and answer.status != "OK" for answer in answers)}


def _sent(answers: Sequence[Answer]) -> list[dict[str, object]]:
    requests = Counter(
        json.dumps({name: value for name, value in answer.sent.items() if name != "seed"}, sort_keys=True)
        for answer in answers
        if answer.sent
    )
    return [{**json.loads(request), "answers": count} for request, count in requests.most_common()]


def _with_intervals(strata: Strata, measured: Measured, seed: int) -> dict[Name, tuple[float, float, float]]:
    """(value, low, high) of every number; low and high are NaN of a number of one unit, which tells nothing of them."""
    value, spread = numbers(strata, measured), intervals(measured, strata.formulas, seed)
    return {name: (value[name], *spread[name]) for name in value}


def _votes(strata: Strata, items: Sequence[Item], judged: Scores | Choices, seed: int) -> list[dict[str, object]]:
    """Each number of votes is taken many times out of the N that there are, and averaged."""
    rules: tuple[Rule, ...] = ("mean", "majority") if isinstance(judged, Scores) else ("majority",)
    curve: list[dict[str, object]] = []
    for size, subsets in votes_curve(judged, seed).items():
        some = [judged.some(subset) for subset in subsets]
        for rule in rules:
            drawn = [numbers(strata, measure(strata, items, each, rule)) for each in some]
            point: dict[str, object] = {"votes": size, "rule": rule}
            for tie_rule in TIE_RULES:
                point[tie_rule] = float(np.mean([each[Name(tie_rule, "overall")] for each in drawn]))
            curve.append(point)
    return curve


def _length_difference(items: Sequence[Item], shape: tuple[int, ...]) -> np.ndarray:
    """[I, M, K]: characters of the chosen response beyond those of the rejected one."""
    difference = np.zeros(shape)
    for index, item in enumerate(items):
        chosen, rejected = (np.array([len(text) for text in side]) for side in (item.chosen, item.rejected))
        difference[index, : len(chosen), : len(rejected)] = chosen[:, None] - rejected[None, :]
    return difference


def _by_length(won: np.ndarray, longer: np.ndarray) -> dict[str, dict[str, float]]:
    cases = {"chosen longer": longer > 0, "chosen shorter": longer < 0, "equally long": longer == 0}
    here, result = ~np.isnan(won), {}
    for name, case in cases.items():
        some = won[case & here]
        if some.size:
            result[name] = {"pairs": some.size, "strict": float((some == 1.0).mean()), "half": float(some.mean())}
    return result


def _calibration(strata: Strata, judged: Scores) -> list[dict[str, float]]:
    gap = gaps(judged)
    unit = np.broadcast_to(strata.unit_of[:, None, None], gap.shape)
    bins = []
    for low, high in itertools.pairwise(GAPS):
        some = (np.abs(gap) > low) & (np.abs(gap) <= high)  # NaN is in none
        if some.any():
            pairs = np.bincount(unit[some])
            right = np.bincount(unit[some], gap[some] > 0)[pairs > 0] / pairs[pairs > 0]
            found = limits(right, pairs[pairs > 0].astype(float))
            ends = dict(zip(("low", "high"), map(float, found.interval), strict=True))
            bins.append({"above": low, "up to": high, "pairs": int(some.sum()), "right": float(found.value), **ends})
    return bins


def _histogram(judged: Scores) -> dict[str, object] | None:
    """Counts of single scores: around 0, 0.5, … 10, or in twenty bins where a score lies outside."""
    sides = {"chosen": judged.chosen, "rejected": judged.rejected}
    scores = {name: side[~np.isnan(side)] for name, side in sides.items()}
    every = np.concatenate(list(scores.values()))
    if not every.size:
        return None
    judgements = every.min() >= 0 and every.max() <= 10
    edges = np.linspace(-0.25, 10.25, 22) if judgements else np.linspace(every.min(), every.max(), 21)
    return {"edges": edges.tolist(), **{name: np.histogram(side, edges)[0].tolist() for name, side in scores.items()}}
