"""The charts as Plotly figures in plain dicts, binned here so that a page never holds a point for each row.

Colours are CSS variables, which the page's script resolves: one figure serves light, dark and print. Each figure
comes with the same figures as a table, for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import ndtr

from gradshield.columns import Coded
from gradshield.report.draw import Chart, axis_style, axis_title, base_layout
from gradshield.report.text import chart_text, number
from gradshield.scanning.decide import PREFERENCE, ROWS
from gradshield.types import Bools, Cut, Floats, Ints, Scores

TITLES = {ROWS: "single rows", PREFERENCE: "preference pairs"}
CATEGORIES = 14  # bars of the category chart; the rest share one
CURVE_POINTS = 240
FAINT = 0.04  # where removed bars are below this share of the tallest, counts start on a logarithmic axis


def score_charts(scores: Scores, removed: Bools, cuts: Mapping[str, Cut], selector: str) -> tuple[Chart, ...]:
    """A distribution for each group of rows on one scale, the most frequent first; ``removed`` (N,)."""
    return tuple(_distribution(group) for group in _groups(scores, removed, cuts, selector))


def class_charts(
    scores: Scores, removed: Bools, cuts: Mapping[str, Cut], selector: str, labels: Ints
) -> tuple[Chart, ...]:
    """The same, harmful over harmless; ``labels`` (N,), 1 for harmful."""
    return tuple(_by_class(group, labels == 1) for group in _groups(scores, removed, cuts, selector))


def category_chart(totals: Mapping[str, int]) -> tuple[Chart, ...]:
    """Removed rows by the kind of harm they are nearest to, the largest on top; none without removed rows."""
    if not totals:
        return ()
    ordered = sorted(totals.items(), key=lambda entry: -entry[1])
    bars = ordered[:CATEGORIES]
    if len(ordered) > CATEGORIES:
        bars = [*bars, (f"{len(ordered) - CATEGORIES} other kinds", sum(n for _, n in ordered[CATEGORIES:]))]
    positions = list(range(len(bars)))
    trace = {
        "type": "bar", "orientation": "h", "x": [n for _, n in bars], "y": positions,
        "text": [f"{n:,}" for _, n in bars], "textposition": "outside", "cliponaxis": False,
        "marker": {"color": "var(--removed)"}, "hoverinfo": "none", "width": 0.62, "textfont": {"color": "var(--ink)"},
    }  # fmt: skip
    layout = base_layout(height=48 + 30 * len(bars), showlegend=False)
    layout["margin"] = {"l": 12, "r": 46, "t": 8, "b": 30}
    layout["yaxis"] = {
        "tickvals": positions, "ticktext": [chart_text(name or "no kind", 30) + "  " for name, _ in bars],
        "range": [len(bars) - 0.4, -0.6], "automargin": True, "fixedrange": True, "showgrid": False, "zeroline": False,
        "ticks": "",
    }  # fmt: skip
    few = {"dtick": 1} if bars[0][1] < 6 else {}
    layout["xaxis"] = (
        axis_style(None) | few | {"rangemode": "tozero", "fixedrange": True, "nticks": 6, "tickformat": ",d"}
    )
    table = (("Nearest kind", "Rows removed"), *((name or "no kind", f"{n:,}") for name, n in bars))
    caption = "Each row is counted under the kind of probe request that its own request resembles most. None was removed for it."
    title = "Removed rows by nearest kind (a guess)"
    return (Chart("categories", title, caption, {"data": [trace], "layout": layout}, table, False),)


@dataclass(frozen=True, eq=False)
class _Group:
    """The rows of one chart. ``own`` (N,) is where they are; ``values``, ``removed`` and ``decoys`` are theirs."""

    place: int
    title: str
    score: str
    own: Bools
    values: Floats
    removed: Bools
    decoys: Floats | None
    cut: Cut
    axis: Axis


def _groups(scores: Scores, removed: Bools, cuts: Mapping[str, Cut], selector: str) -> list[_Group]:
    shapes = Coded.of(scores.shapes)
    counts = {name: n for name, n in shapes.counts().items() if n}
    found = []
    for place, name in enumerate(sorted(counts, key=lambda name: -counts[name])):
        own, cut = shapes.where(name), cuts[name]
        values, decoys = scores.values[own], None if scores.decoys is None else scores.decoys[own]
        shown = values if decoys is None else np.concatenate([values, decoys])
        axis = make_axis(shown, cut.value if math.isfinite(cut.value) else None)
        title = "Scores" if len(counts) == 1 else f"Scores of {TITLES.get(name, name)}"
        score = f"score ({'FIHS' if selector == 'fihs' else chart_text(selector, 60)})"
        found.append(_Group(place, title, score, own, values, removed[own], decoys, cut, axis))
    return found


def _distribution(group: _Group) -> Chart:
    axis, cut, values, removed = group.axis, group.cut, group.values, group.removed
    kept_bins, removed_bins = axis.count(values[~removed]), axis.count(values[removed])
    traces = [_bars(axis, kept_bins, "kept", "var(--kept)"), _bars(axis, removed_bins, "removed", "var(--removed)")]
    traces = [trace for trace, bins in zip(traces, (kept_bins, removed_bins), strict=True) if bins.any()]
    columns = {"kept": kept_bins, "removed": removed_bins}
    tallest = kept_bins + removed_bins
    if group.decoys is not None:
        columns["decoys"] = axis.count(group.decoys)
        traces.append(_steps(axis, columns["decoys"], "decoys", "var(--decoy)"))
        tallest = np.maximum(tallest, columns["decoys"])
    traces += _fits(axis, cut, len(values))
    top = float(tallest.max())
    faint = removed.any() and float(removed_bins.max()) < FAINT * top
    spec = {"data": traces, "layout": _score_layout(group, top), "log": bool(faint), "ranges": {"yaxis": _ranges(top)}}
    return Chart(f"scores-{group.place}", group.title, _caption(group), spec, _table(axis, columns))


def _by_class(group: _Group, harmful: Bools) -> Chart:
    axis, values, removed, harmful = group.axis, group.values, group.removed, harmful[group.own]
    traces: list[dict[str, Any]] = []
    columns: dict[str, Floats] = {}
    ranges: dict[str, dict[str, list[float]]] = {}
    faint = False
    for panel, (name, chosen) in enumerate((("harmful", harmful), ("harmless", ~harmful))):
        suffix = "" if panel == 0 else "2"
        pair = (axis.count(values[chosen & ~removed]), axis.count(values[chosen & removed]))
        for verdict, bins in zip(("kept", "removed"), pair, strict=True):
            columns[f"{name}, {verdict}"] = bins
            trace = _bars(axis, bins, verdict, f"var(--{verdict})", f"{name}, {verdict}")
            traces.append(trace | {"yaxis": f"y{suffix}", "legendgroup": verdict, "showlegend": panel == 0})
        tallest = float(max((pair[0] + pair[1]).max(), 1))
        faint = faint or any(0 < bins.max() < FAINT * tallest for bins in pair)
        ranges[f"yaxis{suffix}"] = _ranges(tallest)
    layout = _score_layout(group, 1.0)
    layout["height"] = 430
    layout["yaxis"] |= {"domain": [0.56, 1], "title": axis_title("harmful rows"), "range": ranges["yaxis"]["linear"]}
    layout["yaxis2"] = layout["yaxis"] | {
        "domain": [0, 0.44], "title": axis_title("harmless rows"), "range": ranges["yaxis2"]["linear"]
    }  # fmt: skip
    layout["xaxis"]["anchor"] = "y2"
    spec = {"data": traces, "layout": layout, "log": faint, "ranges": ranges}
    missed, lost = int((harmful & ~removed).sum()), int((~harmful & removed).sum())
    caption = (
        f"{int(harmful.sum()):,} rows labelled harmful, {missed:,} of them kept; "
        f"{int((~harmful).sum()):,} labelled harmless, {lost:,} of them removed."
    )
    return Chart(f"classes-{group.place}", f"{group.title} by label", caption, spec, _table(axis, columns))


def _bars(axis: Axis, bins: Floats, name: str, colour: str, detail: str = "") -> dict[str, Any]:
    edges = [number(float(x)) for x in axis.inverse(axis.edges)]
    marker = {"color": colour, "line": {"width": 0}}
    return {
        "type": "bar", "name": name, "x": _centres(axis), "y": bins.tolist(), "width": axis.width * 0.94,
        "marker": marker, "hovertemplate": f"%{{y:,d}} {detail or name}<br>%{{customdata}}<extra></extra>",
        "customdata": [f"{a} to {b}" for a, b in pairwise(edges)],
    }  # fmt: skip


def _steps(axis: Axis, bins: Floats, name: str, colour: str) -> dict[str, Any]:
    """An outline over the bars. Zero has no logarithm: among many rows an empty bin is drawn just under one row."""
    y = np.maximum(bins, 0.3) if bins.max() >= 30 else bins
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": _centres(axis), "y": y.tolist(),
        "line": {"shape": "hvh", "color": colour, "width": 1.8, "dash": "dot"},
        "hovertemplate": f"%{{y:,d}} {name}<extra></extra>",
    }  # fmt: skip


def _fits(axis: Axis, cut: Cut, rows: int) -> list[dict[str, Any]]:
    """What the rule fitted, in rows per bin: the mixture's components, and the one Gaussian it was tested against."""
    detail = cut.detail
    traces = []
    mu, sigma = _figure(detail.get("mu")), _figure(detail.get("sigma"))
    if mu is not None and sigma:
        traces.append(_curve(axis, rows, mu, sigma, "one Gaussian", "dash"))
    components = detail.get("components")
    for i, part in enumerate(components if isinstance(components, Sequence) else ()):
        if not isinstance(part, Mapping):
            continue
        weight, mean, std = (_figure(part.get(key)) for key in ("weight", "mean", "std"))
        if weight and mean is not None and std:
            traces.append(_curve(axis, rows * weight, mean, std, f"component {i + 1}", "solid"))
    return traces


