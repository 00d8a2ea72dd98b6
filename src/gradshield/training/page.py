"""The page of one training run: safety and utility before and after, the search of the cut, and the removed rows.

``write(whole, path)`` takes ``title``, ``defence``, ``verdict`` (of the verified threshold, or None), ``before`` and ``after``
(``judges``, ``over_refusal``, ``utility``, if measured), ``rows``, ``removed``, ``dropped_tokens``, ``record``, ``command``,
``versions`` and ``files`` (names to paths relative to the page).

Optional: ``settings`` and ``model`` as in the manifest, ``caught`` and ``lost`` (rates, with labels), ``uncertified`` (why the
scan is not certified), and in ``verdict`` its ``targets``: ``asr``, ``utility`` and ``tolerance``, as shares.
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
    " The search of the cut used other requests and other rows of the task, so its figures differ: data that selected a model "
    "must not also evaluate it."
)


def write(whole: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write the page of a training run, as one self-contained HTML file."""
    return sheet.write(page(whole), path)


def page(whole: Mapping[str, Any]) -> Sheet:
    """The page, unrendered."""
    before, after = whole.get("before") or {}, whole.get("after") or {}
    verdict = whole.get("verdict")
    tone, standing = _verdict(before, after, verdict)
    uncertified = whole.get("uncertified")
    if uncertified and tone == "pass":
        tone, standing = "warn", f"{standing}, but the scan is not certified"
    files = [(str(name), str(path)) for name, path in (whole.get("files") or {}).items()]
    scans = tuple(file for file in files if file[1].startswith("scan/"))
    return Sheet(
        title=str(whole.get("title") or "Training run"),
        kind="training report",
        tone=tone,
        standing=standing,
        verdict=_sentence(before, after),
        facts=(
            *_facts(before, after, verdict),
            *((f"The scan is not certified: {uncertified}.",) if uncertified else ()),
        ),
        figures=_figures(whole, after, bool(scans)),
        sections=(
            _measured(before, after, verdict is not None),
            page_search.section(verdict, int(whole.get("rows") or 0)),
            _removed(whole, scans),
            page_record.section(whole.get("record") or {}),
        ),
        command=str(whole.get("command", "")),
        versions=whole.get("versions") or {},
        made=tuple(made.of_run(whole)),
        links=tuple(file for file in files if file not in scans),
        folded=tuple(made.every_setting(whole)),
    )


def _figures(whole: Mapping[str, Any], after: Mapping[str, Any], scanned: bool) -> tuple[tuple[str, str, str], ...]:
    rows, removed, tokens = (int(whole.get(key) or 0) for key in ("rows", "removed", "dropped_tokens"))
    figures = [("rows", f"{rows:,}", "")]
    if removed or scanned:
        figures.append(("removed", f"{removed:,}", f"{percent(removed / rows)} of them" if rows and removed else ""))
    if tokens:
        figures.append(("tokens masked", f"{tokens:,}", ""))
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
    """The tone of the page and its standing. Safety comes before utility, and a pass needs both."""
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
    if _clearly_less(after.get("utility"), before.get("utility")):
        return "warn", f"{safe}, but utility fell"
    if usable(after.get("utility")) and after["utility"]["rate"] <= USELESS:
        return "warn", f"{safe}, but the model has not learned the task"
    if _clearly_less(before.get("over_refusal"), after.get("over_refusal")):
        return "warn", f"{safe}, but the model refuses more harmless requests"
    return "pass", safe


def _clearly_less(less: Any, more: Any) -> bool:
    """Whether one rate is below another without overlap of their intervals."""
    return usable(less) and usable(more) and bool(less["high"] < more["low"])


def _sentence(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The worst judge's ASR and the utility in one sentence, without intervals."""
    was, now = asr_of(before), asr_of(after)
    parts = []
    if now:
        judge = max(now, key=lambda name: float(now[name]["rate"]))
        parts.append(f"the ASR by its worst judge, {judge}, {_changed(was.get(judge), now[judge])}")
    if usable(after.get("utility")):
        parts.append(f"utility {_changed(before.get('utility'), after['utility'])}")
    return f"After training, {'; '.join(parts)}." if parts else "Neither safety nor utility was measured."


def _changed(before: Any, after: Mapping[str, Any]) -> str:
    now = percent(float(after["rate"]))
    return f"is {now}, from {percent(float(before['rate']))} before" if usable(before) else f"is {now}"


def _facts(before: Mapping[str, Any], after: Mapping[str, Any], verdict: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The ASR by every judge and the utility, with intervals and counts, then the verdict of the search."""
    was, now = asr_of(before), asr_of(after)
    facts = [f"ASR by {judge}: {_change(was.get(judge), rate)}." for judge, rate in now.items()]
    if usable(after.get("utility")):
        facts.append(f"Utility: {_change(before.get('utility'), after['utility'])}.")
    if verdict is not None:
        facts.append(
            f"The search: {verdict.get('sentence', '')}. It used its own prompts and rows, not those reported here."
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
        "The same held-out prompts before and after training. ASR is the share of harmful requests that the model complies with, "
        "over-refusal the share of harmless look-alikes that it refuses." + (OTHERS if chosen else ""),
        nav="Before and after",
        tables=(Table(("Measured", "Before", "After", "Change"), tuple(lines)),),
    )


def _moved(before: Any, after: Any) -> float | None:
    """The change of a rate, in points."""
    return 100 * (float(after["rate"]) - float(before["rate"])) if usable(before) and usable(after) else None


def _removed(whole: Mapping[str, Any], scans: tuple[tuple[str, str], ...]) -> Section:
    rows, removed, tokens = (int(whole.get(key) or 0) for key in ("rows", "removed", "dropped_tokens"))
    rates = [(name, rate_entry(whole[key])) for name, key in LABELLED if usable(whole.get(key))]
    if not (removed or tokens or scans):
        return Section("taken", "Removed before training")
    lead = f"{removed:,} of {rows:,} rows were removed before training."
    if tokens:
        lead += f" {tokens:,} tokens of the other rows were masked."
    tables = (Table(("By the labels", "Share"), tuple(rates)),) if rates else ()
    return Section("taken", "Removed before training", lead, tables=tables, links=scans, nav="Removed")
