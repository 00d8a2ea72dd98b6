"""A visit to the pages: who looks, whether a form is this visit's own, and how pages and errors are drawn.

A signed cookie names the key of who looks, and every form has a token of that session.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from jinja2 import ChoiceLoader, Environment, FileSystemLoader
from markupsafe import Markup
from starlette.datastructures import FormData

from gradshield.gateway.api import Gateway
from gradshield.gateway.database import Caller
from gradshield.gateway.edge import ApiError
from gradshield.gateway.settings import private
from gradshield.gateway.tables import Job, Project
from gradshield.report import frame, sheet, text
from gradshield.stats import percent

COOKIE, DOOR = "gradshield", "gradshield-door"  # of a visit, and of the log-in form alone
LIFETIME = 12 * 3600  # seconds
SECRET = "dashboard.key"
LONGEST = 2000  # characters of a field
FIELDS = 20_000  # of a form: a box for each row that may be released
TEMPLATES = Path(__file__).parent / "templates"
STATUS = {
    "validating_files": "checking the files",
    "queued": "waits",
    "running": "runs",
    "paused": "paused by its user",
}
# Plotly adds one empty style element and sets styles by script, which a policy allows.
POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {frame.source_hash('')}; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


# Sessions


@dataclass(frozen=True)
class Session:
    """A visit: the id of its key, empty before the log-in; the time it ends; and random text that its forms' token is made of."""

    key: str
    until: int
    nonce: str


class Sessions:
    """Signs and reads sessions, with a secret that only the owner of the gateway's folder can read."""

    def __init__(self, folder: Path) -> None:
        """The secret is made by the first server that needs it; servers that start at once read the same one."""
        path = folder / SECRET
        if not path.exists():
            part = private(path, secrets.token_hex(32))
            with suppress(FileExistsError):
                os.link(part, path)
            part.unlink()
        self.secret = path.read_bytes()

    def new(self, key: str = "") -> Session:
        return Session(key, int(time.time()) + LIFETIME, secrets.token_hex(16))

    def sign(self, session: Session) -> str:
        text = f"{session.key}.{session.until}.{session.nonce}"
        return f"{text}.{self._mac('session', text)}"

    def read(self, cookie: str) -> Session | None:
        """The session of a cookie; None if it was not signed here, or has ended."""
        text, _, mac = cookie.rpartition(".")
        if not hmac.compare_digest(mac.encode(), self._mac("session", text).encode()):
            return None
        key, until, nonce = text.split(".")
        return Session(key, int(until), nonce) if int(until) > time.time() else None

    def token(self, session: Session) -> str:
        """What a form of this session holds, and no other site can know."""
        return self._mac("form", session.nonce)

    def give(self, request: Request, response: Response, session: Session, name: str = COOKIE) -> Response:
        """Let the browser keep the session: no script and no other site can use it."""
        secure = request.url.scheme == "https"
        response.set_cookie(name, self.sign(session), LIFETIME, httponly=True, samesite="strict", secure=secure)
        return response

    def _mac(self, use: str, text: str) -> str:
        return hmac.new(self.secret, f"{use}|{text}".encode(), hashlib.sha256).hexdigest()


# Drawing


@cache
def _templates() -> Environment:
    """The report's templates and filters, with the pages'."""
    kit = frame.environment()
    assert kit.loader is not None
    made = kit.overlay(loader=ChoiceLoader([FileSystemLoader(TEMPLATES), kit.loader]))
    made.filters |= {"when": _when, "ago": ago, "size": size, "status": _status, "bound": _bound}
    return made


@cache
def assets() -> dict[str, tuple[str, str]]:
    """The styles and scripts, by name: media type and source."""
    css, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("dashboard.css", "dashboard.js"))
    return {
        "dashboard.css": ("text/css", frame.asset("report.css") + css),
        "plotly.js": ("text/javascript", frame.plotly()),
        "report.js": ("text/javascript", frame.asset("report.js")),
        "dashboard.js": ("text/javascript", script),
    }


