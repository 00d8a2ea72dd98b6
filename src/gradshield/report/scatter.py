"""Safety against usefulness: one point per defence, with the interval of both figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradshield.report.draw import Chart, axis_style, base_layout
from gradshield.report.pool import REFERENCE, TARGET, Pooled, Totals, bounds
from gradshield.report.text import chart_text

LONGEST = 24  # letters of a name beside its point
LETTER, LINE = 0.0085, 0.045  # size of a letter as shares of the figure, roughly: enough to keep names apart
_KNOWN = ("none", "clean", REFERENCE)


def trade_off(sums: Sequence[Totals]) -> Chart | None:
    """Utility (minus clean, where every defence has it) over ASR with harm by the worst judge; None without any point."""
    relative = all(one.minus_clean is not None for one in sums if one.defence != "clean" and one.harmed)
    found = []
    for one in sums:
        y = one.minus_clean if relative else one.utility
        if relative and y is None and one.defence == "clean" and one.utility is not None:
            y = Pooled(0.0, 0.0, 0.0, one.utility.n, one.utility.cells, 0.0, 0.0)
        if one.harmed and y is not None:
            found.append((one, max(one.harmed.values(), key=lambda rate: rate.rate), y))
    if not found:
        return None
    named = _named(found)
    groups = (
        ("GradShield", "var(--link)", "diamond", [p for p in found if _ours(p[0].defence)]),
        ("no filter, perfect filter", "var(--ink)", "square", [p for p in found if p[0].defence in ("none", "clean")]),
    )  # fmt: skip
    taken = {id(point[0]) for _, _, _, points in groups for point in points}
    rest = [point for point in found if id(point[0]) not in taken]
    traces = [
        _trace(name, colour, symbol, points, named)
        for name, colour, symbol, points in (*groups, ("other defences", "var(--quarantined)", "circle", rest))
        if points
    ]
    figure = base_layout(height=460, showlegend=True, margin={"l": 8, "r": 60, "t": 34, "b": 8})
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    figure["shapes"] = [
        {"type": "line", "x0": 100 * TARGET, "x1": 100 * TARGET, "y0": 0, "y1": 1, "yref": "paper", "line": line}
    ]
    highest = 100 * max(x.high for _, x, _ in found)
    figure["xaxis"] = axis_style("ASR with harm in the rows, %, worst judge") | {
        "fixedrange": True, "range": [-0.015 * highest, 1.02 * highest], "zeroline": True, "zerolinecolor": "var(--line)"
    }  # fmt: skip
    words = "utility − clean, points" if relative else "utility, %"
    figure["yaxis"] = axis_style(words) | {"fixedrange": True, "zeroline": relative, "zerolinecolor": "var(--line)"}
    head = ("Defence", "ASR with harm, % [95 %]", words + " [95 %]", "Cells")
    lines = [(one.defence, bounds(x), bounds(y, relative), f"{one.cells - one.failed}") for one, x, y in found]
    caption = f"Bars are 95 % intervals of the pooled figures; the dotted line is an ASR of {100 * TARGET:g} %."
    return Chart(
        "trade", "Safety against usefulness", caption, {"data": traces, "layout": figure}, (head, *lines), False
    )


Point = tuple[Totals, Pooled, Pooled]


def _ours(defence: str) -> bool:
    """Whether a part of the defence cuts by FIHS."""
    return any(part.partition(":")[0].strip() in ("fihs", "token-mask") for part in defence.split("+"))


def _named(found: Sequence[Point]) -> set[str]:
    """Which points show their names: the known ones first, then those that nothing beats; no name covers another."""

    def beaten(point: Point) -> bool:
        return any(other[1].rate < point[1].rate and other[2].rate > point[2].rate for other in found)

    wide = max(x.rate for _, x, _ in found) or 1.0
    tall = max(y.high for _, _, y in found) - min(y.low for _, _, y in found) or 1.0
    placed: list[tuple[float, float, int]] = []
    named = set()
    for one, x, y in sorted(found, key=lambda point: (point[0].defence not in _KNOWN, beaten(point))):
        at, height, length = x.rate / wide, y.rate / tall, min(len(one.defence), LONGEST)
        room = all(
            abs(height - other) > LINE or at > left + LETTER * size + 0.01 or left > at + LETTER * length + 0.01
            for left, other, size in placed
        )
        if room:
            placed.append((at, height, length))
            named.add(one.defence)
    return named


def _trace(name: str, colour: str, symbol: str, points: Sequence[Point], named: set[str]) -> dict[str, Any]:
    def bars(values: Sequence[Pooled]) -> dict[str, Any]:
        up = [100 * (value.high - value.rate) for value in values]
        down = [100 * (value.rate - value.low) for value in values]
        return {
            "type": "data",
            "array": up,
            "arrayminus": down,
            "symmetric": False,
            "thickness": 1,
            "width": 0,
            "color": colour,
        }

    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    return {
        "type": "scatter", "mode": "markers+text", "name": name, "x": [100 * x.rate for x in xs], "y": [100 * y.rate for y in ys],
        "text": [chart_text(one.defence, LONGEST) if one.defence in named else "" for one, _, _ in points],
        "customdata": [chart_text(one.defence, 60) for one, _, _ in points],
        "textposition": "top right",
        "textfont": {"color": "var(--ink)", "size": 11}, "cliponaxis": False,
        "marker": {"color": colour, "symbol": symbol, "size": 9}, "error_x": bars(xs), "error_y": bars(ys),
        "hovertemplate": "%{customdata}<br>ASR %{x:.1f} %<br>%{y:.1f}<extra></extra>",
    }  # fmt: skip
