"""A page with the verdict first, then sections of charts and tables: the form of every page but the scan's.

``write(Sheet(...), "page.html")``. Text is only ever text: what is ``Markup`` was made here by a template.
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
from gradshield.report.frame import Status, as_rate, document, environment, save
from gradshield.report.pool import Pooled, usable

ROWS = 400  # of one table; a page says how many more there are


@dataclass(frozen=True)
class Entry:
    """One entry of a table: its text, a line beneath, what it sorts by, a class (``heat-3``) and a longer word on it."""

    text: str | Markup
    small: str = ""
    key: float | None = None
    look: str = ""
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Header and rows, each an Entry or plain text; the first entry of a row is its head.

    ``sorts`` lets a reader sort by column, ``hint`` stands beneath. ``look`` is a class of the table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Entry | str, ...], ...]
    title: str = ""
    hint: str = ""
    sorts: bool = False
    look: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: a lead, then charts, tables and lists in this order."""

    id: str
    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()  # (class, words)
    search: str = ""  # what a search box filters the rows of every table by
    links: tuple[tuple[str, str], ...] = ()  # (words, path relative to the page)
    nav: str = ""  # a shorter title


@dataclass(frozen=True)
class Sheet:
    """A page. ``figures`` are (name, value, note) in large type; ``kind`` says what the page is in its header."""

    title: str
    kind: str
    tone: Status
    standing: str
    verdict: str
    facts: tuple[str, ...] = ()  # what the verdict rests on, beneath it
    figures: tuple[tuple[str, str, str], ...] = ()
    sections: tuple[Section, ...] = ()
    command: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[tuple[str, str], ...] = ()  # how it was made: (name, value)
    links: tuple[tuple[str, str], ...] = ()  # files it was made with or made: (words, path relative to the page)
    folded: tuple[tuple[str, str], ...] = ()  # every setting, behind a click


def render(sheet: Sheet) -> str:
    """The page as one string of HTML."""
    charts = [chart for section in sheet.sections for chart in section.charts]
    context = {
        "sheet": sheet,
        "sections": [s for s in sheet.sections if _holds(s)],
        "entry": _entry,
        "rows": ROWS,
        "beside": beside,
    }
    return document("sheet.html", context, charts, style="sheet.css", script="sheet.js")


def write(sheet: Sheet, path: str | os.PathLike[str]) -> Path:
    """Render to ``path``. The file appears whole or not at all."""
    return save(render(sheet), path)


def beside(path: str) -> str:
    """A path as the address of a file beside the page: no scheme and no host, whatever it says."""
    return quote(path.replace("\\", "/"), safe="/", errors="replace").lstrip("/")


def _holds(section: Section) -> bool:
    return bool(section.charts or section.tables or section.points or section.lead or section.links)


def _entry(value: Entry | str) -> Entry:
    return value if isinstance(value, Entry) else Entry(value)


def rate_entry(value: Any) -> Entry:
    """A rate with its bar, interval and count; a dash where there is none."""
    if isinstance(value, Pooled):
        counts = round(value.rate * value.n)
        value = {"rate": value.rate, "low": value.low, "high": value.high, "n": value.n, "k": counts}
    if not usable(value):
        return Entry("–")
    shown = dict(value)
    shown.setdefault("k", round(shown["rate"] * shown["n"]))
    return Entry(_parts("rate", as_rate(shown)), key=float(shown["rate"]))


def _parts(macro: str, *arguments: Any) -> Markup:
    module: Any = environment().get_template("parts.html").module
    return Markup(getattr(module, macro)(*arguments))


def spark(points: Sequence[Mapping[str, Any]], limit: float) -> Markup:
    """A drawing the size of a word: one mark per point, with ``low``, ``rate``, ``high`` in [0, 1] and a ``look``."""
    module: Any = environment().get_template("spark.html").module
    return Markup(module.spark(points, limit))
