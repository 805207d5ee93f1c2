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

from patarm_jax.config.sections import DataSection
from patarm_jax.evaluate.catalogue import BENCHMARKS, read_benchmark
from patarm_jax.evaluate.items import Item
from patarm_jax.evaluate.outcomes import Choices, outcomes, votes_curve
from patarm_jax.evaluate.scoring import measure, numbers, strata_of, who_won
from patarm_jax.evaluate.statistics import Name, intervals
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
    strata = strata_of(BENCHMARKS[benchmark].layout, items)
    return numbers(strata, measure(strata, items, judged, rule))


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
    strata = strata_of(BENCHMARKS["rewardbench"].layout, items)
    accuracy = np.array([case["subset_accuracy"][name] for name in subsets])
    got = {name: float(value) for name, value in strata.formulas.of(np.stack([accuracy, accuracy], axis=-1)).items()}
    for section, value in case["sections"].items():
        name = Name("strict", section)
        assert got[name] == pytest.approx(value, abs=1e-12) if name in got else value == 0
    if "score_mean_of_sections" in case and 0 not in case["sections"].values():
        assert got[Name("half", "overall")] == pytest.approx(case["score_mean_of_sections"], abs=1e-12)


def test_a_part_weighs_as_the_whole():
    """A quick look takes as many of every subset, and pools them as the whole would."""
    whole = [item(f"{n}", "mmlu-pro-math" if n < 30 else "livebench-math") for n in range(40)]
    some = [whole[0], whole[1], whole[30], whole[31]]
    strata = strata_of(BENCHMARKS["judgebench"].layout, some, whole)
    judged = scored([[1], [1], [9], [9]], [[5], [5], [5], [5]])
    assert numbers(strata, measure(strata, some, judged))[Name("strict", "overall")] == pytest.approx(10 / 40)


def test_sources_of_which_one_row_was_judged_count_for_all_of_theirs():
    """A quick look at a file of many sources: what has no spread by itself is one stratum, and weighs as the whole."""
    whole = [item(f"{n}", ("a", "b", "c", "c")[n % 4]) for n in range(40)]
    some = [whole[0], whole[1], whole[2], whole[3]]  # one of a, one of b, two of c
    strata = strata_of(BENCHMARKS["pairs"].layout, some, whole)
    assert dict(zip(strata.subsets, strata.counts, strict=True)) == {"other": 20, "c": 20}
    judged = scored([[9], [1], [9], [9]], [[5], [5], [5], [5]])
    assert numbers(strata, measure(strata, some, judged))[Name("strict", "overall")] == pytest.approx(0.75)


# ---- RewardBench 2 --------------------------------------------------------------------------------------------------


def test_rewardbench2_best_of_four():
    given = official("rewardbench2")["best_of_4"]
    ratings = [[None if x == -1 else x for x in one["ratings"]] for one in given["items"]]
    items = [item(f"{one['subset']}/{one['id']}", one["subset"], 1, 3) for one in given["items"]]
    judged = scored([x[:1] for x in ratings], [x[1:] for x in ratings])
    strata = strata_of(BENCHMARKS["rewardbench2"].layout, items)
    measured = measure(strata, items, judged)
    assert measured.values[:, 1] == pytest.approx([one["result"] for one in given["items"]], abs=1e-12)
    assert (measured.values[:, 0] == (measured.values[:, 1] == 1)).all()
    got = numbers(strata, measured)
    for subset, accuracy in given["subset_accuracy"].items():
        assert got[Name("half", subset)] == pytest.approx(accuracy, abs=1e-12)
    assert got[Name("half", "overall")] == pytest.approx(np.mean(list(given["subset_accuracy"].values())), abs=1e-12)


