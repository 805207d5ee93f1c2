"""What is found in answers, on examples small enough to work out by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest

from patarm_jax.ask.answers import Answer, Kind, open_answers
from patarm_jax.config.recipes import EvalConfig
from patarm_jax.config.sections import JudgingSection
from patarm_jax.evaluate.catalogue import BENCHMARKS
from patarm_jax.evaluate.files import compared, load_measured, write_files
from patarm_jax.evaluate.findings import Evaluation, find
from patarm_jax.evaluate.items import Item
from patarm_jax.evaluate.outcomes import Choices
from patarm_jax.evaluate.proportions import clopper_pearson
from patarm_jax.evaluate.questions import ask_about
from patarm_jax.evaluate.scoring import measure, numbers, strata_of
from patarm_jax.evaluate.statistics import Name
from patarm_jax.evaluate.summary import markdown
from patarm_jax.judge.forms import POINTWISE
from patarm_jax.types import Message
from tests.toys import scores_of

nan = math.nan
PROMPT = (Message(role="user", content="Hi"),)


def item(name, chosen="cc", rejected="r", subset="all"):
    return Item(name, subset, "chat", PROMPT, (chosen,), (rejected,), name, {})


def scores(chosen, rejected):
    """[I][N] scores of one chosen and one rejected response each."""
    return scores_of(np.array(chosen, float)[:, None], np.array(rejected, float)[:, None])


# Three pairs, four votes. The chosen response is longer in a, shorter in b, as long in c.
ITEMS = [item("a", "ccc", "r"), item("b", "c", "rrr"), item("c", "cc", "rr")]
SCORES = scores(
    [[9, 9, 9, 1], [4, 4, 4, 4], [5, 6, nan, 7]],  # means 7, 4, 6
    [[6, 6, 6, 6], [3, 3, 3, 10], [6, 6, 6, 6]],  # means 6, 4.75, 6
)
READ, CUT = Answer("q", 0, "OK", Kind.ANSWER), Answer("q", 0, "BAD_TAGS", Kind.CUT, reason="</think> is missing")
ANSWERS = [*[READ] * 21, *[CUT] * 2, Answer("q", 0, "FAILED", Kind.FAILED)]
FINE = ANSWERS[:1]


@pytest.fixture(scope="module")
def found():
    groups = strata_of(BENCHMARKS["pairs"].layout, ITEMS)
    return find(groups, ITEMS, SCORES, ANSWERS, seed=0)[0]


def test_by_mean_and_by_majority(found):
    """A is won by both; b lost by the mean and won by three votes of four; c a tie: equal means, and one win each."""
    assert found.scores[Name("strict", "overall")][0] == pytest.approx(1 / 3)
    assert found.scores[Name("half", "overall")][0] == pytest.approx(1 / 2)
    assert found.majority[Name("strict", "overall")] == pytest.approx(2 / 3)
    assert found.majority[Name("half", "overall")] == pytest.approx(5 / 6)
    assert found.ties == pytest.approx(1 / 3)
    assert (found.answers, found.valid, found.cut, found.failed) == (24, 21 / 24, 2 / 24, 1)


def test_the_votes_curve(found):
    points = {(point["votes"], point["rule"]): (point["strict"], point["half"]) for point in found.votes}
    assert sorted(points) == [(n, rule) for n in (1, 2, 3, 4) for rule in ("majority", "mean")]
    # Votes one by one: a 3 of 4, b 3 of 4, c one win, one loss, one tie of equal scores, one that cannot be read.
    one = (0.75 + 0.75 + 0.25) / 3, (0.75 + 0.75 + 0.5) / 3
    assert points[1, "mean"] == points[1, "majority"] == pytest.approx(one)
    # Of two: a is won by the mean whatever they are, but for one and nine (5 against 6), which are a tie of wins;
    # b is lost where the ten is, and a tie of wins; c: 5 or 6 or 7 or the mean of two of them, against 6.
    strict = (3 / 6 + 3 / 6 + np.mean([0, 0, 0, 0, 1, 1])) / 3  # c: 56 5- 57 6- 67 7-
    assert points[2, "mean"][0] == pytest.approx(strict)
    assert points[4, "mean"] == pytest.approx((1 / 3, 1 / 2)) and points[4, "majority"] == pytest.approx((2 / 3, 5 / 6))


def test_by_which_response_is_longer(found):
    assert found.length == {
        "chosen longer": {"pairs": 1, "strict": 1.0, "half": 1.0},
        "chosen shorter": {"pairs": 1, "strict": 0.0, "half": 0.0},
        "equally long": {"pairs": 1, "strict": 0.0, "half": 0.5},
    }


def test_how_often_a_gap_is_right(found):
    """The gaps are +1, −0.75 and 0, which has no sign."""
    (one,) = found.calibration
    assert (one["above"], one["up to"], one["pairs"], one["right"]) == (0.5, 1.0, 2, 0.5)
    assert (one["low"], one["high"]) == pytest.approx((0.0126, 0.9874), abs=1e-4)  # Clopper and Pearson's of 1 in 2


def test_pairs_of_one_prompt_tell_of_a_gap_together():
    """RM-Bench compares three responses with three; nine pairs of one prompt that agree are no nine prompts."""
    items = [Item(f"{n}", "chat", "chat", PROMPT, ("c",) * 3, ("r",) * 3, f"{n}", {}) for n in range(20)]
    chosen, rejected = np.full((20, 3, 1), 5.0), np.full((20, 3, 1), 3.5)
    chosen[:4], rejected[:4] = 3.5, 5.0
    found = find(strata_of(BENCHMARKS["rm-bench"].layout, items), items, scores_of(chosen, rejected), FINE, seed=0)[0]
    (one,) = found.calibration
    assert (one["pairs"], one["right"]) == (180, 0.8)
    low, high = clopper_pearson(np.array(16), np.array(20))
    assert (one["low"], one["high"]) == pytest.approx((float(low), float(high)), abs=0.01)


def test_the_histogram_of_single_scores(found):
    """A bar around each half point, so that the ends are as wide as the rest."""
    edges = np.array(found.histogram["edges"])
    assert (edges[:-1] + edges[1:]) / 2 == pytest.approx(np.arange(0, 10.5, 0.5))
    at = {"chosen": {1: 1, 4: 4, 5: 1, 6: 1, 7: 1, 9: 3}, "rejected": {3: 3, 6: 8, 10: 1}}
    for side, wanted in at.items():
        assert {i / 2: count for i, count in enumerate(found.histogram[side]) if count} == wanted


def test_scores_of_a_scalar_head_have_a_histogram_of_their_own():
    judged = scores([[-3.0]], [[12.0]])
    histogram = find(strata_of(BENCHMARKS["pairs"].layout, ITEMS[:1]), ITEMS[:1], judged, FINE, seed=0)[0].histogram
    assert (histogram["edges"][0], histogram["edges"][-1]) == (-3, 12)
    assert (histogram["chosen"][0], histogram["rejected"][-1]) == (1, 1)


def test_votes_beyond_32():
    judged = scores([[1] * 70], [[0] * 70])
    votes = [
        point["votes"]
        for point in find(strata_of(BENCHMARKS["pairs"].layout, ITEMS[:1]), ITEMS[:1], judged, FINE, seed=0)[0].votes
    ]
    assert votes[::2] == [*range(1, 33), 64, 70]


def test_the_position_of_two_responses():
    """Two pairs, two votes; the first is always answered A, the second rightly but for one that cannot be read."""
    choices = np.array([[[1, 1], [-1, -1]], [[1, nan], [1, 1]]], float)[:, None, None]
    judged = Choices(choices, np.ones((2, 1, 1), bool))
    found = find(strata_of(BENCHMARKS["pairs"].layout, ITEMS[:2]), ITEMS[:2], judged, FINE, seed=0)[0]
    assert found.position == {
        "chose the first": pytest.approx(5 / 7),
        "same in both orders": pytest.approx(1 / 3),
        "right with chosen first": 3 / 4,
        "right with rejected first": 2 / 4,
        "right per answer": 5 / 8,
    }
    assert found.scores[Name("half", "overall")][0] == 0.75  # a tie, and a win by three votes
    assert (found.majority, found.calibration, found.histogram) == ({}, [], None)


def test_a_majority_is_of_all_votes():
    """The first vote of each order says otherwise."""
    choices = np.array([-1, 1, 1, -1, 1, 1], float).reshape(1, 1, 1, 2, 3)
    judged = Choices(choices, np.ones((1, 1, 1), bool))
    found = find(strata_of(BENCHMARKS["pairs"].layout, ITEMS[:1]), ITEMS[:1], judged, FINE, seed=0)[0]
    assert found.scores[Name("strict", "overall")][0] == 1.0
    assert [(point["votes"], point["strict"]) for point in found.votes] == [
        (1, pytest.approx(2 / 3)), (2, pytest.approx(1 / 3)), (3, 1.0),
    ]  # fmt: skip


def test_a_subset_of_one_has_no_interval_and_takes_none_away():
    items = [item(f"{n}", subset="hep-go" if n else "hep-js") for n in range(20)]
    judged = scores([[n % 3] for n in range(20)], [[1]] * 20)
    found = find(strata_of(BENCHMARKS["rewardbench"].layout, items), items, judged, FINE, seed=0)[0].scores
    assert np.isnan(found[Name("strict", "subset hep-js")][1:]).all()
    for name in ("subset hep-go", "Reasoning", "overall"):
        value, low, high = found[Name("strict", name)]
        assert low < value < high


# ---- Rules ----------------------------------------------------------------------------------------------------------


def evaluation(benchmark, judge="pointwise", items=None, judged=None, **config):
    items = items or [item("a")]
    judged = judged or scores([[9]] * len(items), [[2]] * len(items))
    groups = strata_of(BENCHMARKS[benchmark].layout, items)
    findings, measured = find(groups, items, judged, FINE, seed=0)
    return Evaluation(EvalConfig(benchmark=benchmark, judge=judge, **config), "m", items, groups, findings, measured)


@pytest.mark.parametrize(
    ("benchmark", "judge", "rule", "own"),
    [
        ("rewardbench", "pointwise", "half", True),
        ("rewardbench", "pairwise", "half", False),
        ("rewardbench", "scalar", "strict", True),
        ("rewardbench2", "pointwise", "half", True),
        ("rm-bench", "pointwise", "strict", True),
        ("judgebench", "pairwise", "strict", True),
        ("llmbar", "pointwise", "half", True),
        ("llmbar", "pairwise", "half", False),
        ("rmb", "pointwise", "strict", True),
        ("ppe", "pointwise", "half", True),
    ],
)
def test_the_official_rule(benchmark, judge, rule, own):
    """Which rule of ties is the benchmark's, and whether it makes our number its own."""
    subset = next(iter(BENCHMARKS[benchmark].layout.sections.values()))[0]
    subset = {"rewardbench": "donotanswer", "rm-bench": "chat"}.get(benchmark, subset)
    one = item("a", subset=subset)
    if benchmark == "rm-bench":
        judged = scores_of(np.full((1, 3, 1), 9.0), np.full((1, 3, 1), 2.0))
        one = replace(one, chosen=("c",) * 3, rejected=("r",) * 3)
    else:
        judged = None
    result = evaluation(benchmark, judge, [one], judged)
    assert (result.official, result.is_official) == (rule, own)
    assert (", official" in markdown(result)) == own


