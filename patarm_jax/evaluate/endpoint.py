"""One request to an OpenAI-compatible server, such as vLLM's or SGLang's: sent, tried again, read.

Temporary failures are tried again with growing pauses: a server that does not answer, cannot be reached, is too busy
(429) or broken (5xx), or returns nonsense. A question that the server rejects raises `Refused`; whether it would reject
every question alike (a wrong key, an unknown model) is for the caller to tell.
"""

import asyncio
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx
import tenacity

from patarm_jax.config import EndpointSection, SamplingSection
from patarm_jax.evaluate.answers import Question
from patarm_jax.types import UserError

_LONGEST_PAUSE = 60.0  # seconds
# No key, no money: the same for every question. A moving or missing address, or what is forbidden: perhaps.
_FOR_ALL = (401, 402, 429)
_PERHAPS_ALL = (301, 302, 307, 308, 403, 404, 405)
_MOST_TOKENS = 2**31 - 1  # that an answer may be said to have
LOOK = 0.1  # seconds between looking whether all is to stop


class Unavailable(Exception):
    """There is no answer, and there might be one later; the message says why."""

    def __init__(self, reason: str, pause: float = 0.0, busy: bool = False) -> None:
        super().__init__(reason)
        self.pause = pause  # seconds the server asked for
        self.busy = busy  # it does answer, only not so many at a time
        self.requests = 0  # that were sent before it was given up


class Refused(Exception):
    """There will be no answer to this question; the message says why."""

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status

    @property
    def for_all(self) -> bool:
        """Whether the server refuses every question for this reason."""
        return self.status in _FOR_ALL

    @property
    def perhaps_for_all(self) -> bool:
        """Whether it may."""
        return self.for_all or self.status in _PERHAPS_ALL


class Stopped(Exception):
    """All is to stop while a request waits for its next try."""


@dataclass(frozen=True)
class Reply:
    """What a model wrote."""

    text: str  # its thinking inside <think> where the server sets it apart
    tokens: int  # that it wrote; 0 where the server does not say
    cut: bool  # off at the limit of new tokens


def connect(section: EndpointSection) -> httpx.AsyncClient:
    """A client for as many requests at a time as the section allows."""
    key = os.environ.get(section.api_key_env, "")
    if not key.isascii():
        raise UserError(f"the key in {section.api_key_env} holds letters that no key has. Copy it again.")
    limits = httpx.Limits(max_connections=section.concurrency, max_keepalive_connections=section.concurrency)
    return httpx.AsyncClient(
        base_url=section.url.rstrip("/") + "/",
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(section.timeout, connect=min(section.timeout, 30.0), pool=None),
        limits=limits,
    )


async def served_model(client: httpx.AsyncClient, section: EndpointSection) -> str:
    """The first model that the server lists."""
    try:
        listed = await _send(client, "GET", "models", None)
        name = listed["data"][0]["id"]
    except (Unavailable, Refused, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{section.url} does not list its models: {error}. Check endpoint.url, which ends in /v1 as a rule, or "
            "name the model as endpoint.model."
        ) from error
    return str(name)


def body(
    model: str, question: Question, vote: int, sampling: SamplingSection, section: EndpointSection, seed: int
) -> dict[str, Any]:
    """The request for one answer; each vote has a seed of its own, which hangs on the question and nothing else."""
    digest = hashlib.sha256(f"{seed} {question.key} {vote}".encode()).digest()
    request: dict[str, Any] = {
        "model": model,
        "messages": list(question.messages),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": int.from_bytes(digest[:4]) >> 1,
    }
    if sampling.top_k:
        request["top_k"] = sampling.top_k
    if section.thinking != "server":
        request["chat_template_kwargs"] = {"enable_thinking": section.thinking == "on"}
    return request


