"""A page with the verdict first, then sections of charts and tables: the form of every page.

``write(Sheet(...), "page.html")``. Strings are escaped; only templates of this package make ``Markup``.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from gradshield.files import replacing
from gradshield.report import text
from gradshield.report.draw import Chart
from gradshield.report.text import script_json
from gradshield.stats import counted
from gradshield.types import Rate

ROWS = 400  # of one table; the page says how many are left out
NOTHING = Markup()


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
    """A part of the page: a lead, then charts, tables, links, and a ``body`` made by `drawn`."""

    id: str
    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()  # (class, text)
    search: str = ""  # label of a search box that filters the rows of every table
    links: tuple[tuple[str, str], ...] = ()  # (text, path relative to the page)
    nav: str = ""  # a shorter title
    body: Markup = NOTHING

    def __bool__(self) -> bool:
        """Whether anything is in it: a section without is left out, as is a table without rows."""
        return any((self.lead, self.charts, self.links, self.body, *(table.rows for table in self.tables)))


@dataclass(frozen=True)
class Sheet:
    """A page. ``figures`` are (name, value, note) in large type; ``kind`` is the kind of page, shown in its header.

    ``first`` ends the first screen, and is made by `drawn`.
    """

    title: str
    kind: str
    tone: Status
    standing: str
    verdict: str
    facts: tuple[str, ...] = ()  # the evidence, shown below the verdict
    figures: tuple[tuple[str, str, str], ...] = ()
    first: Markup = NOTHING
    sections: tuple[Section, ...] = ()
    command: str = ""
    versions: Mapping[str, Any] = field(default_factory=dict)
    made: tuple[tuple[str, str], ...] = ()  # how it was made: (name, value)
    links: tuple[tuple[str, str], ...] = ()  # related files: (text, path relative to the page)
    folded: tuple[tuple[str, str], ...] = ()  # every setting, collapsed


def render(sheet: Sheet) -> str:
    """The page as one string of HTML.

    Its content security policy allows only its own scripts and style, by hash: untrusted text that slipped past escaping would
    still not run. Plotly creates one empty style element and adds rules to it: hence the hash of nothing.
    """
    plots, script, style = plotly(), asset("report.js"), asset("report.css")
    policy = (
        f"default-src 'none'; script-src {source_hash(plots)} {source_hash(script)}; "
        f"style-src {source_hash(style)} {source_hash('')}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    specs = {chart.key: chart.spec for section in sheet.sections for chart in section.charts}
    return (
        environment()
        .get_template("sheet.html")
        .render(
            sheet=sheet,
            sections=[one for one in sheet.sections if one],
            entry=entry,
            rows=ROWS,
            relative=relative,
            policy=policy,
            style_guard=style_guard(),
            style=Markup(style),
            plotly=Markup(plots),
            script=Markup(script),
            specs=Markup(script_json(specs)),
        )
    )


def write(sheet: Sheet, path: str | os.PathLike[str]) -> Path:
    """Render to ``path``, atomically."""
    target = Path(path)
    with replacing(target) as part:
        part.write_bytes(render(sheet).encode("utf-8", "replace"))
    return target


def relative(path: str) -> str:
    """A path as a URL relative to the page, never with a scheme or host."""
    return quote(path.replace("\\", "/"), safe="/", errors="replace").lstrip("/")


def entry(value: Entry | str) -> Entry:
    """An entry of either form."""
    return value if isinstance(value, Entry) else Entry(value)


def rate_entry(rate: Rate | None, words: str = "") -> Entry:
    """A rate with its bar, interval and count, of a mean n alone; a dash if it is missing."""
    if rate is None:
        return Entry("–")
    return Entry(drawn("parts.html", "rate", rate, counted(rate)), key=rate.rate, words=words)


def drawn(template: str, macro: str, *arguments: Any) -> Markup:
    """What a macro of a template makes of its arguments."""
    return Markup(getattr(environment().get_template(template).module, macro)(*arguments))


def interval(low: float, value: float, high: float) -> Markup:
    """A bar for an interval within [0, 1], with a mark at the value."""
    return drawn("parts.html", "interval", low, value, high)


def spark(points: Sequence[Mapping[str, Any]], limit: float) -> Markup:
    """A sparkline with one mark per point, which has ``low``, ``rate``, ``high`` in [0, 1] and a ``look``."""
    return drawn("parts.html", "spark", points, limit)


Status = Literal["pass", "warn", "fail"]
_TEMPLATES = Path(__file__).parent / "templates"


def _finalize(value: Any) -> Any:
    """Make hidden characters visible in every ``{{ }}`` of the templates, before autoescape."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else text.visible(str(value))


def _whole_options(value: str) -> Markup:
    """Text with command-line options that do not break after their hyphens."""
    shown = str(escape(text.visible(value)))
    return Markup(re.sub(r"(?<!\S)--[a-z][a-z-]*", r'<span class="nowrap">\g<0></span>', shown))


@cache
def environment() -> Environment:
    """The templates, with their filters."""
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_finalize,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters.update(
        number=text.number,
        percent=text.percent,
        shorten=text.shorten,
        one_line=text.one_line,
        whole_options=_whole_options,
        breakable=text.breakable,
    )
    return found


@cache
def plotly() -> str:
    from plotly.offline import get_plotlyjs  # slow to import

    return _script(get_plotlyjs())


@cache
def asset(name: str) -> str:
    """The source of a style or a script of the templates."""
    return _script((_TEMPLATES / name).read_text(encoding="utf-8"))


def _script(source: str) -> str:
    """The source as an HTML parser passes it on, so that the hash in the policy matches what runs."""
    return source.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script")


def source_hash(source: str) -> str:
    """A source as a content security policy allows it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


@cache
def style_guard() -> str:
    """The id of the style of Plotly's map layer, which is unused here; without the id, Plotly would try to add the style."""
    found = re.search(r'getElementById\("([0-9a-f]{64})"\)', plotly())
    return found.group(1) if found else ""
