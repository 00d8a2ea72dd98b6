"""A client of OpenAI-compatible endpoints: chat completions and moderations, through the official SDK.

The key is named, never given: a caller passes the name of an environment variable, and neither the value nor anything
that holds it is shown by an error, a ``repr`` or a record. It goes to one host: redirects are not followed, and nothing
that the environment holds for OpenAI (its key, organization, headers) is sent to another. The SDK repeats what may pass
and waits between tries; the time and the size of a reply are bounded here.
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
MAX_TOKENS = 1024  # of a chat reply: a judge that thinks aloud first still fits
PATIENCE = 3  # calls that failed in a row, after which a call is tried once, until one succeeds

_AGAIN = frozenset((408, 409, 429))  # statuses that may pass, besides every 5xx
_VARIES = ("max_tokens", "temperature")  # what some models know by another name, or not at all, and refuse
_SENT = ("host", "connection", "content-length", "content-type", "accept", "user-agent")  # headers
_SHOWN = 200  # characters of what an endpoint said
_SHOUTED = re.compile(r"[A-Z][A-Z0-9_]{0,39}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Moderation:
    """What a moderation endpoint says of one text: whether it is flagged, and a score from 0 to 1 per category."""

    flagged: bool
    scores: Mapping[str, float]


class _Refused(EndpointError):
    """A request that was refused; ``named`` are those of _VARIES that the endpoint named as it did so."""

    named: frozenset[str] = frozenset()


class Client:
    """One model behind one OpenAI-compatible endpoint. Calls may come from several threads.

    Parameters
    ----------
    base_url
        As such endpoints name it, up to and with ``/v1``.
    key
        Name of the environment variable that holds the API key; None sends no key.
    timeout
        Seconds for a connection, for each read, and for a whole reply.
    attempts
        Most tries of one call. A try is repeated after a timeout, a broken connection, a body that is not the
        protocol's, and the statuses 408, 409, 429 and 5xx; the wait doubles, or is what Retry-After asks.

    Raises
    ------
    UsageError
        The SDK is not installed; an address that is no plain http(s) URL; an environment variable that is not set; a key
        over plain http to a public host.
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
        self._untaken: frozenset[str] = frozenset()  # of _VARIES, what this model does not take
        self._thread = threading.local()  # ``ended``: the event that ends the `each` that a thread works for
        self._sdk = self._opened()

    def __repr__(self) -> str:
        return f"Client({self.base_url!r}, {self.model!r}, key={self._key_name!r})"

    @property
    def down(self) -> bool:
        """Whether the last PATIENCE calls, or more, all came to nothing: it is the endpoint, not one request."""
        return self._failures >= PATIENCE

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The reply to a conversation, at temperature 0; empty where the model wrote nothing.

        A model that refuses ``max_tokens`` gets ``max_completion_tokens``, and one that refuses ``temperature`` none, as
        OpenAI's that reason do; from then on at once.

        Raises EndpointError, and UsageError where the endpoint does not know the key, the address or the model.
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
                with self._lock:  # only what helped: an endpoint may name them for another reason
                    self._untaken |= untaken
                return reply

    def moderate(self, text: str) -> Moderation:
        """What the moderation endpoint says of a text. Raises as ``chat`` does."""
        return self._call("/moderations", _moderated, {"model": self.model, "input": text})

    def each(self, call: Callable[[Item], Found], items: Sequence[Item]) -> list[Found | EndpointError]:
        """``call`` for every item, ``concurrency`` at once, results in order; an EndpointError stands where it was raised.

        Any other error, and Ctrl-C, stops what has not begun and is raised at once: no call in flight is waited for, and
        none tries again.
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
        """What ``ask`` gets from the SDK's client. Its errors, which hold the key, are not the context of ours."""
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
            raised = self._gave_up(path, f"{type(cause).__name__}{self._said(str(cause))}")
        except UnicodeEncodeError:
            raised = EndpointError("the text to judge holds half a character, which cannot be sent: take it out")
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raised = self._gave_up(path, f"a reply that is not as the protocol says{self._said(str(error))}")
        else:
            self._failures = 0
            return found
        raise raised

    def _answered(self, path: str, status: int, text: str) -> GradShieldError:
        """The error for a status that ends a call."""
        url, said = self.base_url + path, self._said(text)
        if status in _AGAIN or status >= 500:
            return self._gave_up(path, f"status {status}{said}")
        if status == 401:
            key = f"the key in {self._key_name}" if self._key_name else "whether it needs a key (key=NAME_OF_VARIABLE)"
            return UsageError(f"{url} answered 401{said}: check {key}")
        if status == 404:
            return UsageError(f"{url} answered 404{said}: check its address, and that it serves {self.model!r}")
        if status < 400:
            return UsageError(
                f"{url} answered {status}, a redirect, which is not followed: give the address that it leads to, if you "
                "trust it"
            )
        refused = _Refused(
            f"{url} refused this request with {status}{said}: check that it takes such for {self.model!r}"
        )
        refused.named = frozenset(name for name in _VARIES if status == 400 and name in text)
        return refused

    def _gave_up(self, path: str, what: str) -> EndpointError:
        with self._lock:
            self._failures += 1
        return EndpointError(
            f"{self.base_url}{path} gave no answer, at last with {what}: check that it is up, and try again later"
        )

    def _opened(self) -> Any:
        """The SDK's client, over HTTP that bounds what comes in and sends our own headers alone."""
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
        # The key is added in `_send`; what is given here keeps the SDK from looking for one in the environment.
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
        """One try. Raises httpx2's errors for what may be tried again, and EndpointError for what may not."""
        import httpx2

        ended = getattr(self._thread, "ended", None)
        if ended is not None and ended.is_set():
            raise EndpointError(f"{request.url} was not asked: another call ended the work")
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
        if whole.is_success and not _spoken(whole):  # as some gateways answer when what is behind them fails
            raise httpx2.RemoteProtocolError(f"a reply that is not as the protocol says: {whole.text}")
        return whole

    def _said(self, text: str) -> str:
        """The start of what an endpoint said, in brackets: one line of printable characters, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = "".join(c if c.isprintable() else " " for c in text[: 4 * _SHOWN])
        line = " ".join(line.split())[:_SHOWN]
        return f" ({line})" if line else ""


def _checked_url(url: str, with_key: bool) -> str:
    """The base address without its last slash. An address with a password in it is not shown."""
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
    """Whether a host is this machine or in a private network, where plain http is usual."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))


def _secret(name: str | None) -> str | None:
    if name is None:
        return None
    if not _NAME.fullmatch(name):
        # What stands here may be the key itself, by mistake.
        raise UsageError("key takes the NAME of an environment variable (letters, digits and _), not a key")
    value = os.environ.get(name, "").strip()
    if not value:
        # Some keys look like names: only what is spelled as variables are is shown.
        shown = (
            f"the environment variable {name}" if _SHOUTED.fullmatch(name) else "the environment variable named by key"
        )
        raise UsageError(f"{shown} is not set, or empty: put the endpoint's API key into it, and give its NAME")
    if not (value.isascii() and value.isprintable()):
        raise UsageError(f"the environment variable {name} holds characters that no API key has: set it anew")
    return value


def _spoken(reply: Any) -> bool:
    """Whether a reply holds the list that the protocol's replies hold."""
    try:
        said = reply.json()
        return isinstance(said, dict) and any(said.get(name) for name in ("choices", "results"))
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
    said = result.category_scores.to_dict(warnings=False) if result.category_scores else {}
    scores = {name: float(value) for name, value in said.items()}
    if not all(0 <= value <= 1 for value in scores.values()):
        raise ValueError("category_scores")
    return Moderation(result.flagged, scores)
