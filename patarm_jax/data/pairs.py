"""When two preferences are the same pair: the same prompt and the same responses, in either order."""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from patarm_jax.types import Conversation, Preference


def plain(text: str) -> str:
    r"""A text without what differs between copies of it: white space, and how accents are spelled.

    >>> plain(" a\r\n b "), plain("e\u0301") == plain("\u00e9")
    ('a b', True)
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def laid_out(text: str) -> list[str]:
    r"""The lines of a text, without what differs between copies of it but with their indentation: that is code.

    >>> laid_out("if a:\r\n  b\n\n") == laid_out("if  a:\n  b "), laid_out("if a:\n  b") == laid_out("if a:\nb")
    (True, False)
    """
    lines = [line for line in unicodedata.normalize("NFC", text).splitlines() if line.strip()]
    indents = [line[: len(line) - len(line.lstrip())].expandtabs(8) for line in lines]
    return [
        indent * (number > 0) + " ".join(line.split())
        for number, (line, indent) in enumerate(zip(lines, indents, strict=True))
    ]


def prompt_key(prompt: Conversation) -> bytes:
    """Equal for equal prompts, white space apart."""
    return _hash([[message["role"], plain(message["content"])] for message in prompt])


class Sided(Protocol):
    """A preference, with whatever else is known of it."""

    @property
    def prompt(self) -> Conversation:
        """All turns before the response."""

    @property
    def chosen(self) -> str:
        """One response."""

    @property
    def rejected(self) -> str:
        """The other one."""


def pair_key(preference: Sided) -> bytes:
    """Equal for equal pairs, white space and the order of the responses apart."""
    return pair_key_and_order(preference)[0]


def pair_key_and_order(preference: Sided) -> tuple[bytes, bool]:
    """The key of the pair, and whether the chosen response comes first by its text: of equal pairs, which is chosen."""
    chosen, rejected = plain(preference.chosen), plain(preference.rejected)
    return _hash([prompt_key(preference.prompt).hex(), *sorted((chosen, rejected))]), chosen < rejected


def _hash(content: Sequence[object]) -> bytes:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Shared:
    """What two sets of preferences have in common."""

    pairs: int  # how many pairs of the second stand in the first too
    prompts: int  # the same, whatever the responses
    example: tuple[str, str] | None  # ids of a shared pair, in the first and in the second


def shared_between(first: Sequence[Preference], second: Sequence[Preference]) -> Shared:
    """How many pairs and prompts of the second set stand in the first too."""
    pairs = {pair_key(one): one.id for one in reversed(second)}
    prompts = {prompt_key(one.prompt) for one in second}
    met: dict[bytes, str] = {}
    met_prompts: set[bytes] = set()
    for one in first:
        if (prompt := prompt_key(one.prompt)) in prompts:
            met_prompts.add(prompt)
            if (key := pair_key(one)) in pairs:
                met.setdefault(key, one.id)
    in_both = [one for one in second if pair_key(one) in met]
    example = (met[pair_key(in_both[0])], in_both[0].id) if in_both else None
    return Shared(len(in_both), sum(prompt_key(one.prompt) in met_prompts for one in second), example)