def test_a_failed_response_wins_against_no_score_however_low():
    """A scalar head's scores lie below the -1 that a failed rating is."""
    items = [item("Math/0", "Math", 1, 3), item("Math/1", "Math", 1, 3)]
    judged = scored([[-5.0], [None]], [[None, -7.0, -8.0], [-9.0, -9.0, -9.0]])
    strata = strata_of(BENCHMARKS["rewardbench2"].layout, items)
    assert measure(strata, items, judged).values.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_an_answer_that_never_came_is_nobodys_luck():
    """Unreadable answers are rated lowest, as officially; a response to which none came ties with all others."""
    four = scored([[9], [9], [None], [2]], [[5, None, 5], [5, None, 5], [5, 5, 5], [9, 5, None]])
    items = [item(name, "Math", 1, 3) for name in "abcd"]
    strata = strata_of(BENCHMARKS["rewardbench2"].layout, items)
    assert measure(strata, items, four).values.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    chosen, rejected = np.zeros((4, 1, 1), bool), np.zeros((4, 3, 1), bool)
    rejected[1, 1], chosen[2, 0], rejected[3, 2] = True, True, True
    lost = replace(four, lost_chosen=chosen, lost_rejected=rejected)
    assert who_won(strata, lost)[:, 0].tolist() == [[1, 1, 1], [1, 0.5, 1], [0.5] * 3, [0, 0, 0.5]]
    assert measure(strata, items, lost).values.tolist() == [[1, 1], [0, 0.5], [0, 0.25], [0, 0]]  # a loss stays one


def test_a_response_is_unknown_where_no_vote_is_valid_and_one_never_came():
    """Two votes: one of each response came, and says enough; unreadable and missing together say nothing."""
    nan = math.nan
    two = scores_of([[[9, nan]], [[9, 9]]], [[[nan, 5]] * 3, [[nan, nan]] * 3])
    chosen, rejected = np.zeros((2, 1, 2), bool), np.zeros((2, 3, 2), bool)
    chosen[0, 0, 1], rejected[0, :, 0], rejected[1, 0, 1] = True, True, True
    items = [item(name, "Math", 1, 3) for name in "ab"]
    judged = replace(two, lost_chosen=chosen, lost_rejected=rejected)
    strata = strata_of(BENCHMARKS["rewardbench2"].layout, items)
    assert who_won(strata, judged)[:, 0].tolist() == [[1, 1, 1], [0.5, 1, 1]]
    assert judged.some(np.array([1])).unknown()[0].tolist() == [[True], [False]]


def test_ties_with_an_answer_that_never_came_are_not_won():
    ties = [item("ref", "Ties", 1, 1, "1", "ref"), item("tied", "Ties", 2, 1, "1", "tied")]
    judged = scored([[9], [9, 9]], [[2], [None]])
    strata = strata_of(BENCHMARKS["rewardbench2"].layout, ties)
    assert measure(strata, ties, judged).values.tolist() == [[1.01, 1.01]]
    judged = replace(judged, lost_rejected=np.array([[[False]], [[True]]]))
    assert measure(strata, ties, judged).values.tolist() == [[0, 0]]


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
    assert got[Name("half", "Ties")] == pytest.approx(case["official"]["overall_score"], abs=1e-9)
    assert got[Name("strict", "Ties")] == got[Name("half", "Ties")]


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
            assert got[Name("strict", domain.capitalize())] == pytest.approx(want[domain], abs=1e-12)
    for column in ("hard", "normal", "easy"):
        assert got[Name("strict", "overall", column)] == pytest.approx(want[f"{column}_acc"], abs=1e-12)
    if "total_avg_acc" in want:
        assert got[Name("strict", "overall")] == pytest.approx(want["total_avg_acc"], abs=1e-12)


def test_rm_bench_in_full():
    given = official("rm_bench")["full_official_total"]
    same(matrix_of(given["rows"]), given["official"])


def test_rm_bench_by_hand():
    """Two prompts, whose matrix one can write down."""
    given = official("rm_bench")["handmade"]
    got = matrix_of(given["rows"], lambda row: "chat")
    same(got, given["official"])
    cells = [[got[Name("strict", "overall", f"cell_{i}{j}")] for j in range(3)] for i in range(3)]
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
            assert got[Name("strict", f"subset {subset}", column)] == pytest.approx(want[f"{column}_acc"], abs=1e-12)


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
        assert 100 * got[Name("strict", ours)] == pytest.approx(given["both_orders"][theirs], abs=1e-9)


