"""The official numbers: what is measured of each item, and how measures become a benchmark's scores.

Every number exists twice, under both tie rules: `strict`, where a tie is wrong, and `half`, where it is half right
(RewardBench 2: the first place is shared). One of them is the benchmark's own.

All numbers are weighted means of means over subsets. How each benchmark averages, and where that was checked:

    RewardBench    section = Σ n_s·acc_s / Σ n_s, math-prm counted 984; overall = mean of the four sections
                   (calculate_scores_per_section in rewardbench/utils.py with EXAMPLE_COUNTS of constants.py; older
                   tables also count Prior Sets by half, which are other data, see analysis/get_benchmark_results.py)
    RewardBench 2  best of 4, ties share: 1/k when the chosen one is among k best; Ties by margins; overall = mean of
                   the six subsets (scripts/run_v2.py and rewardbench/utils.py of the same repository)
    RM-Bench       M[i][j] = share of chosen i above rejected j; hard = upper triangle (the chosen response is the
                   plainer one), normal = diagonal, easy = lower; domain = mean of M; overall, and each of hard, normal
                   and easy, = mean of four domains; Safety pools the rows of its two files (scripts/utils.py,
                   compute_accuracy of total_dataset.json)
    JudgeBench     sources and overall pool their pairs (utils/metrics.py, compute_final_metrics; run_judge.py)
    LLMBar         Adversarial = mean of its four subsets, overall = mean of all five, whatever their sizes. The code
                   scores one subset at a time (LLMEvaluator/evaluate.py); the tables of arXiv 2310.07641 average:
                   of the published statistics of GPT-4 with Metrics+Reference, 85.4, 89.7, 72.3 and 83.7, the mean is
                   the printed 82.8, and 84.5 if pooled
    RMB            each of Helpfulness and Harmlessness pools its pairs (eval/scripts/my_run_rm.py, model_acc); overall
                   = mean of both, as the paper averages its columns (arXiv 2410.09893; Best-of-N is not judged here)
    PPE            one accuracy for each set of the paper (arXiv 2410.14872); their mean as overall is ours, as the
                   paper reports human preference and correctness apart, and its scorer was not at hand
    pairs          all rows alike
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from patarm_jax.evaluate.benchmarks import Item
from patarm_jax.evaluate.outcomes import Choices, Rule, Scores, mean_scores, outcomes
from patarm_jax.evaluate.statistics import Formulas, Measured, Number, means

TieRule = Literal["strict", "half"]
TIE_RULES: tuple[TieRule, ...] = ("strict", "half")

# The official number of rows of each subset, also where only some were judged. The 447 rows of math-prm count as 984,
# as many as the six languages of hep have together.
_REWARDBENCH_COUNTS = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    "math-prm": 984,
    "hep-cpp": 164,
    "hep-go": 164,
    "hep-java": 164,
    "hep-js": 164,
    "hep-python": 164,
    "hep-rust": 164,
}
# RewardBench 2 rates an unreadable answer -1. A scalar head's scores may be lower; then it is below the lowest.
_FAILED_RATING = -1.0
_BY_MARGINS = "Ties"  # RewardBench 2's subset whose score is no proportion


@dataclass(frozen=True)
class Layout:
    """How a benchmark reports."""

    columns: tuple[str, ...]  # what is measured of an item under each tie rule; the first is its accuracy
    measure: Literal["pair", "best of four", "matrix"]  # how it is measured
    sections: Mapping[str, tuple[str, ...]]  # section → beginnings of its subsets' names
    overall: Literal["mean of sections", "mean of subsets", "pooled"]
    official: TieRule
    paper: str  # where its rules stand
    within: Literal["pooled", "mean of subsets"] = "pooled"  # a section

    @property
    def chance(self) -> float:
        """What a judge has right that knows nothing."""
        return 0.25 if self.measure == "best of four" else 0.5


_REWARDBENCH = {
    "Chat": ("alpacaeval-", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": ("mt-bench-hard", "llmbar-"),
    "Safety": ("refusals-", "xstest-", "donotanswer"),
    "Reasoning": ("math-prm", "hep-"),
}
_RM_BENCH = {"Chat": ("chat",), "Math": ("math",), "Code": ("code",), "Safety": ("safety-",)}
# Of how many comparisons of an item RM-Bench's columns are the mean; a cell is one.
_OF_MATRIX = {"accuracy": 9.0, "hard": 3.0, "normal": 3.0, "easy": 3.0}
_CELLS = tuple(f"cell_{i}{j}" for i in range(3) for j in range(3))
_JUDGEBENCH = {
    "Knowledge": ("mmlu-pro-",),
    "Reasoning": ("livebench-reasoning",),
    "Math": ("livebench-math",),
    "Coding": ("livecodebench",),
}
_LLMBAR = {"Natural": ("Natural",), "Adversarial": ("Neighbor", "GPTInst", "GPTOut", "Manual")}
_RMB = {"Helpfulness": ("Helpfulness",), "Harmlessness": ("Harmlessness",)}
_PPE = {
    "Human preference": ("human",),
    "MMLU-Pro": ("mmlu_pro",),
    "MATH": ("math",),
    "GPQA": ("gpqa",),
    "IFEval": ("ifeval",),
    "MBPP-Plus": ("mbpp_plus",),
}
_REWARDBENCH_2 = {name: (name,) for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")}
_ONE = ("accuracy",)

LAYOUTS: dict[str, Layout] = {
    "rewardbench": Layout(_ONE, "pair", _REWARDBENCH, "mean of sections", "half", "arXiv 2403.13787"),
    "rewardbench2": Layout(_ONE, "best of four", _REWARDBENCH_2, "mean of sections", "half", "arXiv 2506.01937"),
    "rm-bench": Layout(
        ("accuracy", "hard", "normal", "easy", *_CELLS),
        "matrix",
        _RM_BENCH,
        "mean of sections",
        "strict",
        "arXiv 2410.16184",
    ),
    "judgebench": Layout(_ONE, "pair", _JUDGEBENCH, "pooled", "strict", "arXiv 2410.12784"),
    "llmbar": Layout(_ONE, "pair", _LLMBAR, "mean of subsets", "half", "arXiv 2310.07641", within="mean of subsets"),
    "rmb": Layout(_ONE, "pair", _RMB, "mean of sections", "strict", "arXiv 2410.09893"),
    "ppe": Layout(_ONE, "pair", _PPE, "mean of sections", "half", "arXiv 2410.14872; ties and overall by our own rule"),
    "pairs": Layout(_ONE, "pair", {}, "pooled", "strict", "no benchmark: a file of pairs"),
}


@dataclass(frozen=True)
class Plan:
    """The strata of the items that were read, and how a benchmark's numbers follow from their means."""

    layout: Layout
    subsets: tuple[str, ...]
    counts: np.ndarray  # [S] what each subset counts for
    units: tuple[tuple[int, ...], ...]  # items that are sampled together
    unit_of: np.ndarray  # [I] the unit of each item
    stratum: np.ndarray  # [units] subset of each

    @cached_property
    def formulas(self) -> Formulas:
        """Numbers by name, "strict/overall/accuracy" and the like, of 2·columns measures."""
        columns = self.layout.columns
        numbers = {
            f"{rule}/{place}/{column}": Number(r * len(columns) + c, weights)
            for r, rule in enumerate(TIE_RULES)
            for c, column in enumerate(columns)
            for place, weights in _weights(self).items()
        }
        trials = _OF_MATRIX if self.layout.measure == "matrix" else {}
        each = np.array([trials.get(column, 1.0) for column in columns] * len(TIE_RULES))
        return Formulas(numbers, each, np.array([subset != _BY_MARGINS for subset in self.subsets]))