def test_sections_of_rmb_and_ppe_weigh_alike():
    """However many rows each has."""
    right, wrong = ([9], [2]), ([2], [9])
    for benchmark, big, small in (("rmb", "Helpfulness/Code", "Harmlessness/S1"), ("ppe", "math", "gpqa")):
        items = [item(f"{n}", subset=big) for n in range(6)] + [item("x", subset=small)]
        judged = scores(*zip(*([right] * 6 + [wrong]), strict=True))
        groups = strata_of(BENCHMARKS[benchmark].layout, items)
        assert numbers(groups, measure(groups, items, judged))[Name("strict", "overall")] == 0.5
    pooled = [item(f"{n}", subset="livebench-math" if n else "livecodebench") for n in range(7)]
    judged = scores(*zip(wrong, *([right] * 6), strict=True))
    groups = strata_of(BENCHMARKS["judgebench"].layout, pooled)
    assert numbers(groups, measure(groups, pooled, judged))[Name("strict", "overall")] == pytest.approx(6 / 7)


def test_rewardbench2_of_a_judge_of_pairs():
    """The chosen one must win against all three; it shares the first place where it ties."""
    four = Item("a", "Math", "math", PROMPT, ("c",), ("r",) * 3, "a", {})
    won = [[1, 1, 1], [1, 1, -1], [1, 0, 0]]  # against each: wins, a loss, two ties
    choices = np.array([[[[x, x], [x, x]] if x else [[1, 1], [-1, -1]] for x in row] for row in won], float)
    judged = Choices(choices[:, None], np.ones((3, 1, 3), bool))
    items = [replace(four, id=name, group=name) for name in "abc"]
    groups = strata_of(BENCHMARKS["rewardbench2"].layout, items)
    values = measure(groups, items, judged).values
    assert values == pytest.approx(np.array([[1, 1], [0, 0], [0, 1 / 3]]))


