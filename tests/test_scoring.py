"""Our numbers equal the official scorers' on the same inputs.

tests/goldens/benchmarks holds inputs made at random and what the official code, named in each file, gave for them.
"""

import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from patarm_jax.config import DataSection
from patarm_jax.evaluate.benchmarks import Item, read_benchmark
from patarm_jax.evaluate.outcomes import Choices, outcomes, votes_curve
from patarm_jax.evaluate.scoring import measure, numbers, plan, who_won
from patarm_jax.evaluate.statistics import Measured, compare, intervals, means, wilson
from tests.toys import scores_of

GOLDENS = Path(__file__).parent / "goldens" / "benchmarks"
PROMPT = ({"role": "user", "content": "?"},)


def official(name):
    return json.loads((GOLDENS / f"{name}.json").read_text())


def item(name, subset, chosen=1, rejected=1, group=None, kind=""):
    return Item(name, subset, "chat", PROMPT, ("c",) * chosen, ("r",) * rejected, group or name, {}, kind)


def scored(chosen, rejected):
    """Scores of one vote from ragged lists; None is not valid."""

    def padded(side):
        most = max(map(len, side))
        values = np.full((len(side), most, 1), np.nan)
        has = np.zeros((len(side), most), bool)
        for index, given in enumerate(side):
            has[index, : len(given)] = True
            values[index, : len(given), 0] = [math.nan if one is None else one for one in given]
        return values, has

    (c, has_c), (r, has_r) = padded(chosen), padded(rejected)
    return scores_of(c, r, has_c, has_r)


def found(benchmark, items, judged, rule="mean"):
    plan_ = plan(benchmark, items)
    return numbers(plan_, measure(plan_, items, judged, rule))


# ---- RewardBench ----------------------------------------------------------------------------------------------------


def test_rewardbench_ratings():
    """Equal ratings, and a failed one on either side, are half right."""
    rows = official("rewardbench")["ratings"]
    rating = [[None if row[side] == -1 else row[side] for row in rows] for side in ("chosen", "rejected")]
    won = outcomes(scored([[x] for x in rating[0]], [[x] for x in rating[1]]))[:, 0, 0]
    assert won.tolist() == [row["result"] for row in rows]
    assert {0, 0.5, 1} == set(won)


@pytest.mark.parametrize("case", official("rewardbench")["cases"], ids=lambda case: case["kind"])
def test_rewardbench_sections(case):
    """Any subset accuracies give the official sections; math-prm weighs 984 however many rows it has."""
    subsets = list(case["subset_accuracy"])
    items = [item(name, name) for name in subsets]
    plan_ = plan("rewardbench", items)
    accuracy = np.array([case["subset_accuracy"][name] for name in subsets])
    got = {name: float(value) for name, value in plan_.aggregate(np.stack([accuracy, accuracy], axis=-1)).items()}
    for section, value in case["sections"].items():
        name = f"strict/{section}/accuracy"
        assert got[name] == pytest.approx(value, abs=1e-12) if name in got else value == 0
    if "score_mean_of_sections" in case and 0 not in case["sections"].values():
        assert got["half/overall/accuracy"] == pytest.approx(case["score_mean_of_sections"], abs=1e-12)


def test_a_part_weighs_as_the_whole():
    """A quick look takes as many of every subset, and pools them as the whole would."""
    whole = [item(f"{n}", "Neighbor" if n < 30 else "Natural") for n in range(40)]
    some = [whole[0], whole[1], whole[30], whole[31]]
    plan_ = plan("llmbar", some, whole)
    judged = scored([[1], [1], [9], [9]], [[5], [5], [5], [5]])
    assert numbers(plan_, measure(plan_, some, judged))["strict/overall/accuracy"] == pytest.approx(10 / 40)


