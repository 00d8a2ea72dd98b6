"""A small client of OpenAI-compatible endpoints: chat completions and moderations.

The key is named, never given: a caller passes the name of an environment variable, and neither the value nor anything
that holds it is shown by an error, a ``repr`` or a record. It goes to one host: redirects are not followed. What an
endpoint does is bounded on our side: attempts, waits, the time and the size of a reply.

HTTP is `httpx2`, which huggingface_hub brings along anyway, so that this costs a user no further package.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from gradshield.errors import EndpointError, UsageError

TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
CONCURRENCY = 4
LARGEST_REPLY = 2**20  # bytes
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds
MAX_TOKENS = 1024  # of a chat reply: a judge that thinks aloud first still fits
PATIENCE = 3  # calls that failed in a row, after which a call is tried once, until one succeeds

_VARIES = ("max_tokens", "temperature")  # what some models know by another name, or not at all, and refuse
_AGAIN = frozenset((408, 409, 429))  # beside every 5xx
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


class _Failed(Exception):
    """One attempt that may be repeated; ``wait`` is how long the endpoint asks for, in seconds."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _Refused(EndpointError):
    """A request that was refused; ``named`` are those of _VARIES that the endpoint named as it did so."""

    def __init__(self, what: str, named: frozenset[str]) -> None:
        super().__init__(what)
        self.named = named


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
        protocol's, and the statuses 408, 409, 429 and 5xx; the wait doubles, with jitter, or is what Retry-After asks.
    sleep, jitter
        Waits for some seconds (None: as long, or until `each` ends); gives a number from 0 to 1. Replaced in tests.

    Raises
    ------
    UsageError
        An address that is no plain http(s) URL, an environment variable that is not set, a key over plain http to a
        public host.
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
        sleep: Callable[[float], None] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.base_url, self.model = _checked_url(base_url, key is not None), model
        self.host = urlsplit(self.base_url).hostname or ""
        self._key_name, self._key = key, _secret(key)
        self.timeout, self.attempts, self.concurrency = timeout, attempts, concurrency
        self._sleep, self._jitter = sleep, jitter
        self._lock, self._failures = threading.Lock(), 0
        self._untaken: frozenset[str] = frozenset()  # of _VARIES, what this model does not take
        self._thread = threading.local()  # ``ended``: whether the `each` that a thread works for is over
        self._http: Any = None

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
            asked: dict[str, Any] = {"messages": list(messages)}
            if "temperature" not in untaken:
                asked["temperature"] = 0
            asked["max_completion_tokens" if "max_tokens" in untaken else "max_tokens"] = MAX_TOKENS
            try:
                reply = self._call("/chat/completions", asked, _chat_reply)
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
        return self._call("/moderations", {"input": text}, _moderation)

    def each(self, call: Callable[[Item], Found], items: Sequence[Item]) -> list[Found | EndpointError]:
        """``call`` for every item, ``concurrency`` at once, results in order; an EndpointError stands where it was raised.

        Any other error, and Ctrl-C, stops what has not begun and is raised at once: no call in flight is waited for, and
        none tries again.
        """
        ended = threading.Event()
        waiting: SimpleQueue[tuple[int, Item] | None] = SimpleQueue()
        told: SimpleQueue[tuple[int, Found | BaseException]] = SimpleQueue()

        def work() -> None:
            self._thread.ended = ended
            while (taken := waiting.get()) is not None and not ended.is_set():
                try:
                    told.put((taken[0], call(taken[1])))
                except BaseException as error:  # raised, or put in its place, by the caller's thread
                    told.put((taken[0], error))

        for numbered in enumerate(items):
            waiting.put(numbered)
        found: dict[int, Found | EndpointError] = {}
        try:
            for _ in range(max(1, min(self.concurrency, len(items)))):
                waiting.put(None)
                threading.Thread(
                    target=work, daemon=True
                ).start()  # daemons: the end of the program waits for none either
            while len(found) < len(items):
                number, one = told.get()
                if isinstance(one, BaseException) and not isinstance(one, EndpointError):
                    raise one
                found[number] = one
        finally:
            ended.set()
        return [found[number] for number in range(len(items))]

    def close(self) -> None:
        """Close the connections; the client opens new ones when it is used again."""
        with self._lock:
            http, self._http = self._http, None
        if http is not None:
            http.close()

    def _call(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Found]) -> Found:
        asked = json.dumps({"model": self.model, **body}).encode()
        attempts = 1 if self.down else self.attempts
        ended: threading.Event = getattr(self._thread, "ended", None) or threading.Event()
        for attempt in range(attempts):
            if ended.is_set():
                raise EndpointError(f"{self.base_url}{path} was not asked: another call ended the work")
            try:
                found = self._attempt(path, asked, read)
            except _Failed as failed:
                wait = failed.wait
                if wait is None:
                    wait = min(LONGEST_WAIT, FIRST_WAIT * 2**attempt) * (0.5 + 0.5 * self._jitter())
                if attempt + 1 == attempts or wait > LONGEST_WAIT:
                    raise self._gave_up(path, str(failed), attempt + 1, failed.wait) from None
                (self._sleep or ended.wait)(wait)
            else:
                self._failures = 0
                return found
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, path: str, asked: bytes, read: Callable[[Any], Found]) -> Found:
        status, headers, text = self._post(path, asked)
        if status in _AGAIN or status >= 500:
            raise _Failed(f"status {status}{self._said(text)}", _retry_after(headers.get("retry-after")))
        if status in (401, 404):
            key = f"the key in {self._key_name}" if self._key_name else "whether it needs a key (key=NAME_OF_VARIABLE)"
            remedy = key if status == 401 else f"its address, and that it serves {self.model!r}"
            raise UsageError(f"{self.base_url}{path} answered {status}{self._said(text)}: check {remedy}")
        if 300 <= status < 400:
            raise UsageError(
                f"{self.base_url}{path} answered {status}, a redirect, which is not followed: give the address that it "
                "leads to, if you trust it"
            )
        if status >= 400:
            raise _Refused(
                f"{self.base_url}{path} refused this request with {status}{self._said(text)}: check that it takes such "
                f"requests for {self.model!r}",
                frozenset(name for name in _VARIES if status == 400 and name in text),
            )
        try:
            return read(json.loads(text))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
            raise _Failed(f"a reply that is not as the protocol says{self._said(text)}") from None

    def _post(self, path: str, asked: bytes) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and body of one request. Raises _Failed for what a network does."""
        import httpx2

        end = time.monotonic() + self.timeout
        try:
            with self._opened().stream("POST", self.base_url + path, content=asked, headers=self._headers()) as reply:
                body = bytearray()
                for chunk in reply.iter_bytes():
                    body += chunk
                    if len(body) > LARGEST_REPLY:
                        raise EndpointError(
                            f"{self.base_url}{path} sent more than {LARGEST_REPLY} bytes for one reply: check that it is "
                            "an OpenAI-compatible endpoint"
                        )
                    if time.monotonic() > end:
                        raise _Failed(f"no whole reply within {self.timeout:g} s")
                return reply.status_code, reply.headers, bytes(body).decode("utf-8", "replace")
        except httpx2.TimeoutException:
            raise _Failed(f"no reply within {self.timeout:g} s") from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Failed(f"{type(error).__name__}{self._said(str(error))}") from None

    def _opened(self) -> Any:
        import httpx2

        with self._lock:
            if self._http is None:
                limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
                self._http = httpx2.Client(timeout=self.timeout, follow_redirects=False, limits=limits)
            return self._http

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        return headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    def _said(self, text: str) -> str:
        """The start of what an endpoint said, in brackets: one line of printable characters, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = "".join(c if c.isprintable() else " " for c in text[: 4 * _SHOWN])
        line = " ".join(line.split())[:_SHOWN]
        return f" ({line})" if line else ""

    def _gave_up(self, path: str, what: str, attempts: int, wait: float | None) -> EndpointError:
        with self._lock:
            self._failures += 1
        tries = "one attempt" if attempts == 1 else f"{attempts} attempts"
        asks = f", and asks to wait {wait:.0f} s" if wait is not None and wait > LONGEST_WAIT else ""
        return EndpointError(
            f"{self.base_url}{path} gave no answer in {tries}, the last with {what}{asks}: check that it is up, and "
            "try again later"
        )


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


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None where it says nothing that can be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (ValueError, TypeError, LookupError, ArithmeticError):
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _chat_reply(reply: Any) -> str:
    content = reply["choices"][0]["message"].get("content")
    if content is not None and not isinstance(content, str):
        raise TypeError("content")
    return content or ""


def _moderation(reply: Any) -> Moderation:
    result = reply["results"][0]
    if not isinstance(result["flagged"], bool):
        raise TypeError("flagged")
    scores = {str(name): float(value) for name, value in (result.get("category_scores") or {}).items()}
    if not all(0 <= value <= 1 for value in scores.values()):
        raise ValueError("category_scores")
    return Moderation(result["flagged"], scores)
