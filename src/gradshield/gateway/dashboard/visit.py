"""A visit to the pages: who looks, whether a form is this visit's own, and how errors look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.datastructures import FormData

from gradshield.gateway.dashboard.drawing import page
from gradshield.gateway.dashboard.session import COOKIE, DOOR, Session
from gradshield.gateway.database import Caller
from gradshield.gateway.edge import ApiError
from gradshield.gateway.shared import Gateway
from gradshield.gateway.tables import Job, Project
from gradshield.report import frame

LONGEST = 2000  # characters of a field
FIELDS = 20_000  # of a form: a box for each row that may be released
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
        token = self.gateway.sessions.token(self.session)
        return page(template, status, token=token, visit=self, project=self.project.name, **context)


def gateway_of(request: Request) -> Gateway:
    found: Gateway = request.app.state.gateway
    return found


def visiting(request: Request) -> Visit:
    """Raises ApiError, which leads to the log-in, unless the session's key is an operator's and was not revoked."""
    gateway = gateway_of(request)
    session = gateway.sessions.read(request.cookies.get(COOKIE, ""))
    caller = gateway.store.caller_with(session.key) if session and session.key else None
    if session is None or caller is None or caller.role != "operator":
        raise ApiError(303, "Log in first.", headers={"Location": "/login"})
    return Visit(gateway, request, session, caller)


async def posted(request: Request) -> FormData:
    """The fields of a form. Raises ApiError for one that this session did not get."""
    form = await request.form(max_files=0, max_fields=FIELDS)
    sessions, name = gateway_of(request).sessions, DOOR if request.url.path == "/login" else COOKIE
    session = sessions.read(request.cookies.get(name, ""))
    if session is None or not sessions.good(session, field_text(form, "token")):
        raise ApiError(403, "This form is out of date: go back, load the page again and repeat it.")
    return form


def field_text(form: FormData, name: str) -> str:
    """A field as text that any database can hold."""
    return str(form.get(name, "")).replace("\0", "\ufffd").strip()[:LONGEST]


Visiting = Annotated[Visit, Depends(visiting)]
Form = Annotated[FormData, Depends(posted)]