def _curve(axis: Axis, rows: float, mean: float, std: float, name: str, dash: str) -> dict[str, Any]:
    """Expected rows in a bin-wide window around each point: comparable with the bars on any axis."""
    u = np.linspace(axis.edges[0], axis.edges[-1], CURVE_POINTS)
    left, right = (ndtr((axis.inverse(u + side * axis.width / 2) - mean) / abs(std)) for side in (-1, 1))
    y = rows * (right - left)
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": u.tolist(), "y": np.round(y, 4).tolist(),
        "line": {"color": "var(--fit)", "width": 1.8, "dash": dash}, "hoverinfo": "skip",
    }  # fmt: skip


def _figure(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None


def _centres(axis: Axis) -> list[float]:
    centres: list[float] = ((axis.edges[:-1] + axis.edges[1:]) / 2).tolist()
    return centres


def _ranges(tallest: float) -> dict[str, list[float]]:
    """The count axis both ways. The logarithmic one starts under one row, so that a single row has a bar."""
    return {"linear": [0, 1.12 * tallest], "log": [-0.4, math.log10(tallest) * 1.06 + 0.15]}


def _score_layout(group: _Group, tallest: float) -> dict[str, Any]:
    axis, cut = group.axis, group.cut
    positions, labels = axis.ticks()
    low, high = float(axis.edges[0]), float(axis.edges[-1])
    name = group.score + ("" if axis.linear else ", symmetric-log axis")
    layout = base_layout(height=360, showlegend=True)
    layout["xaxis"] = axis_style(name) | {
        "tickvals": positions, "ticktext": labels, "range": [low, high], "showgrid": False, "ticks": "outside",
        "tickcolor": "var(--line)", "showline": True, "fixedrange": True, "tickangle": 0,
    }  # fmt: skip
    layout["yaxis"] = axis_style("rows") | {
        "range": [0, 1.12 * tallest], "fixedrange": True, "nticks": 6, "tickformat": ",~f", "rangemode": "tozero"
    }  # fmt: skip
    if math.isfinite(cut.value):
        at = float(axis.forward(np.array(cut.value)))
        line = {"color": "var(--ink)", "width": 1.5}
        layout["shapes"] = [{"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "line": line}]
        right = at > low + 0.7 * (high - low)
        layout["annotations"] = [{
            "x": at, "y": 1, "yref": "paper", "yanchor": "top", "xanchor": "right" if right else "left",
            "xshift": -4 if right else 4, "showarrow": False, "text": f"cut {number(float(cut.value))}",
            "bgcolor": "var(--surface)", "font": {"color": "var(--ink)", "size": 12, "weight": 600},
        }]  # fmt: skip
    return layout


def _table(axis: Axis, columns: Mapping[str, Floats]) -> tuple[tuple[str, ...], ...]:
    """Bins that hold anything, as text."""
    edges = [number(float(x)) for x in axis.inverse(axis.edges)]
    lines = [
        (edges[i], edges[i + 1], *(f"{int(bins[i]):,}" for bins in columns.values()))
        for i in range(len(edges) - 1)
        if any(bins[i] for bins in columns.values())
    ]
    return (("above", "up to", *columns), *lines)


def _caption(group: _Group) -> str:
    cut, rows, removed = group.cut, len(group.values), int(group.removed.sum())
    if math.isfinite(cut.value):
        where = f"Rows to the right of the cut at {number(float(cut.value))} are removed."
    else:
        where = f"The cut is {'above' if cut.value > 0 else 'below'} every score."
    far = "" if group.axis.linear else " The axis is symmetric-logarithmic, so that tail and bulk are both visible."
    return f"{rows:,} row{'s' if rows != 1 else ''}, {removed:,} removed. {where}{far}"


LINEAR_SPAN = 25.0  # shortest-half widths that a linear axis can hold before its bulk is a sliver
ROUNDING = 1e-12  # relative to the largest score: closer ones are one place, as a cut just under the lowest score is
TICKS = 7  # wanted on an axis
_LARGEST = 1e100  # larger values are clipped: squares would overflow


@dataclass(frozen=True)
class Axis:
    """The transform between scores x and axis units u, and the bin edges in u (ascending)."""

    centre: float
    unit: float
    linear: bool
    edges: Floats  # (bins + 1,)

    @property
    def width(self) -> float:
        """Width of a bin in axis units."""
        return float(self.edges[-1] - self.edges[0]) / (len(self.edges) - 1)

    def forward(self, x: Floats) -> Floats:
        """Scores to axis units."""
        return _forward(np.asarray(x, dtype=np.float64), self.centre, self.unit, self.linear)

    def inverse(self, u: Floats) -> Floats:
        """Axis units to scores."""
        return np.asarray(u) if self.linear else self.centre + self.unit * np.sinh(np.asarray(u))

    def count(self, x: Floats) -> Floats:
        """(bins,) how many fall in each bin. A bin holds its upper edge, as a row at the cut is kept."""
        if not len(x):
            return np.zeros(len(self.edges) - 1)
        index = np.digitize(self.forward(x), self.edges, right=True) - 1
        return np.bincount(np.clip(index, 0, len(self.edges) - 2), minlength=len(self.edges) - 1).astype(np.float64)

    def ticks(self) -> tuple[list[float], list[str]]:
        """Positions in axis units and labels in scores: round numbers, about evenly spread on the axis."""
        low, high = float(self.edges[0]), float(self.edges[-1])
        if self.linear:
            return _linear_ticks(low, high)
        gap = (high - low) / TICKS
        labels: dict[float, str] = {}
        for u in np.linspace(low + gap / 2, high - gap / 2, TICKS):
            left, right = (float(self.inverse(np.array(u + side * gap / 3))) for side in (-1, 1))
            value = _round_within(left, right)
            at = float(self.forward(np.array(value)))
            if low <= at <= high and all(abs(at - other) > 0.45 * gap for other in labels):
                labels[at] = _label(value, right - left)
        return list(labels), list(labels.values())


def make_axis(values: Floats, cut: float | None) -> Axis:
    """The axis for these scores (and decoys) and this cut; an infinite cut is not on it."""
    x = np.clip(np.asarray(values, dtype=np.float64), -_LARGEST, _LARGEST)
    on_axis = np.append(x, cut) if cut is not None and abs(cut) <= _LARGEST else x
    centre, unit = _shortest_half(x)
    span = float(on_axis.max() - on_axis.min())
    if span <= ROUNDING * float(np.abs(on_axis).max()):
        span = 0.0
    linear = span == 0 or (unit > 0 and span <= LINEAR_SPAN * unit)
    if not linear and unit <= span * 1e-12:
        # Half the rows share one score: the unit comes from those that do not.
        apart = np.abs(on_axis - centre)
        unit = max(float(np.quantile(apart[apart > 0], 0.1)), span * 1e-12)
    u = _forward(on_axis, centre, unit, linear)
    pad = 0.03 * float(u.max() - u.min()) if span else max(abs(float(u[0])) * 0.1, 0.5)
    bins = int(np.clip(9 * len(x) ** 0.22, 12, 64))
    at = float(_forward(np.array(cut), centre, unit, linear)) if len(on_axis) > len(x) else None
    return Axis(centre, unit, linear, _edges(float(u.min()) - pad, float(u.max()) + pad, bins, at))


def _edges(low: float, high: float, bins: int, cut: float | None) -> Floats:
    """Equal bins over [low, high], moved so that the cut is one of the edges."""
    width = (high - low) / bins
    if cut is None:
        return np.linspace(low, high, bins + 1)
    below, above = math.ceil((cut - low) / width), math.ceil((high - cut) / width)
    edges: Floats = cut + width * np.arange(-below, above + 1, dtype=np.float64)
    edges[below] = cut
    return edges


def _forward(x: Floats, centre: float, unit: float, linear: bool) -> Floats:
    clipped: Floats = np.clip(x, -_LARGEST, _LARGEST)
    if linear:
        return clipped
    stretched: Floats = np.arcsinh((clipped - centre) / unit)
    return stretched


def _shortest_half(x: Floats) -> tuple[float, float]:
    """Middle and width of the shortest interval that holds half the values: a scale half of them cannot spoil."""
    ordered = np.sort(x)
    half = max(len(ordered) // 2, 1)
    if len(ordered) <= half:
        return float(ordered[0]), 0.0
    widths = ordered[half:] - ordered[:-half]
    at = int(np.argmin(widths))
    return float(ordered[at] + widths[at] / 2), float(widths[at])


def _linear_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Multiples of a 1, 2 or 5 times a power of ten, at least two thirds of the ticks wanted."""
    step = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step *= next((lead for lead in (5, 2) if (high - low) / (lead * step) >= 0.67 * TICKS), 1)
    first = math.ceil(low / step)
    values = [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, math.floor(high / step) + 1)]
    return values, [_label(value, step) for value in values]


def _label(value: float, step: float) -> str:
    """A number with as many digits as distinguish neighbours one step apart."""
    digits = math.ceil(math.log10(abs(value) / step)) + 1 if value else 1
    return f"{value:.{min(max(digits, 6), 15)}g}".replace("-", "−")


def _round_within(left: float, right: float) -> float:
    """The roundest number in [left, right]: zero, a power of ten, a multiple of the largest 1, 2 or 5 times one."""
    if left <= 0 <= right:
        return 0.0
    top = math.floor(math.log10(max(abs(left), abs(right))))
    power = math.copysign(10.0**top, left)
    if left <= power <= right:
        return power
    for exponent in range(top, top - 16, -1):
        for lead in (5, 2, 1):
            step = lead * 10.0**exponent
            value = math.ceil(left / step) * step
            if value <= right:
                return value
    return left
