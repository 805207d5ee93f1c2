"""The fields of a request for one answer, and what is changed of them when a server does not take one.

What is not sent, a server fills in from the model's folder, as it does for everyone whom it serves. So nothing of
sampling is sent that is not set; where all of it is, nothing is left to the server, and fields that are to have no
effect are sent too. Servers that refuse a field are asked without it, or with it under another name, from their first
refusal on.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from patarm_jax.ask.answers import Question
from patarm_jax.ask.replies import Refused
from patarm_jax.config.sections import EndpointSection, JudgingSection
from patarm_jax.types import Message

_LIMITS = ("max_tokens", "max_completion_tokens")  # what servers call the limit of new tokens
_ALL_TOKENS = (-1, 0)  # what servers call a top_k that leaves all tokens
# Fields that a request can do without, with the value at which they have no effect. A seed is ours, whatever it is.
_NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "top_k": None, "seed": None, "top_p": 1.0, "temperature": 1.0}
_SPARABLE = (*_NEUTRAL, "chat_template_kwargs")
_ABOUT_A_VALUE = re.compile(
    r"must be|at least|at most|greater|less than|out of range|between|too (?:large|high|low)|invalid value",
    re.IGNORECASE,
)
# How a server says that it means the field and not the question.
_MEANS_A_FIELD = re.compile(
    r"support|unrecogni[sz]ed|unexpected|unknown|not known|invalid|isn't valid|extra (?:input|field)|cannot|only|"
    r"deprecated|not (?:allowed|permitted|available|enabled)|parameter|argument|\bloc\b",
    re.IGNORECASE,
)
_MEANS_THE_SYSTEM = re.compile(r"system (?:role|message|prompt)|roles? must alternate", re.IGNORECASE)
_IN_USERS_TURN = "the system's words begin the user's turn"


@dataclass
class Dialect:
    """The fields that a server takes, as far as its refusals have told."""

    without: set[str] = field(default_factory=set)  # fields that it does not take
    limit: str = _LIMITS[0]
    all_tokens: int = _ALL_TOKENS[0]
    system_in_users_turn: bool = False  # where the server's chat template knows no system

    def messages(self, question: Question) -> list[Message]:
        """What is asked; without a turn of the system where the server takes none."""
        messages = list(question.messages)
        if not self.system_in_users_turn or messages[0]["role"] != "system":
            return messages
        system, user, *rest = messages
        return [Message(role="user", content=f"{system['content']}\n\n{user['content']}"), *rest]

    def fields(
        self, question: Question, vote: int, sampling: JudgingSection, section: EndpointSection, seed: int
    ) -> dict[str, object]:
        """A request but for model and messages; each vote has a seed of its own, which hangs on the question alone."""
        digest = hashlib.sha256(f"{seed} {question.key} {vote}".encode()).digest()
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        fields: dict[str, object] = {name: value for name, value in drawn.items() if value is not None}
        if len(fields) == len(drawn):
            fields |= {"min_p": 0.0, "repetition_penalty": 1.0}
        if sampling.top_k == 0:
            fields["top_k"] = self.all_tokens
        if sampling.max_new_tokens is not None:
            fields[self.limit] = sampling.max_new_tokens
        fields["seed"] = int.from_bytes(digest[:4]) >> 1
        if section.thinking != "server":
            fields["chat_template_kwargs"] = {"enable_thinking": section.thinking == "on"}
        return {name: value for name, value in fields.items() if name not in self.without}

    def record(self, fields: Mapping[str, object]) -> dict[str, object]:
        """What an answer is kept with: the fields of its request, and a word where its messages were changed."""
        return {**fields, "messages": _IN_USERS_TURN} if self.system_in_users_turn else dict(fields)

    def adapt(self, refusal: Refused, sent: Mapping[str, object]) -> str | None:
        """Changes what a refusal of a request with these fields names.

        Returns what was changed, in words; "" where another refusal has led to that already, so that the request is
        only to be sent anew; None where the refusal is about nothing that can be changed.
        """
        if refusal.own or refusal.for_all or not refusal.lasting:
            return None
        if _MEANS_THE_SYSTEM.search(refusal.said):
            return self._move_system("messages" in sent)
        named = [name for name in _named(refusal) if name in sent]
        about_value = _ABOUT_A_VALUE.search(refusal.said) is not None
        if "top_k" in named and sent["top_k"] in _ALL_TOKENS:
            return self._other_top_k(int(sent["top_k"]))
        # A value that the user chose is for the user to change.
        free = [name for name in named if not about_value or _has_no_effect(name, sent[name])]
        if not free:
            return None
        if free[0] in _LIMITS:
            return self._rename_limit(free[0])
        name = next((name for name in free if _has_no_effect(name, sent[name])), free[0])
        if name in self.without:
            return ""
        self.without.add(name)
        return f"{name} is left out, which the server does not take"

    def _move_system(self, moved: bool) -> str | None:
        if moved:
            return None  # it does not take that either
        if self.system_in_users_turn:
            return ""
        self.system_in_users_turn = True
        return "it takes no turn of the system, whose words now begin the user's turn"

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


def _has_no_effect(name: str, value: object) -> bool:
    return name in _NEUTRAL and _NEUTRAL[name] in (None, value) and not (name == "top_k" and value not in _ALL_TOKENS)


def _named(refusal: Refused) -> list[str]:
    """The fields that a refusal names: as the server's `param`, or in its words."""
    every = (*_LIMITS, *_SPARABLE)
    if refusal.field and "both" not in refusal.said:
        return [name for name in every if name == refusal.field]
    if not (_MEANS_A_FIELD.search(refusal.said) or _ABOUT_A_VALUE.search(refusal.said)):
        return []
    return [name for name in every if re.search(rf"(?<![\w-]){name}(?![\w-])", refusal.said)]
