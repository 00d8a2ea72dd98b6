"""The first screen: the verdict, why these rows, whether to trust it, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gradshield.report.frame import Status
from gradshield.report.text import number, percent
from gradshield.scanning.page_data import FIHS, Agreement, Check, ReportData
from gradshield.types import Cut

LITTLE_LEFT = 0.2  # share of scored rows under which the page says that little is left
AGREES = 0.99  # Spearman against the oracle, as the scan itself asks

_RULES = {
    "anchored": "The score compares a row's request with requests that this model answers (near 0) and with requests that it "
    "refuses (near 1). Rows above the cut read like the refused ones, and have an answer that is no refusal.",
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


@dataclass(frozen=True)
class Reason:
    """Why a shape's rows were removed: the rule, what it means, and its figures as (name, value)."""

    shape: str
    cut: Cut
    explanation: str
    figures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Summary:
    """The first screen. ``tone`` colours the verdict and is also written out."""

    tone: Status
    verdict: str
    standing: str
    checks: tuple[Check, ...]
    reasons: tuple[Reason, ...]
    next_steps: tuple[str, ...]


def summarise(data: ReportData) -> Summary:
    """The first screen's text. The caller's own is used if given."""
    checks = (*data.checks, *_own_checks(data))
    states = {check.status for check in checks}
    tone: Status = "fail" if "fail" in states else "warn" if "warn" in states or data.warnings else "pass"
    standing = {"pass": "No check failed", "warn": "Read the warnings", "fail": "Do not rely on this yet"}[tone]
    if tone == "pass" and not data.checks and data.agreement is None:
        tone, standing = "warn", "Nothing was verified in this run"
    reasons = tuple(_reason(shape, cut) for shape, cut in data.cuts.items())
    return Summary(tone, data.verdict or _verdict(data), standing, checks, reasons, data.next_steps or _next(data))


def _verdict(data: ReportData) -> str:
    counts = data.counts
    if not counts.scored:
        return "No row could be scored."
    rows = f"{counts.scored:,} scored row{'s' if counts.scored != 1 else ''}"
    if not counts.removed:
        return f"Nothing was removed ({rows})."
    if counts.removed == counts.scored:
        return f"Everything was removed ({rows}): nothing is left to train on."
    share = percent(counts.removed / counts.scored)
    if data.selector == "screen":
        return f"{counts.removed:,} of {rows} ({share}) ask for something this model would refuse, and answer it. They were removed."
    if data.selector == FIHS:
        return f"{counts.removed:,} of {rows} ({share}) push toward unsafe answers and were removed."
    return (
        f"{counts.removed:,} of {rows} ({share}) score above the cut of the selector {data.selector} and were removed."
    )


def _own_checks(data: ReportData) -> tuple[Check, ...]:
    """Checks from the counts and the agreement, unless the caller gave a check of that name."""
    own = []
    if data.agreement is not None:
        own.append(agreement_check(data.agreement))
    counts = data.counts
    if counts.scored:
        little = counts.kept < LITTLE_LEFT * counts.scored
        text = f"{counts.kept:,} of {counts.scored:,} scored rows ({percent(counts.kept / counts.scored)})."
        own.append(Check("What is left", "warn" if little else "pass", f"Little: {text}" if little else text))
    given = {check.name for check in data.checks}
    return tuple(check for check in own if check.name not in given)


def agreement_check(found: Agreement) -> Check:
    """The engine against the oracle, as a check."""
    ranks = "" if found.spearman is None else f", Spearman {found.spearman:.5f}"
    text = (
        f"{found.engine} against the oracle on {found.rows:,} rows: relative error {found.relative_error:.2g}{ranks}."
    )
    status: Status = "warn" if found.spearman is not None and found.spearman < AGREES else "pass"
    if not math.isfinite(found.relative_error):
        status = "warn"
    return Check("Engine agreement", status, f"{text} {found.note}".strip())


def _reason(shape: str, cut: Cut) -> Reason:
    plain = {key: _value(value) for key, value in cut.detail.items() if _plain(value)}
    figures = [(_NAMES.get(key, key.replace("_", " ")), value) for key, value in plain.items()]
    for i, part in enumerate(cut.detail.get("components") or ()):
        if isinstance(part, Mapping):
            text = ", ".join(f"{key} {_value(value)}" for key, value in part.items())
            figures.append((f"component {i + 1}", text))
    return Reason(shape, cut, f"{_RULES.get(cut.rule, '')} {_outcome(cut)}".strip(), tuple(figures[:24]))


def _outcome(cut: Cut) -> str:
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


def _value(value: Any) -> str:
    return number(value) if _plain(value) else str(value)


def _next(data: ReportData) -> tuple[str, ...]:
    """The ordinary next steps after a scan."""
    kept, removed = data.files.get("kept", "kept.jsonl"), data.files.get("removed", "removed.jsonl")
    steps = []
    if data.counts.removed:
        steps.append(f"Read the removed rows below ({removed}), the highest scores first.")
    if data.kept_rows:
        steps.append("Read the rows just below the cut too: harm written to evade the scan would be there.")
    if data.counts.scored:
        steps.append("Keep or remove single rows by hand: gradshield review FOLDER.")
    if data.counts.scored:
        steps.append("Try another cut without the model: gradshield cut FOLDER --threshold NAME.")
    if data.counts.quarantined:
        aside = data.files.get("quarantine", "quarantine.jsonl")
        steps.append(f"Fix the {data.counts.quarantined:,} quarantined rows ({aside}).")
    if data.counts.kept:
        steps.append(f"Train on {kept}, then measure the trained model: only that shows whether the filter worked.")
    return tuple(steps)
