"""Reads preferences: every form Hugging Face and TRL know, normalised to (prompt as messages, chosen, rejected).

The prompt may stand in a column of its own or be what both sides begin with; each may be text or a list of messages.
What cannot be meant (a broken line, a missing column, a wrong type) is an error that names file and line. What can be
meant but not learnt from (an empty response, two identical ones) is dropped, counted, and reported by reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

from patarm_jax.config import DataSection
from patarm_jax.data.rows import Row, read_rows
from patarm_jax.data.sft import JudgedPreference, template_judgement
from patarm_jax.judge.parse import parse_pointwise
from patarm_jax.types import CHOSEN, REJECTED, Conversation, Domain, Message, Preference, Status, UsageError, UserError

Record = TypeVar("Record")

COLUMNS = ("prompt", "chosen", "rejected", "id", "source", "domain", "chosen_judgement", "rejected_judgement")
_NEEDED = ("chosen", "rejected")
_DOMAINS: dict[str, Domain] = {domain: domain for domain in get_args(Domain)}

_ROLE = re.compile(r"[A-Za-z0-9_-]+")  # a word, as the judge's prompt can name it

UNKNOWN_DOMAIN = f"unknown domain (of {', '.join(_DOMAINS)}: set data.domain or data.source_domains)"
DROPPED_SOURCE = "source in data.drop_sources"
EMPTY_PROMPT = "empty prompt"
NO_COMMON_PREFIX = "no prompt, neither its own column (see data.columns) nor a common beginning of both sides"
NOT_USERS_TURN = "prompt that does not end with a user's turn"
EMPTY_RESPONSE = "empty response"
IDENTICAL = "identical responses"
UNEQUAL_PREFIXES = "dialogues that differ before their last message"
OTHER_PROMPT = "dialogue that does not continue its prompt"
NOT_ONE_MESSAGE = "response that is not exactly one assistant message"
NOT_UNICODE = "text that is not valid Unicode"
BAD_JUDGEMENT = "judgement that is out of form"


@dataclass(frozen=True)
class Report:
    """What became of the records that went in: kept + dropped is all of them."""

    kept: int
    dropped: dict[str, int]  # reason → count
    renamed: int = 0  # kept under another id, because theirs was taken
    not_read: str = ""  # a clause on files of the folder that were not read

    def __str__(self) -> str:
        """One clause for a log or an error."""
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in self.dropped.items())
        renamed = f"; {self.renamed:,} ids were taken and got a number" if self.renamed else ""
        every = self.kept + sum(self.dropped.values())
        return f"kept {self.kept:,} of {every:,}; dropped {reasons or 'none'}{renamed}{self.not_read}"


def read_preferences(section: DataSection) -> tuple[list[Preference], Report]:
    """All usable preferences of `section.path`, in order, and what became of the rows.

    Ids are unique: a row without one gets `file-name:line`, and one whose id is taken gets it with `#2`, `#3`, …,
    since a folder of files numbered from zero is common and a run's rollouts name their pair by id alone.
    """
    return _collect(section, lambda preference, _row, _values: preference)


def read_judged_preferences(section: DataSection) -> tuple[list[JudgedPreference], Report]:
    """The same with a judgement of each side, from the rows or, where the config says so, from the template."""

    def judged(preference: Preference, row: Row, values: Mapping[str, Any]) -> JudgedPreference:
        chosen, rejected = (_judgement(preference, side, row, values, section) for side in (CHOSEN, REJECTED))
        return JudgedPreference(preference, chosen, rejected)

    return _collect(section, judged)


class _Dropped(Exception):
    """Why a row cannot be learnt from."""


def _collect(
    section: DataSection, finish: Callable[[Preference, Row, Mapping[str, Any]], Record]
) -> tuple[list[Record], Report]:
    _refuse_unknown_names(section)
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    numbers: dict[str, int] = {}
    renamed = 0
    table = read_rows(section.path, section.split)
    for row in table.rows:
        values = _our_columns(row, section.columns)
        try:
            preference = _preference(row, values, section)
            unique = replace(preference, id=free_id(preference.id, numbers))
            kept.append(finish(unique, row, values))
        except _Dropped as reason:
            dropped[str(reason)] += 1
            continue
        renamed += unique.id != preference.id
    report = Report(len(kept), dict(dropped.most_common()), renamed, table.remark)
    if not kept:
        raise UserError(f"no usable preference in {section.path}: {report}. Mend the rows or the data section.")
    return kept, report


def _refuse_unknown_names(section: DataSection) -> None:
    for ours, theirs in section.columns.items():
        if ours not in COLUMNS or not theirs:
            raise UsageError(f"data.columns maps {ours} to {list(theirs)}. Map any of {', '.join(COLUMNS)} to columns.")
    named = {"data.domain": section.domain} if section.domain else {}
    for where, domain in (named | {f"data.source_domains.{k}": v for k, v in section.source_domains.items()}).items():
        if known_domain(domain) is None:
            raise UsageError(f"{where} is {domain!r}. Use one of {', '.join(_DOMAINS)}.")


def free_id(wanted: str, numbers: dict[str, int]) -> str:
    """The id, with a number where it is taken; `numbers` remembers the last one, so that equal ids cost no search."""
    free, number = wanted, numbers.get(wanted, 1)
    while free in numbers:
        number += 1
        free = f"{wanted}#{number}"
    numbers[wanted] = number
    numbers.setdefault(free, 1)
    return free


# ---- Columns --------------------------------------------------------------------------------------------------------


def _our_columns(row: Row, mapping: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """The row's values under our names; None where an optional column is absent."""
    expected = [our for our in COLUMNS if our in mapping or our in _NEEDED]
    missing = [their for our in expected for their in mapping.get(our, (our,)) if their not in row.values]
    if missing:
        raise UserError(
            f"{row.where} has no column {', '.join(missing)}; it has {', '.join(row.values) or 'none'}. Needed are "
            "chosen and rejected, and prompt unless both contain it: say under data.columns what they are called, "
            "such as `chosen: accepted`."
        )
    return {our: _joined(row, mapping.get(our, (our,))) for our in COLUMNS}