def test_llmbar_ratings():
    given = official("llmbar")["rating"]
    rows = [[row[f"score_{n}"] for n in (1, 2)][:: 1 if row["label"] == 1 else -1] for row in given["rows"]]
    rows = [[x if isinstance(x, int) else None for x in row] for row in rows]
    items = [item(str(n), "Natural") for n in range(len(rows))]
    got = found("llmbar", items, scored([[row[0]] for row in rows], [[row[1]] for row in rows]))
    assert 100 * got[Name("half", "overall")] == pytest.approx(given["official"]["correct_average_pct"], abs=1e-9)


def test_llmbar_pairwise_is_the_mean_over_orders():
    from patarm_jax.evaluate.outcomes import position_bias

    given = official("llmbar")["pairwise"]

    def chosen(row, swapped):
        winner = row["winner_swap_true" if swapped else "winner_swap_false"]
        return None if winner is None else (1 if winner == str(row["label"]) else -1)

    # Ours calls the first order the one in which the right response stands first, theirs the one of the file.
    decisions = [[chosen(row, (row["label"] == 2) ^ bool(order)) for order in range(2)] for row in given["rows"]]
    position = position_bias(choices_of(decisions))
    assert 100 * position["right per answer"] == pytest.approx(given["official"]["correct_average_pct"], abs=1e-9)


