"""The benches run the real programs, count right, and refuse what cannot be measured. Their times are no test."""

import json

import jax
import numpy as np
import pytest

from patarm_jax.bench import quick
from patarm_jax.bench.case import open_bench
from patarm_jax.bench.shapes import SHAPES, layer_weights
from patarm_jax.bench.tasks import make_requests
from patarm_jax.cli import main
from patarm_jax.config.recipes import BenchConfig
from patarm_jax.model.transformer import abstract_params

SMALL = (
    "--rows 8 --length 24 --responses 16 --prompt 16 --group 2 --new 6 --question 8 --judgement 5 --repeats 1".split()
)


@pytest.mark.long
def test_every_task_runs_and_is_written_down(tmp_path, capsys):
    assert main(["bench", *SMALL, "--mean_new", "4", "--kl_coef", "0.1", "--json", str(tmp_path / "bench.json")]) == 0
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [
        row["task"] for row in written["results"]
    ] == "sft sample logprobs grpo policy attention decode load compile".split()
    assert written["config"]["kl_coef"] == 0.1 and written["devices"] == ["cpu"] * 8
    by_task = {row["task"]: row for row in written["results"]}
    assert set(by_task["grpo"]["phases_s"]) == {"sample", "logprobs", "update"}
    assert set(by_task["policy"]["phases_s"]) == {"sample", "judge", "logprobs", "update"}
    assert all(row["median_s"] > 0 and row["peak_bytes"] > 0 for row in written["results"])
    assert by_task["sft"]["flops"] > by_task["sft"]["flops_least"] > 0 and by_task["sample"]["bytes_least"] > 0
    printed = capsys.readouterr().out
    assert all(task in printed for task in by_task)


@pytest.mark.long
def test_quick_compares_every_pair_of_ways(tmp_path, capsys):
    """Sizes at which nothing is won: what is tested is that both ways run, and that a low ratio is told."""
    code = main(["bench", "--quick", *SMALL, "--json", str(tmp_path / "quick.json")])
    found = json.loads((tmp_path / "quick.json").read_text())["ratios"]
    assert len(found) == 8 and all(each["times_faster"] == each["plain"] / each["ours"] for each in found)
    assert code == (0 if all(each["times_faster"] >= each["floor"] for each in found) else 1)
    printed = capsys.readouterr().out
    assert all(each["name"] in printed for each in found)


def test_prompts_begin_alike_as_far_as_they_are_told_to(capsys):
    requests = make_requests(open_bench(BenchConfig(responses=8, prompt=16, alike=9)))
    first, *others = (request.tokens for request in requests)
    assert all((first[:9] == other[:9]).all() and (first[9:] != other[9:]).any() for other in others)
    assert main(["bench", "sample", "--prompt", "16", "--alike", "17"]) == 2
    assert "alike is 17; allowed is at most prompt, which is 16" in capsys.readouterr().err


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_counted_right(name):
    layers = jax.tree.leaves(abstract_params(SHAPES[name])["layers"])
    norms = 2 * SHAPES[name].hidden_size + 2 * SHAPES[name].head_dim
    everything = sum(int(np.prod(leaf.shape)) for leaf in layers)
    assert layer_weights(SHAPES[name]) == everything - norms * SHAPES[name].num_hidden_layers


def test_the_published_shapes_have_the_published_sizes():
    for name, billions in {"0.6b": 0.6, "1.7b": 1.7, "4b": 4.0, "8b": 8.2, "14b": 14.8}.items():
        size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(SHAPES[name])))
        assert round(size / 1e9, 1) == billions


@pytest.mark.parametrize("case", [quick.attention_case, quick.head_case])
def test_the_plain_way_and_ours_give_the_same(case):
    plain, ours = case(open_bench(BenchConfig(rows=8, length=40)))
    for one, other in zip(jax.tree.leaves(plain()), jax.tree.leaves(ours()), strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["load", *SMALL, "--json", "/dev/null/bench.json"], 1, "/dev/null is a file. Name a place inside a folder"),
        (["speed"], 2, "there is no task speed. The tasks are sft, sample"),
        (["sft", "--responses", "0"], 2, "responses is 0; allowed is 1 or more"),
        (["sft", "--rows", "9"], 2, "rows 9 gives 9 rows, which micro_batches 1 × 8 devices"),
        (["sft", "--modle", "tiny"], 2, "--model"),
        (["--quick", "sft"], 2, "unknown arguments sft"),
    ],
)
def test_mistakes_are_told(arguments, code, said, capsys):
    assert main(["bench", *arguments]) == code
    assert said in capsys.readouterr().err
