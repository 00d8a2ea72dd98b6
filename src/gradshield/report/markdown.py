"""Untrusted text as Markdown, and table rows."""

from __future__ import annotations

import re
from typing import Any

from gradshield.report.text import MISSING, one_line, visible


def table_row(*entries: str) -> str:
    """A row of a Markdown table; the entries are Markdown."""
    return f"| {' | '.join(entries)} |"


def table_rule(columns: int) -> str:
    """The line between the header and the rows of a Markdown table."""
    return "|" + "---|" * columns


def plain(text: str) -> str:
    """Untrusted text as one line of Markdown, without hidden characters, markup or cell breaks."""
    shown = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", visible(one_line(text, 600)))
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return shown.replace("://", "&#58;//")  # some renderers link any URL


def code(text: Any) -> str:
    """Untrusted text as Markdown code, without characters that would end it or its table cell."""
    shown = visible(one_line(str(text), 600)).replace("`", "'").replace("|", "¦")
    return f"`{shown}`" if shown else MISSING
