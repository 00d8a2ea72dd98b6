"""The page of a scan: what was removed and why, whether to trust it, and the rows on both sides of the cut."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradshield import data as rows_in
from gradshield.files import file_digest
from gradshield.manifests import LEAST_SPEARMAN, Figures, Labelled, ScanManifest, ScanResults, judges_of
from gradshield.report import made
from gradshield.report.draw import Chart
from gradshield.report.sheet import NOTHING, Entry, Section, Sheet, Status, Table, drawn, interval, rate_entry
from gradshield.report.text import BEGIN, END, code, flatten, number, one_line, percent, plain, table_row, table_rule
from gradshield.scanning.decide import ROWS, Selection
from gradshield.scanning.page_charts import category_chart, class_charts, score_charts
from gradshield.scanning.page_rows import (
    LEVELS,
    NEAR,
    SHOWN,
    RowView,
    ShownRow,
    Views,
    references,
    row_view,
    show_rows,
)
from gradshield.stats import wilson
from gradshield.types import Cut, Ints, Quarantined

SCAN = "scan.html"
REMOVED_BYTES, KEPT_BYTES = 1_600_000, 300_000  # with Plotly's 4.8 MB, the page stays under 8 MB
SET_ASIDE = 200  # quarantined rows
BEGINS = 160  # characters of one

_MEANING = {
    "fihs": "A score is how far one training step on the row pushes the model toward unsafe answers.",
    "screen": "Near 0, the model reads a row’s request like everyday ones; near 1, like harm. An answer "
    "that undoes no refusal subtracts 1; an outlying FIHS adds 1.",
}
_DECOYS = " Decoys are the scores of the same rows with flipped token signs: what chance looks like."
_RANKED = (
    "AUROC is how often a harmful row ranks above a harmless one. A score is worth its cost only if it beats baselines that "
    "need no model."
)
LITTLE_LEFT = 0.2  # share of scored rows under which the page says that little is left

_RULES = {
    "anchored": "The score compares a row's request with everyday requests (near 0) and with harmful ones (near 1), as this "
    "model reads them. Rows above the cut read like harm, and have an answer that is no refusal.",
    "adaptive": "Algorithm 1 fits one Gaussian to the scores, and a mixture of two; if the mixture fits better by more than α, "
    "the cut is where its lower component ends, else it is μ + 2σ.",
    "decoy": "Each row is its own control: its tokens with flipped signs give a decoy score, and the cut is the lowest at "
    "which the decoys estimate that at most a share q of the removed rows is harmless.",
    "competition": "Each row competes with its own decoy, the same row with the signs of its tokens flipped. Rows that lose "
    "show what harmless rows can score. The cut is the lowest that bounds the share of harmless rows among the removed by q, "
    "and the share of harmless rows lost.",
    "conformal": "The cut comes from known clean rows, so that a clean row exceeds it with at most the chosen probability.",
    "ratio": "A fixed share of the rows is removed, the highest scores first.",
    "fixed": "The cut was given by hand.",
    "verified": "The cut was searched by training on the kept rows and measuring safety and utility.",
}

_NAMES = {
    "log_likelihood_1": "log-likelihood, one Gaussian", "log_likelihood_2": "log-likelihood, mixture", "mu": "mean μ",
    "sigma": "standard deviation σ", "alpha": "threshold α", "q": "allowed false discovery rate q",
    "estimated_fdr": "estimated false discovery rate", "fdr": "estimated false discovery rate",
    "n_targets": "rows above the cut", "n_decoys": "decoys above the cut",
    "targets": "winning rows above the cut", "decoys": "winning decoys above the cut",
    "lost": "allowed share of harmless rows lost", "counted": "cut by counting", "tail": "cut by the null's tail",
    "branch": "which decided",
}  # fmt: skip


class Reason(NamedTuple):
    """Why the rows of a group were removed: what its rule ``said``, and ``at`` which score, and figures as (name, value)."""

    group: str
    rule: str
    said: str
    at: str
    meaning: str
    figures: tuple[tuple[str, str], ...]


class Check(NamedTuple):
    """One reason to trust the scan, or not."""

    name: str
    status: Status
    text: str


def page(selection: Selection, folder: Path, views: Views, labels: Ints | None = None) -> Sheet:
    """The page of a scan into ``folder``.

    ``views`` are the tokens of the rows that it may show; ``labels`` (N,), 1 for harmful, are aligned with the scores.
    """
    manifest, results, selector = selection.manifest, selection.manifest.results, selection.manifest.settings.selector
    kept, removed = (f"{name}{rows_in.suffix(manifest.data.kind)}" for name in ("kept", "removed"))
    order = np.argsort(-selection.scores.values, kind="stable")
    out = selection.removed[order]
    above, near = (
        [_view(selection, i, views) for i in places.tolist()] for places in (order[out][:SHOWN], order[~out][:NEAR])
    )
    reference = references(above) or references(near)
    reasons = [_reason(group, cut) for group, cut in selection.cuts.items()]
    reads = selector.partition(":")[0] == "screen"
    checks, steps = _checks(results, reads), _steps(results, folder, kept, removed)
    tone, standing = _standing(results, checks)
    charted = selection.scores, selection.removed, selection.cuts, selector
    parts = {name: part for name, part in manifest.plain().items() if name not in ("command", "versions")}
    return Sheet(
        title=f"GradShield · {manifest.data.name}",
        kind="scan report",
        tone=tone,
        standing=standing,
        verdict=_verdict(results, selector),
        facts=tuple(f"Not certified: {text}." for text in results.doubts.values()),
        figures=_figures(results),
        first=drawn(SCAN, "first", results, reasons, checks, steps),
        sections=(
            _trained(results),
            _scores(selector, selection.scores.decoys is not None, score_charts(*charted)),
            _labelled(results.labels, () if labels is None else class_charts(*charted, labels)),
            _removed(results, show_rows(above, reference, REMOVED_BYTES), reference, removed, reads),
            _passed(show_rows(near, reference, KEPT_BYTES)),
            _quarantined(selection.quarantined),
        ),
        command=manifest.command,
        versions=manifest.versions,
        made=(
            ("Data", f"{manifest.data.name}, {manifest.data.rows:,} rows, SHA-256 {manifest.data.sha256[:12]}…"),
            ("Model", made.model_words(manifest.model)),
            ("Scored", f"by {selector}, cut by {manifest.settings.threshold}, seed {manifest.settings.seed}"),
        ),
        links=(
            ("rows that stay", kept),
            ("rows that go", removed),
            *((("rows set aside", "quarantine.jsonl"),) if selection.quarantined else ()),
            ("the score of every row", "scores.parquet"),
            ("manifest", "manifest.json"),
        ),
        folded=tuple(flatten(parts)),
    )


def _view(selection: Selection, i: int, views: Views) -> RowView:
    scores = selection.scores
    row, cut = int(scores.rows[i]), selection.cuts[scores.shapes[i]].value
    note = "kept by hand, above the cut" if row in selection.cleared else ""
    note = "removed by hand, below the cut" if row in selection.denied else note
    return row_view(scores, i, cut, selection.categories[i], views.get(row, ()), note)


def _standing(results: ScanResults, checks: Sequence[Check]) -> tuple[Status, str]:
    states = {check.status for check in checks}
    if "fail" in states:
        return "fail", "Do not rely on this yet"
    if "warn" in states or results.doubts:
        return "warn", "Read the warnings"
    return "pass", "Certified: no check failed"


def _verdict(results: ScanResults, selector: str) -> str:
    rows = f"{results.scored:,} scored row{'s' if results.scored != 1 else ''}"
    if not results.removed:
        return f"Nothing was removed ({rows})."
    if not results.kept:
        return f"Everything was removed ({rows}): nothing is left to train on."
    what = {
        "screen": "ask for something this model reads as harm, and were removed",
        "fihs": "push toward unsafe answers and were removed",
    }.get(selector.partition(":")[0], f"score above the cut of the selector {selector} and were removed")
    return f"{results.removed:,} of {rows} ({percent(results.removed / results.scored)}) {what}."


def _figures(results: ScanResults) -> tuple[tuple[str, str, str], ...]:
    share = f"{percent(results.removed / results.scored)} of scored" if results.removed else ""
    denied = f"{results.denied:,} by hand" if results.denied else ""
    return (
        ("rows read", f"{results.read:,}", ""),
        ("scored", f"{results.scored:,}", ""),
        ("kept", f"{results.kept:,}", f"{results.cleared:,} by hand" if results.cleared else ""),
        ("removed", f"{results.removed:,}", ", ".join(filter(None, (share, denied)))),
        ("quarantined", f"{results.quarantined:,}", ""),
    )


def _trained(results: ScanResults) -> Section:
    """The demo's models: before training, and trained on every row or on those that stay."""
    arms: list[tuple[str, Figures | None, int | None]] = [
        ("aligned", results.aligned, None),
        ("undefended", results.undefended, results.read),
        ("filtered", results.filtered, results.kept),
    ]
    ran = [(name, found, rows) for name, found, rows in arms if found is not None]
    if not ran:
        return Section("results", "")
    judges = judges_of(found.judges for _, found, _ in ran)
    lines: tuple[tuple[Entry | str, ...], ...] = tuple(
        (
            name,
            number(rows),
            *(rate_entry(found.judges.get(judge)) for judge in judges),
            rate_entry(found.over_refusal),
            rate_entry(found.utility),
        )
        for name, found, rows in ran
    )
    head = ("Model", "Trained on rows", *(f"ASR, {judge}" for judge in judges), "over-refusal", "utility")
    lead = "Each line is a model trained on one selection of the rows. Every rate has its interval and count."
    return Section("results", "Results of training", lead, tables=(Table(head, lines),), nav="Results")