def plan(benchmark: str, items: Sequence[Item], whole: Sequence[Item] | None = None) -> Plan:
    """Groups the items of a benchmark.

    Args:
        benchmark: its name.
        items: those that were judged.
        whole: all of them, where only some were judged; subsets count for as many as they have there.
    """
    if benchmark == "pairs":
        rare = {subset for subset, rows in Counter(item.subset for item in items).items() if rows == 1}
        items, whole = _as_other(items, rare), _as_other(whole or items, rare)
    subsets = tuple(dict.fromkeys(item.subset for item in items))
    groups: dict[tuple[str, str], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.subset, item.group), []).append(index)
    stratum = np.array([subsets.index(subset) for subset, _ in groups])
    rows = Counter(item.subset for item in (whole or items))
    counted = _REWARDBENCH_COUNTS if benchmark == "rewardbench" else rows
    counts = np.array([counted[subset] for subset in subsets], float)
    units = tuple(map(tuple, groups.values()))
    unit_of = np.empty(len(items), int)
    for unit, members in enumerate(units):
        unit_of[list(members)] = unit
    return Plan(LAYOUTS[benchmark], subsets, counts, units, unit_of, stratum)


def _as_other(items: Sequence[Item], rare: Collection[str]) -> list[Item]:
    """Merges sources of which a single row was judged into `other`: there may be as many as rows."""
    return [replace(item, subset="other") if item.subset in rare else item for item in items]


