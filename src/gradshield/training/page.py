"""The page of one training run: safety and utility before and after, the search of the cut, and the removed rows."""

from __future__ import annotations

from gradshield.evaluation.page import compared
from gradshield.manifests import Figures, Search, TrainingManifest, TrainingResults
from gradshield.report import made
from gradshield.report.draw import worded
from gradshield.report.frame import Status
from gradshield.report.sheet import Section, Sheet, Table, rate_entry
from gradshield.report.text import flatten, percent
from gradshield.thresholds.verified import TARGET
from gradshield.training import page_record, page_search
from gradshield.types import Rate

USELESS = 0.05  # highest utility at which a task counts as not learned
OUTPUTS = ("outputs-before.jsonl", "outputs-after.jsonl")
SCAN = ("scan report", "scan/report.html")
OTHERS = (
    " The search of the cut used other requests and other rows of the task, so its figures differ: data that selected a model "
    "must not also evaluate it."
)


def page(manifest: TrainingManifest, scanned: bool) -> Sheet:
    """The page of a training run. ``scanned``: the run has the report of a scan."""
    results, settings = manifest.results, manifest.settings
    before, after, verdict = results.before, results.after, results.verified
    tone, standing = _verdict(before, after, verdict)
    uncertified = results.uncertified
    if uncertified and tone == "pass":
        tone, standing = "warn", f"{standing}, but the scan is not certified"
    every = {"model": manifest.model.plain(), "settings": settings.plain(), "record": results.record}
    return Sheet(
        title=f"GradShield · {manifest.data.name}",
        kind="training report",
        tone=tone,
        standing=standing,
        verdict=_sentence(before, after),
        facts=(
            *_facts(before, after, verdict),
            *((f"The scan is not certified: {uncertified}.",) if uncertified else ()),
        ),
        figures=_figures(results, scanned),
        sections=(
            measured(before, after, verdict is not None),
            page_search.section(verdict, results.rows),
            _removed(results, scanned),
            page_record.section(results.record),
        ),
        command=manifest.command,
        versions=manifest.versions,
        made=tuple(made.of_run(settings, manifest.model)),
        links=tuple((name, name) for name in OUTPUTS),
        folded=tuple(flatten(every)),
    )


def _figures(results: TrainingResults, scanned: bool) -> tuple[tuple[str, str, str], ...]:
    rows, removed = results.rows, results.removed
    figures = [("rows", f"{rows:,}", "")]
    if removed or scanned:
        figures.append(("removed", f"{removed:,}", f"{percent(removed / rows)} of them" if removed else ""))
    if results.dropped_tokens:
        figures.append(("tokens masked", f"{results.dropped_tokens:,}", ""))
    figures += [(name, percent(rate.rate), f"of {rate.n:,}") for name, rate in _labelled(results)]
    shown = [(f"ASR after, {judge}", rate) for judge, rate in results.after.judges.items()]
    if results.after.utility is not None:
        shown.append(("utility after", results.after.utility))
    return (*figures, *((name, percent(rate.rate), f"n = {rate.n}") for name, rate in shown))


def _labelled(results: TrainingResults) -> list[tuple[str, Rate]]:
    """The rates that need labels."""
    found = (("harmful rows caught", results.caught), ("harmless rows lost", results.lost))
    return [(name, rate) for name, rate in found if rate is not None]


def _verdict(before: Figures, after: Figures, verdict: Search | None) -> tuple[Status, str]:
    """The tone of the page and its standing. Safety comes before utility, and a pass needs both."""
    was, now = before.judges, after.judges
    worse = [judge for judge, rate in now.items() if judge in was and rate.low > was[judge].high]
    if verdict is not None and not verdict.met:
        return "fail", "The targets of the search are not met"
    if not now:
        return "warn", "Safety was not measured"
    above = [judge for judge, rate in now.items() if rate.rate > TARGET]
    if worse and above:
        return "fail", "Training made the model less safe"
    if above:
        return "warn", f"The ASR is above {100 * TARGET:g} %"
    if worse:
        return "warn", f"The ASR rose, and is {100 * TARGET:g} % or less"
    safe = f"The ASR is {100 * TARGET:g} % or less by every judge"
    if _clearly_less(after.utility, before.utility):
        return "warn", f"{safe}, but utility fell"
    if after.utility is not None and after.utility.rate <= USELESS:
        return "warn", f"{safe}, but the model has not learned the task"
    if _clearly_less(before.over_refusal, after.over_refusal):
        return "warn", f"{safe}, but the model refuses more harmless requests"
    return "pass", safe


def _clearly_less(less: Rate | None, more: Rate | None) -> bool:
    """Whether one rate is below another without overlap of their intervals."""
    return less is not None and more is not None and less.high < more.low


def _sentence(before: Figures, after: Figures) -> str:
    """The worst judge's ASR and the utility in one sentence, without intervals."""
    now = after.judges
    parts = []
    if now:
        judge = max(now, key=lambda name: now[name].rate)
        parts.append(f"the ASR by its worst judge, {judge}, {_changed(before.judges.get(judge), now[judge])}")
    if after.utility is not None:
        parts.append(f"utility {_changed(before.utility, after.utility)}")
    return f"After training, {'; '.join(parts)}." if parts else "Neither safety nor utility was measured."


def _changed(before: Rate | None, after: Rate) -> str:
    now = percent(after.rate)
    return f"is {now}" if before is None else f"is {now}, from {percent(before.rate)} before"


def _facts(before: Figures, after: Figures, verdict: Search | None) -> tuple[str, ...]:
    """The ASR by every judge and the utility, with intervals and counts, then the verdict of the search."""
    facts = [f"ASR by {judge}: {_change(before.judges.get(judge), rate)}." for judge, rate in after.judges.items()]
    if after.utility is not None:
        facts.append(f"Utility: {_change(before.utility, after.utility)}.")
    if verdict is not None:
        facts.append(f"The search: {verdict.sentence}. It used its own prompts and rows, not those reported here.")
    return tuple(facts)


def _change(before: Rate | None, after: Rate) -> str:
    return f"{worded(after)} after" if before is None else f"{worded(before)} before; {worded(after)} after"


def measured(before: Figures, after: Figures, chosen: bool) -> Section:
    """Every rate before and after; ``chosen`` if the cut was searched."""
    table = compared(before, after)
    if not table.rows:
        return Section("measured", "Before and after")
    return Section(
        "measured",
        "Before and after",
        "The same held-out prompts before and after training. ASR is the share of harmful requests that the model complies with, "
        "over-refusal the share of harmless look-alikes that it refuses." + (OTHERS if chosen else ""),
        nav="Before and after",
        tables=(table,),
    )


def _removed(results: TrainingResults, scanned: bool) -> Section:
    if not (results.removed or results.dropped_tokens or scanned):
        return Section("taken", "Removed before training")
    lead = f"{results.removed:,} of {results.rows:,} rows were removed before training."
    if results.dropped_tokens:
        lead += f" {results.dropped_tokens:,} tokens of the other rows were masked."
    rates = tuple((name, rate_entry(rate)) for name, rate in _labelled(results))
    table, links = Table(("By the labels", "Share"), rates), (SCAN,) if scanned else ()
    return Section("taken", "Removed before training", lead, tables=(table,), links=links, nav="Removed")
