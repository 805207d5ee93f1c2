"""Benchmarks in their official forms: what is read, what is refused, and what a limit takes."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from patarm_jax.config.sections import DataSection
from patarm_jax.evaluate.catalogue import BENCHMARKS, read_benchmark
from patarm_jax.evaluate.items import limited
from patarm_jax.evaluate.scoring import strata_of
from patarm_jax.types import UserError

# One row of each official format, in which the good response is the right one.
from tests.benchmark_rows import ROWS, SUBSETS, write_rows
from tests.chat_server import BAD, GOOD


@pytest.mark.parametrize("benchmark", ROWS)
def test_the_official_form_is_read(benchmark, tmp_path):
    section = write_rows(tmp_path / "Natural.jsonl", ROWS[benchmark])
    (item,), _ = read_benchmark(benchmark, section)
    assert set(item.chosen) == {GOOD} and set(item.rejected) == {BAD}
    assert (item.subset, item.domain) == SUBSETS[benchmark]
    assert [dict(turn) for turn in item.prompt] == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("benchmark", [name for name in ROWS if name != "pairs"])
def test_a_row_of_another_form_is_named(benchmark, tmp_path):
    """Row and field, and what it looks like instead."""
    other = "llmbar" if benchmark != "llmbar" else "rewardbench"
    section = write_rows(tmp_path / "Natural.jsonl", ROWS[benchmark], ROWS[other])
    with pytest.raises(UserError, match=rf"Natural.jsonl:2 is no row of {benchmark}: .*It looks like .*{other}"):
        read_benchmark(benchmark, section)


@pytest.mark.parametrize(
    ("benchmark", "change", "words"),
    [
        ("rewardbench", {"subset": "mine"}, ":1: subset is 'mine'; allowed is one of alpacaeval-easy"),
        ("rewardbench", {"chosen": 3}, "Expected `str`, got `int`, in chosen"),
        ("rewardbench2", {"chosen": []}, "chosen is no response"),
        ("rewardbench2", {"chosen": [GOOD] * 2}, "2 responses; allowed is one, save in the subset Ties"),
        ("rewardbench2", {"subset": "Ties"}, "id is '3'; allowed is ref:NUMBER or tied:NUMBER"),
        ("rewardbench2", {"subset": "Ties", "id": "ref:3"}, "Ties 3 has no tied"),
        ("rewardbench2", {"subset": "Ties", "id": "tied:3", "chosen": [GOOD] * 2}, "Ties 3 has no ref"),
        ("rm-bench", {"rejected": [BAD]}, "rejected is 1 responses; allowed is three"),
        ("rm-bench", {"domain": "cooking"}, "'cooking'; allowed is one of chat"),
        ("judgebench", {"label": "A=B"}, "label is 'A=B'; allowed is A>B or B>A"),
        ("llmbar", {"label": 0}, "label is 0; allowed is 1 or 2"),
        ("rmb", {"category_path": "x/y"}, "category_path is 'x/y'"),
        ("rewardbench", {"prompt": "\ud83d"}, "half a character"),
    ],
)
def test_a_wrong_value_is_named(benchmark, change, words, tmp_path):
    section = write_rows(tmp_path / "Natural.jsonl", ROWS[benchmark] | change)
    with pytest.raises(UserError) as error:
        read_benchmark(benchmark, section)
    assert words in str(error.value)


def test_conflict_pairs_of_ppe_belong_to_their_question(tmp_path):
    row = {"question_id": 5, "prompt": "Hi", "scores": [False, True, True, False]}
    row |= {"sampled_conflict_pairs": [[0, 1], [2, 3]], **{f"response_{n}": f"text {n}" for n in range(1, 5)}}
    items, _ = read_benchmark("ppe", write_rows(tmp_path / "PPE-MMLU-Pro-Best-of-K.jsonl", row))
    assert [(one.chosen, one.rejected) for one in items] == [(("text 2",), ("text 1",)), (("text 3",), ("text 4",))]
    assert len({one.group for one in items}) == 1 and {one.subset for one in items} == {"mmlu_pro"}


def test_pairs_of_one_prompt_are_one_unit(tmp_path):
    """Of RMB and of files of pairs too, where a prompt has many."""
    rows = [ROWS["rmb"] | {"pair_uid": n, "chosen": {"answer": f"{GOOD} {n}"}} for n in range(3)]
    other = [{"role": "user", "content": "Ho"}]
    items, _ = read_benchmark("rmb", write_rows(tmp_path / "x.jsonl", *rows, rows[0] | {"conversation_input": other}))
    assert strata_of(BENCHMARKS["rmb"].layout, items).units == ((0, 1, 2), (3,))
    pairs = [ROWS["pairs"] | {"chosen": f"{GOOD} {n}"} for n in range(3)]
    items, _ = read_benchmark("pairs", write_rows(tmp_path / "y.jsonl", *pairs, ROWS["pairs"] | {"prompt": "Ho"}))
    assert strata_of(BENCHMARKS["pairs"].layout, items).units == ((0, 1, 2), (3,))
    assert len(limited(items, 1)) == 3  # a prompt comes whole


def test_votes_for_neither_are_left_out(tmp_path):
    rows = [ROWS["ppe"], ROWS["ppe"] | {"winner": "tie (bothbad)"}]
    items, report = read_benchmark("ppe", write_rows(tmp_path / "x.jsonl", *rows))
    assert len(items) == 1 and "1 rows prefer neither" in report


def test_a_domain_may_be_chosen_by_subset(tmp_path):
    path = str(tmp_path / "Natural.jsonl")
    write_rows(Path(path), ROWS["llmbar"])
    section = DataSection(path=path, split="", source_domains={"Natural": "instruction_following"})
    assert read_benchmark("llmbar", section)[0][0].domain == "instruction_following"
    with pytest.raises(UserError, match="Natural is 'poetry'"):
        read_benchmark("llmbar", DataSection(path=path, split="", source_domains={"Natural": "poetry"}))


def test_settings_without_effect_are_refused(tmp_path):
    path = tmp_path / "Natural.jsonl"
    write_rows(path, ROWS["llmbar"])
    for given, words in (
        ({"source_domains": {"natural": "math"}}, "source_domains names natural, which is no subset here. Use Natural"),
        ({"domain": "math"}, "data.domain is given, and llmbar has its own format"),
        ({"drop_sources": ("Natural",)}, "data.drop_sources is given"),
        ({"columns": {"chosen": ("output_1",)}}, "data.columns is given"),
    ):
        with pytest.raises(UserError, match=words):
            read_benchmark("llmbar", DataSection(path=str(path), split="", **given))


def test_pairs_are_read_as_training_reads_them(tmp_path):
    """Domains by source, columns of other names, sources left out."""
    rows = [{"q": "Hi", "chosen": GOOD, "rejected": BAD, "source": source} for source in ("x", "y", "z")]
    write_rows(tmp_path / "pairs.jsonl", *rows)
    section = DataSection(
        path=str(tmp_path / "pairs.jsonl"), columns={"prompt": ("q",)}, domain="chat", drop_sources=("z",),
        source_domains={"x": "Instruction-Following"},
    )  # fmt: skip
    items, _ = read_benchmark("pairs", section)
    assert [(one.subset, one.domain) for one in items] == [("x", "instruction_following"), ("y", "chat")]


@pytest.mark.parametrize(
    ("name", "subset"),
    [
        ("PPE-GPQA-Best-of-K.jsonl", "gpqa"),
        ("PPE-MMLU-Pro-Best-of-K/data/train-00000.jsonl", "mmlu_pro"),
        ("mbpp_plus_best_of_k.jsonl", "mbpp_plus"),
        ("mathias/ifeval.jsonl", "ifeval"),
    ],
)
def test_the_subset_of_ppe_stands_in_a_name(name, subset, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    row = {"question_id": 1, "prompt": "Hi", "scores": [True, False], "sampled_conflict_pairs": [[1, 0]],
           "response_1": GOOD, "response_2": BAD}  # fmt: skip
    (one,), _ = read_benchmark("ppe", write_rows(tmp_path / name, row))
    assert one.subset == subset and one.chosen == (GOOD,)


def test_of_a_repository_only_the_benchmark_is_read(tmp_path):
    """RM-Bench's folder holds all rows twice; LLMBar's other folders hold other things."""
    for name in ("chat_filtered.json", "total_dataset.json"):
        (tmp_path / name).write_text(json.dumps([ROWS["rm-bench"] | {"domain": "chat"}]))
    assert len(read_benchmark("rm-bench", DataSection(path=str(tmp_path), split=""))[0]) == 1
    (tmp_path / "chat_filtered.json").unlink()
    assert len(read_benchmark("rm-bench", DataSection(path=str(tmp_path), split=""))[0]) == 1
    for folder in ("Dataset/LLMBar/Adversarial/GPTOut", "Dataset/CaseStudy/Base_9"):
        (tmp_path / "repo" / folder).mkdir(parents=True)
        (tmp_path / "repo" / folder / "dataset.json").write_text(json.dumps([ROWS["llmbar"]]))
    items, _ = read_benchmark("llmbar", DataSection(path=str(tmp_path / "repo"), split=""))
    assert [one.subset for one in items] == ["GPTOut"]


@pytest.mark.parametrize(
    ("benchmark", "files", "read"),
    [
        ("rewardbench", ["data/filtered-00000-of-00001.jsonl", "data/raw-00000-of-00001.jsonl"], 1),
        ("judgebench", ["data/claude-00000-of-00001.jsonl", "data/gpt-00000-of-00001.jsonl"], 1),
        ("judgebench", ["data/x,response_model=claude-3-5.jsonl", "data/x,response_model=gpt-4o.jsonl"], 1),
        ("judgebench", ["data/x,response_model=gpt-4o.jsonl", "outputs/x,response_model=gpt-4o,judge=y.jsonl"], 1),
        (
            "ppe",
            ["PPE-Human-V1/data/test-00000-of-00001.jsonl", "PPE-MBPP-Plus-Best-of-K/data/train-00000-of-00001.jsonl"],
            2,
        ),
    ],
)
def test_of_a_copied_repository_the_official_split_is_read(benchmark, files, read, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(tmp_path / name, ROWS[benchmark])
    items, said = read_benchmark(benchmark, DataSection(path=str(tmp_path), split=""))
    assert len(items) == read and ("not read: " in said) == (read < len(files))


@pytest.mark.parametrize(
    ("benchmark", "path", "wanted"),
    [
        ("rewardbench", "", ("allenai/reward-bench", "filtered")),
        ("judgebench", "", ("ScalerLab/JudgeBench", "gpt")),
        ("ppe", "", ("lmarena-ai/PPE-Human-Preference-V1", "test")),
        ("ppe", "lmarena-ai/PPE-MATH-Best-of-K", ("lmarena-ai/PPE-MATH-Best-of-K", "train")),
    ],
)
def test_the_hub_is_asked_for_the_official_split(benchmark, path, wanted, monkeypatch):
    """No network here: what datasets is asked for is seen, and given from a list."""
    asked = []
    row = ROWS[benchmark]
    if path:
        row = {"question_id": 1, "prompt": "Hi", "scores": [True, False], "sampled_conflict_pairs": [[1, 0]],
               "response_1": GOOD, "response_2": BAD}  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or [row])
    assert len(read_benchmark(benchmark, DataSection(path=path, split=""))[0]) == 1
    assert asked == [wanted]


def test_ids_are_unique_whatever_they_look_like(tmp_path):
    rows = [ROWS["judgebench"] | {"pair_id": name} for name in ("a", "a#2", "a", "a")]
    items, _ = read_benchmark("judgebench", write_rows(tmp_path / "x.jsonl", *rows))
    assert len({one.id for one in items}) == 4


def test_the_real_files_are_read(real_inputs):
    llmbar, _ = read_benchmark("llmbar", DataSection(path=str(real_inputs / "llmbar"), split=""))
    counts = {"Neighbor": 134, "Natural": 100, "GPTInst": 92, "GPTOut": 47, "Manual": 46}
    assert Counter(one.subset for one in llmbar) == counts  # RewardBench's own
    rm_bench, _ = read_benchmark("rm-bench", DataSection(path=str(real_inputs / "rm_bench"), split=""))
    counts = {"safety-refuse": 284, "code": 228, "safety-response": 157, "chat": 129}
    assert Counter(one.subset for one in rm_bench) == counts
    assert len({one.id for one in rm_bench}) == 798


def test_a_limit_takes_any_rows_and_not_the_first(tmp_path):
    rows = [ROWS["rewardbench"] | {"id": n, "prompt": f"Topic {n}"} for n in range(100)]
    items, _ = read_benchmark("rewardbench", write_rows(tmp_path / "x.jsonl", *rows))
    taken = [int(one.id.split("/")[1]) for one in limited(items, 20)]
    assert taken == sorted(taken) and taken[-1] > 60 and len(set(taken)) == 20


def test_rubrics_of_rmb(tmp_path):
    """By scenario; chat where a scenario is not named, safety for harmlessness."""
    paths = ("Helpfulness/Reasoning/x", "Helpfulness/Cooking/x", "Harmlessness/S3/x", "Helpfulness/Code/x")
    rows = [ROWS["rmb"] | {"category_path": f"Pairwise_set/{path}"} for path in paths]
    items, _ = read_benchmark("rmb", write_rows(tmp_path / "x.jsonl", *rows))
    assert [one.domain for one in items] == ["math", "chat", "safety", "code"]


def test_a_limit_takes_from_every_subset_and_a_larger_one_takes_the_same_and_more(real_inputs):
    items, _ = read_benchmark("llmbar", DataSection(path=str(real_inputs / "llmbar"), split=""))
    few, more = limited(items, 20), limited(items, 50)
    assert len(few) == 20 and {one.id for one in few} < {one.id for one in more}
    assert set(Counter(one.subset for one in few).values()) == {4}
    assert [one.id for one in few] == [one.id for one in items if one in few]
    assert limited(items, 0) == limited(items, 10_000) == items
