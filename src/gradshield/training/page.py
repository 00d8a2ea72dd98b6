"""The page of one training run: safety and usefulness before and after it, the search of its cut, and what was taken out.

``write(whole, path)`` with ``title``, ``defence``, ``verdict`` (of the verified threshold, or None), ``before`` and ``after``
(``judges``, ``over_refusal``, ``utility``, each where measured), ``rows``, ``removed``, ``dropped_tokens``, ``record``,
``command``, ``versions`` and ``files`` (names to paths relative to the page).

Optionally ``settings`` and ``model`` as the manifest has them, ``caught`` and ``lost`` (rates, where labels are known),
``uncertified`` (why the scan that chose rows is not certified), and in ``verdict`` its ``targets``: ``asr``,
``utility`` and ``tolerance``, as shares.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradshield.report import made, sheet
from gradshield.report.frame import Status
from gradshield.report.lines import worded
from gradshield.report.pool import TARGET, USELESS, asr_of, judges_of, usable
from gradshield.report.sheet import Entry, Section, Sheet, Table, rate_entry
from gradshield.report.text import percent
from gradshield.training import page_record, page_search

LABELLED = (("harmful rows caught", "caught"), ("harmless rows lost", "lost"))
OTHERS = (
    " The search of the cut decided on other requests and other rows of the task, so its figures differ from these: what chose "
    "a model does not also prove it."
)


def write(whole: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The page of a training run, as one self-contained HTML file."""
    return sheet.write(page(whole), path)


def page(whole: Mapping[str, Any]) -> Sheet:
    """Every part of the page."""
    before, after = whole.get("before") or {}, whole.get("after") or {}
    verdict = whole.get("verdict")
    tone, standing = _verdict(before, after, verdict)
    uncertified = whole.get("uncertified")
    if uncertified and tone == "pass":
        tone, standing = "warn", f"{standing}, but the scan is not certified"
    scans, others = _links(whole)
    return Sheet(
        title=str(whole.get("title") or "Training run"),
        kind="training report",
        tone=tone,
        standing=standing,
        verdict=_said(before, after),
        facts=(
            *_facts(before, after, verdict),
            *((f"The scan is not certified: {uncertified}.",) if uncertified else ()),
        ),
        figures=_figures(whole, after, bool(scans)),
        sections=(
            _measured(before, after, verdict is not None),
            page_search.section(verdict, int(whole.get("rows") or 0)),
            _taken(whole, scans),
            page_record.section(whole.get("record") or {}),
        ),
        command=str(whole.get("command", "")),
        versions=whole.get("versions") or {},
        made=tuple(made.of_run(whole)),
        links=others,
        folded=tuple(made.every_setting(whole)),
    )


def _links(whole: Mapping[str, Any]) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Files of the scan, and all others."""
    files = [(str(name), str(path)) for name, path in (whole.get("files") or {}).items()]
    scans = tuple(file for file in files if file[1].startswith("scan/"))
    return scans, tuple(file for file in files if file not in scans)


def _figures(whole: Mapping[str, Any], after: Mapping[str, Any], scanned: bool) -> tuple[tuple[str, str, str], ...]:
    rows, removed, tokens = (int(whole.get(key) or 0) for key in ("rows", "removed", "dropped_tokens"))
    figures = [("rows", f"{rows:,}", "")]
    if removed or scanned:
        figures.append(("removed", f"{removed:,}", f"{percent(removed / rows)} of them" if rows and removed else ""))
    if tokens:
        figures.append(("tokens not learned", f"{tokens:,}", ""))
    for name, key in LABELLED:
        if usable(whole.get(key)):
            figures.append((name, percent(whole[key]["rate"]), f"of {whole[key]['n']:,}"))
    for judge, rate in asr_of(after).items():
        figures.append((f"ASR after, {judge}", percent(rate["rate"]), f"n = {rate['n']}"))
    if usable(after.get("utility")):
        figures.append(("utility after", percent(after["utility"]["rate"]), f"n = {after['utility']['n']}"))
    return tuple(figures)


def _verdict(
    before: Mapping[str, Any], after: Mapping[str, Any], verdict: Mapping[str, Any] | None
) -> tuple[Status, str]:
    """The tone of the page and its standing. Safety counts before usefulness, and neither alone is a pass."""
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
    safe = f"The ASR is {100 * TARGET:g} % or less by every judge"
    if _apart(after.get("utility"), before.get("utility")):
        return "warn", f"{safe}, but utility fell"
    if usable(after.get("utility")) and after["utility"]["rate"] <= USELESS:
        return "warn", f"{safe}, but the model has not learned the task"
    if _apart(before.get("over_refusal"), after.get("over_refusal")):
        return "warn", f"{safe}, but the model refuses more that is harmless"
    return "pass", safe


def _apart(less: Any, more: Any) -> bool:
    """Whether one rate lies below another with no overlap of their intervals."""
    return usable(less) and usable(more) and bool(less["high"] < more["low"])


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
        facts.append(
            f"The search: {verdict.get('sentence', '')}. It decided on prompts and rows of its own, not on those reported here."
        )
    return tuple(facts)


def _change(before: Any, after: Any) -> str:
    return f"{worded(before)} before; {worded(after)} after" if usable(before) else f"{worded(after)} after"


def _measured(before: Mapping[str, Any], after: Mapping[str, Any], chosen: bool) -> Section:
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
        "that it complies with, over-refusal that of harmless look-alikes it refuses." + (OTHERS if chosen else ""),
        nav="Before and after",
        tables=(Table(("Measured", "Before", "After", "Change"), tuple(lines)),),
    )


def _moved(before: Any, after: Any) -> float | None:
    """By how many points a rate rose."""
    return 100 * (float(after["rate"]) - float(before["rate"])) if usable(before) and usable(after) else None


def _taken(whole: Mapping[str, Any], scans: tuple[tuple[str, str], ...]) -> Section:
    rows, removed, tokens = (int(whole.get(key) or 0) for key in ("rows", "removed", "dropped_tokens"))
    rates = [(name, rate_entry(whole[key])) for name, key in LABELLED if usable(whole.get(key))]
    if not (removed or tokens or scans):
        return Section("taken", "What was taken out")
    said = (
        f"{removed:,} of {rows:,} rows were taken out before training."
        if removed
        else f"None of {rows:,} rows was taken out."
    )
    if tokens:
        said += f" {tokens:,} tokens of the rows that stayed were not learned."
    tables = (Table(("By the labels", "Share"), tuple(rates)),) if rates else ()
    return Section("taken", "What was taken out", said, tables=tables, links=scans, nav="Removed")
