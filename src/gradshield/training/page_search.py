"""The search of a cut, round by round: removed rows, rates and verdict, with the targets if they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradshield.manifests import Round, Search, Targets, judges_of
from gradshield.report.draw import Chart
from gradshield.report.lines import STYLES, barred, limit_line, percent_axis, steps_layout, worded
from gradshield.report.sheet import Entry, Section, Table, rate_entry
from gradshield.report.text import number, percent
from gradshield.thresholds.verified import TARGET
from gradshield.types import Rate

LOOKS = {"too unsafe": "x", "utility short": "circle-open", "passes": "star"}
OFFSET = 0.07  # of a step between the marks of two judges, so that their bars do not overlap

Rounds = Sequence[Round]


def section(verdict: Search | None, rows: int) -> Section:
    """Every round of a verdict; a single round has a table only."""
    if verdict is None:
        return Section("search", "The search of the cut")
    done = verdict.rounds
    judges = judges_of(one.asr for one in done)
    lead = (
        "Every round trains on the rows below its cut and measures the model on requests and task rows that are used only to "
        "choose the cut. They differ from those of the figures before and after, and so do the rates."
    )
    if len(done) == 1:
        lead += " The search ended with its first round."
    return Section(
        "search",
        "The search of the cut",
        f"{lead} {_wanted(verdict.targets)}".strip(),
        charts=(_chart(done, judges, verdict.targets),) if len(done) > 1 else (),
        tables=(_table(done, judges, verdict.best, rows),),
        nav="Search",
    )


def _least(targets: Targets | None) -> float | None:
    """The least acceptable utility: the target minus the tolerance."""
    return None if targets is None or targets.utility is None else targets.utility - targets.tolerance


def _wanted(targets: Targets | None) -> str:
    if targets is None:
        return ""
    least = _least(targets)
    useful = "" if least is None else f", and a utility of at least {percent(least)}"
    return f"Targets: an ASR whose interval ends below {percent(targets.asr)} by every judge{useful}."


def _table(done: Rounds, judges: Sequence[str], best: int, rows: int) -> Table:
    lines = []
    for i, one in enumerate(done):
        result = one.verdict + (", this model is kept" if i == best else "")
        lines.append(
            (
                Entry(f"{i + 1}", key=i),
                Entry(number(one.cut), key=one.cut),
                Entry(f"{one.removed:,}", small=percent(one.removed / rows), key=one.removed),
                *(rate_entry(one.asr.get(judge)) for judge in judges),
                rate_entry(one.utility),
                Entry(f"{one.seconds:,.0f}", key=one.seconds),
                Entry(result, small="stopped before every prompt was asked" if one.stopped_early else ""),
            )
        )
    head = ("Round", "Cut", "Removed", *(f"ASR, {judge}" for judge in judges), "Utility", "Seconds", "Verdict")
    return Table(head, tuple(lines), sorts=len(lines) > 1)


def _chart(done: Rounds, judges: Sequence[str], targets: Targets | None) -> Chart:
    """ASR over the rounds, and utility below it if any round has one."""
    rates = {judge: [one.asr.get(judge) for one in done] for judge in judges}
    useful = [one.utility for one in done]
    shown = any(rate is not None for rate in useful)
    limit = TARGET if targets is None else targets.asr
    names = [f"{i + 1}: {one.removed:,} out" for i, one in enumerate(done)]
    figure = steps_layout(names, height=440 if shown else 300)
    figure["yaxis"] = percent_axis("ASR", [rate for found in rates.values() for rate in found])
    figure["shapes"] = [limit_line(limit)]
    if shown:
        figure["yaxis"] |= {"domain": [0.46, 1]}
        figure["yaxis2"] = percent_axis("utility") | {"domain": [0, 0.36]}
        figure["xaxis"]["anchor"] = "y2"
    least = _least(targets)
    if shown and least is not None:
        figure["shapes"].append(limit_line(least, "y2"))
    head = ("Round", *(f"ASR, {judge}" for judge in judges), "Utility", "Verdict")
    table = [
        (names[i], *(worded(rates[judge][i]) for judge in judges), worded(one.utility), one.verdict)
        for i, one in enumerate(done)
    ]
    caption = "Cross: too unsafe. Ring: utility short. Star: both targets are met. Bars are 95 % intervals; the dotted line is "
    caption += f"an ASR of {percent(limit)}, and an interval must end below it."
    if shown and least is not None:
        caption += f" The lower line is the least utility accepted, {percent(least)}."
    spec = {"data": _traces(done, rates, useful if shown else []), "layout": figure}
    return Chart("rounds", "Rounds of the search", caption, spec, (head, *table), False)


def _traces(
    done: Rounds, rates: Mapping[str, Sequence[Rate | None]], useful: Sequence[Rate | None]
) -> list[dict[str, Any]]:
    symbols = [LOOKS.get(one.verdict, "circle") for one in done]
    traces = []
    for i, (judge, found) in enumerate(rates.items()):
        x = [j + OFFSET * (i - (len(rates) - 1) / 2) for j in range(len(done))]
        marker = {"symbol": symbols, "size": 10, "color": STYLES[i % len(STYLES)][0]}
        traces += barred(f"ASR, {judge}", x, found, i, marker=marker)
    mark = {"symbol": "square", "size": 8, "color": STYLES[4][0]}  # a cross would mean too unsafe
    places = [float(j) for j in range(len(done))]
    return traces + (barred("utility", places, useful, 4, y="y2", marker=mark) if useful else [])
