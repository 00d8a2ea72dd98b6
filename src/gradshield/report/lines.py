"""Lines with interval bands or bars, distinguished by colour, dash and marker together, never by colour alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradshield.report.draw import axis_style, base_layout
from gradshield.report.text import chart_text
from gradshield.types import Rate

Rates = Sequence[Rate | None]

STYLES = (
    ("var(--removed)", "solid", "circle"), ("var(--link)", "dash", "square"), ("var(--quarantined)", "dot", "diamond"),
    ("var(--muted)", "dashdot", "triangle-up"), ("var(--ink)", "longdash", "x"), ("var(--kept)", "solid", "cross"),
)  # fmt: skip


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
