"""The pages' templates, with the report's own, and the styles and scripts they load."""

from __future__ import annotations

import hashlib
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import ChoiceLoader, Environment, FileSystemLoader
from markupsafe import Markup

from gradshield.gateway.tables import Job
from gradshield.report import frame, sheet, text
from gradshield.stats import percent

HERE = Path(__file__).parent / "templates"
STATUS = {
    "validating_files": "checking the files",
    "queued": "waits",
    "running": "runs",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
    "paused": "paused by its user",
}


@cache
def _templates() -> Environment:
    """The report's templates and filters, with the pages'."""
    kit = frame.environment()
    assert kit.loader is not None
    made = kit.overlay(loader=ChoiceLoader([FileSystemLoader(HERE), kit.loader]))
    made.filters |= {"when": _when, "ago": ago, "size": size, "status": _status, "bound": _bound}
    return made


@cache
def assets() -> dict[str, tuple[str, str]]:
    """The styles and scripts, by name: media type and source."""
    css = [frame.asset("report.css"), (HERE / "dashboard.css").read_text(encoding="utf-8")]
    return {
        "dashboard.css": ("text/css", "".join(css)),
        "plotly.js": ("text/javascript", frame.plotly()),
        "report.js": ("text/javascript", frame.asset("report.js")),
        "dashboard.js": ("text/javascript", (HERE / "dashboard.js").read_text(encoding="utf-8")),
    }


@cache
def _url(name: str) -> str:
    """The address of an asset, which changes with its source, so that browsers may keep it."""
    return f"/assets/{name}?v={hashlib.sha256(assets()[name][1].encode()).hexdigest()[:16]}"


def page(template: str, status: int = 200, **context: Any) -> HTMLResponse:
    """A page, or a piece of one, of a template."""
    more = {"url": _url, "style_guard": frame.style_guard(), "entry": sheet.entry, "rows": sheet.ROWS}
    defaults = {"visit": None, "project": "", "charts": (), "specs": ""}
    made = _templates().get_template(template).render({**defaults, **more, **context})
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
