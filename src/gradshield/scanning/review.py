"""A person decides on single rows of a finished scan, on a page that only this machine can open.

The decisions are two files in the folder of the scan, ``allow.txt`` and ``deny.txt``, one row id a line with the time and the
reason behind ``#``: the lists that ``cut`` reads there, and that ``scan --allow`` and ``cut --allow --deny`` take.

Every request to the page names a secret in its path and this server as its host, and what changes something comes from the page
itself, so that no other page in the browser can read or decide. It works without scripts; with them, by keyboard.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from markupsafe import Markup

from gradshield.errors import GradShieldError, UsageError
from gradshield.files import write_text
from gradshield.report.sheet import asset, environment, source_hash
from gradshield.scanning import outputs
from gradshield.scanning.cut import ALLOW, DENY, NO_CATEGORY, Scanned, write
from gradshield.scanning.decide import Selection, above, reviewed
from gradshield.scanning.page_rows import Piece, RowView, references, row_view, show_rows, stored_views
from gradshield.types import Bools, Floats, Ints

REASON = 300  # characters of a reason
NEAREST = 20  # rows that say how tokens are tinted
ROWS = 20  # on one page
BYTES = 400_000  # of the rows on one page
BODY = 16_384  # bytes of a request
REASONS = ("ordinary row of the task", "harmful", "harmful in its answer only", "personal data", "not sure")
SHOWN = ("all", "above", "below", "decided")


@dataclass(frozen=True)
class Said:
    """What a person said of a row: ``keep`` it or remove it, why, and when (ISO 8601, UTC)."""

    keep: bool
    reason: str
    at: str


class Review:
    """A finished scan under review. The caller has its folder alone (`runs.alone`)."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the folder is not a finished scan."""
        self.folder = folder
        self.verdicts = dict(_read(folder))
        self._open()

    def _open(self) -> None:
        self.scanned = Scanned.read(self.folder)
        self.views = stored_views(self.folder)
        scores, cuts = self.scanned.scores, self.scanned.cuts
        self.beyond: Bools = above(scores, cuts)  # (N,) the rows above the cut
        self.margins: Floats = scores.values - np.array([cuts[shape].value for shape in scores.shapes])  # (N,)
        self.order: Ints = np.argsort(np.abs(self.margins), kind="stable")  # (N,) places, the nearest to the cut first
        # What tints of tokens are shares of, on every page.
        self.tint = references(self.row(place) for place in self.order[:NEAREST].tolist())
        ids = scores.ids
        known = {id: place for place, id in enumerate(ids) if id in self.verdicts}
        # What earlier lists decided and this folder's do not name, such as those of `scan --allow`.
        before, at = self.beyond != self.scanned.removed, datetime.now(UTC).isoformat(timespec="seconds")
        for place in np.flatnonzero(before).tolist():
            if ids[place] not in known:
                known[ids[place]] = place
                self.verdicts[ids[place]] = Said(bool(self.beyond[place]), "decided before this review", at)
        self.places = known

    def decide(self, place: int, keep: bool, reason: str) -> None:
        """Keep or remove the row at this place among the scores; written when this returns. Raises UsageError for no such row."""
        id = self._id(place)
        said = " ".join(reason.split())[:REASON]
        self.verdicts[id] = Said(keep, said, datetime.now(UTC).isoformat(timespec="seconds"))
        self.places[id] = place
        self._save()

    def undo(self, place: int) -> None:
        """Leave the row to its score again."""
        id = self._id(place)
        if self.verdicts.pop(id, None) is not None:
            del self.places[id]
            self._save()

    def _id(self, place: int) -> str:
        if not 0 <= place < len(self.beyond):
            raise UsageError(f"there is no row {place}: reload the page")
        return self.scanned.scores.ids[place]

    def _save(self) -> None:
        for name, keep in ((ALLOW, True), (DENY, False)):
            lines = (f"{id}  # {v.at} {v.reason}\n" for id, v in self.verdicts.items() if v.keep == keep)
            write_text(self.folder / name, "".join(lines))

    @property
    def removed(self) -> int:
        """Rows that the decisions leave removed."""
        return int(self._out().sum())

    @property
    def waiting(self) -> bool:
        """Whether the folder does not have the decisions yet."""
        confirmed = sum(self.beyond[place] and not self.verdicts[id].keep for id, place in self.places.items())
        return bool((self._out() != self.scanned.removed).any()) or confirmed != self.scanned.manifest.results.confirmed

    def _out(self) -> Bools:
        """Which rows the decisions leave removed, (N,)."""
        found = self.beyond.copy()
        for id, place in self.places.items():
            found[place] = not self.verdicts[id].keep
        return found

    def apply(self, command: str) -> Selection:
        """Split the rows again under the scan's own cut and the decisions."""
        lists = [[id for id, v in self.verdicts.items() if v.keep == keep] for keep in (True, False)]
        decision = reviewed(self.scanned.scores, self.scanned.cuts, *lists)
        found = write(self.folder, self.scanned, decision, self.scanned.manifest.settings.threshold, command)
        self._open()
        return found

    def row(self, place: int) -> RowView:
        """One row, with its tokens where the scan has stored them, else its text."""
        scores, category = self.scanned.scores, self.scanned.categories[place]
        row, cut = int(scores.rows[place]), self.scanned.cuts[scores.shapes[place]].value
        pieces = self.views.get(row) or self._text(row)
        return row_view(scores, place, cut, "" if category == NO_CATEGORY else category, pieces)

    def _text(self, row: int) -> Iterator[Piece]:
        (example,) = self.scanned.rows.at(np.array([row]))
        prompt, answer = outputs.words(example)
        yield prompt, "prompt", None
        yield answer, "response", None