def _scores(selector: str, decoys: bool, charts: tuple[Chart, ...]) -> Section:
    other = (
        f"Scores are those of the selector {selector}: rows with higher scores are removed first. By themselves they say nothing "
        "about unsafe answers."
    )
    lead = _MEANING.get(selector.partition(":")[0], other) + (_DECOYS if decoys else "")
    return Section("scores", "Score distribution", lead, charts, nav="Scores")


def _labelled(labels: Labelled, charts: tuple[Chart, ...]) -> Section:
    rates = (("harmful rows caught", labels.caught), ("harmless rows lost", labels.lost))
    own = tuple((name, rate_entry(rate)) for name, rate in rates if rate is not None)
    ranked: list[tuple[Entry, ...]] = []
    for one in labels.aurocs:
        if one.auroc is not None and one.low is not None and one.high is not None:
            bar, counts = interval(one.low, one.auroc, one.high), f"{one.n_pos:,} / {one.n_neg:,}"
            line = (one.name, f"{one.auroc:.3f}", bar, f"[{one.low:.3f}, {one.high:.3f}]", counts)
            ranked.append(tuple(Entry(shown, look="" if ranked else "own") for shown in line))
    head, title = (
        ("Ranked by", "AUROC", "from 0 to 1", "interval", "harmful / harmless"),
        "Ranking, compared with trivial baselines",
    )
    tables = (Table(("By the labels", "Share"), own), Table(head, tuple(ranked), title, _RANKED))
    return Section("labels", "Against the labels", "", charts, tables, nav="Labels")


