"""What may stand in a cell of a table, and what it means: words, texts, and messages in the forms people have them.

A missing value is None or NaN, as JSON and pandas write it. A value that means nothing here raises `Dropped` with the
name of its column: one odd cell costs its own row, and no other.
"""

import ast
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from patarm_jax.data.reasons import Dropped
from patarm_jax.types import Conversation, Message

# How people call the roles, in lower case → what chat templates call them.
ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "ai", "bot", "chatbot", "chatgpt", "model"), "assistant"),
}
_ROLE = re.compile(r"[A-Za-z0-9_-]+")  # a word, as the judge's prompt can name it
# A dict with a role in front, alone or in a list: how messages look that were written as text.
_MESSAGES_AS_TEXT = re.compile(r"""\s*(?:\[\s*)?\{\s*["'](?:role|from|content|value)["']\s*:""")
_MISSING_WORDS = ("", "NaN", "nan", "None", "NULL", "null", "NA", "<NA>")
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode's categories of what leaves no mark
_UNSEEN_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that are drawn as nothing


def is_missing(value: object) -> bool:
    """Whether a cell holds no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def separated_cell(text: str) -> str | None:
    """A cell of CSV or TSV; None where it says that there is none, as spreadsheets and pandas write it.

    These files have no null of their own. Other files do, and there such a word is a text.

    >>> separated_cell("NaN"), separated_cell(""), separated_cell("None of them")
    (None, None, 'None of them')
    """
    return None if text.strip() in _MISSING_WORDS else text


def is_blank(text: str) -> bool:
    r"""Whether nothing of a text can be seen.

    >>> is_blank(" \n\u200b"), is_blank(" . ")
    (True, False)
    """
    return all(unicodedata.category(mark) in _UNSEEN or mark in _UNSEEN_LETTERS for mark in text)


def word(column: str, value: object) -> str:
    """The text of a name, such as an id; empty where there is none. Tables write the number 7 as 7 or as 7.0.

    >>> word("id", 7.0), word("id", " a "), word("id", None)
    ('7', ' a ', '')
    """
    if is_missing(value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise Dropped(f"{column} that is {kind_of_value(value)}, not text")


def number(column: str, value: object) -> float | None:
    """The number in a cell, of text too, as CSV has it; None where there is none.

    >>> number("score", 7), number("score", "7.5"), number("score", None), number("score", "")
    (7.0, 7.5, None, None)
    """
    written = word(column, value).strip()
    try:
        return float(written) if written else None
    except ValueError:
        raise Dropped(f"{column} that is no number") from None


def joined(names: Sequence[str], values: Sequence[Any]) -> str | None:
    """The text of several columns, one behind the other; None where one is missing."""
    for name, value in zip(names, values, strict=True):
        if not is_missing(value) and not isinstance(value, str):
            raise Dropped(f"{name} that is {kind_of_value(value)}, where only text can be joined")
    return None if any(map(is_missing, values)) else "".join(values)


def text_or_messages(column: str, value: object) -> str | Conversation | None:
    """What a prompt or a response is: text, or messages in any of their forms. None where there is none.

    The forms: a list of `{"role": …, "content": …}` or `{"from": …, "value": …}`, one such message, an object with a
    list of `messages`, an object with a list of each (as tables store them), and each of these written as text.
    """
    if is_missing(value):
        return None
    if isinstance(value, str):
        messages = _written_messages(column, value)
        return value if messages is None else messages
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    listed = _listed(value)
    if listed is None:
        raise Dropped(f"{column} that is {kind_of_value(value)}, neither text nor a list of messages")
    return tuple(_message(column, one) for one in listed)


def show_messages(chosen: object, rejected: object) -> bool:
    """Whether one of two answers in text looks like messages, and the other does not: then it is an answer in JSON.

    A list of messages that is cut off is none: it stays to be dropped as unreadable.
    """
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return False
    looks = [side for side in (chosen, rejected) if _MESSAGES_AS_TEXT.match(side)]
    return len(looks) == 1 and not (looks[0].lstrip().startswith("[") and _parsed(looks[0]) is None)


def _listed(value: object) -> Sequence[object] | None:
    """The messages of a value, not yet looked at; None where it is of no form that has any."""
    match value:
        case list():
            return value
        case {"messages": list(messages)}:
            return messages
        case {"role": list(says), "content": list(texts)} if len(says) == len(texts):
            return [{"role": role, "content": text} for role, text in zip(says, texts, strict=True)]
        case {"from": list(says), "value": list(texts)} if len(says) == len(texts):
            return [{"role": role, "content": text} for role, text in zip(says, texts, strict=True)]
        case {"role": _, "content": _} | {"from": _, "value": _}:
            return [value]
    return None


def _written_messages(column: str, text: str) -> Conversation | None:
    """The messages that a text spells, as JSON or as Python prints them; None of any other text."""
    if not _MESSAGES_AS_TEXT.match(text):
        return None
    parsed = _parsed(text)
    if parsed is None:  # a judge must not be shown the notation in place of the words
        raise Dropped(f"{column} that looks like messages written as text and cannot be read (write them as JSON)")
    listed = _listed(parsed)
    if listed is None or not all(
        isinstance(one, Mapping) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
        for one in listed
    ):
        return None  # such as a response that is JSON itself
    return tuple(_message(column, one) for one in listed)


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes that Python does not know
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _message(column: str, message: object) -> Message:
    """Role and text of a message; what else it may carry is left behind."""
    match message:
        case {"role": str(said), **rest}:
            content = rest.get("content")
        case {"from": str(said), **rest}:
            content = rest.get("value")
        case _:
            raise Dropped(f'message in {column} that is not of the form {{"role": "user", "content": "text"}}')
    role = said.strip().lower()
    role = ROLES.get(role, role if role in ("user", "assistant", "system") else said)
    if not _ROLE.fullmatch(role):
        raise Dropped(f"message in {column} whose role is not a word such as user or assistant")
    return {"role": role, "content": _content(column, content)}


def _content(column: str, content: object) -> str:
    """The text of a message, or of its parts."""
    if is_missing(content):
        raise Dropped(f"message without text in {column}, such as a tool call")
    if isinstance(content, str):
        return content
    if isinstance(content, int) and not isinstance(content, bool):
        return str(content)
    texts = []
    for part in content if isinstance(content, list) else [content]:
        match part:
            case str(text):
                texts.append(text)
            case {"text": str(text), **rest} if str(rest.get("type", "text")).endswith("text"):
                texts.append(text)
            case _:
                raise Dropped(f"message in {column} that holds something else than text, such as an image")
    return "".join(texts)


def kind_of_value(value: object) -> str:
    """What a value is, for a sentence.

    >>> [kind_of_value(value) for value in (True, 0.5, [], {}, "")]
    ['true or false', 'a number', 'a list', 'an object', 'of type str']
    """
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of type {type(value).__name__}")
