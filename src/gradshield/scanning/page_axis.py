"""A score axis on which the bulk, the far tail and the cut can all be seen, and bins that end on the cut.

Scores are binned in axis units u = forward(x): the identity where the scores are of one magnitude, a symmetric
logarithm asinh((x - centre) / unit) where a tail would flatten the bulk into one bar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradshield.types import Floats

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
