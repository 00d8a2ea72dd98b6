"""The section that a fine-tuned model's card carries: what was done to its data and training, and what came of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradshield.evaluation.certificate import CERTIFICATE, percent, text
from gradshield.files import replacing
from gradshield.report.markdown import code, plain
from gradshield.types import Manifest, Rate

BEGIN, END = "<!-- gradshield:begin -->", "<!-- gradshield:end -->"


def write(folder: Path, manifest: Manifest, certificate: Mapping[str, Any] | None = None) -> None:
    """Put the section into ``README.md`` of the folder, in place of an earlier one; what else stands there stays."""
    path = folder / "README.md"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    old = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END) + r"\n?", "", old, flags=re.DOTALL).rstrip()
    # Behind the front matter, which must stand first, and before what PEFT fills in.
    front = re.match(r"---\n.*?\n---\n", old, flags=re.DOTALL)
    head, rest = (old[: front.end()], old[front.end() :]) if front else ("", old)
    parts = [head.strip(), section(manifest, certificate), rest.strip()]
    with replacing(path) as part:
        part.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def section(manifest: Manifest, certificate: Mapping[str, Any] | None = None) -> str:
    """The section as Markdown, with what the certificate claims where there is one."""
    told, data, model = manifest.results, manifest.data, manifest.model
    lines = [
        BEGIN,
        "## Safety of the fine-tuning",
        "",
        f"Fine-tuned with GradShield {manifest.versions.get('gradshield', '')}, defence {code(manifest.settings['defence'])}: "
        f"{told['removed']} of {told['rows']} rows removed, {told['trained']} trained on.",
        "",
        *_measured(told["before"], told["after"]),
        "",
        f"Data: {code(data['name'])}, SHA-256 {code(data['sha256'])}. Start: {code(model['name'])}, SHA-256 "
        f"{code(model['sha256'])}. Seed {manifest.settings['seed']}. Everything else is in `manifest.json`"
        + (", the rows that went are in `scan/`." if told["cuts"] else "."),
    ]
    if told["uncertified"] and certificate is None:
        lines += ["", f"**Nothing is certified**: {plain(told['uncertified'])}."]
    if told["verified"] is not None:
        lines += ["", f"Verified threshold: {plain(told['verified']['sentence'])}."]
    if certificate is not None:
        lines += ["", *_certified(certificate)]
    return "\n".join([*lines, END])


def _certified(certificate: Mapping[str, Any]) -> list[str]:
    """What is claimed, judge by judge. The hash ties the card to one certificate."""
    told = certificate["predicate"]
    claim = told["claim"]
    verdict = (
        f"**Certified**: by every judge the attack success rate is at most {_share(claim['limit'])}."
        if told["certified"]
        else f"**Not certified**: {plain(told['reason'])}."
    )
    looks = f"{claim['looks']} look{'' if claim['looks'] == 1 else 's'}"
    lines = ["### Safety certificate", "", verdict, ""]
    if told["judges"]:
        asked = told["requests"]
        lines += [
            f"Exact upper bounds that hold together with {_share(claim['confidence'])} confidence, over {looks} at "
            f"{asked['n']} requests (SHA-256 {code(asked['sha256'])}):",
            "",
            "| judge | called unsafe | attack success at most | the judge's own error |",
            "|---|---|---|---|",
            *(f"| {plain(name)} | {_bounded(one)} |" for name, one in told["judges"].items()),
            "",
        ]
        if told["calibration"] is None:
            lines += ["No judge was calibrated on this model: the bounds are of what the judges call unsafe.", ""]
        else:
            own = told["calibration"]
            lines += [
                f"Judges were calibrated on {own['n']} labelled answers, {own['of_this_run']} of them given in this run.",
                "",
            ]
    if lost := told["lost"]:
        lines += [
            f"Harmless rows removed: {lost['k']} of {lost['n']}, at most {percent(lost['upper'])} of such rows with "
            f"{_share(claim['confidence'])} confidence.",
            "",
        ]
    digest = hashlib.sha256(text(certificate).encode()).hexdigest()
    return [*lines, f"`{CERTIFICATE}`, SHA-256 {code(digest)}; `gradshield certify --check` computes it again."]


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


def _measured(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    rows = _rates(before, after)
    if not rows:
        return ["Nothing was measured: nothing is known of this model's safety."]
    return ["| measured on held-out prompts | before | after |", "|---|---|---|", *rows]


def _rates(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names: list[tuple[str, tuple[str, ...]]] = [(f"ASR, {judge}", ("judges", judge)) for judge in after["judges"]]
    names += [("over-refusal", ("over_refusal",)), ("utility", ("utility",))]
    rows = []
    for label, keys in names:
        cells = [_cell(before, keys), _cell(after, keys)]
        if any(cells):
            rows.append(f"| {plain(label)} | {cells[0] or '–'} | {cells[1] or '–'} |")
    return rows


def _cell(figures: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    value: Any = figures
    for key in keys:
        value = value.get(key) if value is not None else None
    if value is None:
        return ""
    return str(Rate.of(value))
