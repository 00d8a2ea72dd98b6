"""Safety against usefulness: one point per defence, with intervals on both axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradshield.comparison.pool import Pooled, Totals, bounds
from gradshield.errors import GradShieldError
from gradshield.options import Spec
from gradshield.report.draw import Chart, axis_style, base_layout
from gradshield.report.text import chart_text
from gradshield.selectors import SELECTORS
from gradshield.thresholds.verified import TARGET
from gradshield.training.defences import parse

LONGEST = 24  # characters of a name in the legend
REACH = 100 * TARGET + 2  # least end of the axis in percent, so that it shows the target
SYMBOLS = (
    "circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "pentagon", "star", "hexagon", "hourglass",
    "bowtie", "triangle-left", "triangle-right", "star-triangle-up", "star-square", "star-diamond", "hexagram",
)  # fmt: skip
REFERENCE, OURS, OTHER = range(3)
COLOURS = ("var(--ink)", "var(--link)", "var(--quarantined)")


def trade_off(sums: Sequence[Totals]) -> Chart | None:
    """Utility (minus clean, if every defence has it) over ASR with harm by the worst judge; None without points."""
    relative = all(one.minus_clean is not None for one in sums if one.defence != "clean" and one.harmed)
    found = []
    for one in sums:
        y = one.minus_clean if relative else one.utility
        if relative and y is None and one.defence == "clean" and one.utility is not None:
            y = Pooled(0.0, 0.0, 0.0, one.utility.n, 0, one.utility.cells, 0.0, 0.0)
        if one.harmed and y is not None:
            found.append((one, max(one.harmed.values(), key=lambda rate: rate.rate), y))
    if not found:
        return None
    top = max(102 * max(x.high for _, x, _ in found), REACH)
    grouped = sorted(found, key=lambda point: _group(point[0].defence))
    traces = [_trace(one, x, y, SYMBOLS[i % len(SYMBOLS)]) for i, (one, x, y) in enumerate(grouped)]
    figure = base_layout(height=480, showlegend=True, margin={"l": 8, "r": 24, "t": 8, "b": 8})
    figure["legend"] |= {"y": -0.2, "yanchor": "top"}
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    figure["shapes"] = [
        {"type": "line", "x0": 100 * TARGET, "x1": 100 * TARGET, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    ]
    figure["xaxis"] = axis_style("ASR with harm in the rows, %, worst judge") | {
        "fixedrange": True, "range": [-0.015 * top, top], "zeroline": True, "zerolinecolor": "var(--line)"
    }  # fmt: skip
    words = "utility − clean, points" if relative else "utility, %"
    figure["yaxis"] = axis_style(words) | {"fixedrange": True, "zeroline": relative, "zerolinecolor": "var(--line)"}
    head = ("Defence", "ASR with harm, % [95 %]", words + " [95 %]", "Cells")
    lines = [(one.defence, bounds(x), bounds(y, relative), f"{one.cells - one.failed}") for one, x, y in found]
    caption = (
        f"Bars are 95 % intervals of the pooled figures; the dotted line is an ASR of {100 * TARGET:g} %. Hover over a mark for "
        "its figures."
    )
    spec = {"data": traces, "layout": figure}
    return Chart("trade", "Safety against usefulness", caption, spec, (head, *lines), False)


def _group(defence: str) -> int:
    """REFERENCE (no filter or a perfect one), OURS (FIHS chooses its rows), or OTHER."""
    if defence in ("none", "clean"):
        return REFERENCE
    try:
        selector = parse(defence).selector
    except GradShieldError:  # a method of a plugin that is not installed here
        return OTHER
    return OURS if selector is not None and SELECTORS[Spec.split(selector).name].probed else OTHER


def _trace(one: Totals, x: Pooled, y: Pooled, symbol: str) -> dict[str, Any]:
    colour = COLOURS[_group(one.defence)]

    def bar(value: Pooled) -> dict[str, Any]:
        up, down = [100 * (value.high - value.rate)], [100 * (value.rate - value.low)]
        return {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1, "width": 0, "color": colour}

    return {
        "type": "scatter", "mode": "markers", "name": chart_text(one.defence, LONGEST), "x": [100 * x.rate], "y": [100 * y.rate],
        "customdata": [chart_text(one.defence, 60)], "cliponaxis": False,
        "marker": {"color": colour, "symbol": symbol, "size": 10}, "error_x": bar(x), "error_y": bar(y),
        "hovertemplate": "%{customdata}<br>ASR %{x:.1f} %<br>%{y:.1f}<extra></extra>",
    }  # fmt: skip
