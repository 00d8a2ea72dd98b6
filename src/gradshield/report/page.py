"""ReportData to one HTML file that opens offline and asks nothing of any server.

The policy in the page lets only its own two scripts and its own style run, each named by hash: a row's text that
slipped past escaping would still not run. Plotly's script is inlined once.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from gradshield.report import text
from gradshield.report.charts import category_chart, class_charts, score_charts
from gradshield.report.data import ReportData, RowView, as_rate
from gradshield.report.rows import LEVELS, ShownRow, references, show_rows
from gradshield.report.summary import agreement_check, summarise
from gradshield.types import Manifest

ROWS = 200  # removed rows, and quarantined rows, on one page
KEPT_ROWS = 30
REMOVED_BYTES, KEPT_BYTES = 1_600_000, 300_000  # with Plotly's 4.8 MB, the page stays under 8 MB
MANIFEST_LINES, MANIFEST_BYTES = 400, 200_000
_TEMPLATES = Path(__file__).parent / "templates"


def render(data: ReportData) -> str:
    """The page as one string of HTML."""
    summary = summarise(data)
    scores, classes = score_charts(data), class_charts(data)
    totals = data.categories if data.categories is not None else _by_category(data.removed_rows)
    categories = category_chart(totals)
    charts = [*scores, *classes, *([categories] if categories else [])]
    removed = sorted(data.removed_rows, key=lambda row: -row.score)[:ROWS]
    kept = sorted(data.kept_rows, key=lambda row: -row.score)[:KEPT_ROWS]
    reference = references(removed) or references(kept)
    shown = show_rows(removed, reference, REMOVED_BYTES)
    scripts = (_plotly(), _asset("report.js"))
    style = _asset("report.css")
    context = {
        "data": data, "counts": data.counts, "summary": summary, "scores": scores, "classes": classes,
        "categories": categories, "groups": _groups(shown, totals), "removed_shown": len(shown),
        "kept_rows": show_rows(kept, reference, KEPT_BYTES), "legend": _legend(reference),
        "quarantined": data.quarantined[:ROWS], "agreement": data.agreement,
        "agreement_check": agreement_check(data.agreement) if data.agreement else None,
        "arm_columns": list(dict.fromkeys(name for arm in data.arms for name in arm.rates)),
        "manifest": _manifest(data.manifest), "manifest_json": _manifest_json(data.manifest),
        "plotly": Markup(scripts[0]), "script": Markup(scripts[1]), "style": Markup(style),
        "specs": Markup(text.script_json({chart.key: chart.spec for chart in charts})),
        "infinity": math.inf,
        "policy": _policy(scripts, style), "style_guard": _style_guard(),
    }  # fmt: skip
    return _environment().get_template("page.html").render(context)


def write(data: ReportData, path: str | os.PathLike[str]) -> Path:
    """Render to ``path``. The file appears whole or not at all; an older one stays until then."""
    target = Path(path)
    body = render(data).encode("utf-8", "replace")
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _finalize(value: Any) -> Any:
    """Every ``{{ }}`` of the templates passes here, then autoescape: no text is shown with hidden characters."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else text.visible(str(value))


def _whole_options(value: str) -> Markup:
    """Text whose command-line options do not break after their hyphens."""
    shown = str(escape(text.visible(value)))
    return Markup(re.sub(r"(?<!\S)--[a-z][a-z-]*", r'<span class="nowrap">\g<0></span>', shown))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_finalize,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        number=text.number,
        percent=text.percent,
        shorten=text.shorten,
        one_line=text.one_line,
        rate=as_rate,
        whole_options=_whole_options,
    )
    return environment


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # slow to import, and needed only when a page is written

    return _script(get_plotlyjs())


@cache
def _asset(name: str) -> str:
    return _script((_TEMPLATES / name).read_text(encoding="utf-8"))


def _script(source: str) -> str:
    """As an HTML parser will hand it on, so that the hash in the policy is the hash of what runs."""
    return source.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script")


def _policy(scripts: Sequence[str], style: str) -> str:
    """The content security policy. Plotly makes one empty style element and fills it by rule: hence the empty hash."""
    allowed = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)} {_hash('')}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def _style_guard() -> str:
    """The id by which Plotly's map layer, unused here, knows its style is in place: else it would try to add it."""
    found = re.search(r'getElementById\("([0-9a-f]{64})"\)', _plotly())
    return found.group(1) if found else ""


def _by_category(rows: Sequence[RowView]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for row in rows:
        totals[row.category] = totals.get(row.category, 0) + 1
    return totals


def _groups(shown: Sequence[ShownRow], totals: Mapping[str, int]) -> list[dict[str, Any]]:
    """Shown rows by category, the largest first, with the category's total."""
    members: dict[str, list[ShownRow]] = {}
    for row in shown:
        members.setdefault(row.view.category, []).append(row)
    groups = [
        {"name": name or "no category", "rows": rows, "total": max(totals.get(name, 0), len(rows))}
        for name, rows in members.items()
    ]
    return sorted(groups, key=lambda group: -group["total"])


def _legend(reference: Mapping[str, float]) -> list[dict[str, Any]]:
    """Per row shape, the per-token value at which each tint starts."""
    return [
        {"shape": shape, "levels": [f"{edge * value:.2g}" for edge in LEVELS]} for shape, value in reference.items()
    ]


def _plain(manifest: Any) -> Any:
    return dataclasses.asdict(manifest) if isinstance(manifest, Manifest) else manifest


def _manifest(manifest: Any) -> list[dict[str, Any]]:
    """The manifest's parts as tables of (dotted key, value); single values come first, under no name."""
    if manifest is None:
        return []
    parts: dict[str, list[tuple[str, str]]] = {"": []}
    for key, value in _plain(manifest).items():
        if isinstance(value, Mapping):
            parts[str(key)] = _flatten(value)
        else:
            parts[""].append((str(key), _cell(value)))
    return [
        {"name": name, "lines": lines[:MANIFEST_LINES], "more": max(len(lines) - MANIFEST_LINES, 0)}
        for name, lines in parts.items()
        if lines
    ]


def _flatten(value: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if isinstance(entry, Mapping) and entry:
            lines += _flatten(entry, f"{name}.")
        else:
            lines.append((text.shorten(name, 120), _cell(entry)))
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        value = ", ".join(str(entry) for entry in value[:50])
    return text.shorten(str(value), 300)


def _manifest_json(manifest: Any) -> str:
    """The whole manifest for copying. Cut at a size, where it then says so."""
    if manifest is None:
        return ""
    full = text.plain_json(_plain(manifest))
    if len(full) <= MANIFEST_BYTES:
        return full
    return f"{full[:MANIFEST_BYTES]}\n… {len(full) - MANIFEST_BYTES:,} characters more, in the manifest file"
