"""The page of a safety landscape: rates along lines through a model's weights, one direction set apart from the others.

``write(whole, path)`` with ``alphas``, ``unit`` and ``rates`` (by direction and measure, one rate per step), as the landscape
gives them, and optionally ``highlight`` (the direction set apart, ``alignment`` by default), ``visage`` (by direction and
measure), ``title``, ``about`` (a paragraph on the directions), ``command`` and ``versions``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradshield.report import sheet
from gradshield.report.data import Status
from gradshield.report.draw import Chart, axis_style, base_layout
from gradshield.report.lines import STYLES, banded, limit_line, percent_axis, worded
from gradshield.report.pool import MISSING, TARGET, usable
from gradshield.report.sheet import Entry, Section, Sheet, Table, rate_entry
from gradshield.report.text import chart_text, number, percent

HIGHLIGHT = "alignment"
_OTHERS = (3, 2, 1, 4, 5)  # styles of the kinds of other directions, in the order they come
Rates = Mapping[str, Mapping[str, Sequence[Any]]]


def write(whole: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The page of a landscape, as one self-contained HTML file."""
    return sheet.write(page(whole), path)


def page(whole: Mapping[str, Any]) -> Sheet:
    """Every part of the page."""
    alphas = [float(a) for a in whole.get("alphas") or ()]
    rates: Rates = {str(name): dict(found) for name, found in (whole.get("rates") or {}).items()}
    apart = str(whole.get("highlight") or HIGHLIGHT)
    measures = list(dict.fromkeys(name for found in rates.values() for name in found))
    tone, standing, said, facts = _verdict(alphas, rates, measures, apart)
    charts = tuple(_chart(i, measure, alphas, rates, apart) for i, measure in enumerate(measures))
    unit = whole.get("unit")
    about = str(whole.get("about") or "")
    lead = (
        f"The weights are moved along a line and the model is asked again; a step of 1 is {number(unit)} in their norm."
    )
    return Sheet(
        title=str(whole.get("title") or "Safety landscape"),
        kind="safety landscape",
        tone=tone,
        standing=standing,
        verdict=said,
        facts=facts,
        figures=(
            ("directions", str(len(rates)), ""),
            ("steps", str(len(alphas)), ""),
            ("length of a step of 1", number(unit), ""),
        ),
        sections=(
            Section("lines", "Along every direction", f"{lead} {about}".strip(), charts=charts, nav="Directions"),
            _table(alphas, rates, measures, whole.get("visage") or {}, apart),
        ),
        command=str(whole.get("command", "")),
        versions=whole.get("versions") or {},
    )  # fmt: skip


def worded_measure(measure: str) -> str:
    """``asr/refusal-phrases`` as ``ASR, refusal phrases``."""
    kind, _, judge = measure.partition("/")
    name = {"asr": "ASR", "over_refusal": "over-refusal"}.get(kind, kind.replace("_", " "))
    return f"{name}, {judge}" if judge else name


def breaks(alphas: Sequence[float], rates: Sequence[Any], limit: float = TARGET) -> tuple[float | None, float | None]:
    """The steps nearest to 0 on the negative and the positive side at which the rate is above ``limit``; a step at 0 is both."""
    over = [a for a, rate in zip(alphas, rates, strict=True) if usable(rate) and rate["rate"] > limit]
    down, up = [a for a in over if a <= 0], [a for a in over if a >= 0]
    return max(down, default=None), min(up, default=None)


def _verdict(
    alphas: Sequence[float], rates: Rates, measures: Sequence[str], apart: str
) -> tuple[Status, str, str, tuple[str, ...]]:
    asked = [measure for measure in measures if measure.startswith("asr/")]
    if not asked or not alphas:
        return "warn", "Nothing was measured", "There is no ASR along any direction.", ()
    facts = tuple(_fact(measure, alphas, rates, apart) for measure in asked)
    said = f"Where the ASR first passes {100 * TARGET:g} %, in steps from the model itself:"
    here = [_at(0.0, alphas, found[measure]) for measure in asked for found in rates.values() if measure in found]
    known = [rate for rate in here if rate is not None]
    if not known:
        return "warn", "The model itself was not measured", said, facts
    standing = f"The model itself has an ASR of {percent(max(known))}"
    return ("pass" if max(known) <= TARGET else "fail"), standing, said, facts


def _at(step: float, alphas: Sequence[float], rates: Sequence[Any]) -> float | None:
    found = rates[alphas.index(step)] if step in alphas else None
    return float(found["rate"]) if found is not None and usable(found) else None


