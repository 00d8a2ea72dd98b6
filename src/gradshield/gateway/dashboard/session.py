"""Who looks at the pages: a signed cookie that names a key, and a token of it in every form."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from gradshield.gateway.settings import private

COOKIE, DOOR = "gradshield", "gradshield-door"  # of a visit, and of the log-in form alone
LIFETIME = 12 * 3600  # seconds
SECRET = "dashboard.key"


@dataclass(frozen=True)
class Session:
    """A visit: the id of its key, empty before the log-in; the time it ends; and random text that its forms' token is made of."""

    key: str
    until: int
    nonce: str


class Sessions:
    """Signs and reads sessions, with a secret that only the owner of the gateway's folder can read."""

    def __init__(self, folder: Path) -> None:
        self.secret = _secret(folder / SECRET)

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

    def good(self, session: Session, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self.token(session).encode())

    def give(self, request: Request, response: Response, session: Session, name: str = COOKIE) -> None:
        """Let the browser keep the session: no script and no other site can use it."""
        secure = request.url.scheme == "https"
        response.set_cookie(name, self.sign(session), LIFETIME, httponly=True, samesite="strict", secure=secure)

    def _mac(self, use: str, text: str) -> str:
        return hmac.new(self.secret, f"{use}|{text}".encode(), hashlib.sha256).hexdigest()


def _secret(path: Path) -> bytes:
    """The secret in a file, made by the first server that needs it; servers that start at once read the same one."""
    if not path.exists():
        part = private(path, secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(part, path)
        part.unlink()
    return path.read_bytes()
