"""What a server's reply is worth: the text a judge wrote, or why there is none.

Strings and JSON only; nothing is sent here. Servers that speak OpenAI's protocol differ in how they say that there is
no answer: by a status, by an `error` inside a reply of status 200, by a finish reason of their own, or by silence.
Every way that is known has one kind here, and what is not known is FAILED, so that it is asked again and never scored.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from patarm_jax.ask.answers import Answer, Answers, Kind, Question, answer_of
from patarm_jax.judge.parse import closes_thinking_it_did_not_open
from patarm_jax.types import Judgement, OpensThinking

Parse = Callable[[str], Judgement]

# Finish reasons in lower case → what came. OpenAI's own are stop, length, content_filter, tool_calls, function_call.
FINISH_REASONS: dict[str, Kind] = {
    "stop": Kind.ANSWER,
    "eos": Kind.ANSWER,  # text-generation-inference and others, by the token
    "eos_token": Kind.ANSWER,
    "stop_sequence": Kind.ANSWER,
    "end_turn": Kind.ANSWER,  # Anthropic
    "complete": Kind.ANSWER,  # Cohere
    "tool_calls": Kind.ANSWER,  # the judge called a tool instead of judging: its own fault, and final
    "function_call": Kind.ANSWER,
    "tool_use": Kind.ANSWER,
    "length": Kind.CUT,
    "max_tokens": Kind.CUT,  # Anthropic, Gemini, Cohere
    "max_output_tokens": Kind.CUT,
    "token_limit": Kind.CUT,  # watsonx
    "model_length": Kind.CUT,  # Mistral: at the end of the context
    "model_context_window_exceeded": Kind.CUT,  # Anthropic, the same
    "repetition": Kind.CUT,  # vLLM, where it detects that a text goes round in circles
    "content_filter": Kind.REFUSED,
    "content_filtered": Kind.REFUSED,
    "refusal": Kind.REFUSED,  # Anthropic
    "safety": Kind.REFUSED,  # Gemini, as the next four
    "recitation": Kind.REFUSED,
    "blocklist": Kind.REFUSED,
    "prohibited_content": Kind.REFUSED,
    "spii": Kind.REFUSED,
    "error_toxic": Kind.REFUSED,  # Cohere
    "guardrail_intervened": Kind.REFUSED,  # Bedrock
    "sensitive": Kind.REFUSED,  # GLM
    "error": Kind.FAILED,  # OpenRouter, Mistral, vLLM
    "abort": Kind.FAILED,  # vLLM and SGLang: the request was given up
    "aborted": Kind.FAILED,
    "cancelled": Kind.FAILED,
    "timeout": Kind.FAILED,
    "time_limit": Kind.FAILED,  # watsonx
    "network_error": Kind.FAILED,  # GLM
    "insufficient_system_resource": Kind.FAILED,  # DeepSeek
    "malformed_function_call": Kind.FAILED,  # Gemini
    "other": Kind.FAILED,  # Gemini
}

# What a rejected request says when its question does not fit, and when its content is not wanted.
_TOO_LONG = re.compile(
    r"context[ _-]?(?:length|window|size)|max(?:imum)?[ _-]model[ _-]len|prompt is too long|input (?:is )?too long|"
    r"too many (?:input )?tokens|exceeds? the (?:model's )?max\w* (?:\w+ )?(?:length|tokens)|reduce the length|"
    r"input length .*exceed|longer than the (?:model's )?(?:maximum|context)|range of input length|"
    r"(?:inputs?|prompt)\W{1,3}(?:tokens?|must have less|token count)",
    re.IGNORECASE,
)
_UNWANTED = re.compile(
    r"content[ _-]?(?:policy|filter|management)|responsibleaipolicy|moderation|flagged|data_?inspection_?failed|"
    r"safety (?:system|policy|filter)|prohibited content|usage polic|inappropriate content|content exists risk",
    re.IGNORECASE,
)
# What is refused to every question alike, whatever the status: no money, no key, no model.
_NO_MONEY = re.compile(
    r"insufficient[ _](?:quota|balance|credit|funds)|billing|payment required|credit balance|out of credits|"
    r"exceeded your (?:current )?quota|(?:key|total|usage|spend(?:ing)?|monthly) limit",
    re.IGNORECASE,
)
_NO_SERVICE = re.compile(
    r"api[ _-]?key|unauthori[sz]ed|authenticat|model_not_found|(?:unknown|no such) model|"
    r"model\b.{0,80}\b(?:not (?:loaded|found|available|exist)|does not exist|unavailable)",
    re.IGNORECASE,
)
ALL_APART = "all of it came as thinking, and nothing as content"
_MOST_TOKENS = 2**31 - 1  # the most that an answer may be said to have
_SHOWN = 200  # characters of what a server says


class Unavailable(Exception):
    """There is no answer, and there might be one later; the message says why."""

    def __init__(
        self,
        reason: str,
        *,
        pause: float = 0.0,
        busy: bool = False,
        answered: bool = False,
        foreign: bool = False,
        finish: str = "",
    ) -> None:
        super().__init__(reason)
        self.pause = pause  # seconds the server asked for
        self.busy = busy  # it does answer, only not so many at a time
        self.answered = answered  # by status 200: the server is up, and long pauses would help nothing
        self.foreign = foreign  # it does not look like this protocol at all
        self.finish = finish  # the finish reason, where the server gave one
        self.requests = 0  # how many were sent before it was given up


class Refused(Exception):
    """There will be no answer to this question; the message says why."""

    _FOR_ALL = (401, 402, 429)  # no key, no money
    _OF_A_QUESTION = (400, 413, 422)

    def __init__(self, status: int, said: str, kind: Kind = Kind.REFUSED) -> None:
        super().__init__(_short(f"{status}: {said}"))
        self.status = status
        self.said = said
        self.kind = kind
        # It is certainly about the question: it does not fit, or a content filter does not want it.
        self.own = kind == Kind.TOO_LONG or _UNWANTED.search(said) is not None
        self.field = _field(said)  # the request's field that the server names; empty where it names none

    @property
    def for_all(self) -> bool:
        """Whether the server refuses every question for this reason."""
        if self.own:
            return False
        return self.status in self._FOR_ALL or any(words.search(self.said) for words in (_NO_MONEY, _NO_SERVICE))

    @property
    def lasting(self) -> bool:
        """Whether it is about the question, where others are answered; else it is asked again."""
        return self.own or (self.status in self._OF_A_QUESTION and not self.for_all)


@dataclass(frozen=True)
class Reply:
    """What a model wrote."""

    kind: Kind  # ANSWER, CUT or REFUSED
    text: str  # its thinking inside <think> where the server sets it apart
    finish_reason: str  # as the server calls it
    tokens: int  # how many it wrote; 0 where the server does not say
    reason: str = ""  # why it is REFUSED
    all_apart: bool = False  # whether all of it came as thinking, and nothing as content


def raise_for_status(status: int, said: str, pause: float = 0.0) -> None:
    """Raises what an HTTP status, and the text that came with it, mean; nothing below 300."""
    if status < 300:
        return
    spent = status == 429 and _NO_MONEY.search(said) is not None  # waiting brings none
    # A server that is busy says 429. Some say 500 to a question that does not fit.
    if status == 413 or (status in (400, 422, 500) and _TOO_LONG.search(said)):
        raise Refused(status, said, Kind.TOO_LONG)
    if (status in (408, 409, 425, 429) and not spent) or status >= 500:
        raise Unavailable(_short(f"{status}: {said}"), pause=pause, busy=status == 429)
    raise Refused(status, said)


def _short(text: str) -> str:
    return " ".join(text.split())[:_SHOWN].rstrip(".")


def _field(said: str) -> str:
    """OpenAI's `error.param`, or the end of FastAPI's `detail[0].loc`."""
    try:
        answer = json.loads(said)
        error = answer.get("error")
        param = error.get("param") if isinstance(error, Mapping) else answer.get("param")
        found = param or answer["detail"][0]["loc"][-1]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def read_reply(answer: object) -> Reply:
    """A chat completion as what the model wrote.

    Raises:
        Unavailable: it is no chat completion, or says that it failed, or holds nothing.
        Refused: it is an error that lasts, though it came with status 200.
    """
    if not isinstance(answer, Mapping):
        raise _nonsense(answer)
    if answer.get("error"):
        _raise_error(answer["error"])
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        failure = choice.get("error") or message.get("error")
        content, apart, refused = _parts(message.get("content"))
        thinking = "".join([apart, *(_plain(message.get(name)) for name in _thinking_fields(message))])
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _nonsense(answer) from error
    if failure:
        _raise_error(failure, str(finish or "error"))
    finish = "" if finish is None else str(finish)
    kind, tokens = _kind(choice, finish), _tokens(answer.get("usage"))
    refusal = _plain(message.get("refusal")) or refused
    if refusal or kind == Kind.REFUSED:
        return Reply(
            kind=Kind.REFUSED,
            text=content,
            finish_reason=finish,
            tokens=tokens,
            reason=refusal or f"finish_reason {finish}",
        )
    if kind == Kind.FAILED:
        what = f"finish_reason is {finish}" if finish else "finish_reason is missing"
        raise Unavailable(f"the answer is not finished: {what}", answered=True, finish=finish)
    if not content and not thinking and not tokens:
        raise Unavailable("nothing was written, in 0 tokens", answered=True, finish=finish)
    text = _together(thinking, content).encode("utf-8", "replace").decode()  # half a character is no text
    return Reply(kind=kind, text=text, finish_reason=finish, tokens=tokens, all_apart=bool(thinking) and not content)


def _kind(choice: Mapping[str, object], finish: str) -> Kind:
    """By the finish reason; where a router gives the provider's own besides, that may say that it failed."""
    more = choice.get("provider_specific_fields")
    native = choice.get("native_finish_reason") or (isinstance(more, Mapping) and more.get("native_finish_reason"))
    if native and FINISH_REASONS.get(str(native).lower()) == Kind.FAILED:
        return Kind.FAILED
    return FINISH_REASONS.get(finish.lower(), Kind.FAILED)


