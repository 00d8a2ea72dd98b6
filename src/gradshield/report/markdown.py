"""Untrusted text as Markdown, and the rows of its tables."""

from __future__ import annotations

import re
from typing import Any

from gradshield.report.text import MISSING, one_line, visible


def table_row(*entries: str) -> str:
    """A row of a Markdown table; entries are Markdown already."""
    return f"| {' | '.join(entries)} |"


def table_rule(columns: int) -> str:
    """The line between a Markdown table's head and its rows."""
    return "|" + "---|" * columns


def plain(text: str) -> str:
    """Someone else's text as Markdown text: one line, nothing hidden, no markup, no table cell ended."""
    shown = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", visible(one_line(text, 600)))
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return shown.replace("://", "&#58;//")  # some renderers turn any address into a link


def code(text: Any) -> str:
    """Someone else's text as Markdown code, without what would end it or its table cell."""
    shown = visible(one_line(str(text), 600)).replace("`", "'").replace("|", "¦")
    return f"`{shown}`" if shown else MISSING