@cache
def _url(name: str) -> str:
    """The address of an asset, which changes with its source, so that browsers may keep it."""
    return f"/assets/{name}?v={hashlib.sha256(assets()[name][1].encode()).hexdigest()[:16]}"


def page(template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """A page, or a piece of one, of a template."""
    kit = {"url": _url, "style_guard": frame.style_guard(), "entry": sheet.entry, "rows": sheet.ROWS}
    defaults = {"visit": None, "project": "", "charts": (), "specs": ""}
    made = _templates().get_template(template).render(kit | defaults | context)
    return HTMLResponse(made.encode("utf-8", "replace"), status)


def _when(seconds: float | None) -> Markup:
    """A time for people and for machines."""
    if seconds is None:
        return Markup("–")
    at = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), at.strftime("%Y-%m-%d %H:%M UTC"))


def _bound(share: float) -> str:
    """A share as the certificate writes it, on one line."""
    return percent(share).replace(" ", "\u00a0")


def ago(seconds: float) -> str:
    """How long a time is past."""
    return text.duration(max(time.time() - seconds, 0.0))


def size(count: int) -> str:
    """Bytes for people."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.3g} {units[0]}" if size < 1000 else f"{size:.0f} {units[0]}"


def _status(job: Job) -> str:
    return "waits for review" if job.hold else STATUS.get(job.status, job.status)


# Visits


class Pages(APIRoute):
    """A route of the dashboard, whose errors are pages. No page runs anything but the dashboard's own scripts."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        inner = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return _guarded(await inner(request))

        return handle


def failed(error: ApiError) -> Response:
    """An error as a page."""
    response = page("error.html", error.status_code, message=error.body["error"]["message"])
    response.headers.update(error.headers or {})
    return _guarded(response)


def _guarded(response: Response) -> Response:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


@dataclass(frozen=True)
class Visit:
    """Who looks at a page, and where."""

    gateway: Gateway
    request: Request
    session: Session
    caller: Caller

    @property
    def project(self) -> Project:
        return self.gateway.store.project(self.caller.project)

    def get(self, id: str) -> Job:
        return self.gateway.store.get(Job, self.caller.project, id)

    def show(self, template: str, status: int = 200, **context: Any) -> HTMLResponse:
        token = sessions_of(self.request).token(self.session)
        return page(template, status, token=token, visit=self, project=self.project.name, **context)


def sessions_of(request: Request) -> Sessions:
    found: Sessions = request.app.state.sessions
    return found


def visiting(request: Request) -> Visit:
    """Raises ApiError, which leads to the log-in, unless the session's key is an operator's and was not revoked."""
    gateway: Gateway = request.app.state.gateway
    session = sessions_of(request).read(request.cookies.get(COOKIE, ""))
    caller = gateway.store.caller_with(session.key) if session and session.key else None
    if session is None or caller is None or caller.role != "operator":
        raise ApiError(303, "Log in first.", headers={"Location": "/login"})
    return Visit(gateway, request, session, caller)


async def posted(request: Request) -> FormData:
    """The fields of a form. Raises ApiError for one that this session did not get."""
    form, sessions = await request.form(max_files=0, max_fields=FIELDS), sessions_of(request)
    session = sessions.read(request.cookies.get(DOOR if request.url.path == "/login" else COOKIE, ""))
    token = field_text(form, "token").encode()
    if session is None or not hmac.compare_digest(token, sessions.token(session).encode()):
        raise ApiError(403, "This form is out of date: go back, load the page again and repeat it.")
    return form


def field_text(form: FormData, name: str) -> str:
    """A field as text that any database can hold."""
    return str(form.get(name, "")).replace("\0", "\ufffd").strip()[:LONGEST]


Visiting = Annotated[Visit, Depends(visiting)]
Form = Annotated[FormData, Depends(posted)]
