"""Programs compiled for cards that are not here, by the real command in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from patarm_jax.bench.shapes import SHAPES, layer_weights, step_flops

ROOT = Path(__file__).parents[1]
HAS_PLUGIN = importlib.util.find_spec("jax_plugins") is not None and (
    importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
)
needs_plugin = pytest.mark.skipif(not HAS_PLUGIN, reason="the extra `ahead` is not installed: nobody compiles for CUDA")
ARCH = SHAPES["tiny"]


def computed(tokens, reads, predicted):
    """Of our kernels both that go backward compute the scores and their gradient: two matmuls more than it takes."""
    twice = 4 * ARCH.num_hidden_layers * ARCH.num_attention_heads * ARCH.head_dim * reads
    return pytest.approx(step_flops(ARCH, tokens, reads, predicted, "full") + twice, rel=0.001)


def bench(*arguments):
    command = [sys.executable, "-m", "patarm_jax", "bench", *map(str, arguments)]
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def ahead(tmp_path, card, *arguments):
    written = tmp_path / f"{card}.json"
    ran = bench(*arguments, "--compiled-for", card, "--dtype", "bfloat16", "--json", written)
    assert ran.returncode == 0, ran.stderr
    return {row["program"]: row for row in json.loads(written.read_text())["results"]}, ran.stdout


@needs_plugin
@pytest.mark.parametrize("card", ["h100", "a100"])
def test_training_computes_what_it_must_on_a_card(card, tmp_path):
    """The compiled step has no more matmuls than an analysis of it: XLA recomputes nothing on its own."""
    rows, length, prompts, width, group, new = 2, 512, 2, 128, 4, 64
    shape = (
        f"--rows {rows} --length {length} --responses {prompts} --prompt {width} --group {group} --new {new}".split()
    )
    found, printed = ahead(tmp_path, card, "sft", "grpo", *shape)
    reads = rows * length * (length + 1) // 2
    # The last chunk of the head is filled up.
    assert found["sft update"]["flops"] == computed(rows * length, reads, rows * length)
    written = prompts * group * new
    reads = prompts * width * (width + 1) // 2 + written * width + prompts * group * new * (new + 1) // 2
    assert found["policy update"]["flops"] == computed(prompts * width + written, reads, written)
    for row in found.values():
        assert row["flops_least"] < row["flops"] and row["peak_bytes"] > row["temp_bytes"] > 0
        assert row["tokens_per_s"] == row["tokens"] / row["seconds"]
    assert "compiled for 1 × NVIDIA" in printed and "times are estimates" in printed


@needs_plugin
@pytest.mark.parametrize("card", ["h100", "a100"])
def test_decoding_reads_what_is_written(card, tmp_path):
    """Twice as much written is that much more read; another limit is not."""
    shape = "--responses 8 --group 2 --prompt 128".split()
    item, rows, of_key = 2, 16, 2 * ARCH.num_hidden_layers * ARCH.num_key_value_heads * ARCH.head_dim * 2

    def decode(new, filled):
        found, _ = ahead(tmp_path / f"{new}-{filled}", card, "sample", *shape, "--new", new, "--filled", filled)
        return found["decode"]

    (tmp_path / "1024-0.25").mkdir(), (tmp_path / "1024-0.5").mkdir(), (tmp_path / "2048-0.125").mkdir()
    quarter, half, wide = decode(1024, 0.25), decode(1024, 0.5), decode(2048, 0.125)
    assert half["bytes_least"] - quarter["bytes_least"] == rows * 256 * of_key
    assert half["bytes_read"] - quarter["bytes_read"] == rows * 256 * of_key
    assert wide["bytes_least"] == quarter["bytes_least"]
    # Tables of pages and what was written grow with the limit, by a few bytes a row.
    assert wide["bytes_read"] == pytest.approx(quarter["bytes_read"], rel=0.02)
    matrices = (layer_weights(ARCH) + ARCH.vocab_size * ARCH.hidden_size) * item
    assert quarter["bytes_least"] == matrices + (8 * 128 + rows * 256) * of_key
    assert quarter["bytes_read"] > quarter["bytes_least"]
    assert 5 < quarter["kernels_per_layer"] < 40


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--compiled-for", "b300"], 1, "--compiled-for b300: programs can be compiled for h100 and a100"),
        (["--compiled-for", "h100", "--attention", "cudnn"], 2, "Leave attention at auto: ours stand for them"),
        (["load", "--compiled-for", "h100"], 2, "task load is not compiled ahead. Those that are: sft, sample, grpo"),
    ],
)
def test_mistakes_are_told(arguments, code, said):
    ran = bench(*arguments)
    assert (ran.returncode, said in ran.stderr) == (code, True), ran.stderr


@needs_plugin
@pytest.mark.long
@pytest.mark.parametrize(
    "shape",
    [
        "--model 4b --responses 16 --group 4 --prompt 2048 --new 4096",
        "--model 4b --responses 64 --group 1 --prompt 2048 --new 4096",
        "--model 8b --responses 400 --group 1 --prompt 128 --new 1024",
    ],
)
def test_real_networks_read_little_more_than_the_least(shape, tmp_path):
    decode = ahead(tmp_path, "h100", "sample", *shape.split(), "--filled", 0.25)[0]["decode"]
    assert decode["bytes_least"] <= decode["bytes_read"] <= 1.25 * decode["bytes_least"]


@needs_plugin
def test_a_batch_that_cards_cannot_share_is_told(tmp_path):
    ran = bench("sft", "--compiled-for", "a100", "--rows", "3", "--mesh.fsdp", "2")
    assert ran.returncode == 2 and "rows 3 gives 3 rows, which micro_batches 1 × 2 devices" in ran.stderr


@pytest.mark.skipif(HAS_PLUGIN, reason="the plugin is here")
def test_without_a_compiler_it_is_said_how_one_is_had():
    ran = bench("sft", "--compiled-for", "h100")
    assert ran.returncode == 1
    assert "nothing here compiles for a NVIDIA H100" in ran.stderr and "pip install jax-cuda12-plugin==" in ran.stderr
    assert "Traceback" not in ran.stderr
