"""A visit to the pages: the log-in, who looks, whether a form is this visit's own, and how pages and errors are drawn."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.routing import APIRoute
from jinja2 import ChoiceLoader, Environment, FileSystemLoader
from markupsafe import Markup
from starlette.datastructures import FormData

from gradshield.gateway.api import Gateway
from gradshield.gateway.database import Caller, Missing
from gradshield.gateway.edge import ApiError
from gradshield.gateway.settings import private
from gradshield.gateway.tables import Job, Project
from gradshield.report import sheet, text
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
    f"default-src 'none'; script-src 'self'; style-src 'self' {sheet.source_hash('')}; img-src data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Sessions:
    """Signs and reads sessions, with a secret that only the owner of the gateway's folder can read.

    A session is the text of a cookie: the id of a key, empty before the log-in; the time it ends; random text; the signature.
    """

    def __init__(self, folder: Path) -> None:
        """The secret is made by the first server that needs it; servers that start at once read the same one."""
        path = folder / SECRET
        if not path.exists():
            part = private(path, secrets.token_hex(32))
            with suppress(FileExistsError):
                os.link(part, path)
            part.unlink()
        self.secret = path.read_bytes()

    def new(self, key: str = "") -> str:
        return self.sign(f"{key}.{int(time.time()) + LIFETIME}.{secrets.token_hex(16)}")

    def sign(self, text: str) -> str:
        return f"{text}.{self._mac('session', text)}"

    def key(self, session: str) -> str | None:
        """The key of a session; None if it was not signed here, or has ended."""
        text, _, mac = session.rpartition(".")
        if not hmac.compare_digest(mac.encode(), self._mac("session", text).encode()):
            return None
        key, until, _ = text.split(".")
        return key if int(until) > time.time() else None

    def token(self, session: str) -> str:
        """What a form of this session holds, and no other site can know."""
        return self._mac("form", session)

    def give(self, request: Request, response: Response, session: str, name: str = COOKIE) -> Response:
        """Let the browser keep the session: no script and no other site can use it."""
        secure = request.url.scheme == "https"
        response.set_cookie(name, session, LIFETIME, httponly=True, samesite="strict", secure=secure)
        return response

    def _mac(self, use: str, text: str) -> str:
        return hmac.new(self.secret, f"{use}|{text}".encode(), hashlib.sha256).hexdigest()


# Drawing


@cache
def _templates() -> Environment:
    """The report's templates and filters, with the pages'."""
    kit = sheet.environment()
    assert kit.loader is not None
    made = kit.overlay(loader=ChoiceLoader([FileSystemLoader(TEMPLATES), kit.loader]))
    made.filters |= {"when": _when, "status": _status, "bound": _bound}
    return made


@cache
def assets() -> dict[str, tuple[str, str]]:
    """The styles and scripts, by name: media type and source."""
    css, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("dashboard.css", "dashboard.js"))
    return {
        "dashboard.css": ("text/css", sheet.asset("report.css") + css),
        "plotly.js": ("text/javascript", sheet.plotly()),
        "report.js": ("text/javascript", sheet.asset("report.js")),
        "dashboard.js": ("text/javascript", script),
    }


@cache
def _url(name: str) -> str:
    """The address of an asset, which changes with its source, so that browsers may keep it."""
    return f"/assets/{name}?v={hashlib.sha256(assets()[name][1].encode()).hexdigest()[:16]}"


def page(template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """A page, or a piece of one, of a template. It runs nothing but the dashboard's own scripts."""
    kit = {"url": _url, "style_guard": sheet.style_guard(), "entry": sheet.entry, "rows": sheet.ROWS}
    charts = context.get("charts", ())
    drawn = {"charts": charts, "specs": Markup(text.script_json({chart.key: chart.spec for chart in charts}))}
    made = _templates().get_template(template).render(kit | {"visit": None, "project": ""} | drawn | context)
    return HTMLResponse(made.encode("utf-8", "replace"), status, HEADERS)


