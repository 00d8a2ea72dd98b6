"""Removed rows as findings of a code review: SARIF 2.1.0, and the workflow commands of GitHub Actions.

Names of files and kinds of harm come from the user and are escaped; a row's own text is in neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gradshield.report.text import one_line, visible
from gradshield.scanning.decide import Selection

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
MOST = 5000  # results: GitHub shows no more of a run
ANNOTATED = 10  # annotations of a step: GitHub shows no more
NAMED = 60  # characters of a kind of harm
UNKNOWN = "removed"  # the rule of rows whose kind was not named


def sarif(selection: Selection, closed: bool) -> dict[str, Any]:
    """The removed rows as a SARIF log, highest scores first; errors where the gate is ``closed``, else warnings.

    A result has a rule (the kind of harm), a level, a place, the score and the row's id, which `--allow` takes.
    """
    manifest, order = selection.manifest, _order(selection)
    shown = order[:MOST]
    rules = sorted({_rule(selection, i) for i in shown})
    driver = {
        "name": "GradShield",
        "version": manifest.versions.get("gradshield", ""),
        "rules": [{"id": rule, "shortDescription": {"text": _described(rule)}} for rule in rules],
    }
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": [_result(selection, i, rules, "error" if closed else "warning") for i in shown],
        "properties": {"rows": manifest.results.scored, "removed": len(order), "certified": selection.certified},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def workflow_commands(selection: Selection, closed: bool) -> Iterator[str]:
    """The removed rows as annotations of GitHub Actions, a line each: at most ANNOTATED, the highest scores first."""
    order = _order(selection)
    for i in order[:ANNOTATED]:
        where = (
            f"file={_property(visible(selection.files[i]))},line={selection.lines[i]}," if selection.files[i] else ""
        )
        title = _property(_described(_rule(selection, i)))
        yield f"::{'error' if closed else 'warning'} {where}title={title}::{_data(_message(selection, i))}"
    if len(order) > ANNOTATED:
        yield f"::notice::{len(order) - ANNOTATED} more rows were removed: see the report"


def _order(selection: Selection) -> list[int]:
    """Indices of the removed rows, the highest score first."""
    removed = np.flatnonzero(selection.removed)
    found: list[int] = removed[np.argsort(-selection.scores.values[removed], kind="stable")].tolist()
    return found


def _result(selection: Selection, i: int, rules: list[str], level: str) -> dict[str, Any]:
    scores, rule = selection.scores, _rule(selection, i)
    score = float(scores.values[i])
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "level": level,
        "message": {"text": _message(selection, i)},
        "locations": [_location(selection, i)],
        "partialFingerprints": {"gradshieldRow/v1": scores.ids[i]},
        "properties": {"score": score if np.isfinite(score) else None, "row": int(scores.rows[i])},
    }


def _location(selection: Selection, i: int) -> dict[str, Any]:
    data, file = selection.manifest.data, selection.files[i]
    if not file:
        return {
            "logicalLocations": [
                {"fullyQualifiedName": f"{visible(one_line(data.name, 200))}: row {selection.lines[i]}"}
            ]
        }
    path = Path(file)
    place: dict[str, Any] = {
        "artifactLocation": {"uri": path.as_uri() if path.is_absolute() else quote(os.fsencode(path.as_posix()))}
    }
    if not path.is_absolute():
        place["artifactLocation"]["uriBaseId"] = "%SRCROOT%"
    if data.kind != "parquet":
        place["region"] = {"startLine": int(selection.lines[i])}
    return {"physicalLocation": place}


def _rule(selection: Selection, i: int) -> str:
    return visible(one_line(selection.categories[i], NAMED)) or UNKNOWN


def _described(rule: str) -> str:
    kind = "" if rule == UNKNOWN else f" ({rule})"
    return f"A row that would make the model less safe{kind}"


def _message(selection: Selection, i: int) -> str:
    scores = selection.scores
    cut = selection.cuts[scores.shapes[i]].value
    return (
        f"Row {scores.rows[i]} would make the model less safe: it scores {scores.values[i]:.4g}, and the cut is {cut:.4g}. If a "
        f"person has cleared it, put its id {scores.ids[i]} on the allow list."
    )


def _data(text: str) -> str:
    """Text after the ``::`` of a workflow command: what would end the line is escaped as GitHub asks."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """A property's value, in which ``:`` and ``,`` have a meaning too."""
    return _data(text).replace(":", "%3A").replace(",", "%2C")
