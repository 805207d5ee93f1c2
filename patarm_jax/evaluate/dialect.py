"""The fields of a request for one answer, and what is changed of them when a server does not take one.

All of sampling is sent, also what has no effect: what is not sent, a server fills in from the model's folder. Servers
that refuse a field are asked without it, or with it under another name, from their first refusal on.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from patarm_jax.config import EndpointSection, SamplingSection
from patarm_jax.evaluate.answers import Question
from patarm_jax.evaluate.replies import Refused

_LIMITS = ("max_tokens", "max_completion_tokens")  # what servers call the limit of new tokens
_ALL_TOKENS = (-1, 0)  # what servers call a top_k that leaves all tokens
# Fields that a request can do without. Where a refusal names several, one without effect goes first.
_SPARABLE = ("min_p", "repetition_penalty", "top_k", "seed", "top_p", "temperature", "chat_template_kwargs")
_WITHOUT_EFFECT = {"min_p": 0.0, "repetition_penalty": 1.0, "top_k": -1, "top_p": 1.0, "temperature": 1.0}
_ABOUT_A_VALUE = re.compile(r"must be|at least|greater|less than|out of range|invalid value", re.IGNORECASE)
# How a server says that it means the field and not the question.
_MEANS_A_FIELD = re.compile(
    r"support|unrecogni[sz]ed|unexpected|unknown|invalid|extra (?:input|field)|not (?:allowed|permitted|available)|"
    r"cannot|only|deprecated",
    re.IGNORECASE,
)


@dataclass
class Dialect:
    """The fields that a server takes, as far as its refusals have told."""

    without: set[str] = field(default_factory=set)  # fields that it does not take
    limit: str = _LIMITS[0]
    all_tokens: int = _ALL_TOKENS[0]

    def fields(
        self, question: Question, vote: int, sampling: SamplingSection, section: EndpointSection, seed: int
    ) -> dict[str, Any]:
        """A request but for model and messages; each vote has a seed of its own, which hangs on the question alone."""
        digest = hashlib.sha256(f"{seed} {question.key} {vote}".encode()).digest()
        fields: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or self.all_tokens,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            self.limit: sampling.max_new_tokens,
            "seed": int.from_bytes(digest[:4]) >> 1,
        }
        if section.thinking != "server":
            fields["chat_template_kwargs"] = {"enable_thinking": section.thinking == "on"}
        return {name: value for name, value in fields.items() if name not in self.without}

    def adapt(self, refusal: Refused, sent: Mapping[str, Any]) -> str | None:
        """Changes the field that a refusal of these ones names.

        Returns what was changed, in words; "" where another refusal has led to that already, so that the request is
        only to be sent anew; None where the refusal is about no field that can be changed.
        """
        if refusal.own or refusal.for_all:
            return None
        named = [name for name in _named(refusal) if name in sent]
        about_value = _ABOUT_A_VALUE.search(refusal.said) is not None
        if "top_k" in named and about_value and sent["top_k"] in _ALL_TOKENS:
            return self._other_top_k(int(sent["top_k"]))
        if not named or about_value:  # a value that the user chose is for the user to change
            return None
        if named[0] in _LIMITS:
            return self._rename_limit(named[0])
        without_effect = [name for name in named if sent[name] == _WITHOUT_EFFECT.get(name)]
        name = (without_effect or named)[0]
        if name in self.without:
            return ""
        self.without.add(name)
        return f"{name} is left out, which the server does not take"

    def _rename_limit(self, refused: str) -> str | None:
        if refused != self.limit:
            return ""
        if refused == _LIMITS[1]:
            return None  # it takes neither name
        self.limit = _LIMITS[1]
        return f"{_LIMITS[1]} is sent instead of {refused}, which the server does not take"

    def _other_top_k(self, refused: int) -> str:
        if refused != self.all_tokens or "top_k" in self.without:
            return ""
        if refused == _ALL_TOKENS[0]:
            self.all_tokens = _ALL_TOKENS[1]
            return f"top_k is sent as {self.all_tokens} instead of {refused}, which the server does not take"
        self.without.add("top_k")
        return "top_k is left out, which the server does not take"


def _named(refusal: Refused) -> list[str]:
    """The fields that a refusal names: as the server's `param`, or in its words."""
    in_words = [name for name in (*_LIMITS, *_SPARABLE) if re.search(rf"(?<![\w-]){name}(?![\w-])", refusal.said)]
    if refusal.field and "both" not in refusal.said:
        return [name for name in (*_LIMITS, *_SPARABLE) if name == refusal.field]
    return in_words if _MEANS_A_FIELD.search(refusal.said) else []
