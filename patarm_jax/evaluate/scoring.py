"""The official numbers: what is measured of each item, and how measures become a benchmark's scores.

Every number exists twice, under both tie rules: `strict`, where a tie is wrong, and `half`, where it is half right
(RewardBench 2: the first place is shared). One of them is the benchmark's own.

All numbers are weighted means of means over subsets; how each benchmark averages stands in its file.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from patarm_jax.evaluate.items import Item
from patarm_jax.evaluate.outcomes import Choices, Rule, Scores, outcomes
from patarm_jax.evaluate.statistics import Formulas, Measured, Name, Number, TieRule, means

TIE_RULES: tuple[TieRule, ...] = ("strict", "half")

WhoWon = Callable[[Scores | Choices, Rule], np.ndarray]  # [I, M, K] in {0, ½, 1}, NaN where there is no such pair
# (units, items, judged, who won [I, M, K]) → what is measured of each item, [I, 2·columns]; units are items that are
# sampled together.
Measure = Callable[[Sequence[Sequence[int]], Sequence[Item], Scores | Choices, np.ndarray], np.ndarray]


def of_pairs(
    _units: Sequence[Sequence[int]], _items: Sequence[Item], _judged: Scores | Choices, won: np.ndarray
) -> np.ndarray:
    """Whether the chosen response of a pair won, and its share of a tie, [I, 2]."""
    return np.stack([won[:, 0, 0] == 1.0, won[:, 0, 0]], axis=-1)


@dataclass(frozen=True)
class Layout:
    """How a benchmark measures and reports."""

    sections: Mapping[str, tuple[str, ...]]  # section → beginnings of its subsets' names
    overall: Literal["mean of sections", "mean of subsets", "pooled"]
    official: TieRule
    paper: str  # where its rules stand
    within: Literal["pooled", "mean of subsets"] = "pooled"  # a section
    # What is measured of an item under each tie rule; the first is its accuracy.
    columns: tuple[str, ...] = ("accuracy",)
    # How many comparisons a column is the mean of, where it is not one.
    trials: Mapping[str, float] = field(default_factory=dict)
    who_won: WhoWon = outcomes
    measure: Measure = of_pairs
    counts: Mapping[str, int] | None = None  # what subsets count for; None: for as many as they have
    no_proportions: tuple[str, ...] = ()  # subsets whose scores are none
    rare_as_other: bool = False  # whether subsets of one row are put together: sources of a file of pairs
    chance: float = 0.5  # what a judge has right that knows nothing
    official_of_scalar: TieRule | None = None  # the rule for a scalar head, where that is another
    # How the benchmark itself counts a judge of pairs, where that is not the majority over votes and orders.
    of_pairwise_judges: str = ""
    of_unreadable: str = "A response without any readable judgement decides nothing: its pairs are ties."


@dataclass(frozen=True)
class Strata:
    """The strata of the items that were read, and how a benchmark's numbers follow from their means."""

    layout: Layout
    subsets: tuple[str, ...]
    counts: np.ndarray  # [S] what each subset counts for
    units: tuple[tuple[int, ...], ...]  # items that are sampled together
    unit_of: np.ndarray  # [I] the unit of each item
    stratum: np.ndarray  # [units] subset of each

    @cached_property
    def formulas(self) -> Formulas:
        """The benchmark's numbers, of 2·columns measures."""
        columns = self.layout.columns
        numbers = {
            Name(rule, place, column): Number(r * len(columns) + c, weights)
            for r, rule in enumerate(TIE_RULES)
            for c, column in enumerate(columns)
            for place, weights in _weights(self).items()
        }
        each = np.array([self.layout.trials.get(column, 1.0) for column in columns] * len(TIE_RULES))
        return Formulas(numbers, each, np.array([subset not in self.layout.no_proportions for subset in self.subsets]))


def strata_of(layout: Layout, items: Sequence[Item], whole: Sequence[Item] | None = None) -> Strata:
    """Groups the items of a benchmark.

    Args:
        layout: of the benchmark.
        items: those that were judged.
        whole: all of them, where only some were judged; subsets count for as many as they have there.
    """
    if layout.rare_as_other:
        rare = {subset for subset, rows in Counter(item.subset for item in items).items() if rows == 1}
        items, whole = _as_other(items, rare), _as_other(whole or items, rare)
    subsets = tuple(dict.fromkeys(item.subset for item in items))
    groups: dict[tuple[str, str], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.subset, item.group), []).append(index)
    stratum = np.array([subsets.index(subset) for subset, _ in groups])
    rows = Counter(item.subset for item in (whole or items))
    counted = rows if layout.counts is None else layout.counts
    counts = np.array([counted[subset] for subset in subsets], float)
    units = tuple(map(tuple, groups.values()))
    unit_of = np.empty(len(items), int)
    for unit, members in enumerate(units):
        unit_of[list(members)] = unit
    return Strata(layout=layout, subsets=subsets, counts=counts, units=units, unit_of=unit_of, stratum=stratum)


def _as_other(items: Sequence[Item], rare: Collection[str]) -> list[Item]:
    """Merges sources of which a single row was judged into `other`: there may be as many as rows."""
    return [replace(item, subset="other") if item.subset in rare else item for item in items]


def measure(strata: Strata, items: Sequence[Item], judged: Scores | Choices, rule: Rule = "mean") -> Measured:
    """What is measured of each unit, [units, 2·columns]: under `strict`, then under `half`."""
    values = strata.layout.measure(strata.units, items, judged, who_won(strata, judged, rule))
    grouped = np.zeros((len(strata.units), values.shape[1]))
    np.add.at(grouped, strata.unit_of, values)
    size = np.bincount(strata.unit_of).astype(float)
    return Measured(grouped / size[:, None], size, strata.stratum)


def numbers(strata: Strata, measured: Measured) -> dict[Name, float]:
    """The benchmark's numbers by name."""
    return {name: float(value) for name, value in strata.formulas.of(means(measured)).items()}


def who_won(strata: Strata, judged: Scores | Choices, rule: Rule = "mean") -> np.ndarray:
    """[I, M, K] in {0, ½, 1}, NaN where there is no such pair: as `outcomes`, by the benchmark's rule of failures."""
    return strata.layout.who_won(judged, rule)


# ---- From means to numbers ------------------------------------------------------------------------------------------


def _weights(strata: Strata) -> dict[str, np.ndarray]:
    """[S] what each subset weighs in "subset NAME", in the sections, and in "overall"."""
    layout, count = strata.layout, len(strata.subsets)
    result = {f"subset {subset}": np.eye(count)[s] for s, subset in enumerate(strata.subsets)}
    sections = {}
    for name, beginnings in layout.sections.items():
        members = np.array([subset.startswith(beginnings) for subset in strata.subsets], float)
        if members.any():
            sections[name] = _normalised(members * (strata.counts if layout.within == "pooled" else 1.0))
    if layout.overall == "mean of sections" and sections:
        overall = np.mean(list(sections.values()), axis=0)
    else:
        overall = _normalised(strata.counts if layout.overall == "pooled" else np.ones(count))
    return result | sections | {"overall": overall}


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()
