"""Charts as plain Plotly dicts, with a common style, and lines with the intervals of their rates.

Colours are CSS variables that the page's script resolves, so that one figure works in light, dark and print. Lines are
distinguished by colour, dash and marker together, never by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradshield.report.text import chart_text
from gradshield.types import Rate

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"

Rates = Sequence[Rate | None]

STYLES = (
    ("var(--removed)", "solid", "circle"), ("var(--link)", "dash", "square"), ("var(--quarantined)", "dot", "diamond"),
    ("var(--muted)", "dashdot", "triangle-up"), ("var(--ink)", "longdash", "x"), ("var(--kept)", "solid", "cross"),
)  # fmt: skip


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
    return {"text": text, "standoff": 8, "font": {"size": 12, "color": "var(--muted)"}}


def axis_style(title: str | None) -> dict[str, Any]:
    return {
        "gridcolor": "var(--line)", "linecolor": "var(--line)", "zeroline": False, "automargin": True,
        "tickfont": {"color": "var(--muted)", "size": 11}, "title": axis_title(title or ""),
    }  # fmt: skip


def base_layout(**more: Any) -> dict[str, Any]:
    return {
        "autosize": True, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "barmode": "stack",
        "font": {"family": FONT, "color": "var(--ink)", "size": 12},
        "margin": {"l": 8, "r": 8, "t": 34, "b": 8}, "hovermode": "closest", "dragmode": False,
        "hoverlabel": {"bgcolor": "var(--surface)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "itemclick": False,
                   "itemdoubleclick": False, "traceorder": "normal"},
    } | more  # fmt: skip


def banded(
    name: str, x: Sequence[float], rates: Rates, style: int = 0, y: str = "y", **more: Any
) -> list[dict[str, Any]]:
    """A line through the rates in percent, over the band of their intervals. Missing rates leave a gap."""
    colour, dash, symbol = STYLES[style % len(STYLES)]
    line = more.pop("line", {"color": colour, "width": 2, "dash": dash})
    shown = [(at, rate) for at, rate in zip(x, rates, strict=True) if rate is not None]
    band = {
        "type": "scatter", "mode": "lines", "yaxis": y, "hoverinfo": "skip", "showlegend": False, "opacity": 0.16,
        "x": [at for at, _ in shown] + [at for at, _ in reversed(shown)],
        "y": [100 * rate.high for _, rate in shown] + [100 * rate.low for _, rate in reversed(shown)],
        "fill": "toself", "fillcolor": line["color"], "line": {"width": 0, "color": line["color"]}, "legendgroup": name,
    }  # fmt: skip
    label = chart_text(name)
    marks = {
        "type": "scatter", "mode": "lines+markers", "name": label, "legendgroup": name, "yaxis": y, "line": line,
        "x": list(x), "y": [None if rate is None else 100 * rate.rate for rate in rates],
        "marker": {"symbol": symbol, "size": 7, "color": line["color"]}, "connectgaps": False, "cliponaxis": False,
        "hovertemplate": label + "<br>%{y:.1f} %<extra></extra>",
    }  # fmt: skip
    return [band, {**marks, **more}]


def barred(
    name: str, x: Sequence[float], rates: Rates, style: int = 0, y: str = "y", **more: Any
) -> list[dict[str, Any]]:
    """A line through the rates in percent, with an error bar for each interval."""
    marks = banded(name, x, rates, style, y, **more)[1]
    up = [0.0 if rate is None else 100 * (rate.high - rate.rate) for rate in rates]
    down = [0.0 if rate is None else 100 * (rate.rate - rate.low) for rate in rates]
    bars = {
        "type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.4, "width": 5,
        "color": marks["line"]["color"],
    }  # fmt: skip
    return [{**marks, "error_y": bars}]


def percent_axis(title: str, rates: Iterable[Rate | None] = ()) -> dict[str, Any]:
    """An axis from 0 % to 100 %, or to less if every interval ends well below, with room for marks at both ends."""
    highest = max((100 * rate.high for rate in rates if rate is not None), default=100.0)
    top, step = next(((top, step) for top, step in ((10, 2), (20, 5), (40, 10)) if highest <= top), (100, 25))
    return axis_style(title) | {
        "range": [-0.03 * top, 1.03 * top], "fixedrange": True, "dtick": step, "ticksuffix": " %", "tick0": 0
    }  # fmt: skip


def limit_line(limit: float, yref: str = "y") -> dict[str, Any]:
    """A dotted horizontal line across the figure at a share."""
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    ends = {"x0": 0, "x1": 1, "y0": 100 * limit, "y1": 100 * limit}
    return {"type": "line", "xref": "paper", "yref": yref, "line": line, **ends}


def steps_layout(names: Sequence[str], height: int = 340) -> dict[str, Any]:
    """A figure layout with named steps on the horizontal axis."""
    figure = base_layout(height=height, showlegend=True)
    figure["xaxis"] = axis_style(None) | {
        "tickvals": list(range(len(names))), "ticktext": [chart_text(name, 20) for name in names], "fixedrange": True,
        "range": [-0.3, max(len(names) - 0.7, 0.3)], "showgrid": False,
    }  # fmt: skip
    return figure


def worded(rate: Rate | None) -> str:
    """A rate in percent with its interval and count, as text."""
    return "–" if rate is None else str(rate)
