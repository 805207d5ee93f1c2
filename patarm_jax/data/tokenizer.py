"""The two doors between strings and token ids; the only file that knows transformers.

In: `encode_chat` (what a judge reads) and `encode_judgement` (what it learns to write). Out: `decode`. Nothing here
knows what a rubric or a score is; it only asks `judge.prompts` which parts of a rendered prompt are not to be trusted.

Control tokens are those a tokenizer adds to its byte-level vocabulary: `<|im_end|>`, `<think>`, `<tool_call>`, ….
transformers would find them anywhere in a text, so that a response could end its own turn and open the judge's. Here
they are looked for in trusted text only; what stands between two of them goes in one piece through a copy of the
tokenizer that has never heard of control tokens. For text without such attempts the ids are transformers' own.
"""

import itertools
import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from patarm_jax.files import one_line, read_json_object
from patarm_jax.judge.prompts import untrusted_spans
from patarm_jax.types import Message, UserError

END_OF_TURN = "<|im_end|>"
_PROBE = "Hello."  # a user's message, behind which a chat template's own words are looked at
THINKING = ("<think>", "</think>")
REMEDY = "Give a folder as `hf download Qwen/Qwen3-8B` writes it."

# What makes up a tokenizer on disk. They are saved as they were read, since transformers 5 would write a
# tokenizer_config.json that transformers 4, and with it many a vLLM, cannot read.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A byte-level BPE tokenizer with a chat template."""

    fast: PreTrainedTokenizerFast  # as transformers knows it; renders the chat template and decodes
    plain: tokenizers.Tokenizer  # the same without a single added token: no text makes it write a control token
    control_tokens: dict[str, int]  # every added token, special or not, and its id
    thinking_tokens: dict[str, int]  # those of `<think>` and `</think>` that are added tokens and not special ones
    stop_ids: tuple[int, ...]  # ids that end a completion; the first is the end of a turn in the chat template
    pad_id: int  # fills what lies past a row's length; may be a stop id too
    vocab_size: int  # ids from here on have no text, though the model may have rows for them
    opening: str  # what the chat template writes of the judge's thinking, such as "<think>\n"; empty where it does not
    unthought: str | None  # what begins the turn of a model that does not think, behind that; None where nothing can
    files: dict[str, bytes]  # name → content, as read, for `save_tokenizer`


def load_tokenizer(folder: Path, model: Path | None = None) -> Tokenizer:
    """The tokenizer in a local Hugging Face folder; nothing is downloaded.

    Args:
        folder: holds it.
        model: the folder whose configs name the end tokens where this one's do not; None: this one's alone.
    """
    files = _read_files(folder)
    try:
        fast = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust side raises bare Exceptions
        raise UserError(f"cannot read the tokenizer in {folder}: {one_line(error)}. {REMEDY}") from error
    if not fast.chat_template:
        raise UserError(
            f"the tokenizer in {folder} has no chat template. Put the chat_template.jinja of the model there, "
            "or take the folder of an instruction-tuned model."
        )
    # A template that cannot render what every judge is sent is found before any weight is read.
    probe = [Message(role="system", content="Judge."), Message(role="user", content=_PROBE)]
    rendered = _render(fast, probe)
    opening = _opening(rendered)
    state = json.loads(fast.backend_tokenizer.to_str())
    _refuse_what_cannot_be_exact(folder, state)
    control_tokens = {token["content"]: token["id"] for token in state["added_tokens"]}
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    stop_ids = _stop_ids([folder, model or folder], fast, control_tokens)
    return Tokenizer(
        fast=fast,
        plain=_without_added_tokens(state),
        control_tokens=control_tokens,
        thinking_tokens={text: control_tokens[text] for text in THINKING if text in control_tokens.keys() - special},
        stop_ids=stop_ids,
        pad_id=stop_ids[-1] if fast.pad_token_id is None else fast.pad_token_id,
        vocab_size=len(fast),
        opening=opening,
        unthought=_unthought(rendered, opening, _render(fast, probe, thinking=False)),
        files=files,
    )