def _raise_error(error: object, finish: str = "error") -> None:
    """An error inside a reply of status 200, by the status it names where it names one."""
    said = str(error.get("message") or error) if isinstance(error, Mapping) else str(error)
    code = error.get("code") if isinstance(error, Mapping) else None
    if isinstance(code, int) and not isinstance(code, bool) and 400 <= code < 600:
        try:
            raise_for_status(code, json.dumps({"error": error}, ensure_ascii=False))
        except Unavailable as unavailable:
            unavailable.finish, unavailable.answered = finish, not unavailable.busy
            raise
    raise Unavailable(_short(f"the answer is an error: {said}"), answered=True, finish=finish)


def _nonsense(answer: object) -> Unavailable:
    return Unavailable(f"the answer is not a chat completion: {str(answer)[:80]!r}", answered=True, foreign=True)


def _tokens(usage: Any) -> int:
    try:
        tokens = int(usage["completion_tokens"] or 0)
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0
    return tokens if 0 <= tokens <= _MOST_TOKENS else 0


# ---- Text -----------------------------------------------------------------------------------------------------------


def _thinking_fields(message: Mapping[str, object]) -> list[str]:
    """`reasoning_content` is DeepSeek's name, vLLM's and SGLang's; `reasoning` is OpenRouter's and vLLM's later one."""
    return [name for name in ("reasoning_content", "reasoning") if message.get(name)][:1]


