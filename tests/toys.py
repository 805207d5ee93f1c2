"""Small stand-ins for the real things, made on the spot."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINKING = ("<think>", "</think>")

# ChatML as Qwen3 writes it, with the branch that matters: without thinking, the template closes it at once.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CORPUS = (
    "<task> <rubrics> <prompt> <response> <generate_rubrics> <eval> <answer> </answer> </eval> </generate_rubrics>",
    "system user assistant the response is correct, clear and complete; the score is a number from 0 to 10.",
    "Which of the two is the better answer? The first one, because it does what the user asked for.",
    "im_start im_end endoftext think |> <| </",
)


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