def _opening(rendered: str) -> str:
    r"""What stands of the judge's thinking at the end of a rendered conversation.

    Templates of models that always think open it themselves; those of models that never do may open and close it.

    >>> _opening("<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n<think>\n")
    '<think>\n'
    """
    behind = rendered.rpartition(_PROBE)[2]
    places = [place for tag in THINKING if (place := behind.find(tag)) >= 0]
    return behind[min(places) :] if places else ""


def unthought(opening: str) -> str | None:
    r"""What stands between a chat template's own words and the answer of a model that does not think.

    So Qwen3's template writes it with enable_thinking off. What the template has written is not repeated.

    Args:
        opening: what the template writes of the judge's thinking: see `Tokenizer.opening`.

    Returns:
        The text; None where the template begins the thinking in another way.

    >>> unthought(""), unthought("<think>\n"), unthought("<think>\n\n</think>\n\n")
    ('<think>\n\n</think>\n\n', '\n</think>\n\n', '')
    """
    nothing = f"{THINKING[0]}\n\n{THINKING[1]}\n\n"
    if nothing.startswith(opening):
        return nothing.removeprefix(opening)
    begun, closed, behind = opening.partition(THINKING[1])
    if closed and not behind.strip() and not begun.strip().removeprefix(THINKING[0]).strip():
        return ""
    return None


def _unthought(rendered: str, opening: str, without: str) -> str | None:
    """What the template itself writes behind `opening` where thinking is off; where it does not end it, as `unthought`.

    Args:
        rendered: a conversation, up to where a model begins to write that may think.
        opening: its end.
        without: the same conversation with enable_thinking off.
    """
    before = rendered.removesuffix(opening)
    written = without.removeprefix(before)
    is_over = THINKING[0] not in written or THINKING[1] in written
    if without.startswith(before) and written.startswith(opening) and is_over:
        return written.removeprefix(opening)
    return unthought(opening)


def unthought_opening(tokenizer: Tokenizer) -> list[int]:
    """The ids that begin the turn of a model that does not think, behind what the chat template has written."""
    if tokenizer.unthought is None:
        raise cannot_be_unthought(tokenizer)
    return encode_trusted(tokenizer, tokenizer.unthought)