def redirect(where: str) -> Response:
    """To another page, with the headers of every page: it may carry the session's cookie."""
    return RedirectResponse(where, 303, HEADERS)


def _when(seconds: float | None) -> Markup:
    """A time for people and for machines."""
    if seconds is None:
        return Markup("–")
    at = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), at.strftime("%Y-%m-%d %H:%M UTC"))


def _bound(share: float) -> str:
    """A share as the certificate writes it, on one line."""
    return percent(share).replace(" ", "\u00a0")


def _status(job: Job) -> str:
    return "waits for review" if job.hold else STATUS.get(job.status, job.status)


# Visits


class Pages(APIRoute):
    """A route of the dashboard, whose errors are pages."""


def failed(error: ApiError) -> Response:
    """An error as a page."""
    response = page("error.html", error.status_code, message=error.body["error"]["message"])
    response.headers.update(error.headers or {})
    return response


@dataclass(frozen=True)
class Visit:
    """Who looks at a page, and where."""

    gateway: Gateway
    request: Request
    caller: Caller

    @property
    def project(self) -> Project:
        return self.gateway.store.project(self.caller.project)

    def get(self, id: str) -> Job:
        return self.gateway.store.get(Job, self.caller.project, id)

    def show(self, template: str, status: int = 200, **context: Any) -> HTMLResponse:
        token = self.request.app.state.sessions.token(self.request.cookies[COOKIE])
        return page(template, status, token=token, visit=self, project=self.project.name, **context)


def _visiting(request: Request) -> Visit:
    """Raises ApiError, which leads to the log-in, unless the session's key is an operator's and was not revoked."""
    gateway: Gateway = request.app.state.gateway
    key = request.app.state.sessions.key(request.cookies.get(COOKIE, ""))
    caller = gateway.store.caller_with(key) if key else None
    if caller is None or caller.role != "operator":
        raise ApiError(303, "Log in first.", headers={"Location": "/login"})
    return Visit(gateway, request, caller)


async def _posted(request: Request) -> FormData:
    """The fields of a form. Raises ApiError for one that this session did not get."""
    form = await request.form(max_files=0, max_fields=FIELDS)
    sessions: Sessions = request.app.state.sessions
    session = request.cookies.get(DOOR if request.url.path == "/login" else COOKIE, "")
    good = hmac.compare_digest(field_text(form, "token").encode(), sessions.token(session).encode())
    if sessions.key(session) is None or not good:
        raise ApiError(403, "This form is out of date: go back, load the page again and repeat it.")
    return form


def field_text(form: FormData, name: str) -> str:
    """A field as text that any database can hold."""
    return str(form.get(name, "")).replace("\0", "\ufffd").strip()[:LONGEST]


Visiting = Annotated[Visit, Depends(_visiting)]
Form = Annotated[FormData, Depends(_posted)]
router = APIRouter(route_class=Pages, include_in_schema=False)


@router.get("/assets/{name}")
def asset(name: str) -> Response:
    if name not in assets():
        raise Missing("file", name)
    kind, source = assets()[name]
    return Response(
        source, media_type=kind, headers={**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
    )


@router.get("/login")
def login(request: Request) -> Response:
    return _door(request)


def _door(request: Request, problem: str = "") -> Response:
    sessions: Sessions = request.app.state.sessions
    session = sessions.new()
    response = page("login.html", 403 if problem else 200, token=sessions.token(session), problem=problem)
    return sessions.give(request, response, session, DOOR)


@router.post("/login")
def enter(request: Request, form: Form) -> Response:
    """A session for an operator's key."""
    caller = request.app.state.gateway.store.caller(field_text(form, "key"))
    if caller is None:
        return _door(request, "There is no such key, or it was revoked.")
    if caller.role != "operator":
        return _door(request, "This key is a user's: make an operator's with gradshield keys create --role operator.")
    sessions: Sessions = request.app.state.sessions
    return sessions.give(request, redirect("/"), sessions.new(caller.key))


@router.post("/logout")
def leave(_form: Form) -> Response:
    response = redirect("/login")
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response
