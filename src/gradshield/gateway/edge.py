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
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradshield.gateway.database import AWAY, Caller
from gradshield.gateway.settings import Limits
from gradshield.gateway.store import Store

API = "/v1/"
UPLOAD = "/v1/files"
ENVELOPE = 1 << 16  # bytes of an upload around its file
CLOSE = {"Connection": "close"}  # the rest of a body without an end would be read, and thrown away, for ever
log = structlog.get_logger("gradshield.gateway")


class ApiError(HTTPException):
    """An answer with the published error body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


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
            self.left[key] = (max(left - 1, 0.0) if left >= 1 else left, now)
        return 0.0 if left >= 1 else (1 - left) * 60 / self.size


class Edge:
    """ASGI middleware around the app. ``/v1/`` needs a key; the caller is in ``request.state.caller``."""

    def __init__(self, app: ASGIApp, store: Store, limits: Limits, registry: CollectorRegistry) -> None:
        self.app, self.store, self.limits = app, store, limits
        self.rates = Rates(limits.requests)
        self.requests = Counter(
            "gradshield_requests", "Requests by route and status.", ("method", "route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "gradshield_request_seconds", "Time to answer.", ("method", "route"), registry=registry
        )

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
            try:
                limit = self._admitted(scope)
                scope.setdefault("state", {})["caller"] = await self._caller(scope)
            except ApiError as error:
                await error.response()(scope, receive, answer)
                return
            except AWAY as error:
                await unavailable(error).response()(scope, receive, answer)
                return
            await self.app(scope, _bounded(receive, limit, self.limits.idle), answer)
        finally:
            self._record(scope, status, time.perf_counter() - began)

    def _admitted(self, scope: Scope) -> int:
        """The most bytes that the body may have. Raises ApiError if it says that it has more, and for a zero byte in the URL."""
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:  # no database holds it as text
            raise ApiError(400, "The URL holds a zero byte.", code="invalid_value")
        upload = scope["method"] == "POST" and scope["path"].rstrip("/") == UPLOAD
        limit = self.limits.upload + ENVELOPE if upload else self.limits.body
        length = _header(scope, b"content-length")
        if length.isdigit() and int(length) > limit:
            raise too_large(limit)
        return limit

    async def _caller(self, scope: Scope) -> Caller | None:
        if not scope["path"].startswith(API):
            return None
        kind, _, secret = _header(scope, b"authorization").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise ApiError(
                401,
                "You didn't provide an API key: send it in the header Authorization: Bearer KEY.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.store.near:  # the look-up takes less than a thread's turn, and nothing that writes holds it up
            caller = self.store.caller(secret.strip())
        else:
            caller = await run_in_threadpool(self.store.caller, secret.strip())
        if caller is None:
            raise ApiError(
                401, "Incorrect API key provided.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        if wait := self.rates.wait(caller.key):
            raise ApiError(
                429,
                f"The rate limit of {self.limits.requests} requests per minute is reached: try again in {wait:.1f} s.",
                code="rate_limit_exceeded",
                type="requests",
                headers={"Retry-After": str(int(wait) + 1)},
            )
        structlog.contextvars.bind_contextvars(project=caller.project, key=caller.key)
        return caller

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(
            scope.get("route"), "path", "none"
        )  # never the path itself: a label for each would fill the memory
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self.requests.labels(method, route, status).inc()
        self.seconds.labels(method, route).observe(seconds)
        log.info("request", method=method, path=scope["path"], status=status, ms=round(1000 * seconds, 1))


def too_large(limit: int, headers: dict[str, str] | None = None) -> ApiError:
    message = f"The request is larger than {limit} bytes, the most allowed here."
    return ApiError(413, message, code="request_too_large", headers=headers)


def unavailable(error: Exception) -> ApiError:
    log.error("the database cannot be reached", error=str(getattr(error, "orig", error)))
    message = "The database cannot be reached: try again."
    return ApiError(503, message, code="unavailable", type="server_error", headers={"Retry-After": "5"})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


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
            raise too_large(limit, CLOSE)
        ended = not message.get("more_body", False)
        return message

    return next_message