def _read(folder: Path) -> Iterator[tuple[str, Said]]:
    """The decisions in a folder; of a row in both lists, that it is removed."""
    for name, keep in ((ALLOW, True), (DENY, False)):
        path = folder / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            id, _, note = line.partition("#")
            at, _, reason = note.strip().partition(" ")
            if id.strip():
                yield id.strip(), Said(keep, reason, at)


def page(review: Review, start: int = 0, show: str = "all", said: str = "") -> str:
    """The page from the row ``start`` of those that ``show`` names, without its address."""
    order = review.order
    if show == "decided":
        order = order[np.isin(order, list(review.places.values()))]
    elif show != "all":
        order = order[review.beyond[order] == (show == "above")]
    places = order[start : start + ROWS].tolist()
    views = [review.row(place) for place in places]
    style, script = asset("report.css") + asset("review.css"), asset("review.js")
    rows = list(zip(places, show_rows(views, review.tint, BYTES), strict=True))
    manifest = review.scanned.manifest
    return (
        environment()
        .get_template("review.html")
        .render(
            title=PurePath(manifest.data.name).name,
            review=review,
            total=len(review.beyond),
            now=int(review.scanned.removed.sum()),
            rows=rows,
            start=start,
            before=max(start - ROWS, 0),
            after=start + ROWS if start + ROWS < len(order) else None,
            count=len(order),
            show=show,
            choices=SHOWN,
            reasons=REASONS,
            said=said,
            style=Markup(style),
            script=Markup(script),
            policy=(
                f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}; img-src data:; "
                "form-action 'self'; base-uri 'none'"
            ),
        )
    )


class Server(ThreadingHTTPServer):
    """Serves one review, one request at a time, as a context; a browser may hold several connections open."""

    daemon_threads = True

    def __init__(self, review: Review, port: int, command: str) -> None:
        """Raises UsageError if the port is taken."""
        self.review, self.command, self.token, self.said = review, command, secrets.token_urlsafe(24), ""
        self.lock = Lock()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UsageError(
                f"the port {port} cannot be used ({error.strerror}): give another --port, or none"
            ) from None
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def url(self) -> str:
        """The address of the page, with its secret."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30
    protocol_version = "HTTP/1.1"

    def version_string(self) -> str:
        return "GradShield"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address holds the secret."""

    def do_GET(self) -> None:
        if (rest := self._place()) is None:
            return
        if rest.path:
            self._answer(HTTPStatus.NOT_FOUND)
            return
        asked = parse_qs(rest.query)
        show = asked.get("show", ["all"])[0]
        start = _number(asked.get("from", ["0"])[0])
        with self.server.lock:
            said, self.server.said = self.server.said, ""
            body = page(self.server.review, start or 0, show if show in SHOWN else "all", said)
        self._answer(HTTPStatus.OK, body.encode("utf-8", "replace"))

    def do_POST(self) -> None:
        if (rest := self._place()) is None:
            return
        length = _number(self.headers.get("Content-Length", ""))
        if self.headers.get("Origin") not in {f"http://{host}" for host in self.server.hosts}:
            self._answer(HTTPStatus.FORBIDDEN)
        elif rest.path not in ("decide", "apply"):
            self._answer(HTTPStatus.NOT_FOUND)
        elif length is None or length > BODY:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            given = parse_qs(self.rfile.read(length).decode("utf-8", "replace"), max_num_fields=20)
            form = {key: values[0] for key, values in given.items()}
            with self.server.lock:
                where = self._done(rest.path, form)
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", f"/{self.server.token}/{where}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _done(self, what: str, form: dict[str, str]) -> str:
        """Do what a form asks for; returns where the page goes on."""
        review = self.server.review
        show = form.get("show", "all")
        back = f"?show={show if show in SHOWN else 'all'}&from={_number(form.get('from', '')) or 0}"
        try:
            if what == "apply":
                found = review.apply(self.server.command).manifest.results
                self.server.said = f"Applied: {found.kept:,} rows kept, {found.removed:,} removed."
                return back
            place = _number(form.get("place", ""))
            if place is None or form.get("verdict") not in ("keep", "remove", "undo"):
                raise UsageError("the form was not whole: reload the page")
            if form["verdict"] == "undo":
                review.undo(place)
            else:
                review.decide(place, form["verdict"] == "keep", form.get("reason", ""))
            return f"{back}#{form.get('next', '') if form.get('next', '').isalnum() else ''}"
        except (GradShieldError, OSError) as error:
            self.server.said = f"Not done: {error}"
            return back

    def _place(self) -> Any:
        """The rest of the path behind the secret; None once a request without it was answered."""
        found = urlsplit(self.path)
        token, _, rest = found.path.lstrip("/").partition("/")
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(HTTPStatus.FORBIDDEN)
        elif not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._answer(HTTPStatus.NOT_FOUND)
        else:
            return found._replace(path=rest)
        return None

    def _answer(self, status: HTTPStatus, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
        ):
            self.send_header(name, value)
        if status >= HTTPStatus.BAD_REQUEST:
            self.send_header("Connection", "close")  # closes it: an unread body would be parsed as the next request
        self.end_headers()
        self.wfile.write(body)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None