def _joined(row: Row, names: tuple[str, ...]) -> Any:
    if len(names) == 1:
        return row.values.get(names[0])
    parts = [row.values[name] for name in names]
    for name, part in zip(names, parts, strict=True):
        if not isinstance(part, str | None):
            raise UserError(
                f"{row.where}: {name} is {_kind(part)}, but only text can be joined. "
                "Map one column alone under data.columns."
            )
    return "".join(part or "" for part in parts)


def _text(row: Row, values: Mapping[str, Any], column: str) -> str:
    """The text of an optional column, empty where there is none."""
    value = values[column]
    if column == "id" and isinstance(value, int):
        return str(value)
    if not isinstance(value, str | None):
        raise UserError(f"{row.where}: {column} is {_kind(value)}, not text. Mend it, or map data.columns elsewhere.")
    return value or ""


# ---- From a row to a preference -------------------------------------------------------------------------------------


def _preference(row: Row, values: Mapping[str, Any], section: DataSection) -> Preference:
    source = _text(row, values, "source")
    if source in section.drop_sources:
        raise _Dropped(DROPPED_SOURCE)
    said = _text(row, values, "domain") or section.source_domains.get(source, section.domain)
    prompt, chosen, rejected = _sides(row, values)
    domain = known_domain(said)
    if domain is None:
        raise _Dropped(UNKNOWN_DOMAIN)
    _drop_what_teaches_nothing(prompt, chosen, rejected)
    name = _text(row, values, "id") or row.name
    _drop_lone_surrogates(name + source)  # they are hashed and logged
    return Preference(name, prompt, chosen, rejected, domain, source)


def known_domain(name: str) -> Domain | None:
    """The domain meant by a name, whatever its capitals, spaces and hyphens.

    >>> known_domain("Instruction-Following")
    'instruction_following'
    """
    return _DOMAINS.get("_".join(name.lower().replace("-", " ").replace("_", " ").split()))


def _drop_what_teaches_nothing(prompt: Conversation, chosen: str, rejected: str) -> None:
    if not prompt or not prompt[-1]["content"].strip():
        raise _Dropped(EMPTY_PROMPT)
    if prompt[-1]["role"] != "user":
        raise _Dropped(NOT_USERS_TURN)
    if not chosen.strip() or not rejected.strip():
        raise _Dropped(EMPTY_RESPONSE)
    if chosen.strip() == rejected.strip():
        raise _Dropped(IDENTICAL)
    for text in (chosen, rejected, *(message["content"] for message in prompt)):
        _drop_lone_surrogates(text)


