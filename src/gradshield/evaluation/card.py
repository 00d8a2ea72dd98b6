"""The section of a fine-tuned model's card: the defence, the measured rates and the certificate."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradshield.evaluation.certificate import text
from gradshield.manifests import Figures, TrainingManifest
from gradshield.report.text import BEGIN, END, code, plain, put_section
from gradshield.runs import CERTIFICATE
from gradshield.stats import percent


def write(folder: Path, manifest: TrainingManifest, certificate: Mapping[str, Any] | None = None) -> None:
    """Put the section into ``README.md`` of the folder, in place of an earlier one; the rest of the file is kept."""
    put_section(folder / "README.md", section(manifest, certificate))


def section(manifest: TrainingManifest, certificate: Mapping[str, Any] | None = None) -> str:
    """The section as Markdown, including the certificate's claim if there is one."""
    results, data, model = manifest.results, manifest.data, manifest.model
    lines = [
        BEGIN,
        "## Safety of the fine-tuning",
        "",
        f"Fine-tuned with GradShield {manifest.versions.get('gradshield', '')}, defence {code(manifest.settings.defence)}: "
        f"{results.removed} of {results.rows} rows removed, {results.trained} trained on.",
        "",
        *_measured(results.before, results.after),
        "",
        f"Data: {code(data.name)}, SHA-256 {code(data.sha256)}. Start: {code(model.name)}, SHA-256 "
        f"{code(model.sha256)}. Seed {manifest.settings.seed}. Everything else is in `manifest.json`"
        + (", the removed rows are in `scan/`." if results.cuts else "."),
    ]
    if results.uncertified and certificate is None:
        lines += ["", f"**Nothing is certified**: {plain(results.uncertified)}."]
    if results.verified is not None:
        lines += ["", f"Verified threshold: {plain(results.verified.sentence)}."]
    if certificate is not None:
        lines += ["", *_certified(certificate)]
    return "\n".join([*lines, END])


def _certified(certificate: Mapping[str, Any]) -> list[str]:
    """The claim, judge by judge. The hash ties the card to one certificate."""
    found = certificate["predicate"]
    claim = found["claim"]
    verdict = (
        f"**Certified**: by every judge the attack success rate is at most {_share(claim['limit'])}."
        if found["certified"]
        else f"**Not certified**: {plain(found['reason'])}."
    )
    looks = f"{claim['looks']} look{'' if claim['looks'] == 1 else 's'}"
    lines = ["### Safety certificate", "", verdict, ""]
    if found["judges"]:
        asked, own = found["requests"], found["calibration"]
        lines += [
            f"Exact upper bounds that hold jointly with {_share(claim['confidence'])} confidence, over {looks} at "
            f"{asked['n']} requests (SHA-256 {code(asked['sha256'])}):",
            "",
            "| judge | called unsafe | attack success at most | the judge's own error |",
            "|---|---|---|---|",
            *(f"| {plain(name)} | {_bounded(one)} |" for name, one in found["judges"].items()),
            "",
            "No judge was calibrated on this model: the bounds apply to what the judges call unsafe."
            if own is None
            else f"Judges were calibrated on {own['n']} labelled answers, {own['of_this_run']} of them from this run.",
            "",
        ]
    if lost := found["lost"]:
        lines += [
            f"Harmless rows removed: {lost['k']} of {lost['n']}, at most {percent(lost['upper'])} of such rows with "
            f"{_share(claim['confidence'])} confidence.",
            "",
        ]
    digest = hashlib.sha256(text(certificate).encode()).hexdigest()
    return [*lines, f"`{CERTIFICATE}`, SHA-256 {code(digest)}; `gradshield certify --check` recomputes it."]


def _bounded(judge: Mapping[str, Any]) -> str:
    known = judge["calibration"]
    error = (
        "not calibrated"
        if known is None
        else f"{known['caught']} of {known['unsafe']} unsafe and {known['passed']} of {known['safe']} safe answers recognised"
    )
    return f"{judge['k']} of {judge['n']} | {percent(judge['upper'])} | {error}"


def _share(value: float) -> str:
    return f"{100 * value:g} %"


def _measured(before: Figures, after: Figures) -> list[str]:
    rows = [
        f"| {plain(label)} | {' | '.join('–' if rate is None else str(rate) for rate in pair)} |"
        for label, *pair in after.beside(before)
    ]
    if not rows:
        return ["Nothing was measured: it is unknown how safe this model is."]
    return ["| measured on held-out prompts | before | after |", "|---|---|---|", *rows]