def test_numbers_of_a_part_are_not_put_beside_those_of_the_whole():
    judged = scores_of(np.full((2, 3, 1), 9.0), np.full((2, 3, 1), 2.0))
    items = [replace(item(name, subset=name), chosen=("c",) * 3, rejected=("r",) * 3) for name in ("chat", "code")]
    result = evaluation("rm-bench", items=items, judged=judged)
    assert result.missing_sections == ["Math", "Safety"]
    ours = next(line for line in markdown(result).splitlines() if line.startswith("| **m**"))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells[2:10] == ["", "100.0", "", "100.0", "", "", "", ""]  # Chat and Code alone
    assert "Overall is without Math, Safety" in markdown(result)


def test_the_summary_says_how_the_judge_was_asked():
    drawn = JudgingSection(1.0, 0, 1.0, 1024)
    text = markdown(evaluation("pairs", rubrics="primary", sampling=drawn))
    assert "Rubrics primary, temperature 1, top-p 1, at most 1,024" in text
    assert "No rubrics, temperature 1" in markdown(evaluation("pairs", "baseline", sampling=drawn))
    assert "temperature, top-p, top-k as the server has it" in markdown(evaluation("pairs"))  # nothing is set
    text = markdown(evaluation("pairs", "scalar"))
    assert "Numbers of a reward model (scalar)" in text and "temperature" not in text


