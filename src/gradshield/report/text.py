"""Make untrusted text safe to show: nothing hidden, nothing that reorders or runs.

Each destination has its function: ``visible`` for any text, ``chart_text`` for what Plotly reads as pseudo-HTML, ``script_json``
for JSON inside ``<script>``, ``plain`` and ``code`` for Markdown.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from gradshield.files import replacing

MISSING = "–"
_SPELT_OUT = 1e9  # numbers from here on keep their exponent
_WORD = 18  # characters of a word that fits into any column

# Controls (newline and tab stay), soft hyphen, Arabic and Mongolian marks, zero-width and bidi controls, line and
# paragraph separators, invisible operators, fillers, variation selectors other than the two emoji ones, lone
# surrogates, byte-order mark, interlinear marks, noncharacters, tags: each can hide text or move it.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# More than a few combining marks in a row climb out of their line.
_STACKED = re.compile("([\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{3})"
                      "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")  # fmt: skip


def _show(match: re.Match[str]) -> str:
    return f"⟨U+{ord(match.group()):04X}⟩"


def visible(text: str) -> str:
    """The text with hidden and reordering characters spelled out, as ⟨U+202E⟩. Not escaped."""
    return _STACKED.sub(r"\1⟨+marks⟩", _HIDDEN.sub(_show, text.replace("\r\n", "\n")))


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters, the last an ellipsis if the text was cut."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…"


def one_line(text: str, limit: int) -> str:
    """The start of the text on one line."""
    return shorten(" ".join(text[: 4 * limit].split()), limit)


def chart_text(text: str, limit: int = 36) -> str:
    """A label for Plotly, which interprets tags, entities and (with MathJax) dollars."""
    return html.escape(visible(one_line(text, limit)), quote=False).replace("$", "&#36;")


def script_json(value: Any) -> str:
    """JSON that cannot close, comment out or break the script element around it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def number(value: Any, digits: int = 4) -> str:
    """A number for display: integers with separators, others with ``digits`` significant digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{value:.4g}"
    if not isinstance(value, float):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    if "e+" in text and abs(value) < _SPELT_OUT:
        text = f"{float(text):,.0f}"
    return text.replace("-", "−")


def duration(seconds: float) -> str:
    """A time for display: ``0.4 s``, ``12 s``, ``3 min``, ``5.1 h``."""
    if seconds == math.inf:
        return "longer"
    if seconds < 0.1:
        return "less than 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def breakable(value: Any) -> Markup:
    """Text with line breaks allowed in long words, only after the punctuation between their parts; markup is unchanged."""
    if isinstance(value, Markup):
        return value
    words = re.split(r"(\s+)", str(value))
    return Markup("").join(_with_breaks(word) if len(word) > _WORD else escape(visible(word)) for word in words)


def _with_breaks(word: str) -> Markup:
    parts = re.split(r"(?<=[._/:+,])(?=[^\W_])", word)
    return Markup("<wbr>").join(escape(visible(part)) for part in parts)


def percent(value: float) -> str:
    """A proportion as a percentage, with one decimal unless it is exactly 0 or 1."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:.1f}"
    if text in ("0.0", "100.0"):  # 0.04 % is not nothing and 99.96 % is not all
        return {0.0: "0\u00a0%", 1.0: "100\u00a0%"}.get(value, "<0.1\u00a0%" if value < 0.5 else ">99.9\u00a0%")
    return f"{text}\u00a0%"


def flatten(value: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as lines of (dotted key, short value)."""
    lines: list[tuple[str, str]] = []
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if isinstance(entry, Mapping) and entry:
            lines += flatten(entry, f"{name}.")
        else:
            lines.append((shorten(name, 120), brief(entry)))
    return lines


def brief(value: Any) -> str:
    """A value on one line: a number to six digits, a list to fifty entries."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        value = ", ".join(str(entry) for entry in value[:50])
    return shorten(str(value), 300)


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