def _removed(
    results: ScanResults, shown: Sequence[ShownRow], reference: dict[str, float], file: str, reads: bool
) -> Section:
    """Removed rows by category, the largest first, each with its total."""
    if not results.removed:
        return Section("removed", "Removed rows", "No row was removed.", nav="Removed")
    members: dict[str, list[ShownRow]] = {}
    for row in shown:
        members.setdefault(row.view.category, []).append(row)
    groups = [
        (name or "no kind", max(results.categories.get(name, 0), len(rows)), rows) for name, rows in members.items()
    ]
    groups.sort(key=lambda group: -group[1])
    legend = [(shape, [number(edge * value, 2) for edge in LEVELS]) for shape, value in reference.items()]
    more = results.removed - len(shown)
    lead = f"Shown are the {len(shown):,} with the highest scores; {more:,} more are in {file}." if more else ""
    return Section(
        "removed",
        "Removed rows",
        lead,
        charts=category_chart(results.categories),
        nav="Removed",
        body=drawn(SCAN, "removed", groups, legend, reads),
    )


def _passed(shown: Sequence[ShownRow]) -> Section:
    lead = "The kept rows with the highest scores. A filter's misses are here: read these before you trust the cut."
    body = drawn(SCAN, "passed", shown) if shown else NOTHING
    return Section("passed", "Just passed", lead if shown else "", body=body)


