"""What the demo begins with: a small tokenizer made from its own texts, and a Qwen3 that knows nothing yet.

Both are written as a Hugging Face folder that is read like any other.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from patarm_jax.data.preferences import CHECKLISTS, CHOICES, COMPARISONS, JUDGEMENTS, RUBRIC_COLUMN
from patarm_jax.demo.settings import model_shape
from patarm_jax.files import appearing_whole
from patarm_jax.judge.forms import POINTWISE, RUBRIC_JUDGE, Form
from patarm_jax.judge.rubrics import PRIMARY
from patarm_jax.model import weights
from patarm_jax.model.transformer import init_params
from patarm_jax.types import RubricMode

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
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

# What no merge may cross: a tag, a word with the space before it, a number, a run of other signs, white space.
PIECES = r"</?\w+>| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}<]+|<|\s+(?!\S)|\s+"
MOST_TOKENS = 2000  # the demo's few words make about 1,100


def write_untrained_model(
    folder: Path,
    pairs: Path,
    seed: int,
    forms: Sequence[Form] = (POINTWISE,),
    rubrics: RubricMode = "adaptive",
    given: bool = False,
) -> None:
    """A tokenizer trained on the texts of a pair file, and random weights; a folder that is there already stays.

    The paragraphs that it knows are those of models that are asked by these forms, by given rubrics too or not.
    """
    if folder.is_dir():
        return
    rows = map(json.loads, pairs.read_text(encoding="utf-8").splitlines())
    tokenizer = train_tokenizer((text for row in rows for text in _texts(row)), forms, rubrics, given)
    ids = tokenizer.get_vocab()
    shape = model_shape(len(ids))
    with appearing_whole(folder) as part:
        weights.save(
            init_params(shape, jax.random.key(seed)),
            shape,
            part,
            dtype="float32",
            stop_ids=(ids[END_OF_TURN], ids[END_OF_TEXT]),
            pad_id=ids[END_OF_TEXT],
        )
        write_tokenizer(tokenizer, part)


def train_tokenizer(texts: Iterable[str], forms: Sequence[Form], rubrics: RubricMode, given: bool = False) -> Tokenizer:
    """A byte-level BPE of these texts, with the paragraphs that every judge prompt repeats as tokens of their own.

    The rubrics and instructions are 230 of the 280 tokens that a demo prompt would have. As one token a paragraph,
    they leave it 55, and the demo is done in minutes. What a model of this size could learn from them is which of the
    five domains it is in, and that a single token says as well.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=MOST_TOKENS, initial_alphabet=every_byte, show_progress=False)
    tokenizer.train_from_iterator([*texts, *2 * ("system\n", "user\n", "assistant\n\n")], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in (*THINKING, *_paragraphs(forms, rubrics, given))]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _paragraphs(forms: Sequence[Form], rubrics: RubricMode, given: bool) -> list[str]:
    """What stands around the judged texts in the prompts of all domains, cut after each blank line."""
    gap = "\0"
    messages = [
        message
        for form in forms
        for rubric in (["", gap] if form is RUBRIC_JUDGE or given else [""])
        for domain in PRIMARY
        for message in form.ask(gap, *[gap] * form.responses, domain=domain, rubrics=rubrics, rubric=rubric)
    ]
    fixed = [text for message in messages for text in message["content"].split(gap)]
    return list(dict.fromkeys(part for text in fixed for part in re.split(r"(?<=\n\n)", text) if part))


def _texts(row: dict[str, Any]) -> list[str]:
    """All texts of one row of a pair file."""
    messages = [message["content"] for column in ("prompt", "chosen", "rejected") for message in row[column]]
    return [
        *messages,
        *(row[column] for column in (*JUDGEMENTS, *CHOICES, RUBRIC_COLUMN, *COMPARISONS, *CHECKLISTS) if column in row),
    ]
