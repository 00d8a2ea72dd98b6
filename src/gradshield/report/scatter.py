"""Safety against usefulness: one point per defence, with the interval of both figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradshield.report.draw import Chart, axis_style, base_layout
from gradshield.report.pool import REFERENCES, TARGET, Pooled, Totals, bounds
from gradshield.report.text import chart_text, one_line

LONGEST = 24  # letters of a name beside its point
LETTER, LINE = 0.0085, 0.045  # size of a letter as shares of the figure, roughly: enough to keep names apart
NARROW = 0.024  # the same letter on a phone
NEAR = 0.012  # of the figure: points within it lie on top of each other, and share a name
ROW, ROWS = 30, 3  # letters of a line of joined names, and lines
REACH = 100 * TARGET + 2  # percent of the axis at least, so that the line of the target is on it
SIDES = ("top right", "top left", "bottom right", "bottom left")
_KNOWN = (*REFERENCES, "clean", "none")


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
    named, few = _named(found, LETTER), _named(found, NARROW)
    top = max(102 * max(x.high for _, x, _ in found), REACH)
    groups = (
        ("GradShield", "var(--link)", "diamond", [p for p in found if _ours(p[0].defence)]),
        ("no filter, perfect filter", "var(--ink)", "square", [p for p in found if p[0].defence in ("none", "clean")]),
    )  # fmt: skip
    taken = {id(point[0]) for _, _, _, points in groups for point in points}
    rest = [point for point in found if id(point[0]) not in taken]
    drawn = [group for group in (*groups, ("other defences", "var(--quarantined)", "circle", rest)) if group[3]]
    traces = [_trace(name, colour, symbol, points, named) for name, colour, symbol, points in drawn]
    narrow = [_labels(points, few) for _, _, _, points in drawn]
    figure = base_layout(height=460, showlegend=True, margin={"l": 8, "r": 60, "t": 34, "b": 8})
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
    caption = f"Bars are 95 % intervals of the pooled figures; the dotted line is an ASR of {100 * TARGET:g} %."
    return Chart(
        "trade",
        "Safety against usefulness",
        caption,
        {"data": traces, "layout": figure, "narrow": narrow},
        (head, *lines),
        False,
    )


Point = tuple[Totals, Pooled, Pooled]
Box = tuple[float, float, float, float]


def _ours(defence: str) -> bool:
    """Whether a part of the defence is one of our scans."""
    return any(part.partition(":")[0].strip() in ("screen", "fihs", "token-mask") for part in defence.split("+"))


def _named(found: Sequence[Point], letter: float) -> dict[str, tuple[str, str]]:
    """What stands beside a point and on which side, by the defence that carries it: the known ones first, then those that
    nothing beats.

    Points on top of each other share one label, and no label covers another, nor another point where there is room elsewhere.
    """

    def beaten(point: Point) -> bool:
        return any(other[1].rate < point[1].rate and other[2].rate > point[2].rate for other in found)

    wide = max(max(x.high for _, x, _ in found), REACH / 100)
    tall = max(y.high for _, _, y in found) - min(y.low for _, _, y in found) or 1.0
    piles: list[tuple[float, float, list[str]]] = []
    for one, x, y in sorted(found, key=lambda point: (_rank(point[0].defence), beaten(point))):
        at, height = x.rate / wide, y.rate / tall
        pile = next((names for a, h, names in piles if abs(a - at) <= NEAR and abs(h - height) <= NEAR), None)
        if pile is None:
            piles.append((at, height, [one.defence]))
        else:
            pile.append(one.defence)
    placed: list[Box] = []
    named = {}
    for at, height, names in piles:
        lines = _joined(names)
        boxes = {side: _box(at, height, lines, side, letter) for side in SIDES}
        free = [
            side
            for side, box in boxes.items()
            if box[0] >= 0 and box[1] <= 1.1 and not any(_meet(box, o) for o in placed)
        ]
        others = [(a, a, h, h) for a, h, _ in piles if (a, h) != (at, height)]
        clear = [side for side in free if not any(_meet(boxes[side], other) for other in others)]
        if free:
            side = (clear or free)[0]
            placed.append(boxes[side])
            named[names[0]] = ("<br>".join(chart_text(line, 2 * ROW) for line in lines), side)
    return named


def _rank(defence: str) -> int:
    return _KNOWN.index(defence) if defence in _KNOWN else len(_KNOWN)


def _box(at: float, height: float, lines: Sequence[str], side: str, letter: float) -> Box:
    """Left, right, bottom and top of a label on one side of its point, as shares of the figure."""
    length, deep = letter * max(len(line) for line in lines), LINE * len(lines)
    left = at + 0.008 if side.endswith("right") else at - 0.008 - length
    low = height + 0.01 if side.startswith("top") else height - 0.01 - deep
    return left, left + length, low, low + deep


def _meet(one: Box, other: Box) -> bool:
    return one[0] <= other[1] and other[0] <= one[1] and one[2] <= other[3] and other[2] <= one[3]


def _joined(names: Sequence[str]) -> list[str]:
    """``clean, fihs, fihs:verified`` in lines of text, the last saying how many more there are."""
    lines = [""]
    for i, name in enumerate(names):
        word = f"{one_line(name, LONGEST)}{',' if i < len(names) - 1 else ''}"
        if lines[-1] and len(lines[-1]) + len(word) >= ROW:
            if len(lines) == ROWS:
                lines[-1] += f" and {len(names) - i} more"
                break
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def _labels(points: Sequence[Point], named: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    beside = [named.get(one.defence, ("", SIDES[0])) for one, _, _ in points]
    return {"text": [label for label, _ in beside], "textposition": [side for _, side in beside]}


def _trace(
    name: str, colour: str, symbol: str, points: Sequence[Point], named: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
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
        **_labels(points, named),
        "customdata": [chart_text(one.defence, 60) for one, _, _ in points],
        "textfont": {"color": "var(--ink)", "size": 11}, "cliponaxis": False,
        "marker": {"color": colour, "symbol": symbol, "size": 9}, "error_x": bars(xs), "error_y": bars(ys),
        "hovertemplate": "%{customdata}<br>ASR %{x:.1f} %<br>%{y:.1f}<extra></extra>",
    }  # fmt: skip
