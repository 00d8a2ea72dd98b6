"""What every page is drawn with: escaping templates, and the styles and scripts with their hashes."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from gradshield.report import text

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
