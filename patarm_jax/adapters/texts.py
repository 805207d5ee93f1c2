"""What other trainers hand over, as a judge reads it: a prompt, and the answer to it.

A prompt is text, text with a chat template's marks, or messages; a completion is text, or the messages that were added.
"""

import json
import re
import unicodedata
from dataclasses import dataclass

from patarm_jax.data.cells import text_or_messages
from patarm_jax.data.dialogues import read_open_prompt
from patarm_jax.data.pairs import plain
from patarm_jax.data.reasons import Dropped
from patarm_jax.judge.parse import answer_of, closes_thinking_it_did_not_open
from patarm_jax.types import Conversation

NO_ANSWER = "no answer stands behind the thinking"
# How a chat template begins the assistant's turn of a model that is not to think, and of one that is to.
_UNTHINKING, _THINKING = re.compile(r"<think>\s*</think>\s*\Z"), re.compile(r"<think>\s*\Z")
_ENDS = re.compile(
    r"(?:\s|<\|(?:im_end|eot_id|end|return|endoftext)\|>|<end_of_turn>|<｜[^｜]{1,30}｜>|</?s>|<eos>|<pad>)+\Z"
)


@dataclass(frozen=True)
class Shown:
    """What a judge is shown, or why nothing can be."""

    prompt: str | Conversation = ""
    response: str = ""
    reason: str = ""  # why it cannot be judged; empty: it can


def shown(prompt: object, completion: object, sees_thinking: bool = False, opens_thinking: bool = False) -> Shown:
    r"""One prompt and completion of a trainer, as a judge is shown them; never raises.

    >>> prompt = "<|im_start|>user\nRice?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    >>> shown(prompt, "Hm.</think>18 minutes.<|im_end|>")
    Shown(prompt=({'role': 'user', 'content': 'Rice?'},), response='18 minutes.', reason='')
    >>> shown([{"role": "user", "content": "Rice?"}], [{"role": "assistant", "content": "<think>Rice, or"}]).reason
    'no answer stands behind the thinking'

    Args:
        prompt: as the trainer has it.
        completion: to it.
        sees_thinking: whether the judge sees the thinking before an answer too.
        opens_thinking: whether the chat template has opened the thinking, which no prompt of messages shows.
    """
    try:
        asked, opens = _prompt(prompt)
        text = _completion(completion)
    except Dropped as dropped:
        return Shown(reason=str(dropped))
    text = _ENDS.sub("", text)
    opens = (opens or opens_thinking) and not text.lstrip().startswith("<think>")
    answer = answer_of(f"<think>{text}" if opens else text)
    if answer is None:
        return Shown(reason=NO_ANSWER)
    return Shown(asked, text.strip() if sees_thinking else answer)


def _plain(value: object) -> object:
    """Lists, where a table's array stands for them."""
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value


def ends_thinking_of_its_template(completion: object) -> bool:
    """Whether a completion closes a thinking that it did not open, so that the chat template did.

    >>> [ends_thinking_of_its_template(text) for text in ("Hm.</think>18.", "<think>Hm.</think>18.", "18.", [])]
    [True, False, False, False]
    """
    try:
        return closes_thinking_it_did_not_open(_completion(completion))
    except Dropped:
        return False


def split_query(query: str, prompt: str) -> str | None:
    r"""The completion in a text of prompt and completion; None where the two do not fit together.

    A text that comes of tokens may differ from the prompt in how accents are spelled, or in white space: then the
    completion is what stands behind as many marks of a turn as the prompt has.

    >>> split_query("Rice? 18 minutes.</s>", "Rice?"), split_query("Rice?", "Beans?")
    (' 18 minutes.</s>', None)
    """
    if query.startswith(prompt):
        return query[len(prompt) :]
    query, prompt = (unicodedata.normalize("NFC", text) for text in (query, prompt))
    if query.startswith(prompt):
        return query[len(prompt) :]
    read = read_open_prompt(_THINKING.sub("", _UNTHINKING.sub("", prompt)))
    if read is None:
        return None
    _, notation = read
    marks, expected = list(notation.turn.finditer(query)), len(list(notation.turn.finditer(prompt)))
    if len(marks) < expected:
        return None
    end = marks[expected - 1].end()
    return query[end:] if plain(query[:end]).rstrip() == plain(_THINKING.sub("", _UNTHINKING.sub("", prompt))) else None


def _with_calls(prompt: object) -> object:
    """Messages, with the tools that an assistant has called where it said nothing."""
    if not isinstance(prompt, list):
        return prompt
    return [
        {**turn, "content": json.dumps(turn["tool_calls"], ensure_ascii=False, default=str)}
        if isinstance(turn, dict) and turn.get("content") is None and turn.get("tool_calls")
        else turn
        for turn in prompt
    ]


def _prompt(prompt: object) -> tuple[str | Conversation, bool]:
    """The prompt, and whether it has opened the thinking of its answer."""
    prompt = _plain(prompt)
    if isinstance(prompt, str):
        opens = not _UNTHINKING.search(prompt) and _THINKING.search(prompt) is not None
        read = read_open_prompt(_THINKING.sub("", _UNTHINKING.sub("", prompt)))
        return (read[0], opens) if read else (prompt, False)
    messages = text_or_messages("the prompt", _with_calls(prompt))
    if not messages or isinstance(messages, str):
        raise Dropped("the prompt is empty")
    return messages, False


def _completion(completion: object) -> str:
    """The text of a completion; of messages the last one's, which is the assistant's."""
    completion = _plain(completion)
    if isinstance(completion, str):
        return completion
    last = completion[-1:] if isinstance(completion, list) else completion  # tools and their results stand before it
    messages = text_or_messages("the completion", last)
    if not messages or isinstance(messages, str) or messages[-1]["role"] != "assistant":
        raise Dropped("the completion does not end with what the assistant says")
    return messages[-1]["content"]
