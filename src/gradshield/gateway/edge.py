"""What every request passes: an id, a key, a rate, a size, and one line in the log."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradshield.gateway.database import AWAY, Caller
from gradshield.gateway.settings import Limits
from gradshield.gateway.store import Store

API = "/v1/"
UPLOAD = "/v1/files"
ENVELOPE = 1 << 16  # bytes of an upload around its file
METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS")
CLOSE = {"Connection": "close"}  # the rest of a body without an end would be read, and thrown away, for ever
BEARER = {"WWW-Authenticate": "Bearer"}
log = structlog.get_logger("gradshield.gateway")


class ApiError(HTTPException):
    """An answer with the published error body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        kind = "server_error" if status >= 500 else "requests" if status == 429 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


def unavailable(message: str, seconds: int = 5) -> ApiError:
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(seconds)})


def away(error: Exception) -> ApiError:
    log.error("the database cannot be reached", error=str(getattr(error, "orig", error)))
    return unavailable("The database cannot be reached: try again.")


class Rates:
    """A bucket of requests for each key, refilled evenly to ``a_minute``."""

    def __init__(self, a_minute: int) -> None:
        self.size, self.lock = a_minute, threading.Lock()
        self.left: dict[str, tuple[float, float]] = {}

    def wait(self, key: str) -> float:
        """Take one request; the seconds to wait if there is none left."""
        now = time.monotonic()
        with self.lock:
            left, at = self.left.get(key, (float(self.size), now))
            left = min(float(self.size), left + (now - at) * self.size / 60)
            self.left[key] = (left - 1 if left >= 1 else left, now)
        return 0.0 if left >= 1 else (1 - left) * 60 / self.size


class Edge:
    """ASGI middleware around the app. ``/v1/`` needs a key; the caller is in ``request.state.caller``."""

    def __init__(self, app: ASGIApp, store: Store, limits: Limits, registry: CollectorRegistry) -> None:
        self.app, self.store, self.limits, self.rates = app, store, limits, Rates(limits.requests)
        labels = ("method", "route", "status")
        self.requests = Counter("gradshield_requests", "Requests by route and status.", labels, registry=registry)
        self.seconds = Histogram("gradshield_request_seconds", "Time to answer.", labels[:2], registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, id = time.perf_counter(), 500, secrets.token_hex(16)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=id)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = ((b"x-request-id", id.encode()), (b"x-content-type-options", b"nosniff"))
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        try:
            headers = Headers(scope=scope)
            limit = self._admitted(scope, headers.get("content-length", ""))
            caller = await self._caller(headers.get("authorization", "")) if scope["path"].startswith(API) else None
            scope.setdefault("state", {})["caller"] = caller
        except (ApiError, *AWAY) as error:
            refused = error if isinstance(error, ApiError) else away(error)
            await refused.response()(scope, receive, answer)
        else:
            await self.app(scope, _bounded(receive, limit, self.limits.idle), answer)
        finally:
            # Never the path itself as a label: one for each would fill the memory.
            route, seconds = getattr(scope.get("route"), "path", "none"), time.perf_counter() - began
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.requests.labels(method, route, status).inc()
            self.seconds.labels(method, route).observe(seconds)
            log.info("request", method=method, path=scope["path"], status=status, ms=round(1000 * seconds, 1))

    def _admitted(self, scope: Scope, length: str) -> int:
        """The most bytes that the body may have. Raises ApiError if it says that it has more, and for a zero byte in the URL."""
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:  # no database holds it as text
            raise ApiError(400, "The URL holds a zero byte.", code="invalid_value")
        upload = scope["method"] == "POST" and scope["path"].rstrip("/") == UPLOAD
        limit = self.limits.upload + ENVELOPE if upload else self.limits.body
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        return limit

    async def _caller(self, header: str) -> Caller:
        """Whose key a request has. Raises ApiError if it has none, and if the key's rate is reached."""
        kind, _, secret = header.partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            message = "You didn't provide an API key: send it in the header Authorization: Bearer KEY."
            raise ApiError(401, message, headers=BEARER)
        if self.store.near:  # the look-up takes less than a thread's turn, and nothing that writes holds it up
            caller = self.store.caller(secret.strip())
        else:
            caller = await run_in_threadpool(self.store.caller, secret.strip())
        if caller is None:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=BEARER)
        if wait := self.rates.wait(caller.key):
            most = self.limits.requests
            message = f"The rate limit of {most} requests per minute is reached: try again in {wait:.1f} s."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(int(wait) + 1)})
        structlog.contextvars.bind_contextvars(project=caller.project, key=caller.key)
        return caller


def _too_large(limit: int, headers: dict[str, str] | None = None) -> ApiError:
    message = f"The request is larger than {limit} bytes, the most allowed here."
    return ApiError(413, message, code="request_too_large", headers=headers)


def _bounded(receive: Receive, limit: int, idle: float) -> Receive:
    """``receive`` that raises ApiError for a body over ``limit`` bytes, or one that stops for ``idle`` seconds."""
    read, ended = 0, False

    async def next_message() -> Any:
        nonlocal read, ended
        if ended:
            return await receive()  # waits for the end of the connection
        try:
            message = await asyncio.wait_for(receive(), idle)
        except TimeoutError:
            said = f"The request's body stopped for {idle:g} s: send it again."
            raise ApiError(408, said, code="timeout", headers=CLOSE) from None
        read += len(message.get("body", b""))
        if read > limit:
            raise _too_large(limit, CLOSE)
        ended = not message.get("more_body", False)
        return message

    return next_message
