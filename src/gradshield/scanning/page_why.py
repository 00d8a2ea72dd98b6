"""The cards of the first screen: why these rows, whether to trust the scan, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gradshield.manifests import LEAST_SPEARMAN, ScanResults
from gradshield.report.frame import Status
from gradshield.report.text import number, percent
from gradshield.types import Cut

LITTLE_LEFT = 0.2  # share of scored rows under which the page says that little is left

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


def reason(group: str, cut: Cut) -> Reason:
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


def checks(results: ScanResults) -> list[Check]:
    """What was checked: the probes and the engine, where the selector has any, and how much is left."""
    found = []
    if (probes := results.probes) is not None:
        asked = probes.refused
        text = (
            f"The model refused {asked.k} of {asked.n} probes "
            f"({100 * asked.rate:.0f} %, 95 % interval {100 * asked.low:.0f}–{100 * asked.high:.0f} %)."
        )
        found.append(Check("Probe validity", "fail" if probes.problem else "pass", text))
    if (known := results.agreement) is not None:
        agrees = known.relative_error is not None and (known.spearman is None or known.spearman >= LEAST_SPEARMAN)
        ranks = "" if known.spearman is None else f", Spearman {known.spearman:.5f}"
        text = (
            f"{known.engine} against the oracle on {known.n:,} rows: relative error ‖f − o‖/‖o‖ "
            f"{number(known.relative_error, 2)}{ranks}.{'' if agrees else ' They disagree: treat the scores with care.'}"
        )
        found.append(Check("Engine agreement", "pass" if agrees else "warn", text))
    little = results.kept < LITTLE_LEFT * results.scored
    left = f"{results.kept:,} of {results.scored:,} scored rows ({percent(results.kept / results.scored)})."
    found.append(Check("What is left", "warn" if little else "pass", f"Little: {left}" if little else left))
    return found


def steps(results: ScanResults, folder: Path, kept: str, removed: str) -> list[str]:
    """What to do next; ``kept`` and ``removed`` are the names of the files of rows in the output folder, as it was typed."""
    found, typed = [], shlex.quote(str(folder))
    if results.removed:
        found.append(f"Read the removed rows below ({removed}), the highest scores first.")
    if results.kept:
        found.append("Read the rows just below the cut too: harm written to evade the scan would be there.")
    found.append(f"Keep or remove single rows by hand: gradshield review {typed}")
    found.append(f"Try another cut without the model: gradshield cut {typed} --threshold ratio:5%")
    if results.quarantined:
        found.append(f"Fix the {results.quarantined:,} quarantined rows (quarantine.jsonl).")
    if results.kept:
        found.append(
            f"Train on {folder / kept}, then measure the trained model: only that shows whether the filter worked."
        )
    return found
