"""What every page stands in: templates that escape all they show, a policy of exact hashes, Plotly inline, whole files.

The policy in a page lets only its own scripts and its own style run, each named by hash: someone else's text that slipped
past escaping would still not run. Plotly's script is inlined once.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from gradshield.files import replacing
from gradshield.report import text
from gradshield.report.draw import Chart
from gradshield.types import Rate

RateLike = Rate | Mapping[str, Any]
"""A ``types.Rate``, or its dict form ``{rate, low, high, n, k}``."""

Status = Literal["pass", "warn", "fail"]


def as_rate(value: RateLike) -> Rate:
    """The Rate behind either form."""
    if isinstance(value, Rate):
        return value
    return Rate(
        k=int(value["k"]),
        n=int(value["n"]),
        rate=float(value["rate"]),
        low=float(value["low"]),
        high=float(value["high"]),
        level=float(value.get("level", 0.95)),
    )


_TEMPLATES = Path(__file__).parent / "templates"


def document(
    template: str, context: Mapping[str, Any], charts: Sequence[Chart], style: str = "", script: str = ""
) -> str:
    """A whole page of ``template``, with its charts and, beside the common ones, a ``style`` and a ``script`` by file name."""
    sources = [_plotly(), _asset("report.js"), *([_asset(script)] if script else [])]
    css = _asset("report.css") + (_asset(style) if style else "")
    frame = {
        "plotly": Markup(sources[0]), "scripts": [Markup(source) for source in sources[1:]], "style": Markup(css),
        "specs": Markup(text.script_json({chart.key: chart.spec for chart in charts})),
        "policy": _policy(sources, css), "style_guard": _style_guard(),
    }  # fmt: skip
    return environment().get_template(template).render({**context, **frame})


def fragment(template: str, context: Mapping[str, Any]) -> Markup:
    """A part of a page, as safe as its template."""
    return Markup(environment().get_template(template).render(context))


def save(page: str, path: str | os.PathLike[str]) -> Path:
    """Write a page to ``path``. The file appears whole or not at all; an older one stays until then."""
    target = Path(path)
    body = page.encode("utf-8", "replace")
    with replacing(target) as part:
        part.write_bytes(body)
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


def _breakable(value: Any) -> Markup:
    """`text.breakable` of anything but markup, which is left alone."""
    return value if isinstance(value, Markup) else text.breakable(str(value))


@cache
def environment() -> Environment:
    """The templates, with every filter that they use."""
    found = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=_finalize,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found.filters.update(
        number=text.number,
        percent=text.percent,
        shorten=text.shorten,
        one_line=text.one_line,
        rate=as_rate,
        whole_options=_whole_options,
        breakable=_breakable,
    )
    return found


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
