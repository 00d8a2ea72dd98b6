"""The search of a cut, round by round: removed rows, rates and verdict, with the targets if they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradshield.report.draw import Chart
from gradshield.report.lines import STYLES, barred, limit_line, percent_axis, steps_layout, worded
from gradshield.report.pool import TARGET, asr_of, finite, judges_of, usable
from gradshield.report.sheet import Entry, Section, Table, rate_entry
from gradshield.report.text import number, percent

LOOKS = {"too unsafe": "x", "utility short": "circle-open", "passes": "star"}
OFFSET = 0.07  # of a step between the marks of two judges, so that their bars do not overlap

Rounds = Sequence[Mapping[str, Any]]


def section(verdict: Mapping[str, Any] | None, rows: int) -> Section:
    """Every round of a verdict; a single round has a table only."""
    done = list((verdict or {}).get("rounds") or ())
    if verdict is None or not done:
        return Section("search", "The search of the cut")
    targets = _targets(verdict)
    judges = judges_of([{"judges": one.get("asr") or {}} for one in done])
    lead = (
        "Every round trains on the rows below its cut and measures the model on requests and task rows that are used only to "
        "choose the cut. They differ from those of the figures before and after, and so do the rates."
    )
    if len(done) == 1:
        lead += " The search ended with its first round."
    return Section(
        "search",
        "The search of the cut",
        f"{lead} {_wanted(targets)}".strip(),
        charts=(_chart(done, judges, targets),) if len(done) > 1 else (),
        tables=(_table(done, judges, verdict.get("best"), rows),),
        nav="Search",
    )


def _targets(verdict: Mapping[str, Any]) -> dict[str, float]:
    """The numeric targets of the search."""
    targets = verdict.get("targets")
    return {str(k): float(v) for k, v in targets.items() if finite(v)} if isinstance(targets, Mapping) else {}


def _least(targets: Mapping[str, float]) -> float | None:
    """The least acceptable utility: the target minus the tolerance."""
    return targets["utility"] - targets.get("tolerance", 0.0) if "utility" in targets else None


def _wanted(targets: Mapping[str, float]) -> str:
    parts = []
    if "asr" in targets:
        parts.append(f"an ASR whose interval ends below {percent(targets['asr'])} by every judge")
    least = _least(targets)
    if least is not None:
        parts.append(f"a utility of at least {percent(least)}")
    return f"Targets: {', and '.join(parts)}." if parts else ""


def _table(done: Rounds, judges: Sequence[str], best: Any, rows: int) -> Table:
    lines = []
    for i, one in enumerate(done):
        asr = asr_of({"judges": one.get("asr") or {}})
        result = str(one.get("verdict", "–")) + (", this model is kept" if i == best else "")
        removed = int(one.get("removed") or 0)
        lines.append(
            (
                Entry(f"{i + 1}", key=i),
                Entry(number(one.get("cut")), key=one["cut"] if finite(one.get("cut")) else None),
                Entry(f"{removed:,}", small=percent(removed / rows) if rows else "", key=removed),
                *(rate_entry(asr.get(judge)) for judge in judges),
                rate_entry(one.get("utility")),
                Entry(f"{float(one.get('seconds') or 0):,.0f}", key=float(one.get("seconds") or 0)),
                Entry(result, small="stopped before every prompt was asked" if one.get("stopped_early") else ""),
            )
        )
    head = ("Round", "Cut", "Removed", *(f"ASR, {judge}" for judge in judges), "Utility", "Seconds", "Verdict")
    return Table(head, tuple(lines), sorts=len(lines) > 1)


def _chart(done: Rounds, judges: Sequence[str], targets: Mapping[str, float]) -> Chart:
    """ASR over the rounds, and utility below it if any round has one."""
    rates = {judge: [asr_of({"judges": one.get("asr") or {}}).get(judge) for one in done] for judge in judges}
    useful = [one.get("utility") for one in done]
    shown = any(usable(rate) for rate in useful)
    names = [f"{i + 1}: {int(one.get('removed') or 0):,} out" for i, one in enumerate(done)]
    figure = steps_layout(names, height=440 if shown else 300)
    figure["yaxis"] = percent_axis("ASR", [rate for found in rates.values() for rate in found])
    figure["shapes"] = [limit_line(targets.get("asr", TARGET))]
    if shown:
        figure["yaxis"] |= {"domain": [0.46, 1]}
        figure["yaxis2"] = percent_axis("utility") | {"domain": [0, 0.36]}
        figure["xaxis"]["anchor"] = "y2"
    least = _least(targets)
    if shown and least is not None:
        figure["shapes"].append(limit_line(least, "y2"))
    head = ("Round", *(f"ASR, {judge}" for judge in judges), "Utility", "Verdict")
    table = [
        (
            names[i],
            *(worded(rates[judge][i]) for judge in judges),
            worded(one.get("utility")),
            str(one.get("verdict", "–")),
        )
        for i, one in enumerate(done)
    ]
    caption = "Cross: too unsafe. Ring: utility short. Star: both targets are met. Bars are 95 % intervals; the dotted line is "
    caption += f"an ASR of {percent(targets.get('asr', TARGET))}, and an interval must end below it."
    if shown and least is not None:
        caption += f" The lower line is the least utility accepted, {percent(least)}."
    spec = {"data": _traces(done, rates, useful if shown else []), "layout": figure}
    return Chart("rounds", "Rounds of the search", caption, spec, (head, *table), False)


def _traces(done: Rounds, rates: Mapping[str, Sequence[Any]], useful: Sequence[Any]) -> list[dict[str, Any]]:
    symbols = [LOOKS.get(str(one.get("verdict")), "circle") for one in done]
    traces = []
    for i, (judge, found) in enumerate(rates.items()):
        x = [j + OFFSET * (i - (len(rates) - 1) / 2) for j in range(len(done))]
        marker = {"symbol": symbols, "size": 10, "color": STYLES[i % len(STYLES)][0]}
        traces += barred(f"ASR, {judge}", x, found, i, marker=marker)
    mark = {"symbol": "square", "size": 8, "color": STYLES[4][0]}  # a cross would mean too unsafe
    places = [float(j) for j in range(len(done))]
    return traces + (barred("utility", places, useful, 4, y="y2", marker=mark) if useful else [])
