"""Charts as plain Plotly dicts, with a common style.

Colours are CSS variables that the page's script resolves, so that one figure works in light, dark and print.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


@dataclass(frozen=True)
class Chart:
    """One figure: ``spec`` for Plotly, ``table`` (header, then rows of text) as an alternative, title and caption."""

    key: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    table: tuple[tuple[str, ...], ...]
    toggles: bool = True  # whether counts can be shown on a logarithmic axis


def axis_title(text: str) -> dict[str, Any]:
    """The title of an axis."""
    return {"text": text, "standoff": 8, "font": {"size": 12, "color": "var(--muted)"}}


def axis_style(title: str | None) -> dict[str, Any]:
    """An axis in the common style."""
    return {
        "gridcolor": "var(--line)", "linecolor": "var(--line)", "zeroline": False, "automargin": True,
        "tickfont": {"color": "var(--muted)", "size": 11}, "title": axis_title(title or ""),
    }  # fmt: skip


def base_layout(**more: Any) -> dict[str, Any]:
    """A figure layout in the common style."""
    return {
        "autosize": True, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "barmode": "stack",
        "font": {"family": FONT, "color": "var(--ink)", "size": 12},
        "margin": {"l": 8, "r": 8, "t": 34, "b": 8}, "hovermode": "closest", "dragmode": False,
        "hoverlabel": {"bgcolor": "var(--surface)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "itemclick": False,
                   "itemdoubleclick": False, "traceorder": "normal"},
    } | more  # fmt: skip
