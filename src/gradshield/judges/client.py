"""A client of OpenAI-compatible endpoints: chat completions and moderations, through the official SDK.

The caller passes the name of an environment variable, never the key itself; the value never appears in an error, a ``repr``
or a record. It is sent to one host: redirects are not followed, and OpenAI settings in the environment (key, organization,
headers) are not sent to other hosts. The SDK retries transient errors with back-off; this module bounds the time and size of
a reply.
"""

from __future__ import annotations

import ipaddress
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gradshield.errors import EndpointError, GradShieldError, UsageError

TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
CONCURRENCY = 4
LARGEST_REPLY = 2**20  # bytes
MAX_TOKENS = 1024  # in a chat reply, with room for a judge that reasons first
PATIENCE = 3  # after this many failed calls in a row, calls are tried once, until one succeeds

_AGAIN = frozenset((408, 409, 429))  # transient statuses, in addition to every 5xx
_VARIES = ("max_tokens", "temperature")  # parameters that some models rename or reject
_SENT = ("host", "connection", "content-length", "content-type", "accept", "user-agent")  # headers that are sent
_SHOWN = 200  # characters of an endpoint's text in a message
_SHOUTED = re.compile(r"[A-Z][A-Z0-9_]{0,39}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Moderation:
    """A moderation endpoint's result for one text: flagged or not, and a score from 0 to 1 per category."""

    flagged: bool
    scores: Mapping[str, float]


class _Refused(EndpointError):
    """A rejected request; ``named`` are the parameters in _VARIES that the endpoint's message mentions."""

    named: frozenset[str] = frozenset()


class Client:
    """One model behind one OpenAI-compatible endpoint. Calls may come from several threads.

    ``base_url`` is the endpoint's address, up to and including ``/v1``; ``key`` names the environment variable that holds the
    API key, None sends none; ``timeout`` is in seconds, for a connection, for each read, and for a whole reply; ``attempts`` is
    the most tries of one call, which is tried again after a timeout, a broken connection, a malformed body, and the statuses
    408, 409, 429 and 5xx (the wait doubles, or follows Retry-After).

    Raises UsageError if the SDK is not installed, the address is not a plain http(s) URL, the environment variable is not set,
    or a key would go over plain http to a public host.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str | None = None,
        *,
        timeout: float = TIMEOUT_SECONDS,
        attempts: int = ATTEMPTS,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self.base_url, self.model = _checked_url(base_url, key is not None), model
        self._key_name, self._key = key, _secret(key)
        self.timeout, self.attempts, self.concurrency = timeout, attempts, concurrency
        self._lock, self._failures = threading.Lock(), 0
        self._untaken: frozenset[str] = frozenset()  # the parameters in _VARIES that this model rejects
        self._thread = threading.local()  # ``ended``: the event that cancels the thread's `each`
        self._sdk = self._opened()

    def __repr__(self) -> str:
        return f"Client({self.base_url!r}, {self.model!r}, key={self._key_name!r})"

    @property
    def down(self) -> bool:
        """Whether the last PATIENCE calls or more all failed: the endpoint is down, not one request bad."""
        return self._failures >= PATIENCE

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The reply to a conversation, at temperature 0; empty if the model wrote nothing.

        For a model that rejects ``max_tokens``, ``max_completion_tokens`` is sent instead, and for one that rejects
        ``temperature``, none (OpenAI's reasoning models); later calls remember this.

        Raises EndpointError, and UsageError if the endpoint rejects the key, the address or the model.
        """
        untaken = self._untaken
        while True:
            asked: dict[str, Any] = {} if "temperature" in untaken else {"temperature": 0}
            asked["max_completion_tokens" if "max_tokens" in untaken else "max_tokens"] = MAX_TOKENS
            asked |= {"model": self.model, "messages": list(messages)}
            try:
                reply = self._call("/chat/completions", _chatted, asked)
            except _Refused as refused:
                if refused.named <= untaken:
                    raise
                untaken |= refused.named
            else:
                with self._lock:  # only after success: an endpoint may mention them for another reason
                    self._untaken |= untaken
                return reply

    def moderate(self, text: str) -> Moderation:
        """The moderation endpoint's result for a text. Raises like ``chat``."""
        return self._call("/moderations", _moderated, {"model": self.model, "input": text})

    def each(self, call: Callable[[Item], Found], items: Sequence[Item]) -> list[Found | EndpointError]:
        """``call`` for every item, ``concurrency`` at once, results in order; an EndpointError is returned in its place.

        Any other error, and Ctrl-C, is raised at once: waiting items are dropped, and calls in flight are neither awaited nor
        retried.
        """
        ended = threading.Event()

        def work(numbered: tuple[int, Item]) -> tuple[int, Found | EndpointError]:
            self._thread.ended = ended
            try:
                return numbered[0], call(numbered[1])
            except EndpointError as error:
                return numbered[0], error

        try:
            with ThreadPool(max(1, min(self.concurrency, len(items)))) as pool:  # of daemons; it ends without them
                found = dict(pool.imap_unordered(work, enumerate(items)))
        finally:
            ended.set()
        return [found[number] for number in range(len(items))]

    def _call(self, path: str, ask: Callable[[Any, Mapping[str, Any]], Found], asked: Mapping[str, Any]) -> Found:
        """The result of ``ask`` on the SDK's client. The SDK's errors, which hold the key, are not chained to ours."""
        import openai

        raised: GradShieldError
        try:
            found = ask(self._sdk.with_options(max_retries=0 if self.down else self.attempts - 1), asked)
        except openai.APIStatusError as error:
            raised = self._answered(path, error.status_code, error.response.text)
        except openai.APITimeoutError:
            raised = self._gave_up(path, f"no whole reply within {self.timeout:g} s")
        except openai.APIConnectionError as error:
            cause = error.__cause__
            raised = self._gave_up(path, f"{type(cause).__name__}{self._shown(str(cause))}")
        except UnicodeEncodeError:
            raised = EndpointError("the text to judge has a lone surrogate, which cannot be sent: remove it")
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raised = self._gave_up(path, f"a reply that breaks the protocol{self._shown(str(error))}")
        else:
            self._failures = 0
            return found
        raise raised

    def _answered(self, path: str, status: int, text: str) -> GradShieldError:
        """The error for a status that ends a call."""
        url, shown = self.base_url + path, self._shown(text)
        if status in _AGAIN or status >= 500:
            return self._gave_up(path, f"status {status}{shown}")
        if status == 401:
            key = f"the key in {self._key_name}" if self._key_name else "whether it needs a key (key=NAME_OF_VARIABLE)"
            return UsageError(f"{url} answered 401{shown}: check {key}")
        if status == 404:
            return UsageError(f"{url} answered 404{shown}: check its address, and that it serves {self.model!r}")
        if status < 400:
            return UsageError(
                f"{url} answered {status}, a redirect, which is not followed: give the target address, if you trust it"
            )
        refused = _Refused(
            f"{url} refused this request with {status}{shown}: check that it supports such requests for {self.model!r}"
        )
        refused.named = frozenset(name for name in _VARIES if status == 400 and name in text)
        return refused

    def _gave_up(self, path: str, what: str) -> EndpointError:
        with self._lock:
            self._failures += 1
        return EndpointError(
            f"{self.base_url}{path} gave no answer (last error: {what}): check that it is up, and try again later"
        )

    def _opened(self) -> Any:
        """The SDK's client, over an HTTP client that bounds replies and sends only our headers."""
        try:
            import httpx2
            import openai
        except ImportError:
            raise UsageError(
                "judges and guards behind an endpoint need the openai SDK, which is not installed: run "
                "pip install 'gradshield[endpoint]'"
            ) from None

        class Bounded(httpx2.Client):
            def send(http, request: httpx2.Request, **_: Any) -> Any:
                return self._send(super().send, request)

        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        http = Bounded(timeout=self.timeout, follow_redirects=False, limits=limits)
        # The key is added in `_send`; this placeholder keeps the SDK from reading one from the environment.
        none = "no-key"
        try:
            return openai.OpenAI(
                api_key=none, admin_api_key=none, base_url=self.base_url, timeout=self.timeout, http_client=http
            )
        except httpx2.InvalidURL:  # such as a host that no name can be
            raise UsageError(
                f"the endpoint's address is {self.base_url[:_SHOWN]!r}: give a plain URL like https://host/v1"
            ) from None

    def _send(self, send: Callable[..., Any], request: Any) -> Any:
        """One try. Raises httpx2's errors if a retry may help, else EndpointError."""
        import httpx2

        ended = getattr(self._thread, "ended", None)
        if ended is not None and ended.is_set():
            raise EndpointError(f"{request.url} was not called: another call stopped the work")
        headers = {name: value for name, value in request.headers.items() if name in _SENT}
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request.headers = httpx2.Headers(headers | key | {"Accept-Encoding": "identity"})
        end, body = time.monotonic() + self.timeout, bytearray()
        reply = send(request, stream=True)
        try:
            for chunk in reply.iter_bytes():
                body += chunk
                if len(body) > LARGEST_REPLY:
                    raise EndpointError(
                        f"{request.url} sent more than {LARGEST_REPLY} bytes for one reply: check that it is an "
                        "OpenAI-compatible endpoint"
                    )
                if time.monotonic() > end:
                    raise httpx2.ReadTimeout("no whole reply in time")
        finally:
            reply.close()
        kept = {name: reply.headers[name] for name in ("content-type", "retry-after") if name in reply.headers}
        whole = httpx2.Response(reply.status_code, headers=kept, content=bytes(body), request=request)
        if whole.is_success and not _well_formed(whole):  # some gateways do this when their backend fails
            raise httpx2.RemoteProtocolError(f"a reply that breaks the protocol: {whole.text}")
        return whole

    def _shown(self, text: str) -> str:
        """The start of an endpoint's text, in brackets: one line of printable characters, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = "".join(c if c.isprintable() else " " for c in text[: 4 * _SHOWN])
        line = " ".join(line.split())[:_SHOWN]
        return f" ({line})" if line else ""


def _checked_url(url: str, with_key: bool) -> str:
    """The base address without a trailing slash. An address with a password is never shown."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UsageError("the endpoint's address is not a URL: give one like https://host/v1") from None
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            "the endpoint's address holds a user or password: leave it out, and name the variable that holds the key"
        )
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not url.isprintable():
        raise UsageError(f"the endpoint's address is {url[:_SHOWN]!r}: give a plain URL like https://host/v1")
    if with_key and parts.scheme == "http" and not _nearby(host):
        raise UsageError(f"a key would go to {host} unencrypted: give an address that begins with https://")
    return url.rstrip("/")


