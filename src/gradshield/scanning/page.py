"""The page of a scan: ReportData to one HTML file that works offline and requests nothing from a server."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradshield.report import text
from gradshield.report.frame import document, save
from gradshield.scanning.page_charts import category_chart, class_charts, score_charts
from gradshield.scanning.page_data import ReportData, RowView
from gradshield.scanning.page_rows import LEVELS, ShownRow, references, show_rows
from gradshield.scanning.page_summary import agreement_check, summarise

ROWS = 200  # removed rows, and quarantined rows, on one page
KEPT_ROWS = 30
REMOVED_BYTES, KEPT_BYTES = 1_600_000, 300_000  # with Plotly's 4.8 MB, the page stays under 8 MB
MANIFEST_LINES, MANIFEST_BYTES = 400, 200_000


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
    context = {
        "data": data, "counts": data.counts, "summary": summary, "scores": scores, "classes": classes,
        "categories": categories, "groups": _groups(shown, totals), "removed_shown": len(shown),
        "kept_rows": show_rows(kept, reference, KEPT_BYTES), "legend": _legend(reference),
        "quarantined": data.quarantined[:ROWS], "agreement": data.agreement,
        "agreement_check": agreement_check(data.agreement) if data.agreement else None,
        "arm_columns": list(dict.fromkeys(name for arm in data.arms for name in arm.rates)),
        "manifest": _manifest(data.manifest), "manifest_json": _manifest_json(data.manifest),
        "infinity": math.inf,
    }  # fmt: skip
    return document("page.html", context, charts)


def write(data: ReportData, path: str | os.PathLike[str]) -> Path:
    """Render to ``path``, atomically."""
    return save(render(data), path)


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
        {"name": name or "no kind", "rows": rows, "total": max(totals.get(name, 0), len(rows))}
        for name, rows in members.items()
    ]
    return sorted(groups, key=lambda group: -group["total"])


def _legend(reference: Mapping[str, float]) -> list[dict[str, Any]]:
    """Per row shape, the per-token value at which each tint starts."""
    return [
        {"shape": shape, "levels": [text.number(edge * value, 2) for edge in LEVELS]}
        for shape, value in reference.items()
    ]


def _manifest(manifest: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The manifest's parts as tables of (dotted key, value); single values come first, without a name."""
    if manifest is None:
        return []
    parts: dict[str, list[tuple[str, str]]] = {"": []}
    for key, value in manifest.items():
        if isinstance(value, Mapping):
            parts[str(key)] = text.flatten(value)
        else:
            parts[""].append((str(key), text.brief(value)))
    return [
        {"name": name, "lines": lines[:MANIFEST_LINES], "more": max(len(lines) - MANIFEST_LINES, 0)}
        for name, lines in parts.items()
        if lines
    ]


def _manifest_json(manifest: Mapping[str, Any] | None) -> str:
    """The whole manifest for copying, truncated with a note if it is too long."""
    if manifest is None:
        return ""
    full = text.plain_json(manifest)
    if len(full) <= MANIFEST_BYTES:
        return full
    return f"{full[:MANIFEST_BYTES]}\n… {len(full) - MANIFEST_BYTES:,} characters more, in the manifest file"
