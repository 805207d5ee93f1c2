"""One request to an OpenAI-compatible server, such as vLLM's or SGLang's: sent, tried again, read.

Temporary failures are tried again: a server that does not answer, cannot be reached, is too busy (429) or broken (5xx),
or returns something that is not an answer. A question that the server rejects raises `Refused`; whether it would reject
every question alike (a wrong key, an unknown model) is for the caller to tell.
"""

import asyncio
import ipaddress
import json
import math
import os
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx
import tenacity

from patarm_jax.ask.replies import Refused, Reply, Unavailable, raise_for_status, read_reply
from patarm_jax.config.sections import EndpointSection
from patarm_jax.types import UsageError, UserError

_LONGEST_PAUSE = 60.0  # seconds
_ANSWERED_PAUSE = 1.0  # seconds, after a reply that is not an answer: the server is up
LOOK = 0.1  # seconds between looking whether all is to stop


class Stopped(Exception):
    """All is to stop while a request waits for its next try, or before it is sent."""


def connect(section: EndpointSection) -> httpx.AsyncClient:
    """A client for as many requests at a time as the section allows."""
    url, key = _address(section.url), _key(section)
    limits = httpx.Limits(max_connections=section.concurrency, max_keepalive_connections=section.concurrency)
    try:
        return httpx.AsyncClient(
            base_url=section.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(section.timeout, connect=min(section.timeout, 30.0), pool=None),
            limits=limits,
            trust_env=not _is_this_machine(url.host),  # no proxy knows the way to 127.0.0.1
        )
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise UserError(
            f"the environment names a proxy that cannot be used: {error}. Set HTTP_PROXY, HTTPS_PROXY and ALL_PROXY as "
            f"http://host:port, or NO_PROXY={url.host} to go around them."
        ) from error


def _address(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise _no_address(error) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise _no_address("it does not begin with http:// or https:// and a host")
    if parsed.userinfo:
        # It would be written into config.yaml and printed. So the address itself is not repeated here.
        raise UsageError(
            "endpoint.url holds a name or password. Leave it out, and put the key into the environment variable that "
            "endpoint.api_key_env names."
        )
    if parsed.query or parsed.fragment:
        raise UsageError(
            "endpoint.url goes on behind ? or #, which requests would lose. Give the part before it; a key belongs "
            "into the environment variable that endpoint.api_key_env names."
        )
    return parsed


def _no_address(why: object) -> UserError:
    return UserError(f"endpoint.url is not an address: {why}. Give one such as http://host:8000/v1.")


def _key(section: EndpointSection) -> str:
    key = os.environ.get(section.api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in {section.api_key_env} holds characters that no key has. Copy it again.")
    return key


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


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


async def complete(
    client: httpx.AsyncClient,
    request: Mapping[str, object],
    section: EndpointSection,
    stopping: Callable[[], bool],
    trouble: Callable[[Unavailable], None],
    spend: Callable[[], None],
) -> Reply:
    """The answer to a request; raises Unavailable after so many tries, Refused, or Stopped when all is to stop.

    An answer of 429 does not count as a try; the server is waited for, `section.busy` seconds at most.

    Args:
        client: from `connect`.
        request: model, messages and the fields of a `Dialect`.
        section: how often and how long it is tried.
        stopping: whether all is to stop; asked while a request waits for its next try.
        trouble: told why a request is tried again.
        spend: called before each time that a request is sent; raises Stopped where no more may be.
    """
    growing = tenacity.wait_exponential_jitter(initial=1.0, max=_LONGEST_PAUSE)
    tries = 0

    def error_of(state: tenacity.RetryCallState) -> Unavailable:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, Unavailable)
        return error

    def pause(state: tenacity.RetryCallState) -> float:
        error = error_of(state)
        return max(error.pause, _ANSWERED_PAUSE if error.answered else growing(state))

    def enough(state: tenacity.RetryCallState) -> bool:
        error = error_of(state)
        error.requests = state.attempt_number
        return tries >= section.tries or (error.busy and (state.seconds_since_start or 0.0) > section.busy)

    async def send() -> Reply:
        nonlocal tries
        spend()
        try:
            async with asyncio.timeout(section.timeout):  # the client's own begins anew with every byte
                return read_reply(await _send(client, "POST", "chat/completions", dict(request)))
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


async def _send(client: httpx.AsyncClient, method: str, path: str, content: object) -> Any:
    try:
        response = await client.request(method, path, json=content)
    except httpx.TimeoutException as error:
        raise Unavailable(f"no answer in time ({type(error).__name__})") from error
    except httpx.RequestError as error:
        why = _without_key(client, str(error) or type(error).__name__)
        raise Unavailable(f"cannot reach the server{_through(client)}: {why}") from error
    text = _without_key(client, response.text)
    if response.is_redirect:
        where = _without_key(client, response.headers.get("Location", "nowhere"))
        raise Refused(response.status_code, f"moved to {where}; give that address as endpoint.url, up to /v1")
    raise_for_status(response.status_code, text, _retry_after(response))
    if response.headers.get("Content-Type", "").startswith("text/event-stream"):
        why = "the server streams its answer though that was not asked for: turn streaming off there"
        raise Unavailable(why, answered=True, foreign=True)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unavailable(f"the answer is not JSON: {text[:80]!r}", answered=True, foreign=True) from error


def _without_key(client: httpx.AsyncClient, text: str) -> str:
    """Servers repeat the key that they refuse; no log and no file is to hold it."""
    key = client.headers.get("Authorization", "").removeprefix("Bearer ")
    return text.replace(key, "***").replace(json.dumps(key)[1:-1], "***") if key else text


def _through(client: httpx.AsyncClient) -> str:
    """A clause on the proxy that stands between, where the environment names one."""
    host, scheme = client.base_url.host, client.base_url.scheme
    proxies = urllib.request.getproxies()
    proxied = not _is_this_machine(host) and (scheme in proxies or "all" in proxies)
    if not proxied or urllib.request.proxy_bypass(host):
        return ""
    return f" through the proxy that {scheme.upper()}_PROXY or ALL_PROXY names (NO_PROXY={host} goes around it)"


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