def _quarantined(rows: Sequence[Quarantined]) -> Section:
    if not rows:
        return Section("quarantine", "")
    lines = tuple(
        (
            Entry(f"{row.line:,}", key=row.line),
            Entry(one_line(row.reason, 300), look="words"),
            Entry(one_line(row.source[: 4 * BEGINS].decode("utf-8", "backslashreplace"), BEGINS), look="words preview"),
        )
        for row in rows[:SET_ASIDE]
    )
    more = f"{len(rows) - SET_ASIDE:,} more in that file." if len(rows) > SET_ASIDE else ""
    return Section(
        "quarantine",
        "Quarantined rows",
        f"{len(rows):,} row{'s' if len(rows) != 1 else ''} could not be read or scored. They are in neither the kept nor the "
        "removed file, but in quarantine.jsonl.",
        tables=(Table(("Line", "Why", "Begins"), lines, hint=more),),
        nav="Quarantine",
    )


def _reason(group: str, cut: Cut) -> Reason:
    """Why the rows beyond a cut were removed."""
    figures = [(_NAMES.get(key, key.replace("_", " ")), number(v)) for key, v in cut.detail.items() if _plain(v)]
    for i, part in enumerate(cut.detail.get("components") or ()):
        if isinstance(part, Mapping):
            figures.append((f"component {i + 1}", ", ".join(f"{key} {number(value)}" for key, value in part.items())))
    if math.isfinite(cut.value):
        said, at = "removes rows that score above", number(float(cut.value))
    else:
        some = "found no score to cut at: none of these rows goes", "removes every one of these rows"
        said, at = some[cut.value < 0], ""
    meaning = f"{_RULES.get(cut.rule, '')} {_branch(cut)}".strip()
    return Reason(group, cut.rule, said, at, meaning, tuple(figures[:24]))


def _branch(cut: Cut) -> str:
    """For Algorithm 1, the branch taken."""
    found = [cut.detail.get(key) for key in ("log_likelihood_1", "log_likelihood_2", "alpha")]
    figures = [float(value) for value in found if isinstance(value, int | float)]
    if cut.rule != "adaptive" or len(figures) < 3:
        return ""
    one, two, alpha = figures
    taken = "so the mixture decides" if two - one > alpha else "so the single Gaussian decides"
    return f"Here the mixture is better by {number(two - one)} against α = {number(alpha)}, {taken}."


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str) or hasattr(value, "item")


def _checks(results: ScanResults, reads: bool) -> list[Check]:
    """What was checked: the probes, the ruler and the engine, where the selector has any, how much is left, and all else.

    ``reads``: the scores of known requests are readings, not FIHS.
    """
    found = []
    others = results.doubts.keys() - {"share"}  # doubts that no line of its own shows
    if (probes := results.probes) is not None:
        others -= {"probes"}
        asked = probes.refused
        text = (
            f"The model refused {asked.k} of {asked.n} probes "
            f"({100 * asked.rate:.0f} %, 95 % interval {100 * asked.low:.0f}–{100 * asked.high:.0f} %)."
        )
        found.append(Check("Probe validity", "fail" if probes.problem else "pass", text))
    cut = results.cuts[ROWS].value if ROWS in results.cuts else None
    if reads and (known := results.anchors) is not None and cut is not None:
        others -= {"ruler"}
        beyond = (
            wilson(sum(v is not None and v > cut for v in one), len(one)) for one in (known.harmful, known.harmless)
        )
        text = "Above the cut, by a ruler that was not fitted on them: known harmful requests {}, everyday ones {}."
        status: Status = "warn" if "ruler" in results.doubts else "pass"
        found.append(Check("Known requests", status, text.format(*beyond)))
    if (agreed := results.agreement) is not None:
        agrees = agreed.relative_error is not None and (agreed.spearman is None or agreed.spearman >= LEAST_SPEARMAN)
        ranks = "" if agreed.spearman is None else f", Spearman {agreed.spearman:.5f}"
        text = (
            f"{agreed.engine} against the oracle on {agreed.n:,} rows: relative error ‖f − o‖/‖o‖ "
            f"{number(agreed.relative_error, 2)}{ranks}.{'' if agrees else ' They disagree: treat the scores with care.'}"
        )
        found.append(Check("Engine agreement", "pass" if agrees else "warn", text))
    little = results.kept < LITTLE_LEFT * results.scored
    left = f"{results.kept:,} of {results.scored:,} scored rows ({percent(results.kept / results.scored)})."
    status = "warn" if little or "share" in results.doubts else "pass"
    found.append(Check("What is left", status, f"Little: {left}" if little else left))
    if others:
        found.append(Check("Other checks", "warn", f"{len(others)} failed: see the top of the page."))
    return found


