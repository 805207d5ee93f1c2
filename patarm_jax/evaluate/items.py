"""The items of a benchmark: every row a prompt with responses that should score high, and low."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from patarm_jax.data.rows import Row
from patarm_jax.types import Conversation, Domain, Message, UserError


@dataclass(frozen=True)
class Item:
    """One prompt, responses that should score high, and responses that should score low."""

    id: str  # unique in the benchmark
    subset: str
    domain: Domain
    prompt: Conversation
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    group: str  # names the prompt: its items are resampled together
    row: Mapping[str, object]  # as it was read, for result files that repeat it
    kind: str = ""  # in RewardBench 2's Ties: ref, with one right response, or tied, with several


def limited(items: Sequence[Item], limit: int) -> list[Item]:
    """About so many items, in order: subsets take turns, each drawing its groups in a fixed random order.

    A larger limit draws the same and more, so that a quick look is no waste.
    """
    if not limit or limit >= len(items):
        return list(items)
    groups: dict[str, dict[str, list[int]]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.subset, {}).setdefault(item.group, []).append(index)
    rng = np.random.default_rng(0)
    waiting = [[list(members.values())[i] for i in rng.permutation(len(members))] for members in groups.values()]
    taken: list[int] = []
    while len(taken) < limit:
        for subset in waiting:
            if subset and len(taken) < limit:
                taken += subset.pop(0)
    return [items[index] for index in sorted(taken)]


# ---- From a row -----------------------------------------------------------------------------------------------------


class Turn(msgspec.Struct):
    """A turn of a prompt."""

    role: str
    content: str


Prompt = str | list[Turn]


def make_item(
    row: Row,
    name: str,
    subset: str,
    table: Mapping[str, Domain],
    prompt: Prompt,
    chosen: Sequence[str],
    rejected: Sequence[str],
    group: str | None = None,
) -> Item:
    """An item of a row.

    Args:
        row: as it was read.
        name: of the item, unique in its file.
        subset: that it belongs to.
        table: subset → domain.
        prompt: text, or turns.
        chosen: responses that should score high.
        rejected: responses that should score low.
        group: names the prompt; None: by its text.
    """
    turns = [Turn("user", prompt)] if isinstance(prompt, str) else prompt
    said = tuple(Message(role=turn.role, content=turn.content) for turn in turns)
    if not said:
        raise wrong(row, "prompt", "no turns", "text or messages")
    for text in (*chosen, *rejected, *(turn.content for turn in turns)):
        _refuse_lone_surrogates(row, text)
    return Item(
        id=name,
        subset=subset,
        domain=table[subset],
        prompt=said,
        chosen=tuple(chosen),
        rejected=tuple(rejected),
        group=group or name_of(said),
        row=row.values,
    )


def name_of(prompt: Conversation) -> str:
    """A short name of a prompt, by its text."""
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:12]


def _refuse_lone_surrogates(row: Row, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{row.where} holds half a character, which is no valid Unicode. Fix the file.") from error


Value = TypeVar("Value")


def known(row: Row, field: str, value: str, table: Mapping[str, Value]) -> str:
    """The value, which must be a key of the table."""
    if value not in table:
        raise wrong(row, field, repr(value), f"one of {', '.join(table)}")
    return value


def not_empty(row: Row, **fields: Sequence[str]) -> None:
    """Refuses fields that hold no response."""
    for name, responses in fields.items():
        if not responses:
            raise wrong(row, name, "no response", "one or more")


def wrong(row: Row, field: str, got: str, allowed: str) -> UserError:
    """What is said of a row that is not as its format has it."""
    return UserError(f"{row.where}: {field} is {got}; allowed is {allowed}. Fix the file, or give the official one.")