def test_sources_of_which_one_row_was_judged_count_for_all_of_theirs():
    """A quick look at a file of many sources: what has no spread by itself is one stratum, and weighs as the whole."""
    whole = [item(f"{n}", ("a", "b", "c", "c")[n % 4]) for n in range(40)]
    some = [whole[0], whole[1], whole[2], whole[3]]  # one of a, one of b, two of c
    plan_ = plan("pairs", some, whole)
    assert dict(zip(plan_.subsets, plan_.counts, strict=True)) == {"other": 20, "c": 20}
    judged = scored([[9], [1], [9], [9]], [[5], [5], [5], [5]])
    assert numbers(plan_, measure(plan_, some, judged))["strict/overall/accuracy"] == pytest.approx(0.75)


# ---- RewardBench 2 --------------------------------------------------------------------------------------------------


def test_rewardbench2_best_of_four():
    given = official("rewardbench2")["best_of_4"]
    ratings = [[None if x == -1 else x for x in one["ratings"]] for one in given["items"]]
    items = [item(f"{one['subset']}/{one['id']}", one["subset"], 1, 3) for one in given["items"]]
    judged = scored([x[:1] for x in ratings], [x[1:] for x in ratings])
    plan_ = plan("rewardbench2", items)
    measured = measure(plan_, items, judged)
    assert measured.values[:, 1] == pytest.approx([one["result"] for one in given["items"]], abs=1e-12)
    assert (measured.values[:, 0] == (measured.values[:, 1] == 1)).all()
    got = numbers(plan_, measured)
    for subset, accuracy in given["subset_accuracy"].items():
        assert got[f"half/{subset}/accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert got["half/overall/accuracy"] == pytest.approx(np.mean(list(given["subset_accuracy"].values())), abs=1e-12)


def test_a_failed_response_wins_against_no_score_however_low():
    """A scalar head's scores lie below the -1 that a failed rating is."""
    items = [item("Math/0", "Math", 1, 3), item("Math/1", "Math", 1, 3)]
    judged = scored([[-5.0], [None]], [[None, -7.0, -8.0], [-9.0, -9.0, -9.0]])
    plan_ = plan("rewardbench2", items)
    assert measure(plan_, items, judged).values.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_an_answer_that_never_came_is_nobodys_luck():
    """Unreadable answers are rated lowest, as officially; a response to which none came ties with all others."""
    four = scored([[9], [9], [None], [2]], [[5, None, 5], [5, None, 5], [5, 5, 5], [9, 5, None]])
    items = [item(name, "Math", 1, 3) for name in "abcd"]
    plan_ = plan("rewardbench2", items)
    assert measure(plan_, items, four).values.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    chosen, rejected = np.zeros((4, 1, 1), bool), np.zeros((4, 3, 1), bool)
    rejected[1, 1], chosen[2, 0], rejected[3, 2] = True, True, True
    lost = replace(four, lost_chosen=chosen, lost_rejected=rejected)
    assert who_won(plan_, lost)[:, 0].tolist() == [[1, 1, 1], [1, 0.5, 1], [0.5] * 3, [0, 0, 0.5]]
    assert measure(plan_, items, lost).values.tolist() == [[1, 1], [0, 0.5], [0, 0.25], [0, 0]]  # a loss stays one


def test_a_response_is_unknown_where_no_vote_is_valid_and_one_never_came():
    """Two votes: one of each response came, and says enough; unreadable and missing together say nothing."""
    nan = math.nan
    two = scores_of([[[9, nan]], [[9, 9]]], [[[nan, 5]] * 3, [[nan, nan]] * 3])
    chosen, rejected = np.zeros((2, 1, 2), bool), np.zeros((2, 3, 2), bool)
    chosen[0, 0, 1], rejected[0, :, 0], rejected[1, 0, 1] = True, True, True
    items = [item(name, "Math", 1, 3) for name in "ab"]
    judged = replace(two, lost_chosen=chosen, lost_rejected=rejected)
    plan_ = plan("rewardbench2", items)
    assert who_won(plan_, judged)[:, 0].tolist() == [[1, 1, 1], [0.5, 1, 1]]
    assert judged.some(np.array([1])).unknown()[0].tolist() == [[True], [False]]


def test_ties_with_an_answer_that_never_came_are_not_won():
    ties = [item("ref", "Ties", 1, 1, "1", "ref"), item("tied", "Ties", 2, 1, "1", "tied")]
    judged = scored([[9], [9, 9]], [[2], [None]])
    plan_ = plan("rewardbench2", ties)
    assert measure(plan_, ties, judged).values.tolist() == [[1.01, 1.01]]
    judged = replace(judged, lost_rejected=np.array([[[False]], [[True]]]))
    assert measure(plan_, ties, judged).values.tolist() == [[0, 0]]


@pytest.mark.parametrize("case", official("rewardbench2")["ties"], ids=lambda case: case["name"])
def test_rewardbench2_ties(case):
    rows = case["rows"]
    right = [row["num_correct"] for row in rows]
    items = [
        item(f"Ties/{row['id']}", "Ties", n, len(row["scores"]) - n, *reversed(row["id"].split(":")))
        for row, n in zip(rows, right, strict=True)
    ]
    # In its own code a failed rating is -1; scores of a scalar head may be -1 and valid.
    failed = case["name"] == "integers_with_parse_failures"
    scores = [[None if failed and x == -1 else x for x in row["scores"]] for row in rows]
    judged = scored(*zip(*((x[:n], x[n:]) for x, n in zip(scores, right, strict=True)), strict=True))
    got = found("rewardbench2", items, judged)
    assert got["half/Ties/accuracy"] == pytest.approx(case["official"]["overall_score"], abs=1e-9)
    assert got["strict/Ties/accuracy"] == got["half/Ties/accuracy"]


# ---- RM-Bench -------------------------------------------------------------------------------------------------------


def matrix_of(rows, subset=lambda row: row["domain"]):
    items = [item(f"{row['id']}", subset(row), 3, 3) for row in rows]
    return found(
        "rm-bench", items, scored([row["score_chosen"] for row in rows], [row["score_rejected"] for row in rows])
    )


def same(got, want):
    """Their eight keys."""
    for domain in ("chat", "math", "code", "safety"):
        if domain in want:
            assert got[f"strict/{domain.capitalize()}/accuracy"] == pytest.approx(want[domain], abs=1e-12)
    for column in ("hard", "normal", "easy"):
        assert got[f"strict/overall/{column}"] == pytest.approx(want[f"{column}_acc"], abs=1e-12)
    if "total_avg_acc" in want:
        assert got["strict/overall/accuracy"] == pytest.approx(want["total_avg_acc"], abs=1e-12)


def test_rm_bench_in_full():
    given = official("rm_bench")["full_official_total"]
    same(matrix_of(given["rows"]), given["official"])


def test_rm_bench_by_hand():
    """Two prompts, whose matrix one can write down."""
    given = official("rm_bench")["handmade"]
    got = matrix_of(given["rows"], lambda row: "chat")
    same(got, given["official"])
    cells = [[got[f"strict/overall/cell_{i}{j}"] for j in range(3)] for i in range(3)]
    assert cells == [[0, 0.5, 0], [1, 1, 0.5], [0.5, 0.5, 0]]


def test_rm_bench_on_the_real_files(real_inputs):
    """798 real prompts with scores made from a hash; safety pools two files, and math is missing."""
    items, _ = read_benchmark("rm-bench", DataSection(path=str(real_inputs / "rm_bench"), split=""))
    given = official("rm_bench")

    def score(one, side, k):
        name = f"{one.subset}:{one.row['id']}:{side}:{k}"
        return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 11

    rows = [[[score(one, side, k) for k in range(3)] for one in items] for side in ("chosen", "rejected")]
    got = found("rm-bench", items, scored(*rows))
    same(got, given["merged_without_math"])
    for subset, want in given["per_file"].items():
        assert sum(one.subset == subset for one in items) == want["n"]
        for column in ("hard", "normal", "easy"):
            assert got[f"strict/subset {subset}/{column}"] == pytest.approx(want[f"{column}_acc"], abs=1e-12)


# ---- Judges of pairs ------------------------------------------------------------------------------------------------


def choices_of(decisions):
    """[I] pairs of (chosen first, rejected first), each 1, -1 or None: which one was chosen, the right one being 1."""
    values = [[[[[math.nan if x is None else x] for x in pair]]] for pair in decisions]
    return Choices(np.array(values, float), np.ones((len(decisions), 1, 1), bool))


def test_judgebench_in_both_orders():
    """Right and tie is right, right and wrong is not, nothing read is nothing."""
    given = official("judgebench")

    def chosen(decision, label, swapped):
        if decision is None or decision["decision"] in (None, "A=B"):
            return None
        said = decision["decision"]
        said = {"A>B": "B>A", "B>A": "A>B"}[said] if swapped else said
        return 1 if said == label else -1

    decisions = [
        [chosen(one, row["label"], swapped) for swapped, one in enumerate(row["judgments"])] for row in given["rows"]
    ]
    items = [item(row["pair_id"], row["source"]) for row in given["rows"]]
    judged = choices_of(decisions)
    assert (outcomes(judged)[:, 0, 0] == 1).tolist() == given["per_row_correct"]
    got = found("judgebench", items, judged)
    names = {
        "mmlu-pro": "Knowledge",
        "livebench-reasoning": "Reasoning",
        "livebench-math": "Math",
        "overall": "overall",
    }
    for theirs, ours in (*names.items(), ("livecodebench", "Coding")):
        assert 100 * got[f"strict/{ours}/accuracy"] == pytest.approx(given["both_orders"][theirs], abs=1e-9)


def test_llmbar_ratings():
    given = official("llmbar")["rating"]
    rows = [[row[f"score_{n}"] for n in (1, 2)][:: 1 if row["label"] == 1 else -1] for row in given["rows"]]
    rows = [[x if isinstance(x, int) else None for x in row] for row in rows]
    items = [item(str(n), "Natural") for n in range(len(rows))]
    got = found("llmbar", items, scored([[row[0]] for row in rows], [[row[1]] for row in rows]))
    assert 100 * got["half/overall/accuracy"] == pytest.approx(given["official"]["correct_average_pct"], abs=1e-9)


def test_llmbar_pairwise_is_the_mean_over_orders():
    from patarm_jax.evaluate.findings import _position

    given = official("llmbar")["pairwise"]

    def chosen(row, swapped):
        winner = row["winner_swap_true" if swapped else "winner_swap_false"]
        return None if winner is None else (1 if winner == str(row["label"]) else -1)

    # Ours calls the first order the one in which the right response stands first, theirs the one of the file.
    decisions = [[chosen(row, (row["label"] == 2) ^ bool(order)) for order in range(2)] for row in given["rows"]]
    position = _position(choices_of(decisions))
    assert 100 * position["right per answer"] == pytest.approx(given["official"]["correct_average_pct"], abs=1e-9)


def test_rmb_pairs():
    given = official("rmb")["pairwise"]
    items = [item(row["pair_uid"], row["category_path"].split("/", 1)[1]) for row in given["rows"]]
    judged = scored([[row["chosen"]] for row in given["rows"]], [[row["reject"]] for row in given["rows"]])
    assert (outcomes(judged)[:, 0, 0] == 1).astype(int).tolist() == given["results"]
    got = found("rmb", items, judged)
    for goal in ("Helpfulness", "Harmlessness"):
        right = [x for x, one in zip(given["results"], items, strict=True) if one.subset.startswith(goal)]
        assert got[f"strict/{goal}/accuracy"] == pytest.approx(np.mean(right), abs=1e-12)


# ---- Judges whose numbers are known beforehand ----------------------------------------------------------------------


@pytest.mark.parametrize("benchmark", ["rewardbench", "rm-bench", "rewardbench2", "pairs"])
def test_a_perfect_judge_has_everything_right(benchmark):
    items, size = made_up(benchmark, 40)
    judged = scores_of(
        np.full((len(items), size[0], 2), 9.0), np.full((len(items), size[1], 2), 1.0), *present(items, size)
    )
    got = found(benchmark, items, judged)
    assert all(value == 1.0 for value in got.values())


@pytest.mark.parametrize("benchmark", ["rewardbench", "rm-bench", "pairs"])
@pytest.mark.parametrize("votes", [1, 4])
def test_a_random_judge_lands_on_the_expectation(benchmark, votes):
    """Integers 0 to 10 at random: by symmetry ½ where a tie is ½, and ½ minus half the ties where it is wrong."""
    items, size = made_up(benchmark, 600)
    rng = np.random.default_rng(5)
    judged = scores_of(
        rng.integers(0, 11, (len(items), size[0], votes)).astype(float),
        rng.integers(0, 11, (len(items), size[1], votes)).astype(float),
        *present(items, size),
    )
    plan_ = plan(benchmark, items)
    spread = intervals(measure(plan_, items, judged), plan_.aggregate, seed=0)
    tie = (chance_of_sum(votes) ** 2).sum()
    for rule, expected in (("half", 0.5), ("strict", 0.5 - tie / 2)):
        low, high = spread[f"{rule}/overall/accuracy"]
        assert low <= expected <= high and high - low < 0.12


def chance_of_sum(votes):
    chance = np.ones(1)
    for _ in range(votes):
        chance = np.convolve(chance, np.full(11, 1 / 11))
    return chance


def made_up(benchmark, rows):
    subsets = {
        "rewardbench": ("alpacaeval-easy", "llmbar-natural", "donotanswer", "hep-go", "math-prm"),
        "rm-bench": ("chat", "math", "code", "safety-refuse", "safety-response"),
        "rewardbench2": ("Factuality", "Math", "Focus"),
        "pairs": ("all",),
    }[benchmark]
    size = {"rm-bench": (3, 3), "rewardbench2": (1, 3)}.get(benchmark, (1, 1))
    return [item(str(n), subset, *size) for n, subset in zip(range(rows), itertools.cycle(subsets), strict=False)], size


def present(items, size):
    return np.ones((len(items), size[0]), bool), np.ones((len(items), size[1]), bool)


# ---- Votes ----------------------------------------------------------------------------------------------------------


def test_equal_means_are_a_tie_and_single_scores_are_never_rounded():
    means = scores_of(np.array([[[7.3, 7.3, 7.3]]]), np.array([[[7.1, 7.3, 7.5]]]))
    assert outcomes(means).ravel().tolist() == [0.5]
    single = scores_of(np.array([[[1.0000001]]]), np.array([[[1.0]]]))  # as of a scalar head
    assert outcomes(single).ravel().tolist() == [1.0]


def test_majority_and_mean_differ_as_they_should():
    """Two narrow wins and one crushing defeat: the majority is for it, the mean against."""
    judged = scores_of(
        np.array([[[6.0, 6.0, 0.0]]]), np.array([[[5.0, 5.0, 10.0]]]), np.ones((1, 1), bool), np.ones((1, 1), bool)
    )
    assert outcomes(judged, "majority")[0, 0, 0] == 1 and outcomes(judged, "mean")[0, 0, 0] == 0


def test_an_unreadable_vote_counts_for_nothing():
    nan = math.nan
    judged = scores_of(np.array([[[nan, 6.0]]]), np.array([[[9.0, 5.0]]]))
    assert outcomes(judged, "majority")[0, 0, 0] == 1  # the first vote has one side alone
    assert outcomes(judged, "mean")[0, 0, 0] == 0  # 6 against 7
    judged = scores_of(np.array([[[nan]]]), np.array([[[9.0]]]))
    assert outcomes(judged)[0, 0, 0] == 0.5


def test_the_votes_of_a_curve():
    judged = scores_of(np.zeros((1, 1, 6)), np.zeros((1, 1, 6)))
    curve = votes_curve(judged, seed=0)
    assert (
        list(curve) == [1, 2, 3, 4, 5, 6] and len(curve[1]) == 6 and [list(x) for x in curve[6]] == [[0, 1, 2, 3, 4, 5]]
    )
    assert all(len(set(subset.tolist())) == size for size, subsets in curve.items() for subset in subsets)


# ---- Intervals and comparison ---------------------------------------------------------------------------------------


def units(values, stratum=None):
    """Units of one item each."""
    return Measured(
        np.asarray(values, float), np.ones(len(values)), np.zeros(len(values), int) if stratum is None else stratum
    )


def test_an_interval_is_that_of_the_bootstrap_library():
    """One stratum and a plain mean: scipy's percentile bootstrap."""
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).normal(size=200)
    got = intervals(units(values[:, None]), lambda m: {"mean": m[..., 0, 0]}, seed=0)["mean"]
    want = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert got == pytest.approx((want.low, want.high), abs=0.01)


