"""An exported folder is what transformers loads, and it is there whole or not at all."""

import jax
import numpy as np
import pytest
import transformers
from huggingface_hub import ModelCard

from patarm_jax.data.tokenizer import encode_chat, load_tokenizer
from patarm_jax.judge.prompts import pointwise
from patarm_jax.model import weights
from patarm_jax.model.config import Qwen3Config
from patarm_jax.model.qwen3 import init_params
from patarm_jax.recipes.export import ModelCardFacts, model_card, write_export
from patarm_jax.types import UserError
from tests.toys import tiny_tokenizer_folder

FACTS = ModelCardFacts("Qwen/Qwen3-8B", "grpo", "org/pairs", 12_345, 400, "PAR, graded margin, G 8", "primary")
CONFIG = Qwen3Config(
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
    assert config == Qwen3Config(**vars(CONFIG) | {"eos_token_id": tokenizer.stop_ids[0]})
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
    for code in card.text.split("```python\n")[1:]:
        compile(code.split("```")[0], "README.md", "exec")


@pytest.mark.parametrize(
    "name", ["data/pairs.jsonl", "/models/Qwen3-8B", "./runs/sft", "models", "a/b/c", "x/y.parquet"]
)
def test_what_is_no_hub_id_stays_out_of_the_front_matter(name):
    facts = ModelCardFacts(name, "sft", name, 1, 1, "", "adaptive")
    card = model_card(facts, "judge")
    assert not {"base_model", "datasets"} & card.data.to_dict().keys()
    assert f"| base model | `{name}` |" in card.text and "| reward |" not in card.text


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "judge").mkdir(parents=True)
    facts = ModelCardFacts("models/judge", "sft", "org/pairs", 1, 1, "", "adaptive")
    assert model_card(facts, "judge").data.to_dict().keys() & {"base_model", "datasets"} == {"datasets"}


def test_what_fails_halfway_leaves_nothing(tokenizer, params, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patarm_jax.recipes.export.save_tokenizer", full)
    with pytest.raises(UserError, match=r"cannot write .*/export: .*No space left on device.* GiB are free there"):
        write_export(tmp_path / "export", params, CONFIG, tokenizer, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_overwritten(tokenizer, params, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(UserError, match=r"exists and is not empty\. Give another folder"):
        write_export(tmp_path, params, CONFIG, tokenizer, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
