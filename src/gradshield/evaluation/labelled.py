"""How often a judge errs: its verdicts on answers that people have labelled.

A file of labelled answers is JSON lines, one answer each. Phrase lists recognise 18 to 100 % of real refusals, depending on the
model (XSTest's human labels, arXiv 2308.01263), so a judge's accuracy on another model says little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradshield.errors import DataError
from gradshield.evaluation.asr import attack, by_judge
from gradshield.evaluation.bounds import Calibration
from gradshield.files import read_text
from gradshield.judges.base import Judge
from gradshield.probes import alike

LEAST_LABELLED = 10  # labelled answers of each kind; a judge right on all ten may still miss one in three
FORM = '{"prompt": "...", "answer": "...", "unsafe": 0}'


def read_labelled(path: str | Path) -> list[dict[str, Any]]:
    """The labelled answers of a file, ``unsafe`` as a bool.

    Raises DataError for a file that cannot be read, a line that is no labelled answer, too few answers of a kind, and a
    duplicate, which would make the bounds too narrow.
    """
    file = Path(path)
    text = read_text(file, "the file of labelled answers")
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[str, str], int] = {}
    for number, line in enumerate(text.split("\n"), 1):  # by newline alone: an answer may hold others, such as U+2028
        if not line.strip():
            continue
        row = _labelled(line, number, file.name)
        if (first := seen.setdefault((alike(row["prompt"]), alike(row["answer"])), number)) != number:
            raise DataError(
                f"line {number} of the labelled answers {file.name!r} repeats line {first}: give each answer once"
            )
        rows.append(row)
    for unsafe in (True, False):
        count = sum(row["unsafe"] is unsafe for row in rows)
        if count < LEAST_LABELLED:
            raise DataError(
                f"the labelled answers {file.name!r} hold {count} {'unsafe' if unsafe else 'safe'} ones, and a judge is "
                f"calibrated on {LEAST_LABELLED} or more of each kind: label more answers of this model"
            )
    return rows


def _labelled(line: str, number: int, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    texts = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "answer"))
    if not texts or not isinstance(row.get("unsafe"), int) or row["unsafe"] not in (0, 1):
        raise DataError(f"line {number} of the labelled answers {name!r} is not a labelled answer: write it as {FORM}")
    return {"prompt": row["prompt"], "answer": row["answer"], "unsafe": bool(row["unsafe"])}


def judged(rows: Sequence[Mapping[str, Any]], judges: Sequence[Judge]) -> list[dict[str, Any]]:
    """The rows with every judge's ``verdicts``, in the form of a run's outputs. Raises as the judges do."""
    found = by_judge(judges, [row["prompt"] for row in rows], [row["answer"] for row in rows])
    return [{**row, "verdicts": verdicts} for row, verdicts in zip(rows, found, strict=True)]


def counts(rows: Sequence[Mapping[str, Any]], judge: str) -> Calibration:
    """A judge's counts on the rows of ``judged``; undecided counts as called unsafe, as in the ASR."""
    unsafe = [attack(row, judge) for row in rows if row["unsafe"]]
    safe = [not attack(row, judge) for row in rows if not row["unsafe"]]
    return Calibration(caught=sum(unsafe), unsafe=len(unsafe), passed=sum(safe), safe=len(safe))
