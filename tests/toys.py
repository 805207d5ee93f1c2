"""Small stand-ins for the real things, made on the spot."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import yaml
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from patarm_jax.demo.tokenizer import CHAT_TEMPLATE, SPECIAL, THINKING
from patarm_jax.evaluate.outcomes import Scores

CORPUS = (
    "<task> <rubrics> <prompt> <response> <generate_rubrics> <eval> <answer> </answer> </eval> </generate_rubrics>",
    "system user assistant the response is correct, clear and complete; the score is a number from 0 to 10.",
    "Which of the two is the better answer? The first one, because it does what the user asked for.",
    "im_start im_end endoftext think |> <| </",
)


TINY = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rope_theta=10000.0, max_position_embeddings=256,
)  # fmt: skip

# A dozen little preferences whose texts the tiny tokenizer was not made for.
TOPICS = ("tea", "rain", "chess", "iron", "moss", "jazz", "salt", "maps", "owls", "silk", "mint", "clay")


def hf_model(seed: int = 0, family: str = "Qwen3", **changes):
    """A random transformers Qwen3 whose norms are not all ones and whose logits are not all alike; or a Qwen2."""
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    numbers = TINY | changes
    if family == "Qwen2":  # its heads share the width
        numbers = {name: value for name, value in numbers.items() if name != "head_dim"}
    config = getattr(transformers, f"{family}Config")(**numbers)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.2 * torch.randn_like(parameter)
            )
    return model


def tiny_tokenizer_folder(path: Path) -> Path:
    """Writes a byte-level BPE tokenizer of about 400 tokens with a ChatML template; returns the folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tiny_tokenizer(), encoding="utf-8")
    (path / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    vocab = tokenizers.Tokenizer.from_str(_tiny_tokenizer())
    ends = [vocab.token_to_id("<|im_end|>"), vocab.token_to_id("<|endoftext|>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    return path


@cache
def _tiny_tokenizer() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=395, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in THINKING])
    return tokenizer.to_str()


def tiny_model_folder(path: Path, **changes) -> Path:
    """The tiny tokenizer with the config of a tiny Qwen3, and no weights: for `model.weights: random`."""
    tiny_tokenizer_folder(path)
    config = {"model_type": "qwen3", **TINY, "vocab_size": 400, "tie_word_embeddings": True}
    config |= {"max_position_embeddings": 8192, **changes}  # a judge's prompt has hundreds of tokens
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def write_preferences(path: Path, count: int = len(TOPICS)) -> Path:
    """So many preferences, one JSON object per line."""
    rows = [
        {"id": f"pair-{i}", "prompt": f"Say something about {a}.", "chosen": f"I like {a}.", "rejected": f"I like {b}."}
        for i, (a, b) in enumerate(zip(TOPICS[:count], TOPICS[1:] + TOPICS[:1], strict=False))
    ]
    path.write_text("".join(json.dumps(row | {"domain": "chat"}) + "\n" for row in rows), encoding="utf-8")
    return path


def scores_of(chosen, rejected, has_chosen=None, has_rejected=None) -> Scores:
    """Scores [I, M, N] and [I, K, N], every answer of which came; all responses are there unless it is said."""
    sides = [np.asarray(side, float) for side in (chosen, rejected)]
    here = [
        np.ones(side.shape[:2], bool) if has is None else has
        for side, has in zip(sides, (has_chosen, has_rejected), strict=True)
    ]
    return Scores(*sides, *here, *(np.zeros(side.shape, bool) for side in sides))


def small_world(root: Path, count: int = len(TOPICS)) -> Path:
    """Writes a model's folder without weights, and preferences; returns the folder they stand in."""
    tiny_model_folder(root / "model")
    write_preferences(root / "pairs.jsonl", count)
    return root


def write_recipes(root: Path, *recipes: str, **run) -> dict:
    """Writes a config for runs in the small world, by the name of each recipe; returns it."""
    config = {
        "model": {"path": str(root / "model"), "weights": "random", "dtype": "float32"},
        "data": {"path": str(root / "pairs.jsonl"), "missing_judgements": "template"},
        "run": {"tensorboard": False, **run},
        "pairs_per_step": 8,
    }
    for recipe in recipes:
        (root / f"{recipe}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return config


def write_run(folder: Path, config: dict) -> None:
    """Writes a run's folder as far as `patarm report` looks at it."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"recipe": "sft"}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