def _drop_lone_surrogates(text: str) -> None:
    r"""JSON can spell half a character (`\ud83d`), which no tokenizer and no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Dropped(NOT_UNICODE) from None


# ---- The four forms -------------------------------------------------------------------------------------------------


def _sides(row: Row, values: Mapping[str, Any]) -> tuple[Conversation, str, str]:
    """The prompt, the chosen and the rejected response, whatever form they came in."""
    prompt = _text_or_messages(row, values, "prompt")
    chosen, rejected = (_text_or_messages(row, values, column) for column in _NEEDED)
    if chosen is None or rejected is None:
        raise _Dropped(EMPTY_RESPONSE)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(chosen, rejected) if prompt is None else (_conversation(prompt), chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{row.where}: one of chosen and rejected is text, the other messages. Make both the same.")
    return _split_dialogues(chosen, rejected) if prompt is None else _answers(_conversation(prompt), chosen, rejected)


def _conversation(prompt: str | Conversation) -> Conversation:
    return (Message(role="user", content=prompt),) if isinstance(prompt, str) else prompt


def _split_texts(chosen: str, rejected: str) -> tuple[Conversation, str, str]:
    """TRL's rule: the prompt is the longest common beginning, without a space at its end."""
    differ = (index for index, (ours, theirs) in enumerate(zip(chosen, rejected, strict=False)) if ours != theirs)
    length = next(differ, min(len(chosen), len(rejected)))
    if length and chosen[length - 1] == " ":
        length -= 1
    if not length:
        raise _Dropped(NO_COMMON_PREFIX)
    return _conversation(chosen[:length]), chosen[length:], rejected[length:]


def _split_dialogues(chosen: Conversation, rejected: Conversation) -> tuple[Conversation, str, str]:
    """Two whole dialogues: the prompt is all but their last message, and must be the same."""
    if chosen[:-1] != rejected[:-1]:
        raise _Dropped(UNEQUAL_PREFIXES)
    return chosen[:-1], _only_message(chosen[-1:]), _only_message(rejected[-1:])


def _answers(prompt: Conversation, chosen: Conversation, rejected: Conversation) -> tuple[Conversation, str, str]:
    """A prompt of its own and messages on each side: one answer each, or, as UltraFeedback has it, the whole dialogue.

    The dialogue may say more than the prompt column (a system message, earlier turns); then it is the prompt.
    """
    if min(len(chosen), len(rejected)) < 2:
        return prompt, _only_message(chosen), _only_message(rejected)
    context, chosen_response, rejected_response = _split_dialogues(chosen, rejected)
    if context[-len(prompt) :] != prompt:
        raise _Dropped(OTHER_PROMPT)
    return context, chosen_response, rejected_response


def _only_message(response: Conversation) -> str:
    if [message["role"] for message in response] != ["assistant"]:
        raise _Dropped(NOT_ONE_MESSAGE)
    return response[0]["content"]


def _text_or_messages(row: Row, values: Mapping[str, Any], column: str) -> str | Conversation | None:
    value = values[column]
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{row.where}: {column} is {_kind(value)}. Make it text or a list of messages.")
    return tuple(_message(row, column, message) for message in value)


def _message(row: Row, column: str, message: Any) -> Message:
    """Role and content of a message; what else it may carry is left behind."""
    match message:
        case {"role": str(role), "content": str(content)} if _ROLE.fullmatch(role):
            return {"role": role, "content": content}
    raise UserError(
        f"{row.where}: a message in {column} is {_shortened(message)}. "
        'Write messages as {"role": "user", "content": "text"}; nothing but text can be judged.'
    )


# ---- Judgements -----------------------------------------------------------------------------------------------------


def _judgement(preference: Preference, side: int, row: Row, values: Mapping[str, Any], section: DataSection) -> str:
    column = ("chosen_judgement", "rejected_judgement")[side]
    judgement = _text(row, values, column)
    if not judgement.strip():
        if section.missing_judgements == "error":
            raise UserError(
                f"{row.where} has no {column}, which SFT learns from. Name its column under data.columns, or set "
                "data.missing_judgements to template, which teaches the form of a judgement and nothing else."
            )
        return template_judgement(preference, side)
    if parse_pointwise(judgement).status is not Status.OK:
        raise _Dropped(BAD_JUDGEMENT)
    _drop_lone_surrogates(judgement)
    return judgement


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
