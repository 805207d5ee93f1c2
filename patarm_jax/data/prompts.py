"""Reads prompts for a policy: those of a file of preferences, or of any file that has prompts."""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from patarm_jax.config.sections import DataSection
from patarm_jax.data import reasons
from patarm_jax.data.cells import is_blank, is_missing, text_or_messages
from patarm_jax.data.dialogues import read_open_prompt
from patarm_jax.data.preferences import RESPONSE, Kind, Report, collect, drop_lone_surrogates
from patarm_jax.data.reasons import Dropped
from patarm_jax.data.rows import Row
from patarm_jax.data.sft import JudgedPreference
from patarm_jax.data.sides import TURNS, Sides, sides_of
from patarm_jax.types import Conversation, Domain, Message, Preference, UserError

DOMAIN: Domain = "instruction_following"  # of prompts of which nothing says another


def read_prompts(section: DataSection, setting: str = "data") -> tuple[list[Preference], Report]:
    """All usable prompts, in order, and what became of the rows; their responses are empty, their rows kept.

    A prompt is a column `prompt`, text or messages; else a conversation in one of messages, conversations and
    conversation, without an assistant's last turn; else what the two sides of a preference share.

    Args:
        section: what to read.
        setting: the section of the settings that says path and split, as an error names it.
    """

    def with_row(preference: Preference, row: Row, values: Mapping[str, object]) -> Preference:
        return replace(preference, row={**row.values, "prompt": values["prompt"]})

    domain = section.domain or DOMAIN
    read, report = collect(replace(section, domain=domain), setting, with_row, PROMPTS)
    every = dict.fromkeys(name for one in read for name in one.row)  # a row may lack a column that others have
    return [replace(one, row={name: one.row.get(name) for name in every}) for one in read], report


def read_answered_prompts(section: DataSection, setting: str = "data") -> tuple[list[JudgedPreference], Report]:
    """The same with the response to each, which a policy is taught.

    A response is a column `response`, or `completion` as TRL has it, text or one message; else an assistant's last turn
    of the conversation; else the chosen one of a preference.
    """

    def answered(preference: Preference, row: Row, values: Mapping[str, object]) -> JudgedPreference:
        response = _response_of(row, values)
        if is_blank(response):
            if section.missing_judgements == "error":
                raise UserError(
                    f"{row.where} has no response, which SFT of a policy learns from. Name its column as "
                    "data.columns.response, or set data.missing_judgements to drop, which leaves such rows out."
                )
            raise Dropped(reasons.NO_RESPONSE)
        drop_lone_surrogates(response)
        return JudgedPreference(preference, (response,))

    return collect(replace(section, domain=section.domain or DOMAIN), setting, answered, PROMPTS)


def read_preferred_responses(section: DataSection, setting: str = "data") -> tuple[list[JudgedPreference], Report]:
    """Preferences with both responses, the chosen one first, as a policy learns from them."""

    def both(preference: Preference, _row: Row, _values: Mapping[str, object]) -> JudgedPreference:
        return both_responses(preference)

    return collect(replace(section, domain=section.domain or DOMAIN), setting, both)


def both_responses(preference: Preference) -> JudgedPreference:
    """A preference with both of its responses as what is written, the chosen one first."""
    return JudgedPreference(preference, (preference.chosen, preference.rejected))


def _response_of(row: Row, values: Mapping[str, object]) -> str:
    """The response in a row; empty where there is none."""
    given = values[RESPONSE] if not is_missing(values[RESPONSE]) else row.values.get("completion")
    if is_missing(given) and not is_missing(values["chosen"]) and not is_missing(values["rejected"]):
        return sides_of(values, row.values, row.values.keys(), set())[1]
    if is_missing(given):
        name = next((name for name in ("prompt", *TURNS) if not is_missing(row.values.get(name))), "")
        given = row.values.get(name)
        if isinstance(given, str):
            return ""
    said = text_or_messages(RESPONSE, given)
    if said is None or isinstance(said, str):
        return said or ""
    return said[-1]["content"] if said and said[-1]["role"] == "assistant" else ""


def _prompt_of(values: Mapping[str, Any], row: Mapping[str, object], columns: Set[str], mapped: Set[str]) -> Sides:
    """The prompt, and two empty responses."""
    if not (is_missing(values["chosen"]) or is_missing(values["rejected"])):
        return sides_of(values, row, columns, mapped)[0], "", ""
    prompt = text_or_messages("prompt", values["prompt"])
    if prompt is None:
        name = next((name for name in TURNS if not is_missing(row.get(name))), "")
        prompt = text_or_messages(name, row[name]) if name else None
    if prompt is None:
        raise Dropped(reasons.EMPTY_PROMPT)
    return _asked(prompt), "", ""


def _asked(prompt: str | Conversation) -> Conversation:
    """A conversation up to where the assistant is to answer."""
    if isinstance(prompt, str):
        opened = read_open_prompt(prompt)
        return opened[0] if opened else (Message(role="user", content=prompt),)
    return prompt[:-1] if prompt and prompt[-1]["role"] == "assistant" else prompt


PROMPTS = Kind(
    sides=_prompt_of,
    needed=(("prompt",), *((name,) for name in TURNS), ("chosen", "rejected")),
    words="a prompt, such as a column prompt or messages",
    has_responses=False,
)