def cannot_be_unthought(tokenizer: Tokenizer) -> UserError:
    """What is said of a template that opens the thinking in a way that has no known end."""
    return UserError(
        f"the chat template in {tokenizer.fast.name_or_path} begins the thinking with {tokenizer.opening!r}, which "
        "cannot be ended unthought. Take Qwen3's template."
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer's files as they were read; transformers and vLLM load them as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    # Older folders keep the template inside tokenizer_config.json; readers of today look for it here first.
    if "chat_template.jinja" not in tokenizer.files and isinstance(tokenizer.fast.chat_template, str):
        (folder / "chat_template.jinja").write_text(tokenizer.fast.chat_template, encoding="utf-8")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids of a rendered conversation, up to where the assistant begins to write.

    Judged text (`untrusted_spans`) yields no control token, whatever it contains. For all other text the ids equal
    `apply_chat_template(messages, tokenize=True, add_generation_prompt=True, enable_thinking=True)`.
    """
    text = _render(tokenizer.fast, messages)
    spans = untrusted_spans(text)
    shown = [text[start:end] for start, end in spans]
    meant = [
        message["content"][start:end] for message in messages for start, end in untrusted_spans(message["content"])
    ]
    # What is not found, or stands there a second time, would pass for trusted, control tokens and all.
    if shown != meant or (spans and untrusted_spans(text[spans[-1][1] :])):
        raise UserError(
            f"the chat template in {tokenizer.fast.name_or_path} changes the text of its messages, so that judged "
            "text cannot be told from trusted. Take a template that writes each message as it is, and once."
        )
    return _encode(tokenizer.plain, text, _complement(spans, len(text)), tokenizer.control_tokens)


def encode_dialogue(tokenizer: Tokenizer, messages: Sequence[Message], answering: bool = False) -> list[int]:
    """The ids of a whole conversation: what a scalar reward model reads of it, or what a policy answers.

    No message yields a control token, whatever it contains. Of messages without any, the ids equal
    `apply_chat_template(messages, tokenize=True, add_generation_prompt=answering)`.

    Args:
        tokenizer: of the model.
        messages: all turns.
        answering: whether the assistant begins to write behind them.
    """
    controls = sorted(tokenizer.control_tokens, key=len, reverse=True)
    stand_ins = dict(zip(controls, _unused(messages, len(controls)), strict=True))
    hidden = [Message(role=one["role"], content=_replaced(one["content"], stand_ins)) for one in messages]
    text = _render(tokenizer.fast, hidden, answering)
    meant = {stand_in: control for control, stand_in in stand_ins.items()}
    shown = partial(_replaced, replacements=meant)
    return _encode(tokenizer.plain, text, [(0, len(text))], tokenizer.control_tokens, shown)


def _unused(messages: Sequence[Message], count: int) -> list[str]:
    """Private characters, which mean nothing, that no message holds."""
    found = set().union(*(message["content"] for message in messages))
    return list(itertools.islice((each for each in map(chr, range(0xF0000, 0xFFFFD)) if each not in found), count))


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    pattern = re.compile("|".join(map(re.escape, replacements)) or r"(?!)")
    return pattern.sub(lambda match: replacements[match[0]], text)


def encode_judgement(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids a judge learns to write: the judgement, then the end of the turn.

    `<think>` and `</think>` are the model's own tokens where it has them. No other control token can come from the
    text, so the end token at the end is the only one. What the chat template writes itself (`opening`) is not written
    again: `written(tokenizer, ids[:-1])` gives the text back, in the tokenizer's Unicode normal form (NFC for Qwen3)
    and with the template's white space behind `<think>`.

    Raises:
        UserError: when the chat template has ended the thinking before the judge begins to write.
    """
    _, opening, inside = tokenizer.opening.partition(THINKING[0])
    if (tokenizer.opening and not opening) or THINKING[1] in inside:
        raise UserError(
            f"the chat template in {tokenizer.fast.name_or_path} ends the thinking itself, so that a judge cannot "
            "learn to think. Take a template that leaves it open with enable_thinking, as Qwen3's does."
        )
    if opening:
        text = text.lstrip().removeprefix(opening).removeprefix(inside)
    ids = _encode(tokenizer.plain, text, [(0, len(text))], tokenizer.thinking_tokens)
    return [*ids, tokenizer.stop_ids[0]]


def encode_unthought(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that a model which does not think learns to write: the text, behind `unthought_opening`, and the end."""
    return [*encode_text(tokenizer, text), tokenizer.stop_ids[0]]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a piece of a judgement, in which no control token is meant."""
    return _encode(tokenizer.plain, text, (), {})


def encode_trusted(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a piece of a judgement in which `<think>` and `</think>` are tokens of their own."""
    return _encode(tokenizer.plain, text, [(0, len(text))], tokenizer.thinking_tokens)


def written(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """All that stands in a judge's turn: what the chat template began, then the text of some sampled ids."""
    return tokenizer.opening + decode(tokenizer, ids)


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The exact text of some ids: control tokens visible, no space cleaned up; ids without a text give none."""
    return tokenizer.fast.backend_tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)


def _render(
    fast: PreTrainedTokenizerFast, messages: Sequence[Message], answering: bool = True, thinking: bool = True
) -> str:
    conversation = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        # enable_thinking leaves `<think>` for the judge to write; without it Qwen3's template would open and close it.
        text = fast.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=answering, enable_thinking=thinking
        )
    except Exception as error:  # a template is a program and may raise anything
        raise UserError(
            f"the chat template in {fast.name_or_path} does not render a conversation of the roles "
            f"{', '.join(message['role'] for message in messages)}: {one_line(error)}. Fix its chat_template.jinja, "
            "or take the template of an instruction-tuned model."
        ) from error
    return str(text)


def _encode(
    plain: tokenizers.Tokenizer,
    text: str,
    trusted: Iterable[tuple[int, int]],
    control_tokens: Mapping[str, int],
    shown: Callable[[str], str] = str,
) -> list[int]:
    """Control tokens where they lie wholly inside a trusted span; everything between two of them in one piece.

    One piece, though trusted and judged text meet in it, because a byte-pair encoder looks across the border.
    """
    longest_first = sorted(control_tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    ids: list[int] = []
    done = 0
    for start, end in trusted:
        for match in pattern.finditer(text, start, end):
            ids += plain.encode(shown(text[done : match.start()]), add_special_tokens=False).ids
            ids.append(control_tokens[match[0]])
            done = match.end()
    return ids + plain.encode(shown(text[done:]), add_special_tokens=False).ids


def _complement(spans: Iterable[tuple[int, int]], length: int) -> Iterator[tuple[int, int]]:
    """The spans of range(length) outside the given sorted spans.

    >>> list(_complement([(2, 4), (6, 6)], 9))
    [(0, 2), (4, 6), (6, 9)]
    """
    done = 0
    for start, end in spans:
        yield done, start
        done = end
    yield done, length


def _read_files(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}. {REMEDY}")
    try:
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}. Make it a file that you may read.") from error
    if "tokenizer.json" not in files:
        raise UserError(f"{folder} holds no tokenizer.json. {REMEDY}")
    return files


def _refuse_what_cannot_be_exact(folder: Path, state: dict[str, Any]) -> None:
    """Only byte-level BPE gives back every text; only added tokens that stand for themselves can be found by search."""
    model, decoder = state["model"]["type"], (state["decoder"] or {"type": "no"})["type"]
    if (model, decoder) != ("BPE", "ByteLevel"):
        raise UserError(
            f"{folder} holds a {model} tokenizer with {decoder} decoder, byte-level BPE is needed. {REMEDY}"
        )
    for token in state["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UserError(
                f"the added token {token['content']} in {folder}/tokenizer.json depends on the text around it. "
                "Set its lstrip, rstrip and single_word to false."
            )


def _stop_ids(
    folders: Sequence[Path], fast: PreTrainedTokenizerFast, control_tokens: dict[str, int]
) -> tuple[int, ...]:
    """Generation's end tokens, else the model's, else the tokenizer's; before them the end of a turn.

    A base model's config ends a document, not a turn, though its chat template writes turns.
    """
    names = ("generation_config.json", "config.json")
    declared = [_declared_eos(folder / name) for folder in folders for name in names]
    found = next((ids for ids in declared if ids), [] if fast.eos_token_id is None else [fast.eos_token_id])
    if END_OF_TURN in control_tokens and END_OF_TURN in str(fast.chat_template):
        found = [control_tokens[END_OF_TURN], *found]
    if not found:
        where = folders[0]
        raise UserError(f"nothing in {where} names an end token. Set eos_token_id in {where}/generation_config.json.")
    return tuple(dict.fromkeys(found))


def _declared_eos(path: Path) -> list[int]:
    declared = (read_json_object(path) or {}).get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise UserError(
            f"{path}: eos_token_id is {reprlib.repr(declared)}; allowed is a token's number, or a list of numbers. "
            "Copy the file again."
        )
    return ids


def _without_added_tokens(state: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer with no added token, neither in the list that is searched nor in the vocabulary it merges to.

    A tokenizer trained with its special tokens has them in the vocabulary too, where merges might reach them.
    """
    added = {token["content"] for token in state["added_tokens"]}
    model = dict(state["model"])
    model["vocab"] = {text: index for text, index in model["vocab"].items() if text not in added}
    model["merges"] = [
        (left, right) for left, right in model["merges"] if added.isdisjoint((left, right, left + right))
    ]
    plain = state | {"model": model, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(plain))
