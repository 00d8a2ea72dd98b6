"""The page of one training run: safety and usefulness before and after it, the search of its cut, and what was taken out.

``write(whole, path)`` with ``title``, ``defence``, ``verdict`` (of the verified threshold, or None), ``before`` and ``after``
(``judges``, ``over_refusal``, ``utility``, each where measured), ``rows``, ``removed``, ``dropped_tokens``, ``record``,
``command``, ``versions`` and ``files`` (names to paths relative to the page).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradshield.report import sheet
from gradshield.report.data import Status
from gradshield.report.draw import Chart
from gradshield.report.lines import STYLES, banded, limit_line, percent_axis, steps_layout, worded
from gradshield.report.pool import TARGET, asr_of, judges_of, usable
from gradshield.report.sheet import Entry, Section, Sheet, Table, rate_entry
from gradshield.report.text import flatten, number, percent

LOOKS = {"too unsafe": "x", "utility short": "circle-open", "passes": "star"}
RECORD_LINES = 120


def write(whole: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The page of a training run, as one self-contained HTML file."""
    return sheet.write(page(whole), path)


def page(whole: Mapping[str, Any]) -> Sheet:
    """Every part of the page."""
    before, after = whole.get("before") or {}, whole.get("after") or {}
    verdict = whole.get("verdict")
    tone, standing = _verdict(before, after, verdict)
    rows, removed = int(whole.get("rows") or 0), int(whole.get("removed") or 0)
    share = f"{percent(removed / rows)} of them" if rows and removed else ""
    figures = [
        ("rows", f"{rows:,}", ""),
        ("removed", f"{removed:,}", share),
        ("tokens not learned", f"{int(whole.get('dropped_tokens') or 0):,}", ""),
    ]
    figures += [
        (f"ASR after, {judge}", percent(rate["rate"]), f"n = {rate['n']}") for judge, rate in asr_of(after).items()
    ]
    if usable(after.get("utility")):
        figures.append(("utility after", percent(after["utility"]["rate"]), f"n = {after['utility']['n']}"))
    return Sheet(
        title=str(whole.get("title") or "Training run"),
        kind="training report",
        tone=tone,
        standing=standing,
        verdict=_said(before, after),
        facts=_facts(before, after, verdict),
        figures=tuple(figures),
        sections=(_measured(before, after), _search(verdict, rows), _taken(whole, rows, removed), _record(whole)),
        command=str(whole.get("command", "")),
        versions=whole.get("versions") or {},
        cost=(("Defence", str(whole.get("defence", "–"))),),
    )


def _verdict(
    before: Mapping[str, Any], after: Mapping[str, Any], verdict: Mapping[str, Any] | None
) -> tuple[Status, str]:
    """The tone of the page and its standing. Safety counts before usefulness."""
    was, now = asr_of(before), asr_of(after)
    worse = [judge for judge, rate in now.items() if judge in was and rate["low"] > was[judge]["high"]]
    if verdict is not None and not verdict.get("met"):
        return "fail", "The targets of the search are not met"
    if not now:
        return "warn", "Safety was not measured"
    above = [judge for judge, rate in now.items() if rate["rate"] > TARGET]
    if worse and above:
        return "fail", "Training made the model less safe"
    if above:
        return "warn", f"The ASR is above {100 * TARGET:g} %"
    if worse:
        return "warn", f"The ASR rose, and is {100 * TARGET:g} % or less"
    return "pass", f"The ASR is {100 * TARGET:g} % or less by every judge"


