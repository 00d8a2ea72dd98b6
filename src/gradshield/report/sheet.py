"""A page with the verdict first, then sections of charts and tables: the form of every page except the scan's.

``write(Sheet(...), "page.html")``. Strings are escaped; only templates of this package make ``Markup``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from gradshield.report.draw import Chart
from gradshield.report.frame import Status, document, environment, save
from gradshield.types import Rate

ROWS = 400  # of one table; the page says how many are left out


@dataclass(frozen=True)
class Entry:
    """One entry of a table: its text, a small line below, a sort key, a CSS class (``heat-3``) and a tooltip.

    ``words`` stand for the entry where nothing can be drawn or set small, as in Markdown.
    """

    text: str | Markup
    small: str = ""
    key: float | None = None
    look: str = ""
    title: str = ""
    words: str = ""


@dataclass(frozen=True)
class Table:
    """Header and rows of Entry or plain text; the first entry of a row is its header.

    ``sorts`` lets a reader sort by column, ``hint`` is shown below the table, ``look`` is a CSS class.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Entry | str, ...], ...]
    title: str = ""
    hint: str = ""
    sorts: bool = False
    look: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: a lead, then charts, tables and links."""

    id: str
    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()  # (class, text)
    search: str = ""  # label of a search box that filters the rows of every table
    links: tuple[tuple[str, str], ...] = ()  # (text, path relative to the page)
    nav: str = ""  # a shorter title


@dataclass(frozen=True)
class Sheet:
    """A page. ``figures`` are (name, value, note) in large type; ``kind`` is the kind of page, shown in its header."""

    title: str
    kind: str
    tone: Status
    standing: str
    verdict: str
    facts: tuple[str, ...] = ()  # the evidence, shown below the verdict
    figures: tuple[tuple[str, str, str], ...] = ()
    sections: tuple[Section, ...] = ()
    command: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[tuple[str, str], ...] = ()  # how it was made: (name, value)
    links: tuple[tuple[str, str], ...] = ()  # related files: (text, path relative to the page)
    folded: tuple[tuple[str, str], ...] = ()  # every setting, collapsed


def render(sheet: Sheet) -> str:
    """The page as one string of HTML."""
    charts = [chart for section in sheet.sections for chart in section.charts]
    sections = [s for s in sheet.sections if s.charts or s.tables or s.lead or s.links]
    context = {"sheet": sheet, "sections": sections, "entry": entry, "rows": ROWS, "relative": relative}
    return document("sheet.html", context, charts, style="sheet.css", script="sheet.js")


def write(sheet: Sheet, path: str | os.PathLike[str]) -> Path:
    """Render to ``path``, atomically."""
    return save(render(sheet), path)


def relative(path: str) -> str:
    """A path as a URL relative to the page, never with a scheme or host."""
    return quote(path.replace("\\", "/"), safe="/", errors="replace").lstrip("/")


def entry(value: Entry | str) -> Entry:
    """An entry of either form."""
    return value if isinstance(value, Entry) else Entry(value)


def rate_entry(rate: Rate | None, words: str = "") -> Entry:
    """A rate with its bar, interval and count; a dash if it is missing."""
    return Entry("–") if rate is None else Entry(_drawn("parts.html", "rate", rate), key=rate.rate, words=words)


def _drawn(template: str, macro: str, *arguments: Any) -> Markup:
    return Markup(getattr(environment().get_template(template).module, macro)(*arguments))


def spark(points: Sequence[Mapping[str, Any]], limit: float) -> Markup:
    """A sparkline with one mark per point, which has ``low``, ``rate``, ``high`` in [0, 1] and a ``look``."""
    return _drawn("spark.html", "spark", points, limit)