def test_strata_are_resampled_by_themselves():
    """A stratum whose units are all alike adds nothing to the spread of another."""
    rng = np.random.default_rng(2)
    mixed = rng.integers(0, 2, 50)
    measured = units(np.concatenate([mixed, np.ones(50)])[:, None], np.repeat([0, 1], 50))
    got = intervals(measured, lambda m: {"both": m[..., 0].mean(-1), "first": m[..., 0, 0]}, seed=0)
    first, both = np.array(got["first"]), np.array(got["both"])
    assert both == pytest.approx((first + 1) / 2)


def test_intervals_of_few_units():
    """Wider than a plain bootstrap's, which is too narrow; never outside what a mean can be; of one unit, none."""
    few = units([[0.0], [1.0], [1.0], [1.0]])
    low, high = intervals(few, lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    assert low == pytest.approx(0.75 - 0.5 * np.sqrt(4 / 3)) and high == 1.0
    one = units([[1.0]])
    assert np.isnan(intervals(one, lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]).all()


def test_strata_of_one_unit_are_taken_together_for_their_spread():
    """Where others have more units too; and as wide as when they had been one stratum all along."""
    values = np.random.default_rng(1).integers(0, 2, 60).astype(float)[:, None]

    def overall(m):
        return {"x": m[..., 0].mean(-1)}

    each, one = units(values, np.arange(60)), units(values)
    (low, high), (low_1, high_1) = (intervals(measured, overall, seed=0)["x"] for measured in (each, one))
    assert (low, high) == pytest.approx((low_1, high_1), abs=1.01 / 60)  # a unit's worth
    lone = units(np.append(values, [[1.0]], axis=0), np.repeat([0, 1], [60, 1]))

    def weighted(m):
        return {"x": (60 * m[..., 0, 0] + m[..., 1, 0]) / 61}

    low, high = intervals(lone, weighted, seed=0)["x"]
    assert low < values.mean() < high and high - low == pytest.approx(high_1 - low_1, abs=1.01 / 60)


def test_a_paired_comparison_is_that_of_the_permutation_library():
    from scipy.stats import permutation_test

    rng = np.random.default_rng(4)
    ours, theirs = rng.integers(0, 2, 60).astype(float), rng.integers(0, 2, 60).astype(float)
    ours[:12] = 1.0
    got = compare(units(ours[:, None]), units(theirs[:, None]), lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    want = permutation_test(
        (ours, theirs), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples", n_resamples=10_000, rng=2
    )
    assert got.value == pytest.approx(np.mean(ours - theirs))
    assert got.p_value == pytest.approx(want.pvalue, abs=0.02)
    assert got.interval[0] < got.value < got.interval[1]


def test_a_comparison_over_strata_is_exact():
    """Of four units of unlike size in two strata all sixteen exchanges are counted by hand; p is never 0."""
    stratum, size, weights = np.array([0, 0, 0, 1]), np.array([1.0, 2.0, 1.0, 3.0]), np.array([0.7, 0.3])
    ours, theirs = np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 0.5, 0.75, 0.0])

    def number(m):
        return {"x": m[..., 0] @ weights}

    got = compare(*(Measured(x[:, None], size, stratum) for x in (ours, theirs)), number, seed=0)["x"]
    each = weights[stratum] * size / np.bincount(stratum, size)[stratum] * (ours - theirs)
    exchanged = np.array([signs @ each for signs in itertools.product((1, -1), repeat=4)])
    assert got.value == pytest.approx(each.sum())
    assert got.p_value == pytest.approx(np.mean(np.abs(exchanged) >= abs(each.sum()) - 1e-9), abs=0.02)
    # Three small prompts against a large one that says otherwise: 0.75 of 9, which half of the exchanges reach.
    ours, theirs, size = (
        np.array([1.0, 1.0, 1.0, 0.0]),
        np.array([0.0, 0.0, 0.0, 0.375]),
        np.array([1.0, 1.0, 1.0, 6.0]),
    )
    one = np.zeros(4, int)
    got = compare(*(Measured(x[:, None], size, one) for x in (ours, theirs)), lambda m: {"x": m[..., 0, 0]}, seed=0)[
        "x"
    ]
    exchanged = [abs(signs @ (size * (ours - theirs))) for signs in itertools.product((1, -1), repeat=4)]
    assert got.value == pytest.approx(0.75 / 9)
    assert got.p_value == pytest.approx(np.mean(np.array(exchanged) >= 0.75), abs=0.02)
    many = compare(units(np.ones((60, 1))), units(np.zeros((60, 1))), lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    assert many.p_value == 1 / 10_001


def test_items_of_one_prompt_are_resampled_together():
    """A prompt's items say the same: the interval is that of the prompts, the number that of the items."""
    rng = np.random.default_rng(5)
    prompts = rng.integers(0, 2, 80).astype(float)
    size = rng.integers(1, 6, 80).astype(float)
    together = Measured(prompts[:, None], size, np.zeros(80, int))
    apart = units(np.repeat(prompts, size.astype(int))[:, None])

    def number(m):
        return {"x": m[..., 0, 0]}

    assert means(together) == pytest.approx(means(apart))
    (low, high), (low_1, high_1) = (intervals(one, number, seed=0)["x"] for one in (together, apart))
    # Of a ratio estimator: √Σ size²·(x − mean)² / Σ size, within the normal approximation.
    deviation = np.sqrt((size**2 * (prompts - means(together)[0, 0]) ** 2).sum()) / size.sum()
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)
    assert high_1 - low_1 < 0.75 * (high - low)


