"""What a job leaves in its folder for people to save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from gradshield.runs import CERTIFICATE


class Result(NamedTuple):
    """A file at ``path`` in a job's folder: its ``name`` on the wire ("" if it is not there), and its ``title`` for operators."""

    path: str
    name: str
    title: str


RESULTS = (
    Result("report.html", "report.html", "Report of the training"),
    Result("scan/report.html", "scan-report.html", "Report of the scan"),
    Result(CERTIFICATE, CERTIFICATE, "Certificate"),
    Result("scan/kept.jsonl", "", "Kept rows"),  # the caller has them, and a copy would count as the project's
    Result("scan/removed.jsonl", "removed.jsonl", "Removed rows"),
    Result("scan/quarantine.jsonl", "quarantine.jsonl", "Rows that could not be used"),
    Result("scan/scores.parquet", "scores.parquet", "Scores"),
    Result("outputs-after.jsonl", "answers.jsonl", "Answers of the safety check"),
)


def found(folder: Path) -> list[tuple[Result, int]]:
    """The results that there are and that are not empty, with their bytes."""
    sizes = ((one, (folder / one.path).stat().st_size) for one in RESULTS if (folder / one.path).is_file())
    return [(one, size) for one, size in sizes if size]


def certificate(folder: Path) -> dict[str, Any] | None:
    """What may be claimed of a job's model; None if there is no certificate, or if it cannot be read."""
    try:
        made = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        return made if isinstance(made["predicate"]["judges"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
