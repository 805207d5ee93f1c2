"""The prompt and the two responses of a row, whatever form they came in.

The prompt may stand in a column of its own or be what both sides begin with; each may be text or messages.
"""

from collections.abc import Mapping, Set
from typing import Any

from patarm_jax.data import reasons
from patarm_jax.data.cells import is_blank, is_missing, show_messages, text_or_messages
from patarm_jax.data.cuts import cut_texts
from patarm_jax.data.dialogues import closed, read_dialogues, read_open_prompt
from patarm_jax.data.reasons import Dropped
from patarm_jax.types import Conversation, Message

Sides = tuple[Conversation, str, str]  # the prompt, the chosen and the rejected response

# Columns with the turns before the response, where none is called prompt: LLaMA-Factory's, and OpenAI's.
TURNS = ("conversations", "messages", "conversation")
# Columns that hold the prompt in many data sets. Whoever has one of them means it, and not what both texts share.
_PROMPTS = ("instruction", "question", "query", "input", "problem", "post", "context", "user", *TURNS)


def sides_of(values: Mapping[str, Any], row: Mapping[str, object], columns: Set[str], mapped: Set[str]) -> Sides:
    """Prompt, chosen and rejected.

    Args:
        values: the row under our names.
        row: the row as it was read.
        columns: those that the table has; a row may lack one.
        mapped: those of our names that the settings give columns to.

    Raises:
        Dropped: where the row has no prompt or response that can be told.
    """
    has_prompt = "prompt" in columns or "prompt" in mapped
    prompt = text_or_messages("prompt", values["prompt"])
    if isinstance(prompt, str) and show_messages(values["chosen"], values["rejected"]):
        chosen, rejected = values["chosen"], values["rejected"]
    else:
        chosen, rejected = (text_or_messages(column, values[column]) for column in ("chosen", "rejected"))
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
    row: Mapping[str, object], chosen: str | Conversation, rejected: str | Conversation
) -> Conversation | None:
    """The turns of a column that is not called prompt, where the responses are single answers."""
    if any(not isinstance(side, str) and len(side) > 1 for side in (chosen, rejected)):
        return None
    name = next((name for name in TURNS if not is_missing(row.get(name))), None)
    turns = text_or_messages(name, row[name]) if name else None
    if turns is None or isinstance(turns, str):
        return None
    system = row.get("system")
    if isinstance(system, str) and not is_blank(system) and turns[:1] and turns[0]["role"] != "system":
        return (Message(role="system", content=system), *turns)
    return turns


def _with_prompt(prompt: str | Conversation, chosen: str | Conversation, rejected: str | Conversation) -> Sides:
    texts = (chosen, rejected) if isinstance(chosen, str) and isinstance(rejected, str) else None
    if isinstance(prompt, str):
        opened = read_open_prompt(prompt)
        if opened and texts:
            if all(side.lstrip().startswith(prompt.strip()) for side in texts):
                dialogues = read_dialogues(*texts, known=True)
                if dialogues is not None:
                    return _split_dialogues(*dialogues)
            return opened[0], closed(texts[0], opened[1]), closed(texts[1], opened[1])
        prompt = opened[0] if opened else (Message(role="user", content=prompt),)
    elif prompt and prompt[-1]["role"] == "assistant" and is_blank(prompt[-1]["content"]):
        prompt = prompt[:-1]  # where the assistant begins
    if texts:
        return _without_repeated_prompt(prompt, *texts)
    answers = (
        (Message(role="assistant", content=side),) if isinstance(side, str) else side for side in (chosen, rejected)
    )
    return _answers(prompt, *answers)


def _without_repeated_prompt(prompt: Conversation, chosen: str, rejected: str) -> Sides:
    """Two answers in text. Where both begin with the prompt, as a dialogue or as it stands, it is no part of them."""
    try:
        dialogues = read_dialogues(chosen, rejected, known=True)
    except Dropped:  # answers that show dialogues
        dialogues = None
    if dialogues and prompt and dialogues[0][:-1] == dialogues[1][:-1]:
        context = dialogues[0][:-1]
        if _stripped(context[-len(prompt) :]) == _stripped(prompt):
            return _split_dialogues(*dialogues)
        if context and _stripped(prompt[-len(context) :]) == _stripped(context):
            return prompt, *_split_dialogues(*dialogues)[1:]
    asked = prompt[-1]["content"].strip() if prompt else ""
    answers = [side.lstrip() for side in (chosen, rejected)]
    if _is_told_apart(asked) and all(side.startswith(asked) for side in answers):
        answers = [side[len(asked) :] for side in answers]
        if all(_stands_behind(asked, side) for side in answers):
            return prompt, answers[0].strip(), answers[1].strip()
    return prompt, chosen, rejected


def _stripped(turns: Conversation) -> list[tuple[str, str]]:
    return [(turn["role"], " ".join(turn["content"].split())) for turn in turns]


def _is_told_apart(asked: str) -> bool:
    """Whether no answer begins with these words of its own accord, as one to `Hello!` or `Rice` may."""
    return asked.endswith(("?", "？")) or len(asked.split()) > 2


def _stands_behind(asked: str, answer: str) -> bool:
    """Whether a text goes on behind the prompt on a line or in a sentence of its own."""
    gap = answer[: len(answer) - len(answer.lstrip())]
    return not is_blank(answer) and ("\n" in gap or (asked.endswith(("?", "？")) and (bool(gap) or asked[-1] == "？")))


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