@pytest.mark.parametrize(("right", "count"), [(0, 3), (1, 2), (7, 9), (40, 40), (1234, 2985)])
def test_wilsons_interval_is_that_of_the_library(right, count):
    from scipy.stats import binomtest

    want = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count) == pytest.approx((want.low, want.high), abs=1e-7)


def test_where_nothing_varies_the_interval_is_put_together_of_wilsons():
    """By hand: half of the reach of 40 units and half of that of 160, squared and added."""
    right = units(np.ones((200, 1)), np.repeat([0, 1], [40, 160]))
    got = intervals(right, lambda m: {"x": m[..., 0].mean(-1), "first": m[..., 0, 0]}, seed=0)
    reach = [1 - wilson(1, n)[0] for n in (40, 160)]
    assert got["first"] == pytest.approx((1 - reach[0], 1.0), abs=1e-9)
    assert got["x"] == pytest.approx((1 - np.hypot(*reach) / 2, 1.0), abs=0.001)
    apart = units(np.repeat([[0.0], [1.0]], 50, axis=0), np.repeat([0, 1], 50))
    away = (1 - wilson(1, 50)[0]) / 2
    got = intervals(apart, lambda m: {"x": m[..., 0].mean(-1)}, seed=0)["x"]
    assert got == pytest.approx((0.5 - away, 0.5 + away), abs=1e-9)
    ties = intervals(units(np.full((30, 1), 0.5)), lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    assert ties == pytest.approx(wilson(0.5, 30))
    thirds = intervals(units(np.full((5, 1), 1 / 3)), lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    assert thirds == pytest.approx(wilson(1 / 3, 5))
    unlike = Measured(np.ones((2, 1)), np.array([1.0, 9.0]), np.zeros(2, int))  # of ten items nine are one prompt's
    got = intervals(unlike, lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    assert got == pytest.approx((wilson(1, 100 / 82)[0], 1.0))
    best = Measured(np.full((4, 1), 1.01), np.full(4, 2.0), np.zeros(4, int))  # RewardBench 2's Ties
    assert intervals(best, lambda m: {"x": m[..., 0, 0]}, seed=0)["x"] == pytest.approx(
        (1.01 - 0.48991, 1.01), abs=1e-4
    )


def test_an_interval_may_leave_what_was_seen_and_not_what_can_be():
    low, high = intervals(units([[0.3], [0.5]]), lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    assert low < 0.3 and high > 0.5
    low, high = intervals(units([[0.0], [1.0], [1.0]]), lambda m: {"x": m[..., 0, 0]}, seed=0)["x"]
    assert low == 0 and high == 1


def test_a_difference_is_one_that_can_be(tmp_path):
    """Also where a stratum of one unit takes its spread from others."""
    ours, theirs = np.ones((21, 1)), np.append(np.ones(10), np.zeros(11))[:, None]
    stratum = np.append(np.zeros(20, int), 1)

    def numbers_of(m):
        return {"lone": m[..., 1, 0], "both": m[..., 0].mean(-1)}

    got = compare(units(ours, stratum), units(theirs, stratum), numbers_of, seed=0)
    assert got["lone"].value == 1 and -1 <= got["lone"].interval[0] <= got["lone"].interval[1] <= 1
    assert 0 < got["both"].interval[0] < got["both"].value < got["both"].interval[1] <= 1
    other = compare(units(theirs, stratum), units(ours, stratum), numbers_of, seed=0)["lone"]
    assert other.value == -1 and -1 <= other.interval[0] <= other.interval[1] <= 1


def test_a_paired_interval_weighs_units_by_their_items():
    """Of a ratio: √Σ size²·(d − mean)² / Σ size, within the normal approximation."""
    rng = np.random.default_rng(7)
    size, stratum = rng.integers(1, 8, 200).astype(float), np.zeros(200, int)
    ours, theirs = (rng.integers(0, 2, 200).astype(float) for _ in range(2))
    got = compare(
        *(Measured(x[:, None], size, stratum) for x in (ours, theirs)), lambda m: {"x": m[..., 0, 0]}, seed=0
    )["x"]
    mean = size @ (ours - theirs) / size.sum()
    deviation = np.sqrt((size**2 * (ours - theirs - mean) ** 2).sum()) / size.sum()
    assert got.value == pytest.approx(mean)
    assert got.interval[1] - got.interval[0] == pytest.approx(2 * 1.96 * deviation, rel=0.04)


def test_single_units_share_a_pool_of_their_own():
    """Not that of a large stratum beside them, which knows no spread here."""
    values = np.append(np.ones(50), [0.0, 1.0, 0.0, 1.0])[:, None]
    stratum = np.append(np.zeros(50, int), [1, 2, 3, 4])
    low, high = intervals(units(values, stratum), lambda m: {"x": m[..., 1:, 0].mean(-1)}, seed=0)["x"]
    assert low <= 0.25 and high >= 0.75  # as wide as of four units of which half are right


def test_a_judge_does_not_differ_from_itself():
    measured = units(np.random.default_rng(0).random((30, 2)), np.repeat([0, 1, 2], 10))
    same_ = compare(measured, measured, lambda m: {"x": m[..., 0].mean(-1)}, seed=0)["x"]
    assert same_.value == 0 and same_.interval == (0.0, 0.0) and same_.p_value == 1.0


def test_the_same_seed_gives_the_same_numbers():
    measured = units(np.random.default_rng(0).random((30, 2)), np.repeat([0, 1, 2], 10))
    first, second, other = (intervals(measured, lambda m: {"x": m[..., 0].mean(-1)}, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert means(measured).shape == (3, 2)