# ---- Files ----------------------------------------------------------------------------------------------------------


def write(folder, result, judged):
    """With the answers that the scores would have come from."""
    asked = ask_about(result.items, POINTWISE, "adaptive")
    with open_answers(folder / "answers.jsonl", {"who": "me"}) as answers:
        for index, one in enumerate(asked):
            for side, said in zip(one.of_sides, (judged.chosen, judged.rejected), strict=True):
                for vote, score in enumerate(said[index, 0]):
                    status, read = ("BAD_TAGS", None) if math.isnan(score) else ("OK", float(score))
                    answers.add([Answer(side[0].key, vote, status, Kind.ANSWER, score=read, text=f"vote {vote}")])
    write_files(folder, result, asked, answers, judged)


def test_results_are_strict_json(tmp_path):
    judged = scores([[9], [5]], [[2], [nan]])  # a gap beyond the last bin, and a side that cannot be read
    result = evaluation("pairs", items=ITEMS[:2], judged=judged)
    write(tmp_path, result, judged)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for file in tmp_path.rglob("*.json*"):
        for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    written = json.loads((tmp_path / "results.json").read_text())
    (last,) = written["calibration"]
    assert (last["above"], last["up to"], last["pairs"], last["right"]) == (6.0, None, 1, 1.0)
    lines = [json.loads(line) for line in (tmp_path / "official" / "m_outputs.jsonl").read_text().splitlines()]
    assert [(line["results"], line["scores_chosen"], line["scores_rejected"]) for line in lines] == [
        (1.0, 9.0, 2.0), (0.0, 5.0, None),
    ]  # fmt: skip
    summary = json.loads((tmp_path / "official" / "m.json").read_text())
    assert (summary["accuracy"], summary["num_prompts"], summary["extra_results"]) == (0.5, 2, {"all": 0.5})


def test_every_judgement_is_written_with_its_place(tmp_path):
    judged = scores([[9, 8], [5, 4]], [[2, 3], [nan, 1]])
    write(tmp_path, evaluation("pairs", items=ITEMS[:2], judged=judged, votes=2), judged)
    rows = pyarrow.parquet.read_table(tmp_path / "judgements.parquet").to_pylist()
    assert [(row["item"], row["side"], row["chosen"], row["rejected"], row["vote"], row["score"]) for row in rows] == [
        ("a", "chosen", 0, None, 0, 9), ("a", "chosen", 0, None, 1, 8),
        ("a", "rejected", None, 0, 0, 2), ("a", "rejected", None, 0, 1, 3),
        ("b", "chosen", 0, None, 0, 5), ("b", "chosen", 0, None, 1, 4),
        ("b", "rejected", None, 0, 0, None), ("b", "rejected", None, 0, 1, 1),
    ]  # fmt: skip
    assert [row["status"] for row in rows] == ["OK"] * 6 + ["BAD_TAGS", "OK"]
    assert {(row["subset"], row["domain"]) for row in rows} == {("all", "chat")}
    assert [row["text"] for row in rows[:2]] == ["vote 0", "vote 1"]


