"""Untrusted text as Markdown, table rows, and a section of our own in a README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gradshield.files import replacing
from gradshield.report.text import MISSING, one_line, visible

BEGIN, END = "<!-- gradshield:begin -->", "<!-- gradshield:end -->"


def put_section(path: Path, section: str, front: str = "") -> None:
    """Put a section, from BEGIN to END, into a README in place of an earlier one; the rest of the file is kept.

    ``front`` is the front matter of a new file.
    """
    old = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else front
    old = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", "", old, flags=re.DOTALL).rstrip()
    # After the front matter, which must come first, and before PEFT's text.
    matter = re.match(r"---\n.*?\n---(\n|$)", old, flags=re.DOTALL)
    head, rest = (old[: matter.end()], old[matter.end() :]) if matter else ("", old)
    parts = [head.strip(), section, rest.strip()]
    with replacing(path) as part:
        part.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8", errors="surrogateescape")


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