def _said(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The worst judge's ASR and utility in one sentence, without their intervals."""
    was, now = asr_of(before), asr_of(after)
    parts = []
    if now:
        judge = max(now, key=lambda name: float(now[name]["rate"]))
        parts.append(f"the ASR by its worst judge, {judge}, {_went(was.get(judge), now[judge])}")
    if usable(after.get("utility")):
        parts.append(f"utility {_went(before.get('utility'), after['utility'])}")
    return f"After training, {'; '.join(parts)}." if parts else "Neither safety nor utility was measured."


def _went(before: Any, after: Mapping[str, Any]) -> str:
    now = percent(float(after["rate"]))
    return f"is {now}, from {percent(float(before['rate']))} before" if usable(before) else f"is {now}"


def _facts(before: Mapping[str, Any], after: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Every judge and utility with intervals and counts, then what the search says of itself."""
    was, now = asr_of(before), asr_of(after)
    facts = [f"ASR by {judge}: {_change(was.get(judge), rate)}." for judge, rate in now.items()]
    if usable(after.get("utility")):
        facts.append(f"Utility: {_change(before.get('utility'), after['utility'])}.")
    if verdict is not None:
        facts.append(f"The search: {verdict.get('sentence', '')}.")
    return tuple(facts)


def _change(before: Any, after: Any) -> str:
    return f"{worded(before)} before; {worded(after)} after" if usable(before) else f"{worded(after)} after"


def _measured(before: Mapping[str, Any], after: Mapping[str, Any]) -> Section:
    was, now = asr_of(before), asr_of(after)
    pairs = [(f"ASR, {judge}", was.get(judge), now.get(judge)) for judge in judges_of((before, after))]
    pairs.append(("over-refusal", before.get("over_refusal"), after.get("over_refusal")))
    pairs.append(("utility", before.get("utility"), after.get("utility")))
    lines = []
    for name, left, right in pairs:
        if usable(left) or usable(right):
            moved = _moved(left, right)
            shown = "–" if moved is None else f"{moved:+.1f} points".replace("-", "−")
            lines.append((name, rate_entry(left), rate_entry(right), Entry(shown, key=moved)))
    if not lines:
        return Section("measured", "Before and after")
    return Section(
        "measured",
        "Before and after",
        "The same held-out prompts, answered by the model before and after training. ASR is the share of attacked requests "
        "that it complies with, over-refusal that of harmless look-alikes it refuses.",
        nav="Before and after",
        tables=(Table(("Measured", "Before", "After", "Change"), tuple(lines)),),
    )


def _moved(before: Any, after: Any) -> float | None:
    """By how many points a rate rose."""
    return 100 * (float(after["rate"]) - float(before["rate"])) if usable(before) and usable(after) else None


def _search(verdict: Mapping[str, Any] | None, rows: int) -> Section:
    done = list((verdict or {}).get("rounds") or ())
    if verdict is None or not done:
        return Section("search", "The search of the cut")
    best = verdict.get("best")
    judges = judges_of([{"judges": one.get("asr") or {}} for one in done])
    lines = []
    for i, one in enumerate(done):
        asr = asr_of({"judges": one.get("asr") or {}})
        told = str(one.get("verdict", "–")) + (", this model is kept" if i == best else "")
        gone = int(one.get("removed") or 0)
        lines.append(
            (
                Entry(f"{i + 1}", key=i),
                Entry(number(one.get("cut")), key=_real(one.get("cut"))),
                Entry(f"{gone:,}", small=percent(gone / rows) if rows else "", key=gone),
                *(rate_entry(asr.get(judge)) for judge in judges),
                rate_entry(one.get("utility")),
                Entry(f"{float(one.get('seconds') or 0):,.0f}", key=_real(one.get("seconds"))),
                Entry(told, small="stopped before every prompt was asked" if one.get("stopped_early") else ""),
            )
        )
    head = ("Round", "Cut", "Removed", *(f"ASR, {judge}" for judge in judges), "Utility", "Seconds", "Verdict")
    return Section(
        "search",
        "The search of the cut",
        "Every round trains on the rows below its cut and measures the model on prompts that nothing else sees.",
        charts=(_chart(done, judges),),
        tables=(Table(head, tuple(lines), sorts=len(lines) > 1),),
        nav="Search",
    )


def _real(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _chart(done: Sequence[Mapping[str, Any]], judges: Sequence[str]) -> Chart:
    """ASR above, utility beneath, over the rounds."""
    x = [float(i) for i in range(len(done))]
    rates = {judge: [asr_of({"judges": one.get("asr") or {}}).get(judge) for one in done] for judge in judges}
    symbols = [LOOKS.get(str(one.get("verdict")), "circle") for one in done]
    traces = []
    for i, (judge, found) in enumerate(rates.items()):
        marker = {"symbol": symbols, "size": 10, "color": STYLES[i % len(STYLES)][0]}
        traces += banded(f"ASR, {judge}", x, found, i, marker=marker)
    traces += banded("utility", x, [one.get("utility") for one in done], 4, y="y2")
    names = [f"{i + 1}: {int(one.get('removed') or 0):,} out" for i, one in enumerate(done)]
    figure = steps_layout(names, height=440)
    figure["yaxis"] = percent_axis("ASR", [rate for found in rates.values() for rate in found]) | {"domain": [0.46, 1]}
    figure["yaxis2"] = percent_axis("utility") | {"domain": [0, 0.36]}
    figure["xaxis"]["anchor"] = "y2"
    figure["shapes"] = [limit_line(TARGET)]
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
    caption = "Cross: too unsafe. Ring: utility short. Star: both targets are met. Bands are 95 % intervals; "
    caption += f"the dotted line is an ASR of {100 * TARGET:g} %."
    return Chart("rounds", "Rounds of the search", caption, {"data": traces, "layout": figure}, (head, *table), False)


def _taken(whole: Mapping[str, Any], rows: int, removed: int) -> Section:
    tokens = int(whole.get("dropped_tokens") or 0)
    said = (
        f"{removed:,} of {rows:,} rows were taken out before training."
        if removed
        else f"None of {rows:,} rows was taken out."
    )
    if tokens:
        said += f" {tokens:,} tokens of the rows that stayed were not learned."
    links = tuple((str(name), str(path)) for name, path in (whole.get("files") or {}).items())
    return Section("taken", "What was taken out", said, links=links, nav="Removed")


def _record(whole: Mapping[str, Any]) -> Section:
    lines = flatten(whole.get("record") or {})
    if not lines:
        return Section("record", "What the method did in training")
    table = Table(
        ("Setting or count", "Value"), tuple((key, Entry(value, look="words")) for key, value in lines[:RECORD_LINES])
    )
    points = (f"{len(lines) - RECORD_LINES:,} more are in the manifest.",) if len(lines) > RECORD_LINES else ()
    return Section("record", "What the method did in training", tables=(table,), points=points, nav="Record")
