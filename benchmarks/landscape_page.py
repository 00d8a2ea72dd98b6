"""The page of a safety landscape: rates along lines through a model's weights, one direction set apart from the others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.directions import breaking_steps
from gradshield.evaluation.landscape import Landscape
from gradshield.report import sheet
from gradshield.report.draw import STYLES, Chart, axis_style, banded, base_layout, limit_line, percent_axis, worded
from gradshield.report.sheet import Entry, Section, Sheet, Status, Table, rate_entry
from gradshield.report.text import MISSING, chart_text, number, percent
from gradshield.thresholds.verified import TARGET

HIGHLIGHT = "alignment"
_OTHERS = (3, 2, 1, 4, 5)  # styles of the kinds of other directions, in the order they come


def write(
    found: Landscape, path: str | os.PathLike[str], title: str, command: str, versions: Mapping[str, str]
) -> Path:
    """The page of a landscape, as one self-contained HTML file."""
    return sheet.write(page(found, title, command, versions), path)


def page(found: Landscape, title: str, command: str, versions: Mapping[str, str], apart: str = HIGHLIGHT) -> Sheet:
    """Every part of the page; ``apart`` is the direction set apart."""
    measures = list(dict.fromkeys(name for line in found.rates.values() for name in line))
    tone, standing, said, facts = _verdict(found, measures, apart)
    return Sheet(
        title=title,
        kind="safety landscape",
        tone=tone,
        standing=standing,
        verdict=said,
        facts=facts,
        figures=(
            ("directions", str(len(found.rates)), ""),
            ("steps", str(len(found.alphas)), ""),
            ("length of a step of 1", number(found.unit), ""),
        ),
        sections=(
            Section(
                "lines",
                "Along every direction",
                "The weights are moved along a line and the model is asked again; a step of 1 is "
                f"{number(found.unit)} in their norm.",
                charts=tuple(_chart(i, measure, found, apart) for i, measure in enumerate(measures)),
                nav="Directions",
            ),
            _table(found, measures, apart),
        ),
        command=command,
        versions=versions,
    )


def worded_measure(measure: str) -> str:
    """``asr/refusal-phrases`` as ``ASR, refusal phrases``."""
    kind, _, judge = measure.partition("/")
    name = {"asr": "ASR", "over_refusal": "over-refusal"}.get(kind, kind.replace("_", " "))
    return f"{name}, {judge}" if judge else name


def _verdict(found: Landscape, measures: Sequence[str], apart: str) -> tuple[Status, str, str, tuple[str, ...]]:
    asked = [measure for measure in measures if measure.startswith("asr/")]
    if not asked:
        return "warn", "Nothing was measured", "There is no ASR along any direction.", ()
    facts = tuple(_fact(measure, found, apart) for measure in asked)
    said = f"Where the ASR first passes {100 * TARGET:g} %, in steps from the model itself:"
    start = found.alphas.index(0.0)
    worst = max(line[measure][start].rate for measure in asked for line in found.rates.values() if measure in line)
    standing = f"The model itself has an ASR of {percent(worst)}"
    return ("pass" if worst <= TARGET else "fail"), standing, said, facts


def _fact(measure: str, whole: Landscape, apart: str) -> str:
    """For one judge, the first steps along the direction set apart and, at the earliest, along each kind of other."""
    groups: dict[str, list[tuple[float | None, float | None]]] = {}
    for name in sorted(whole.rates, key=lambda name: name != apart):
        if measure in whole.rates[name]:
            steps = breaking_steps(whole.alphas, whole.curve(name, measure), TARGET)
            groups.setdefault(name if name == apart else kind(name), []).append(steps)
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


def _chart(index: int, measure: str, whole: Landscape, apart: str) -> Chart:
    alphas = whole.alphas
    lines = {name: found[measure] for name, found in whole.rates.items() if measure in found}
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


def _table(whole: Landscape, measures: Sequence[str], apart: str) -> Section:
    head = ["Direction"]
    for measure in measures:
        words = worded_measure(measure)
        head.append(f"Highest {words}")
        if measure.startswith("asr/"):
            head += [f"Above {100 * TARGET:g} % from", f"VISAGE by {words}"]
    lines = []
    for name, found in whole.rates.items():
        line: list[Entry | str] = [Entry(name, small="set apart" if name == apart else "")]
        for measure in measures:
            line.append(rate_entry(max(found.get(measure, ()), key=lambda rate: rate.rate, default=None)))
            if measure.startswith("asr/") and measure in found:
                value = whole.visage(measure, [name])
                line.append(_where(breaking_steps(whole.alphas, whole.curve(name, measure), TARGET)))
                line.append(Entry(f"{value:.3f}", key=value))
            elif measure.startswith("asr/"):
                line += [MISSING, MISSING]
        lines.append(tuple(line))
    return Section(
        "directions",
        "Every direction",
        "VISAGE is the mean of the highest rate there can be minus the rate, over the steps below that mark: 1 is a line along "
        "which the model never complies.",
        tables=(Table(tuple(head), tuple(lines), sorts=True),),
        nav="Figures",
    )
