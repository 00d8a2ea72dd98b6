"""The web app: the API, its errors, and what operations needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gradshield import __version__
from gradshield.errors import UsageError
from gradshield.gateway import api
from gradshield.gateway.chat import Chats
from gradshield.gateway.content import Content
from gradshield.gateway.dashboard import pages
from gradshield.gateway.dashboard.session import Sessions
from gradshield.gateway.database import AWAY, Missing, Refused
from gradshield.gateway.edge import ApiError, Edge, unavailable
from gradshield.gateway.queue import Queue
from gradshield.gateway.settings import Settings
from gradshield.gateway.store import Store
from gradshield.gateway.wire import error_body

log = structlog.get_logger("gradshield.gateway")


@dataclass(eq=False)
class Gateway:
    """What the routes share. ``send`` puts a job into the queue."""

    settings: Settings
    store: Store
    content: Content
    send: Callable[[str], None]
    chats: Chats
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)


def create_app(settings: Settings, send: Callable[[str], None] | None = None) -> FastAPI:
    """The app on a migrated database. ``send`` takes the id of a job to run; by default the settings' queue does.

    Raises UsageError for a URL or a folder that cannot be used.
    """
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"the folder {str(settings.folder)!r} cannot be made ({error.strerror}): give another --folder"
        ) from None
    if send is None:
        send = Queue(settings).send
    store = Store(settings.database_url, settings.webhooks)
    store.migrate()
    gateway = Gateway(settings, store, Content(settings.files_url), send, Chats(settings))
    gateway.registry.register(_Jobs(store))

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        gateway.chats.close()
        store.close()

    app = FastAPI(
        title="GradShield gateway",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.gateway = gateway
    app.state.sessions = Sessions(settings.folder)
    app.add_middleware(Edge, store=store, limits=settings.limits, registry=gateway.registry)
    app.include_router(api.router)
    app.include_router(pages.router)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)

    @app.get("/healthz", include_in_schema=False)
    def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    def readyz() -> Response:
        """The database and the files can be reached."""
        try:
            store.counts()
            ready = gateway.content.ready()
        except Exception as error:
            log.warning("not ready", error=type(error).__name__)
            ready = False
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        return Response(generate_latest(gateway.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class _Jobs:
    """Jobs by status, counted when the metrics are read."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def collect(self) -> Any:
        family = GaugeMetricFamily("gradshield_jobs", "Jobs by status.", labels=("status",))
        for status, count in self.store.counts().items():
            family.add_metric((status,), count)
        yield family


def _http(_request: Request, error: Any) -> Response:
    if isinstance(error, ApiError):
        return error.response()
    message = {404: "Unknown request URL.", 405: "This method is not allowed here."}.get(
        error.status_code, str(error.detail)
    )
    return JSONResponse(error_body(message), error.status_code, error.headers)


def _invalid(_request: Request, error: Any) -> Response:
    """The first thing that is wrong with a request, with the name of its parameter."""
    found = error.errors()
    wrong = next((one for one in found if one["type"] != "literal_error"), found[0])  # "or 'auto'" says less
    path = [part for part in wrong["loc"][1:] if not (isinstance(part, str) and _is_union(part))]
    param = ".".join(map(str, path)) or None
    kinds = {
        "extra_forbidden": "unknown_parameter",
        "missing": "missing_required_parameter",
        "json_invalid": "invalid_json",
    }
    code = kinds.get(wrong["type"], "invalid_value")
    said = {
        "unknown_parameter": f"Unknown parameter: {param!r}.",
        "missing_required_parameter": f"Missing required parameter: {param!r}.",
        "invalid_json": "We could not parse the JSON body of your request.",
    }
    message = said.get(code, f"Invalid value for {param!r}: {wrong['msg']}." if param else f"{wrong['msg']}.")
    return JSONResponse(error_body(message, param=None if code == "invalid_json" else param, code=code), 400)


def _is_union(part: str) -> bool:
    """Whether a part of a place in a body names pydantic's branch of a union, not a key."""
    return part.startswith(("literal[", "constrained-", "list[")) or part in ("str", "int", "float")


def _missing(_request: Request, error: Any) -> Response:
    message = f"No such {error.kind}: {error.name!r}."
    code = "model_not_found" if error.kind == "model" else "not_found"
    return JSONResponse(error_body(message, param=error.kind, code=code), 404)


def _refused(_request: Request, error: Any) -> Response:
    return JSONResponse(error_body(f"{str(error)[0].upper()}{str(error)[1:]}.", code="invalid_state"), 409)


def _database(_request: Request, error: Any) -> Response:
    return unavailable(error).response()


def _gone(_request: Request, _error: Any) -> Response:
    return Response(status_code=400)  # nobody reads it


def _full(_request: Request, error: Any) -> Response:
    log.error("the files cannot be written or read", error=str(error))
    body = error_body("The server cannot write or read files now: try again later.", "server_error", code="unavailable")
    return JSONResponse(body, 503, {"Retry-After": "60"})


def _unexpected(_request: Request, error: Any) -> Response:
    log.error("unexpected error", exc_info=error)
    return JSONResponse(error_body("The server had an error.", "server_error", code="server_error"), 500)


HANDLERS: dict[type[Exception], Callable[[Request, Any], Response]] = {
    HTTPException: _http,
    RequestValidationError: _invalid,
    Missing: _missing,
    Refused: _refused,
    **dict.fromkeys(AWAY, _database),
    ClientDisconnect: _gone,
    OSError: _full,
    Exception: _unexpected,
}