def measure(plan: Plan, items: Sequence[Item], judged: Scores | Choices, rule: Rule = "mean") -> Measured:
    """What is measured of each unit, [units, 2·columns]: under `strict`, then under `half`."""
    won = who_won(plan, judged, rule)
    if plan.layout.measure == "best of four":
        values = _best_of(won)
        if isinstance(judged, Scores):
            values = _with_ties(plan, items, judged, values)
    elif plan.layout.measure == "matrix":
        values = _matrix(won)
    else:
        values = np.stack([won[:, 0, 0] == 1.0, won[:, 0, 0]], axis=-1)
    grouped = np.zeros((len(plan.units), values.shape[1]))
    np.add.at(grouped, plan.unit_of, values)
    size = np.bincount(plan.unit_of).astype(float)
    return Measured(grouped / size[:, None], size, plan.stratum)


def numbers(plan: Plan, measured: Measured) -> dict[str, float]:
    """The benchmark's numbers by name."""
    return {name: float(value) for name, value in plan.formulas.of(means(measured)).items()}


def who_won(plan: Plan, judged: Scores | Choices, rule: Rule = "mean") -> np.ndarray:
    """[I, M, K] in {0, ½, 1}, NaN where there is no such pair: as `outcomes`, by the benchmark's rule of failures.

    RewardBench 2 rates what cannot be read below all else. An answer that never came is neither the judge's failure nor
    its luck: pairs of a response that is unknown for that reason are ties.
    """
    if plan.layout.measure != "best of four" or isinstance(judged, Choices):
        return outcomes(judged, rule)
    won, (chosen, rejected) = outcomes(_failed_as_lowest(judged), rule), judged.unknown()
    return np.where((chosen[:, :, None] | rejected[:, None, :]) & ~np.isnan(won), 0.5, won)


# ---- What is measured of an item ------------------------------------------------------------------------------------


def _matrix(won: np.ndarray) -> np.ndarray:
    """[I, 3, 3] → [I, 26]: accuracy, hard, normal, easy and the nine cells, under each tie rule."""
    (i, j), (k, m), same = np.triu_indices(3, 1), np.tril_indices(3, -1), np.arange(3)
    both = []
    for cells in ((won == 1.0).astype(float), won):
        parts = [
            cells.mean(axis=(1, 2)),
            cells[:, i, j].mean(axis=1),
            cells[:, same, same].mean(axis=1),
            cells[:, k, m].mean(axis=1),
        ]
        both.append(np.concatenate([np.stack(parts, axis=-1), cells.reshape(len(won), 9)], axis=-1))
    return np.concatenate(both, axis=-1)


