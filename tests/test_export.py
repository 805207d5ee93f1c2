"""An exported folder is what transformers loads, and it is there whole or not at all."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from huggingface_hub import ModelCard

from patarm_jax.data.tokenizer import encode_chat, load_tokenizer
from patarm_jax.judge.prompts import pointwise
from patarm_jax.model import weights
from patarm_jax.model.architecture import Architecture
from patarm_jax.model.generation import Drawing
from patarm_jax.model.transformer import init_params
from patarm_jax.run.card import ModelCardFacts, model_card
from patarm_jax.run.export import write_export
from patarm_jax.types import UserError
from tests.toys import tiny_tokenizer_folder

STAGE = "reinforcement learning (GRPO) on preference pairs"
FACTS = ModelCardFacts("Qwen/Qwen3-8B", "grpo", STAGE, "org/pairs", 12_345, 400, "PAR, graded margin, G 8", "primary")
CONFIG = Architecture(
    vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 5, init_params(CONFIG, jax.random.key(0)))


def test_transformers_loads_an_export_as_it_is(tokenizer, params, tmp_path):
    folder = tmp_path / "runs" / "export"
    write_export(folder, params, CONFIG, tokenizer, FACTS, dtype="float32")
    assert [path.name for path in folder.parent.iterdir()] == ["export"]

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = pointwise("What is 2 + 2?", "4", "math", "primary")
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=True)["input_ids"]
    assert ids == encode_chat(load_tokenizer(folder), messages) == encode_chat(tokenizer, messages)
    assert (folder / "chat_template.jinja").read_text() == tokenizer.fast.chat_template

    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    again, config = weights.load(folder)
    assert config == Architecture(**vars(CONFIG) | {"eos_token_id": tokenizer.stop_ids[0]})
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert torch.equal(model.model.embed_tokens.weight, torch.tensor(np.asarray(params["embed_tokens"])))
    assert model.generation_config.eos_token_id == list(tokenizer.stop_ids)
    assert model.generation_config.pad_token_id == tokenizer.pad_id
    assert model.config.eos_token_id == tokenizer.stop_ids[0]


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e30])
def test_ruined_weights_are_not_exported(tokenizer, params, tmp_path, value):
    ruined = params | {"norm": params["norm"].at[1].set(value)}
    with pytest.raises(UserError, match=r"nothing is exported: the weights norm hold numbers that are not finite or"):
        write_export(tmp_path / "judge", ruined, CONFIG, tokenizer, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_an_export_says_where_it_comes_from(tokenizer, params, tmp_path):
    write_export(tmp_path / "judge", params, CONFIG, tokenizer, FACTS)
    card = ModelCard.load(tmp_path / "judge" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "Qwen/Qwen3-8B",
        "datasets": "org/pairs",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reward-model", "generative-reward-model", "judge", "patarm", "grpo"],
    }
    assert card.text.strip().startswith("# judge\n")
    for row in (
        "| training data | `org/pairs`, 12,345 preference pairs |",
        "| optimiser updates | 400 |",
        "| reward | PAR, graded margin, G 8 |",
        "| rubrics | primary |",
    ):
        assert f"\n{row}\n" in card.text
    assert "patarm judge judge --input pairs.jsonl" in card.text
    assert "| sampling | temperature 1, top_k 0, top_p 1; generation_config.json says so" in card.text
    assert "held-out" not in card.text
    for code in card.text.split("```python\n")[1:]:
        compile(code.split("```")[0], "README.md", "exec")


def test_the_card_of_a_runs_export_has_the_runs_name(tokenizer, params, tmp_path):
    write_export(tmp_path / "judge-8b" / "export", params, CONFIG, tokenizer, FACTS)
    text = ModelCard.load(tmp_path / "judge-8b" / "export" / "README.md").text
    assert text.strip().startswith("# judge-8b\n") and "export" not in text
    assert 'LLM("judge-8b")' in text and "patarm judge judge-8b --input" in text
    assert "`judge-8b` stands for this folder" in text


def test_a_card_names_the_settings_behind_its_numbers(tokenizer, params, tmp_path):
    names = ("accuracy_strict", "accuracy_half", "accuracy_low", "accuracy_high", "valid")
    measured = {f"eval/{name}": value for name, value in zip(names, (0.968, 0.979, 0.964, 0.99, 1.0), strict=True)}
    facts = replace(FACTS, drawing=Drawing(0.6, 20, 0.95), measured_on="`held.jsonl`, greedy", measured=measured)
    text = model_card(facts, "judge").text
    for row in (
        "| sampling | temperature 0.6, top_k 20, top_p 0.95; generation_config.json says so to whoever serves it |",
        "| held-out accuracy | 96.8 % with a tie as wrong, 97.9 % with a tie as ½ (95 % interval 96.4 to 99.0); "
        "100.0 % of the judgements could be read |",
        "| measured on | `held.jsonl`, greedy |",
    ):
        assert f"\n{row}\n" in text
    write_export(tmp_path / "judge", params, CONFIG, tokenizer, facts)
    generation = json.loads((tmp_path / "judge" / "generation_config.json").read_text())
    assert [generation[name] for name in ("do_sample", "temperature", "top_k", "top_p")] == [True, 0.6, 20, 0.95]


@pytest.mark.parametrize(
    "facts",
    [pytest.param(FACTS, marks=pytest.mark.long), replace(FACTS, drawing=Drawing(0.0))],
    ids=["sampled", "greedy"],
)
def test_the_cards_code_runs_as_it_is_printed(tokenizer, params, tmp_path, facts):
    """Where the export lies under its name, with transformers and torch and nothing that the card does not name."""
    pytest.importorskip("torch", reason="transformers' models need torch")
    export = tmp_path / "runs" / "judge-8b" / "export"
    write_export(export, params, CONFIG, tokenizer, facts)
    export.rename(tmp_path / "judge-8b")
    text = (tmp_path / "judge-8b" / "README.md").read_text()
    *_, code = (part.split("```")[0] for part in text.split("```python\n"))  # with vLLM, then with transformers
    blocked = "import sys\nsys.modules.update(accelerate=None, vllm=None, jax=None)\n"
    ran = subprocess.run(
        [sys.executable, "-c", blocked + code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "None\n"  # random weights write nothing that can be read


@pytest.mark.parametrize(
    "name", ["data/pairs.jsonl", "/models/Qwen3-8B", "./runs/sft", "models", "a/b/c", "x/y.parquet"]
)
def test_what_is_no_hub_id_stays_out_of_the_front_matter(name):
    facts = ModelCardFacts(name, "sft", "fine-tuning", name, 1, 1, "", "adaptive")
    card = model_card(facts, "judge")
    assert not {"base_model", "datasets"} & card.data.to_dict().keys()
    assert f"| base model | `{name}` |" in card.text and "| reward |" not in card.text


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "judge").mkdir(parents=True)
    facts = ModelCardFacts("models/judge", "sft", "fine-tuning", "org/pairs", 1, 1, "", "adaptive")
    assert model_card(facts, "judge").data.to_dict().keys() & {"base_model", "datasets"} == {"datasets"}


def test_what_fails_halfway_leaves_nothing(tokenizer, params, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patarm_jax.run.export.save_tokenizer", full)
    with pytest.raises(UserError, match=r"cannot write .*/export: .*No space left on device.* GiB are free there"):
        write_export(tmp_path / "export", params, CONFIG, tokenizer, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_overwritten(tokenizer, params, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(UserError, match=r"exists and is not empty\. Give another folder"):
        write_export(tmp_path, params, CONFIG, tokenizer, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
