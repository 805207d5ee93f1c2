"""The real preference file and the real Qwen3 tokenizer, through every verb, with a small random Qwen3."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pyarrow.parquet
import pytest
import yaml

from patarm_jax.model import weights
from patarm_jax.model.architecture import read_architecture
from patarm_jax.model.transformer import init_params

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folder(real_inputs, tmp_path_factory):
    """Qwen3's own files around a small network; the preferences, a dozen multi-turn ones first."""
    root = tmp_path_factory.mktemp("real")
    shutil.copytree(real_inputs / "qwen3_tokenizer", root / "model")
    (root / "model" / "Qwen3.generation_config.json").rename(root / "model" / "generation_config.json")
    published = root / "model" / "Qwen3-4B.config.json"
    (root / "model" / "config.json").write_text(json.dumps(json.loads(published.read_text()) | SMALL))
    published.unlink()
    rows = (real_inputs / "preferences.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    long = [row for row in rows if len(json.loads(row)["prompt"]) > 1]
    (root / "multi_turn.jsonl").write_text("".join(long[:20]), encoding="utf-8")
    return root


def patarm(*arguments, flags="", code=0):
    """What a patarm, with one CPU device unless said otherwise, says; it must end with this exit code."""
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "patarm_jax", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stderr + done.stdout


def write_config(folder, name, **sections):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"run": {"folder": str(folder / name), "steps": 2, "show_every": 1}, **sections}))
    return str(path)


@pytest.mark.long
def test_every_verb_on_real_input(folder, real_inputs):
    pairs = str(real_inputs / "preferences.jsonl")
    data = {"path": pairs, "domain": "chat", "max_prompt_tokens": 400}
    model = {"dtype": "float32", "remat": "none"}
    sft = write_config(
        folder,
        "sft",
        model={**model, "path": str(folder / "model"), "weights": "random"},
        data={**data, "missing_judgements": "template"},
        optimizer={"learning_rate": 1e-3},
        pairs_per_step=2,
    )
    assert "kept 1,600 of 1,601; dropped 1 × empty response" in patarm("sft", sft)
    first, last = (json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines())
    assert last["loss"] < first["loss"]

    grpo = write_config(
        folder,
        "grpo",
        model={**model, "path": str(folder / "sft")},
        data={"path": str(folder / "multi_turn.jsonl"), "domain": "chat", "max_prompt_tokens": 768},
        sampling={"max_new_tokens": 8},
        update={"kl": {"coef": 0.1}},
        pairs_per_step=2,
        group_size=2,
    )
    assert "raise sampling.max_new_tokens, which is 8" in patarm("grpo", grpo, code=1)  # two steps teach no form
    table = pyarrow.parquet.read_table(folder / "grpo" / "rollouts" / "step_000002.parquet").to_pylist()
    assert len(table) == 2 * 2 * 2 and all(row["pair_id"].startswith("lf_dpo_en_demo") for row in table)

    scores = folder / "scores.jsonl"
    judge = ["judge", str(folder / "grpo"), "--input", str(folder / "multi_turn.jsonl"), "--output", str(scores)]
    judge += ["--votes", "2", "--data.domain", "chat", "--sampling.max_new_tokens", "8", "--model.dtype", "float32"]
    patarm(*judge, "--data.max_prompt_tokens", "768", "--sampling.rows", "8")
    assert len(scores.read_text().splitlines()) > 4

    patarm("export", folder / "grpo", folder / "judge")
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "judge")
    assert exported.generation_config.eos_token_id == [151645, 151643]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "judge")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.long
def test_the_styles_of_an_rm_bench_prompt_are_read_together(folder, real_inputs, tmp_path):
    """The six responses to a prompt are asked about with the same rubrics and prompt before them."""
    arch = read_architecture(folder / "model")
    weights.save(init_params(arch, jax.random.key(0)), arch, tmp_path / "weights")
    model = shutil.copytree(folder / "model", tmp_path / "model")
    for file in (tmp_path / "weights").glob("*.safetensors"):
        file.rename(model / file.name)
    more = ["--limit", "12", "--sampling.max_new_tokens", "1", "--sampling.rows", "16"]
    said = patarm(
        "eval", "rm-bench", "--model", model, "--data", real_inputs / "rm_bench", "--output", tmp_path / "out", *more
    )
    read, whole = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) of ([\d,]+) prompt tokens were read", said).groups()
    )
    assert read < 0.65 * whole


@pytest.mark.long
@pytest.mark.parametrize(("name", "devices"), [("sft", 8), ("grpo", 16), ("lora_grpo", 1)])
def test_the_8b_config_compiles_on_its_mesh(folder, real_inputs, name, devices):
    """`--dry-run` compiles every program of a run at full size, for as many devices as the config asks for."""
    eight = folder / "Qwen3-8B"
    if not eight.exists():
        shutil.copytree(folder / "model", eight)
        published = json.loads((real_inputs / "qwen3_tokenizer" / "Qwen3-4B.config.json").read_text())
        sizes = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
        (eight / "config.json").write_text(json.dumps(published | sizes))
    recipe = name.removeprefix("lora_")
    config = Path(__file__).parents[1] / "configs" / f"qwen3_8b_{name}.yaml"
    settings = ["--model.path", eight, "--data.path", real_inputs / "preferences.jsonl", "--data.domain", "chat"]
    settings += ["--data.missing_judgements", "template", "--dry-run"]
    said = patarm(recipe, config, *settings, flags=f"--xla_force_host_platform_device_count={devices}")
    programs = {"sft": ["update"], "grpo": ["prefill", "decode", "update", "reference log-probs"]}[recipe]
    for program in programs:
        assert re.search(rf"^{program}: arrays .* per device \d+\.\d+ GiB of arguments and \d+\.\d+ GiB", said, re.M)
