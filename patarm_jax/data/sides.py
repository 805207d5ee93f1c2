"""The prompt and the two responses of a row, whatever form they came in.

The prompt may stand in a column of its own or be what both sides begin with; each may be text or messages.
"""

from collections.abc import Mapping, Set
from typing import Any

from patarm_jax.data import reasons
from patarm_jax.data.cells import is_blank, is_missing, text_or_messages
from patarm_jax.data.dialogues import cut_texts, read_dialogues, read_open_prompt
from patarm_jax.data.reasons import Dropped
from patarm_jax.types import Conversation, Message

Sides = tuple[Conversation, str, str]  # the prompt, the chosen and the rejected response

# Columns with the turns before the response, where none is called prompt: LLaMA-Factory's, and OpenAI's.
_TURNS = ("conversations", "messages", "conversation")
# Columns that hold the prompt in many data sets. Whoever has one of them means it, and not what both texts share.
_PROMPTS = ("instruction", "question", "query", "input", "problem", "post", "context", "user", *_TURNS)


def sides_of(values: Mapping[str, Any], row: Mapping[str, Any], columns: Set[str], mapped: Set[str]) -> Sides:
    """Prompt, chosen and rejected.

    Args:
        values: the row under our names.
        row: the row as it was read.
        columns: those that the table has; a row may lack one.
        mapped: those of our names that the settings give columns to.

    Raises:
        Dropped: where the row has no prompt or response that can be told.
    """
    chosen, rejected = (text_or_messages(column, values[column]) for column in ("chosen", "rejected"))
    has_prompt = "prompt" in columns or "prompt" in mapped
    prompt = text_or_messages("prompt", values["prompt"])
    if chosen is None or rejected is None:
        raise Dropped(reasons.EMPTY_RESPONSE)
    if not has_prompt:
        prompt = _turns_before(row, chosen, rejected)
    if prompt is not None:
        return _with_prompt(prompt, chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(chosen, rejected, has_prompt, columns)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Dropped(reasons.TEXT_AND_MESSAGES)
    return _split_dialogues(chosen, rejected)


def _turns_before(
    row: Mapping[str, Any], chosen: str | Conversation, rejected: str | Conversation
) -> Conversation | None:
    """The turns of a column that is not called prompt, where the responses are single answers."""
    if any(not isinstance(side, str) and len(side) > 1 for side in (chosen, rejected)):
        return None
    name = next((name for name in _TURNS if not is_missing(row.get(name))), None)
    turns = text_or_messages(name, row[name]) if name else None
    if turns is None or isinstance(turns, str):
        return None
    system = row.get("system")
    if isinstance(system, str) and not is_blank(system) and turns[:1] and turns[0]["role"] != "system":
        return (Message(role="system", content=system), *turns)
    return turns


def _with_prompt(prompt: str | Conversation, chosen: str | Conversation, rejected: str | Conversation) -> Sides:
    if isinstance(prompt, str):
        if isinstance(chosen, str) and isinstance(rejected, str):
            dialogues = _dialogues_that_repeat(prompt, chosen, rejected)
            if dialogues is not None:
                return _split_dialogues(*dialogues)
        prompt = read_open_prompt(prompt) or (Message(role="user", content=prompt),)
    elif prompt and prompt[-1]["role"] == "assistant" and is_blank(prompt[-1]["content"]):
        prompt = prompt[:-1]  # where the assistant begins
    if isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    answers = (
        (Message(role="assistant", content=side),) if isinstance(side, str) else side for side in (chosen, rejected)
    )
    return _answers(prompt, *answers)


def _dialogues_that_repeat(prompt: str, chosen: str, rejected: str) -> tuple[Conversation, Conversation] | None:
    """Texts that begin with the prompt, all of them dialogues; None of any others, which are answers."""
    if not all(side.lstrip().startswith(prompt.strip()) for side in (chosen, rejected)):
        return None
    return read_dialogues(chosen, rejected) if read_open_prompt(prompt) is not None else None


def _split_texts(chosen: str, rejected: str, has_prompt: bool, columns: Set[str]) -> Sides:
    """Two texts that contain the prompt. See `dialogues` for where they are cut."""
    if is_blank(chosen) or is_blank(rejected):
        raise Dropped(reasons.EMPTY_RESPONSE)
    if chosen.split() == rejected.split():
        raise Dropped(reasons.IDENTICAL)
    if (dialogues := read_dialogues(chosen, rejected)) is not None:
        return _split_dialogues(*dialogues)
    if has_prompt:  # in other rows: these texts are answers
        raise Dropped(reasons.EMPTY_PROMPT)
    if name := next((name for name in _PROMPTS if name in columns), None):
        raise Dropped(f"no prompt, though there is a column {name} (if that is it, set data.columns.prompt {name})")
    prompt, *responses = cut_texts(chosen, rejected)
    return (Message(role="user", content=prompt),), responses[0], responses[1]


def _split_dialogues(chosen: Conversation, rejected: Conversation) -> Sides:
    """Two whole dialogues: the prompt is all but their last message, and must be the same."""
    if chosen[:-1] != rejected[:-1]:
        raise Dropped(reasons.UNEQUAL_PREFIXES)
    return chosen[:-1], _only_message(chosen[-1:]), _only_message(rejected[-1:])


def _answers(prompt: Conversation, chosen: Conversation, rejected: Conversation) -> Sides:
    """A prompt of its own and messages on each side: one answer each, or, as UltraFeedback has it, the whole dialogue.

    The dialogue may say more than the prompt column (a system message, earlier turns); then it is the prompt.
    """
    if min(len(chosen), len(rejected)) < 2:
        return prompt, _only_message(chosen), _only_message(rejected)
    context, chosen_response, rejected_response = _split_dialogues(chosen, rejected)
    if context[-len(prompt) :] != prompt:
        raise Dropped(reasons.OTHER_PROMPT)
    return context, chosen_response, rejected_response


def _only_message(response: Conversation) -> str:
    if [message["role"] for message in response] != ["assistant"]:
        raise Dropped(reasons.NOT_ONE_MESSAGE)
    return response[0]["content"]
