"""The verified threshold in training: every round trains on the rows below a cut and measures them on separate prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import runs
from gradshield.errors import UsageError
from gradshield.evaluation.exam import Exam, Settled, never, rates_by_judge
from gradshield.manifests import Round, Search
from gradshield.thresholds.verified import Trial, Verified, futile
from gradshield.training.course import Chosen, Course
from gradshield.training.defences import Defence
from gradshield.types import Bools, EvalResult

Examine = Callable[[Chosen, Settled], tuple[EvalResult, float]]
"""Fine-tunes on rows and measures; returns the result and the seconds it took."""


@dataclass(frozen=True)
class Settle:
    """Whether the ASR by some judge exceeds ``asr`` whatever the remaining answers are."""

    asr: float

    def __call__(self, found: EvalResult, total: int) -> bool:
        return any(futile(rate.k, total, self.asr) for rate in rates_by_judge(found.rates).values())


def arm(
    folder: Path, key: str, exam: Exam, settled: Settled, make: Callable[[], tuple[EvalResult, dict[str, Any]]]
) -> tuple[EvalResult, dict[str, Any]]:
    """The result of a model trained under ``key`` on an exam, and its stored record: from disk, else (missing or damaged) from
    ``make``, which also gives the ``seconds`` and the training's ``record``.

    The file's name covers everything that its figures depend on. A measurement that may stop early is stored under its target.
    """
    early = f"-asr{settled.asr:g}" if isinstance(settled, Settle) else ""
    path = folder / f"{key}-{runs.digest(exam.record().plain())[:12]}{early}.json"
    if (known := _stored(path, key)) is not None:
        return known
    measured, more = make()
    stored = {"key": key, **more, **runs.stored(measured)}
    runs.write_json(path, stored)
    return measured, stored


def _stored(path: Path, key: str) -> tuple[EvalResult, dict[str, Any]] | None:
    """A finished measurement; None if it is missing or damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, whole = runs.result(stored), stored["key"] == key and math.isfinite(stored["seconds"])
        dict(stored["record"])
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    return (found, stored) if whole and found.rates and found.outputs else None


def search(
    course: Course,
    defence: Defence,
    examine: Examine,
    exam: Exam,
    after: Callable[[Sequence[Round], int], None] | None = None,
) -> tuple[Search, Chosen]:
    """Search the cut of a defence's scores, starting with the default cut; the verdict, and the rows of its best round.

    ``examine`` fine-tunes on the chosen rows and measures the model on ``exam``, the search prompts. The target of utility is the
    user's. Without one, it is the lower bound of the utility after removing as many random rows as the default cut removes: a
    filter is compared at an equal number of rows, since fewer rows mean fewer steps, and the bound allows for the spread between
    equivalent fine-tunes. Raises UsageError if the exam cannot decide anything.
    """
    rule = defence.verified
    assert rule is not None
    check(exam, rule)
    scored, decision = course.decision(defence)
    (start,) = (cut.value for cut in decision.cuts.values())  # pairs train apart from other rows
    target = rule.utility
    if target is None:
        # The rule subtracts its tolerance from the target, and the bound already includes slack.
        target = examine(_drawn(course, decision.removed), never)[0].rates["utility"].low + rule.tolerance

    def trial(cut: float) -> Trial:
        found, seconds = examine(course.chosen(defence, cut), Settle(rule.asr))
        rates = rates_by_judge(found.rates)
        asked = next(iter(rates.values())).n
        return Trial(rates, found.rates.get("utility"), seconds, stopped_early=asked < len(exam.requests))

    verdict = rule.search(scored.scores.values, start, trial, target, after=after)
    return verdict, course.chosen(defence, verdict.kept.cut)


def _drawn(course: Course, removed: Bools) -> Chosen:
    """The rows minus as many as ``removed`` has, drawn at random by content and seed."""
    values = course.scored("random").scores.values
    out = np.zeros(len(values), dtype=bool)
    out[np.argsort(values, kind="stable")[len(values) - int(removed.sum()) :]] = True
    return Chosen(tuple(course.job.rows.rendered), out, {})


def check(exam: Exam, rule: Verified) -> None:
    """Raises UsageError if an exam cannot decide anything."""
    if not exam.task:
        raise UsageError(
            "the verified threshold measures utility after every round, and there are no task rows: give --utility FILE"
        )
    if futile(0, len(exam.requests), rule.asr):
        raise UsageError(
            f"the verified threshold cannot show an ASR below {100 * rule.asr:g} % with {len(exam.requests)} search "
            "requests, even without a single success: give more requests, or a higher target"
        )