def test_a_comparison_of_prompts_with_many_items(tmp_path):
    """Three items of one prompt and one of another: theirs are weighed as ours are; one subset has a single prompt."""
    items = [replace(item(f"{n}", subset="ab"[n == 3]), group="one" if n < 3 else "other") for n in range(5)]
    theirs_judged = scores([[9], [9], [9], [1], [1]], [[3]] * 5)
    theirs = evaluation("pairs", items=items, judged=theirs_judged)
    write(tmp_path, theirs, theirs_judged)
    ours = evaluation("pairs", items=items, judged=scores([[1], [9], [9], [9], [9]], [[3]] * 5))
    loaded = load_measured(tmp_path, ours.strata, items)
    assert (loaded.values.tolist(), loaded.size.tolist()) == (theirs.measured.values.tolist(), [3, 1, 1])
    found = compared(ours, loaded)
    assert found[Name("strict", "overall")].value == pytest.approx(4 / 5 - 3 / 5)


def test_the_difference_on_a_subset_of_one_has_no_interval(tmp_path):
    items = [item(f"{n}", subset="hep-go" if n else "hep-js") for n in range(20)]
    judged = scores([[n % 3] for n in range(20)], [[1]] * 20)
    one = evaluation("rewardbench", items=items, judged=judged)
    found = compared(one, one.measured)
    assert np.isnan(found[Name("strict", "subset hep-js")].interval).all()
    low, high = found[Name("strict", "overall")].interval
    assert low < 0 < high < 0.7


def test_judges_that_differ(tmp_path):
    """Ours minus theirs, whatever the order of the rows; p is never 0."""
    many = [item(f"{n}", chosen=f"c{n}") for n in range(40)]
    good, bad = [[9]] * 40, [[5] if n % 4 else [1] for n in range(40)]  # theirs is wrong in every fourth
    theirs = evaluation("pairs", items=many[::-1], judged=scores(bad[::-1], [[3]] * 40))
    write(tmp_path, theirs, scores(bad[::-1], [[3]] * 40))
    ours = evaluation("pairs", items=many, judged=scores(good, [[3]] * 40))
    loaded = load_measured(tmp_path, ours.strata, many)
    assert loaded.values[:, 0].tolist() == [float(n % 4 > 0) for n in range(40)]
    one = compared(ours, loaded)[Name("strict", "overall")]
    assert one.value == pytest.approx(0.25) and one.interval == pytest.approx((0.0986, 0.4120), abs=1e-4)
    assert 1 / 10_001 <= one.p_value < 0.01
    result = replace(ours, config=replace(ours.config, against="them"), against={Name("strict", "overall"): one} | {
        Name("half", "overall"): one})  # fmt: skip
    assert "| overall | tie = wrong | +25.0 |" in markdown(result)


def test_parts_that_the_data_do_not_hold_are_named():
    """LLMBar's Adversarial is a mean over four subsets; over three it is another number."""
    items = [item(f"{n}", subset=name) for n, name in enumerate(("Natural", "Neighbor", "GPTInst", "Manual") * 2)]
    result = evaluation("llmbar", items=items)
    assert result.missing_parts == {"Adversarial": ["GPTOut"]} and not result.missing_sections
    assert "- Adversarial is without GPTOut, which the data do not hold." in markdown(result)
    part = evaluation("rewardbench", items=[item(f"{n}", subset="math-prm") for n in range(3)])
    assert part.missing_parts == {"Reasoning": ["hep"]}
    assert part.missing_sections == ["Chat", "Chat Hard", "Safety"]


def test_how_intervals_are_made_is_said():
    text = markdown(evaluation("pairs", items=[item(f"{n}") for n in range(4)]))
    assert "Clopper and Pearson's on the effective number of comparisons" in text and "bootstrap" not in text
    ties = [Item(f"{k}/{n}", "Ties", "chat", PROMPT, ("c", "c"), ("r",), f"{n}", {}, k) for n in (1, 2) for k in KINDS]
    judged = scores_of(np.full((4, 2, 1), 9.0), np.full((4, 1, 1), 2.0))
    assert "its share of the uncertainty is resampled" in markdown(
        evaluation("rewardbench2", items=ties, judged=judged)
    )


KINDS = ("ref", "tied")