# Accuracies of GPT-4 as the benchmark's repository holds them, in the files evaluators/GPT-4/NAME/statistics.json, and
# what the paper's table makes of them: the mean over the four adversarial subsets, and over all five.
LLMBAR_SUBSETS = {"Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
GPT_4 = {
    "Metrics_Reference": ((96.0, 85.4, 89.7, 72.3, 83.7), 82.8, 85.4),
    "Vanilla_NoRules": ((93.5, 64.2, 76.6, 76.6, 75.0), 73.1, 77.2),
}


@pytest.mark.parametrize("name", GPT_4)
def test_llmbar_averages_subsets_whatever_their_sizes(name):
    accuracies, adversarial, average = GPT_4[name]
    items = [item(f"{subset}/{n}", subset) for subset, count in LLMBAR_SUBSETS.items() for n in range(count)]
    # So many items of each subset are right that each has its published accuracy; a half is a tie.
    scores = []
    for accuracy, count in zip(accuracies, LLMBAR_SUBSETS.values(), strict=True):
        points = round(2 * count * accuracy / 100)
        scores += [[9]] * (points // 2) + [[5]] * (points % 2) + [[1]] * (count - points // 2 - points % 2)
    got = found("llmbar", items, scored(scores, [[5]] * len(items)))
    for subset, accuracy in zip(LLMBAR_SUBSETS, accuracies, strict=True):
        assert 100 * got[Name("half", f"subset {subset}")] == pytest.approx(accuracy, abs=0.05)
    assert 100 * got[Name("half", "Natural")] == pytest.approx(accuracies[0])
    assert round(100 * got[Name("half", "Adversarial")], 1) == adversarial
    assert round(100 * got[Name("half", "overall")], 1) == average


def test_llmbars_real_rows_are_averaged_by_subset(real_inputs):
    """A judge that prefers the longer output, by a plain computation beside it."""
    items, _ = read_benchmark("llmbar", DataSection(path=str(real_inputs / "llmbar"), split=""))
    lengths = [
        [[len(text)] for text in side] for side in zip(*((x.chosen[0], x.rejected[0]) for x in items), strict=True)
    ]
    got = found("llmbar", items, scored(*lengths))
    each = {}
    for subset, count in LLMBAR_SUBSETS.items():
        rows = json.loads(
            (real_inputs / "llmbar" / f"{'' if subset == 'Natural' else 'Adversarial_'}{subset}.json").read_text()
        )
        assert len(rows) == count
        longer = [len(row[f"output_{row['label']}"]) - len(row[f"output_{3 - row['label']}"]) for row in rows]
        each[subset] = np.mean([(x > 0) + (x == 0) / 2 for x in longer])
        assert got[Name("half", f"subset {subset}")] == pytest.approx(each[subset], abs=1e-12)
    assert got[Name("half", "overall")] == pytest.approx(np.mean(list(each.values())), abs=1e-12)
    del each["Natural"]
    assert got[Name("half", "Adversarial")] == pytest.approx(np.mean(list(each.values())), abs=1e-12)


def test_rmb_pairs():
    given = official("rmb")["pairwise"]
    items = [item(row["pair_uid"], row["category_path"].split("/", 1)[1]) for row in given["rows"]]
    judged = scored([[row["chosen"]] for row in given["rows"]], [[row["reject"]] for row in given["rows"]])
    assert (outcomes(judged)[:, 0, 0] == 1).astype(int).tolist() == given["results"]
    got = found("rmb", items, judged)
    for goal in ("Helpfulness", "Harmlessness"):
        right = [x for x, one in zip(given["results"], items, strict=True) if one.subset.startswith(goal)]
        assert got[Name("strict", goal)] == pytest.approx(np.mean(right), abs=1e-12)
    both = [got[Name("strict", goal)] for goal in ("Helpfulness", "Harmlessness")]
    assert got[Name("strict", "overall")] == pytest.approx(np.mean(both), abs=1e-12)


@pytest.mark.parametrize(
    ("benchmark", "rows", "overall"),
    [
        # Rows of each subset and how many are right; what the overall is then.
        ("rewardbench", {"math-prm": (447, 447), "hep-go": (164, 0), "donotanswer": (136, 68)}, (984 / 1148 + 0.5) / 2),
        ("rewardbench2", {"Math": (10, 10), "Focus": (40, 10)}, (1 + 0.25) / 2),
        ("rm-bench", {"chat": (10, 10), "safety-refuse": (30, 0), "safety-response": (10, 10)}, (1 + 0.25) / 2),
        ("judgebench", {"mmlu-pro-math": (30, 30), "livebench-math": (10, 0)}, 0.75),
        ("llmbar", {"Natural": (100, 100), "GPTOut": (47, 0), "Manual": (46, 46)}, 2 / 3),
        ("rmb", {"Helpfulness/Code": (30, 30), "Helpfulness/Chat": (10, 0), "Harmlessness/S1": (5, 0)}, 0.375),
        ("ppe", {"human": (30, 30), "human-code": (10, 0), "gpqa": (5, 0)}, 0.375),
        ("pairs", {"a": (30, 30), "b": (10, 0)}, 0.75),
    ],
)
def test_how_subsets_make_an_overall(benchmark, rows, overall):
    """Subsets of unlike size, by hand."""
    size = {"rm-bench": (3, 3), "rewardbench2": (1, 3)}.get(benchmark, (1, 1))
    items = [item(f"{subset}/{n}", subset, *size) for subset, (count, _) in rows.items() for n in range(count)]
    right = np.concatenate([np.arange(count) < right for count, right in rows.values()])
    chosen = np.where(right, 9.0, 1.0)[:, None, None] * np.ones((1, size[0], 1))
    got = found(benchmark, items, scores_of(chosen, np.full((len(items), size[1], 1), 5.0)))
    assert got[Name("strict", "overall")] == got[Name("half", "overall")] == pytest.approx(overall, abs=1e-12)


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
    strata = strata_of(BENCHMARKS[benchmark].layout, items)
    spread = intervals(measure(strata, items, judged), strata.formulas, seed=0)
    tie = (chance_of_sum(votes) ** 2).sum()
    for rule, expected in (("half", 0.5), ("strict", 0.5 - tie / 2)):
        low, high = spread[Name(rule, "overall")]
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