def _steps(results: ScanResults, folder: Path, kept: str, removed: str) -> list[str]:
    """What to do next; ``kept`` and ``removed`` are the names of the files of rows in the output folder, as it was typed."""
    found = []
    if results.removed:
        found.append(f"Read the removed rows below ({removed}), the highest scores first.")
    if results.kept:
        found.append("Read the rows just below the cut too: harm written to evade the scan would be there.")
    found.append(f"Keep or remove single rows by hand: gradshield review {shlex.quote(str(folder))}")
    if results.quarantined:
        found.append(f"Fix the quarantined rows (quarantine.jsonl): {results.quarantined:,}.")
    if results.kept:
        found.append(
            f"Train on {folder / kept}, then measure the trained model: only that shows whether the filter worked."
        )
    return found


# So that the hub shows the rows that stay, and not those that went.
FRONT = "---\nconfigs:\n- config_name: default\n  data_files: {kept}\n---\n"
VERSIONS = ("gradshield", "torch", "transformers")


def card(manifest: ScanManifest, kept: Path) -> str:
    """The section of a dataset's card, as Markdown; of paths only the last part, since a card is published."""
    results, data, model = manifest.results, manifest.data, manifest.model
    counts = f"{results.removed:,} of {results.read:,} rows removed, {results.kept:,} kept"
    counts += f", {results.quarantined:,} set aside as unusable" if results.quarantined else ""
    counts += f", {results.cleared:,} of the kept ones cleared by a reviewer" if results.cleared else ""
    counts += f", {results.denied:,} of the removed ones taken out by a reviewer" if results.denied else ""
    cuts = "; ".join(
        f"{plain(cut.rule)}, score above {cut.value:.6g}" + (f" ({plain(name)})" if name != "rows" else "")
        for name, cut in results.cuts.items()
    )
    verdict = (
        "**Certified**: no check speaks against the scan."
        if results.certified
        else f"**Not certified**: {plain('; '.join(results.doubts.values()))}."
    )
    kinds = ", ".join(f"{plain(name)} {count:,}" for name, count in results.categories.items() if name)
    hashes = [
        ("input", data.name, data.sha256),
        ("kept", kept.name, file_digest(kept)),
        ("model", model.name, model.sha256),
    ]
    versions = ", ".join(f"{name} {manifest.versions[name]}" for name in VERSIONS if name in manifest.versions)
    lines = [
        BEGIN,
        "## Safety screening",
        "",
        f"Screened with GradShield, selector {code(manifest.settings.selector)}, for rows that would make the model less safe: "
        f"{counts}.",
        f"Removed: {cuts or 'nothing could be cut'}.",
        *([f"Nearest kinds of harm, a guess: {kinds}."] if kinds else []),
        "",
        f"{verdict} A certified scan is one whose own checks passed; no scan finds every harmful row.",
        "",
        table_row("", "name", "SHA-256"),
        table_rule(3),
        *(table_row(label, code(Path(name).name), code(digest)) for label, name, digest in hashes),
        "",
        f"Seed {manifest.settings.seed}; {plain(versions)}. Everything else is in `manifest.json`.",
        END,
    ]
    return "\n".join(lines)
