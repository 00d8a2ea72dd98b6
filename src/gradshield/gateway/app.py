"""The web app: the API, its errors, and what operations needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gradshield import __version__
from gradshield.errors import UsageError
from gradshield.gateway import api
from gradshield.gateway.chat import Chats
from gradshield.gateway.content import Content
from gradshield.gateway.dashboard import pages
from gradshield.gateway.dashboard.visit import Pages, Sessions, failed
from gradshield.gateway.database import AWAY, Missing, Refused
from gradshield.gateway.edge import ApiError, Edge, away, unavailable
from gradshield.gateway.settings import Settings
from gradshield.gateway.store import STATUSES, Store
from gradshield.gateway.worker import Queue

BRANCHES = ("literal[", "constrained-", "list[")
log = structlog.get_logger("gradshield.gateway")


def create_app(settings: Settings, send: Callable[[str], None] | None = None) -> FastAPI:
    """The app on a migrated database. ``send`` takes the id of a job to run; by default the settings' queue does.

    Raises UsageError for a URL or a folder that cannot be used.
    """
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        folder = str(settings.folder)
        raise UsageError(f"the folder {folder!r} cannot be made ({error.strerror}): give another --folder") from None
    send = send or Queue(settings).send
    store = Store(settings.database_url, settings.webhooks).migrate()
    content = Content(settings.files_url)
    content.sweep()
    gateway = api.Gateway(settings, store, content, send, Chats(settings))
    jobs = Gauge("gradshield_jobs", "Jobs by status.", ("status",), registry=gateway.registry)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        gateway.chats.client.close()
        store.close()

    app = FastAPI(
        title="GradShield gateway",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.gateway, app.state.sessions = gateway, Sessions(settings.folder)
    app.add_middleware(Edge, store=store, limits=settings.limits, registry=gateway.registry)
    app.include_router(api.router)
    app.include_router(pages.router)
    for kind, problem in PROBLEMS.items():
        app.add_exception_handler(kind, partial(_answered, problem))

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
        counts = store.counts()
        for status in STATUSES:
            jobs.labels(status).set(counts.get(status, 0))
        return Response(generate_latest(gateway.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _answered(problem: Callable[[Any], ApiError], request: Request, error: Exception) -> Response:
    made = problem(error)
    return failed(made) if isinstance(request.scope.get("route"), Pages) else made.response()


def _http(error: Any) -> ApiError:
    if isinstance(error, ApiError):
        return error
    said = {404: "Unknown request URL.", 405: "This method is not allowed here."}
    return ApiError(error.status_code, said.get(error.status_code, str(error.detail)), headers=error.headers)


def _invalid(error: Any) -> ApiError:
    """What is wrong with a request, a value rather than a type, with the name of its parameter."""
    found = error.errors()
    # What another branch of a union would take, such as 'auto' or a text, says less.
    wrong = next((one for one in found if not one["type"].endswith(("literal_error", "_type"))), found[0])
    path = (str(part) for part in wrong["loc"][1:])  # a branch of a union that pydantic names is no key
    named = (part for part in path if not part.startswith(BRANCHES) and part not in ("str", "int", "float"))
    param = ".".join(named).encode(errors="replace").decode() or None
    if wrong["type"] == "json_invalid":
        return ApiError(400, "We could not parse the JSON body of your request.", code="invalid_json")
    if wrong["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: {param!r}.", param, "unknown_parameter")
    if wrong["type"] == "missing":
        return ApiError(400, f"Missing required parameter: {param!r}.", param, "missing_required_parameter")
    where = f"Invalid value for {param!r}: " if param else ""
    return ApiError(400, f"{where}{wrong['msg']}.", param, "invalid_value")


def _missing(error: Any) -> ApiError:
    code = "model_not_found" if error.kind == "model" else "not_found"
    return ApiError(404, f"No such {error.kind}: {error.name!r}.", error.kind, code)


def _full(error: Any) -> ApiError:
    log.error("the files cannot be written or read", error=str(error))
    return unavailable("The server cannot write or read files now: try again later.", 60)


def _unexpected(error: Any) -> ApiError:
    log.error("unexpected error", exc_info=error)
    return ApiError(500, "The server had an error.", code="server_error")


PROBLEMS: dict[type[Exception], Callable[[Any], ApiError]] = {
    HTTPException: _http,
    RequestValidationError: _invalid,
    Missing: _missing,
    Refused: lambda error: ApiError(409, str(error), code="invalid_state"),
    **dict.fromkeys(AWAY, away),
    ClientDisconnect: lambda _error: ApiError(400, "The request broke off."),  # nobody reads it
    OSError: _full,
    Exception: _unexpected,
}