def _best_of(won: np.ndarray) -> np.ndarray:
    """[I, 2]: whether the chosen response is alone the best, and its share of the first place."""
    won = won[:, 0]
    beaten, tied = (won == 0.0).any(axis=-1), (won == 0.5).sum(axis=-1)
    share = np.where(beaten, 0.0, 1.0 / (1 + tied))
    return np.stack([share == 1.0, share], axis=-1)


def _failed_as_lowest(scores: Scores) -> Scores:
    """A response none of whose judgements is valid is rated below all others; of the rest only valid ones count."""
    every = np.concatenate([side[~np.isnan(side)] for side in (scores.chosen, scores.rejected)])
    lowest = min(_FAILED_RATING, float(every.min()) - 1 if every.size else _FAILED_RATING)

    def lowered(side: np.ndarray) -> np.ndarray:
        nothing = np.isnan(side).all(axis=-1, keepdims=True)
        return np.where(nothing, lowest, side)

    return replace(scores, chosen=lowered(scores.chosen), rejected=lowered(scores.rejected))


def _with_ties(plan: Plan, items: Sequence[Item], judged: Scores, values: np.ndarray) -> np.ndarray:
    """The subset Ties is scored by prompt, once alone (ref) and once with several right answers (tied).

        d = max C − min C    g = min C − max W    C scores of right, W of wrong responses
        0.3·[g_tied > 0] + 0.3·[g_ref > 0] + 0.2·[g_tied > d_tied] + 0.2·[g > d_tied] + 0.01·tanh(g/d_tied − 1)

    with g = min(g_ref, g_tied). It knows no tie between two responses, so that both tie rules give the same. Where a
    response is unknown because no answer came, there are no margins, and nothing is won.
    """
    lowered, unknown = _failed_as_lowest(judged), np.concatenate(judged.unknown(), axis=1).max(axis=1)
    chosen, rejected = mean_scores(lowered.chosen), mean_scores(lowered.rejected)
    for members in plan.units:
        if items[members[0]].subset != _BY_MARGINS:
            continue
        if unknown[list(members)].any():
            values[list(members)] = 0.0
            continue
        by_kind = {items[index].kind: index for index in members}
        margin, spread = {}, 0.0
        for kind, index in by_kind.items():
            right, wrong = chosen[index][judged.has_chosen[index]], rejected[index][judged.has_rejected[index]]
            margin[kind] = right.min() - wrong.max()
            spread = right.max() - right.min() if kind == "tied" else spread
        least = min(margin.values())
        values[list(members)] = (
            0.3 * (margin["tied"] > 0)
            + 0.3 * (margin["ref"] > 0)
            + 0.2 * (margin["tied"] > spread)
            + 0.2 * (least > spread)
            + 0.01 * _squashed(least, spread)
        )
    return values


def _squashed(margin: float, spread: float) -> float:
    """tanh(margin/spread − 1), at its limits where the spread is 0."""
    return float(np.tanh(margin / spread - 1)) if spread > 0 else float(np.sign(margin))


# ---- From means to numbers ------------------------------------------------------------------------------------------


def _weights(plan: Plan) -> dict[str, np.ndarray]:
    """[S] what each subset weighs in "subset NAME", in the sections, and in "overall"."""
    layout, count = plan.layout, len(plan.subsets)
    result = {f"subset {subset}": np.eye(count)[s] for s, subset in enumerate(plan.subsets)}
    sections = {}
    for name, beginnings in layout.sections.items():
        members = np.array([subset.startswith(beginnings) for subset in plan.subsets], float)
        if members.any():
            sections[name] = _normalised(members * (plan.counts if layout.within == "pooled" else 1.0))
    if layout.overall == "mean of sections" and sections:
        overall = np.mean(list(sections.values()), axis=0)
    else:
        overall = _normalised(plan.counts if layout.overall == "pooled" else np.ones(count))
    return result | sections | {"overall": overall}


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()
