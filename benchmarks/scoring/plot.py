"""The figures as a picture: every arm's cost on a logarithmic axis, with its range over the rounds, model beside model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Line = Mapping[str, Any]

PANEL, LABELS, GAP, ROW, TOP, BOTTOM = 300, 190, 28, 19, 64, 44  # pixels
TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
COLOURS = {"ours": "#0b6e4f", "directions": "#0b6e4f", "oracle": "#8a6d00", "peer": "#b3261e"}
WORDS = {"ours": "this project", "oracle": "the oracle", "peer": "peers"}
LEFT_OUT = ("floor",)  # the line at 1


def svg(lines: Sequence[Line]) -> str:
    """One panel a model, the arms from cheap to dear by the last model that has them."""
    shown = [line for line in lines if line["group"] not in LEFT_OUT]
    models = list(dict.fromkeys(line["model"] for line in shown))
    by_name = {line["name"]: line["ratio_to_floor"] for line in shown}
    names = sorted(by_name, key=lambda name: by_name[name])
    most = max((line["high"] for line in shown), default=2.0) * 1.1
    least = min(1.0, min((line["low"] for line in shown), default=1.0)) * 0.95
    width = LABELS + len(models) * (PANEL + GAP)
    height = TOP + ROW * len(names) + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, -apple-system, Segoe UI, Liberation Sans, DejaVu Sans, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(),
    ]
    for n, name in enumerate(names):
        y = TOP + ROW * (n + 0.5)
        if n % 2 == 0:
            parts.append(f'<rect x="0" y="{y - ROW / 2}" width="{width}" height="{ROW}" fill="#f5f5f7"/>')
        parts.append(f'<text x="{LABELS - 10}" y="{y + 4}" text-anchor="end" fill="#1c1b1f">{escape(name)}</text>')
    for m, model in enumerate(models):
        left = LABELS + m * (PANEL + GAP)
        own = [line for line in shown if line["model"] == model]
        parts += _panel(model, own, names, left, (least, most))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    parts, x = [], 12
    for group, words in WORDS.items():
        parts.append(f'<circle cx="{x + 5}" cy="18" r="4.5" fill="{COLOURS[group]}"/>')
        parts.append(f'<text x="{x + 15}" y="22" fill="#1c1b1f">{words}</text>')
        x += 30 + 7 * len(words)
    return parts


def _panel(model: str, own: Sequence[Line], names: Sequence[str], left: int, limits: tuple[float, float]) -> list[str]:
    """Grid, ranges and medians of one model."""
    low, high = (math.log(limit) for limit in limits)

    def x(ratio: float) -> float:
        return left + PANEL * (math.log(ratio) - low) / (high - low)

    bottom = TOP + ROW * len(names)
    parts = [f'<text x="{left}" y="{TOP - 16}" font-weight="600" fill="#1c1b1f">{escape(model)}</text>']
    last = -math.inf
    for tick in TICKS:
        if limits[0] <= tick <= limits[1]:
            colour, thick = ("#1c1b1f", 1.4) if tick == 1 else ("#dddde2", 1)
            line = f'x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" y2="{bottom}"'
            parts.append(f'<line {line} stroke="{colour}" stroke-width="{thick}"/>')
            if x(tick) - last > 22:
                parts.append(
                    f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle" fill="#55555c">{tick}</text>'
                )
                last = x(tick)
    words = "forward passes (1 is the floor)"
    parts.append(f'<text x="{left + PANEL / 2}" y="{bottom + 34}" text-anchor="middle" fill="#55555c">{words}</text>')
    place = {name: n for n, name in enumerate(names)}
    for line in own:
        y, colour = TOP + ROW * (place[line["name"]] + 0.5), COLOURS[line["group"]]
        ends = f'x1="{x(line["low"]):.1f}" x2="{x(line["high"]):.1f}" y1="{y}" y2="{y}"'
        parts.append(f'<line {ends} stroke="{colour}" stroke-width="2.5" stroke-opacity="0.45"/>')
        title = f"{line['name']}: {line['ratio_to_floor']:.2f} ({line['low']:.2f} to {line['high']:.2f})"
        dot = f'cx="{x(line["ratio_to_floor"]):.1f}" cy="{y}" r="4.5" fill="{colour}"'
        parts.append(f"<circle {dot}><title>{escape(title)}</title></circle>")
    return parts