def _nearby(host: str) -> bool:
    """Whether a host is local or in a private network, where plain http is acceptable."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))


def _secret(name: str | None) -> str | None:
    if name is None:
        return None
    if not _NAME.fullmatch(name):
        # The value may be the key itself, by mistake, so it is not shown.
        raise UsageError("key takes the NAME of an environment variable (letters, digits and _), not a key")
    value = os.environ.get(name, "").strip()
    if not value:
        # Some keys look like names: only upper-case names are shown.
        shown = (
            f"the environment variable {name}" if _SHOUTED.fullmatch(name) else "the environment variable named by key"
        )
        raise UsageError(f"{shown} is not set, or empty: put the endpoint's API key into it, and give its NAME")
    if not (value.isascii() and value.isprintable()):
        raise UsageError(f"the environment variable {name} has characters that no API key has: set it again")
    return value


def _well_formed(reply: Any) -> bool:
    """Whether a reply has the list that every reply of the protocol has."""
    try:
        body = reply.json()
        return isinstance(body, dict) and any(body.get(name) for name in ("choices", "results"))
    except (ValueError, RecursionError):
        return False


def _chatted(sdk: Any, asked: Mapping[str, Any]) -> str:
    content = sdk.chat.completions.create(**asked).choices[0].message.content
    if content is not None and not isinstance(content, str):
        raise TypeError("content")
    return content or ""


def _moderated(sdk: Any, asked: Mapping[str, Any]) -> Moderation:
    result = sdk.moderations.create(**asked).results[0]
    if not isinstance(result.flagged, bool):
        raise TypeError("flagged")
    by_category = result.category_scores.to_dict(warnings=False) if result.category_scores else {}
    scores = {name: float(value) for name, value in by_category.items()}
    if not all(0 <= value <= 1 for value in scores.values()):
        raise ValueError("category_scores")
    return Moderation(result.flagged, scores)