def _parts(content: object) -> tuple[str, str, str]:
    """(text, thinking, refusal) of a message's content, which may be a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", "", ""
    if not isinstance(content, list):
        raise TypeError("content is neither text nor a list of parts")
    text, thinking, refusal = [], [], []
    for part in content:
        if isinstance(part, str):
            text.append(part)
        elif part.get("type") in ("thinking", "reasoning", "redacted_thinking"):
            thinking.append(_plain(part.get("thinking") or part.get("text") or part.get("reasoning")))
        elif part.get("type", "text") in ("text", "output_text"):
            text.append(_plain(part.get("text")))
        elif part.get("type") == "refusal":
            refusal.append(_plain(part.get("refusal")))
        else:
            raise TypeError("a part that is neither text nor thinking")
    return "".join(text), "".join(thinking), "".join(refusal)


def _plain(value: object) -> str:
    """Text that may stand in parts."""
    if isinstance(value, list):
        return "".join(_plain(each.get("text") if isinstance(each, Mapping) else each) for each in value)
    if value is None or isinstance(value, str):
        return value or ""
    raise TypeError("neither text nor a list of parts")


def _together(thinking: str, content: str) -> str:
    """What the judge wrote since its turn began."""
    if not thinking or content.lstrip().startswith("<think>"):
        # A judge that was told to write <think> may do so after thinking of its own, which is not what is judged then.
        return content
    if not content and "</think>" in thinking:
        # A server that sets thinking apart took all for it; the judge itself says where its thinking ends.
        return f"<think>{thinking}" if closes_thinking_it_did_not_open(thinking) else thinking
    return f"<think>{thinking}</think>{content}"


# ---- As an answer ---------------------------------------------------------------------------------------------------


def as_answer(
    question: Question, vote: int, parse: Parse, opens: OpensThinking, reply: Reply, sent: Mapping[str, object]
) -> Answer:
    """A reply as it was read; `read_again` follows when all have come."""
    cut = reply.kind == Kind.CUT
    opened = _is_opened(reply.text, cut, opens)
    judgement = parse("<think>" + reply.text if opened else reply.text)
    if reply.all_apart and judgement.reason:
        judgement = replace(judgement, reason=f"{judgement.reason}; {ALL_APART}")
    return answer_of(question, vote, judgement, reply.tokens, cut, reply.finish_reason, sent, opened)


def read_again(answers: Answers, parse: Parse, opens: OpensThinking) -> None:
    """Reads by what all answers together show of the server's chat template, and by what the user says of it today."""
    texts = {
        key: answer.text.removeprefix("<think>") if answer.opened else answer.text
        for key, answer in answers.known.items()
        if answer.kind in (Kind.ANSWER, Kind.CUT)
    }
    shown = any(map(closes_thinking_it_did_not_open, texts.values()))
    changed = []
    for key, text in texts.items():
        answer = answers.known[key]
        opened = _is_opened(text, answer.cut, opens, shown)
        if opened != answer.opened:
            changed.append(_reread(answer, parse("<think>" + text if opened else text), opened))
    answers.add(changed)


def _is_opened(text: str, cut: bool, opens: OpensThinking, shown: bool = False) -> bool:
    """Whether the chat template wrote `<think>` before this text: what is read is all that stands in the judge's turn.

    The template of a server is not seen. That it opens the thinking is shown by a text that ends a thinking which it
    did not open. Once any has, a text that was cut off before it did lies inside the thinking as well.
    """
    if opens == "no" or text.lstrip().startswith("<think>"):
        return False
    return (
        opens == "yes"
        or closes_thinking_it_did_not_open(text)
        or (shown and cut and "</think>" not in text and "<think>" not in text)
    )


def _reread(answer: Answer, read: Judgement, opened: bool) -> Answer:
    return replace(
        answer,
        status=read.status.name,
        score=read.score,
        choice=read.choice,
        text=read.text,
        reason=read.reason,
        opened=opened,
    )