async def complete(
    client: httpx.AsyncClient,
    request: Mapping[str, Any],
    section: EndpointSection,
    stopping: Callable[[], bool],
    trouble: Callable[[Unavailable], None],
) -> Reply:
    """The answer to a request; raises Unavailable after so many tries, Refused, or Stopped when all is to stop.

    An answer of 429 does not count as a try; the server is waited for, `section.busy` seconds at most.

    Args:
        client: from `connect`.
        request: from `body`.
        section: how often and how long it is tried.
        stopping: whether all is to stop; asked while a request waits for its next try.
        trouble: told why a request is tried again.
    """
    growing = tenacity.wait_exponential_jitter(initial=1.0, max=_LONGEST_PAUSE)
    tries = 0

    def error_of(state: tenacity.RetryCallState) -> Unavailable:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, Unavailable)
        return error

    def pause(state: tenacity.RetryCallState) -> float:
        return max(error_of(state).pause, growing(state))

    def enough(state: tenacity.RetryCallState) -> bool:
        error = error_of(state)
        error.requests = state.attempt_number
        return tries >= section.tries or (error.busy and (state.seconds_since_start or 0.0) > section.busy)

    async def send() -> Reply:
        nonlocal tries
        try:
            async with asyncio.timeout(section.timeout):  # the client's own begins anew with every byte
                return _reply(await _send(client, "POST", "chat/completions", dict(request)))
        except TimeoutError as error:
            tries += 1
            raise Unavailable(f"no answer in {section.timeout:g} s") from error
        except Unavailable as error:
            tries += not error.busy
            raise

    async def wait(seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while not stopping():
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await asyncio.sleep(min(LOOK, left))
        raise Stopped

    retrying = tenacity.AsyncRetrying(
        sleep=wait,
        before_sleep=lambda state: trouble(error_of(state)),
        stop=enough,
        wait=pause,
        retry=tenacity.retry_if_exception_type(Unavailable),
        reraise=True,
    )
    return await retrying(send)


async def _send(client: httpx.AsyncClient, method: str, path: str, content: Any) -> Any:
    try:
        response = await client.request(method, path, json=content)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UserError(f"endpoint.url is no address: {error}. Give one such as http://host:8000/v1.") from error
    except httpx.TimeoutException as error:
        raise Unavailable(f"no answer in time ({type(error).__name__})") from error
    except httpx.RequestError as error:
        raise Unavailable(f"cannot reach the server: {str(error) or type(error).__name__}") from error
    _raise_for(response)
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise Unavailable(f"the answer is not JSON: {response.text[:80]!r}") from error


def _raise_for(response: httpx.Response) -> None:
    status = response.status_code
    if status < 300:
        return
    said = f"{status}: {' '.join(response.text.split())[:200]}"
    spent = status == 429 and "insufficient_quota" in said  # OpenAI's word for money; waiting brings none
    if (status in (408, 409, 425, 429) and not spent) or status >= 500:
        raise Unavailable(said, _retry_after(response), busy=status == 429)
    raise Refused(said, status)


def _retry_after(response: httpx.Response) -> float:
    """Seconds the server asks to wait, by their number or by a date."""
    said = response.headers.get("Retry-After", "0")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # neither; or a date that names no zone
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE) if math.isfinite(seconds) else 0.0


def _reply(answer: Any) -> Reply:
    try:
        choice = answer["choices"][0]
        message, finished = choice["message"], choice.get("finish_reason")
        content = message.get("content") or ""
        thinking = message.get("reasoning_content") or message.get("reasoning") or ""
        tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
        if not isinstance(content, str) or not isinstance(thinking, str):
            raise TypeError("content is no text")
        if not content and not thinking and not finished:
            raise ValueError("nothing was written")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise Unavailable(f"the answer is no chat completion: {str(answer)[:80]!r}") from error
    # A judge that was told to write <think> may do so after thinking of its own, which is not what is judged then.
    inside = thinking and not content.lstrip().startswith("<think>")
    text = f"<think>{thinking}</think>{content}" if inside else content
    text = text.encode("utf-8", "replace").decode()  # half a character is no text
    return Reply(text, tokens if 0 <= tokens <= _MOST_TOKENS else 0, finished == "length")