def _fact(measure: str, alphas: Sequence[float], rates: Rates, apart: str) -> str:
    """For one judge, the first steps along the direction set apart and, at the earliest, along each kind of other."""
    groups: dict[str, list[tuple[float | None, float | None]]] = {}
    for name in sorted(rates, key=lambda name: name != apart):
        if measure in rates[name]:
            group = name if name == apart else kind(name)
            groups.setdefault(group, []).append(breaks(alphas, rates[name][measure]))
    parts = []
    for group, found in groups.items():
        down = max((low for low, _ in found if low is not None), default=None)
        up = min((high for _, high in found if high is not None), default=None)
        several = f" ({len(found)} directions, at the earliest)" if len(found) > 1 else ""
        parts.append(f"{group}{several} {_where((down, up))}")
    return f"{worded_measure(measure)}: {'; '.join(parts)}."


def _where(steps: tuple[float | None, float | None]) -> str:
    down, up = (number(step) for step in steps)
    if steps == (None, None):
        return "nowhere"
    if steps[0] is None:
        return f"at +{up}"
    return f"at {down}" if steps[1] is None else f"at {down} and +{up}"


def kind(name: str) -> str:
    """Directions drawn alike: ``random-0`` and ``random-1`` are both ``random``."""
    return re.sub(r"[-_ ]\d+$", "", name)


def _chart(index: int, measure: str, alphas: Sequence[float], rates: Rates, apart: str) -> Chart:
    lines = {name: found[measure] for name, found in rates.items() if measure in found}
    kinds = list(dict.fromkeys(kind(name) for name in lines if name != apart))
    traces: list[dict[str, Any]] = []
    seen: set[str] = set()
    for name in sorted(lines, key=lambda name: name == apart):  # the one set apart is drawn over the others
        group = name if name == apart else kind(name)
        style = 0 if name == apart else _OTHERS[kinds.index(group) % len(_OTHERS)]
        colour, dash, symbol = STYLES[style]
        own = name == apart
        more: dict[str, Any] = {
            "line": {"color": colour, "width": 3 if own else 1.4, "dash": dash},
            "marker": {"symbol": symbol, "size": 7 if own else 4, "color": colour},
            "showlegend": group not in seen,
        }
        pair = banded(name, alphas, lines[name], style, **more)
        pair[1]["name"] = pair[1]["name"] if own else chart_text(group)
        traces += [trace | {"legendgroup": group} for trace in pair]
        seen.add(group)
    figure = base_layout(height=380, showlegend=True)
    figure["xaxis"] = axis_style("step") | {"fixedrange": True, "zeroline": True, "zerolinecolor": "var(--muted)"}
    if measure.startswith("asr/"):
        figure["shapes"] = [limit_line(TARGET)]
    figure["yaxis"] = percent_axis(worded_measure(measure), [rate for line in lines.values() for rate in line])
    table = [(number(a), *(worded(line[i]) for line in lines.values())) for i, a in enumerate(alphas)]
    caption = f"Bands are 95 % intervals. The thick line is {apart}." if apart in lines else "Bands are 95 % intervals."
    spec = {"data": traces, "layout": figure}
    return Chart(f"line-{index}", worded_measure(measure), caption, spec, (("Step", *lines), *table), False)


def _table(
    alphas: Sequence[float], rates: Rates, measures: Sequence[str], visages: Mapping[str, Any], apart: str
) -> Section:
    if not rates:
        return Section("directions", "Every direction")
    head = ["Direction"]
    for measure in measures:
        words = worded_measure(measure)
        head.append(f"Highest {words}")
        if measure.startswith("asr/"):
            head += [f"Above {100 * TARGET:g} % from", f"VISAGE by {words}"]
    lines = []
    for name, found in rates.items():
        line: list[Entry | str] = [Entry(name, small="set apart" if name == apart else "")]
        for measure in measures:
            steps = [rate for rate in found.get(measure, ()) if usable(rate)]
            line.append(rate_entry(max(steps, key=lambda rate: rate["rate"], default=None)))
            if measure.startswith("asr/"):
                line.append(_where(breaks(alphas, found[measure])) if measure in found else MISSING)
                value = (visages.get(name) or {}).get(measure)
                real = isinstance(value, int | float) and math.isfinite(value)
                line.append(Entry(f"{value:.3f}", key=value) if real else MISSING)
        lines.append(tuple(line))
    return Section(
        "directions",
        "Every direction",
        "VISAGE is the mean of the highest rate there can be minus the rate, over the steps below that mark: 1 is a line along "
        "which the model never complies.",
        tables=(Table(tuple(head), tuple(lines), sorts=True),),
        nav="Figures",
    )
