"""The verified threshold, wired: every round trains on what a cut keeps and measures it on prompts that nothing else sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gradshield.errors import UsageError
from gradshield.pipeline.course import Chosen, Course
from gradshield.pipeline.decide import ROWS
from gradshield.pipeline.defences import Defence
from gradshield.pipeline.exam import Exam
from gradshield.thresholds.verified import Round, Trial, Verdict, Verified, decided
from gradshield.types import EvalResult

Settled = Callable[[EvalResult, int], bool]
Examine = Callable[[Chosen, Settled], EvalResult]


def settled_by(rule: Verified) -> Settled:
    """Whether some judge has seen enough harm that the model is too unsafe whatever the remaining answers are."""

    def settled(found: EvalResult, total: int) -> bool:
        rates = [rate for name, rate in found.rates.items() if name.startswith("asr/")]
        return any(decided(rate.k, rate.n, total, rule.asr) is False for rate in rates)

    return settled


def search(
    course: Course,
    defence: Defence,
    examine: Examine,
    exam: Exam,
    after: Callable[[Sequence[Round], int], None] | None = None,
) -> tuple[Verdict, Chosen]:
    """Search the cut of a defence's scores, beginning with the default one; the verdict, and the rows of its best round.

    ``examine`` fine-tunes on the chosen rows and measures the model on ``exam``, the search prompts. The target of utility is
    the user's, else the lower bound of what the rows without any filter give on the same held-out task: fine-tunes of the
    same rows differ by as much. Raises UsageError where the exam cannot decide anything.
    """
    rule = defence.verified
    assert rule is not None
    check(exam, rule)
    target = rule.utility
    if target is None:
        whole = Chosen(tuple(course.job.rows.rendered), np.zeros(len(course.job.rows.rendered), dtype=bool), {})
        # The rule takes its tolerance off the target; the bound has its slack already.
        target = examine(whole, lambda found, total: False).rates["utility"].low + rule.tolerance
    scored, decision = course.decision(defence)
    start = decision.cuts[ROWS].value

    def trial(cut: float) -> Trial:
        found = examine(course.chosen(defence, cut), settled_by(rule))
        rates = {name.partition("/")[2]: rate for name, rate in found.rates.items() if name.startswith("asr/")}
        asked = next(iter(rates.values())).n
        return Trial(rates, found.rates.get("utility"), stopped_early=asked < len(exam.requests))

    verdict = rule.search(scored.scores.values, start, trial, target, after=after)
    return verdict, course.chosen(defence, verdict.kept.cut)


def check(exam: Exam, rule: Verified) -> None:
    """Raises UsageError where an exam cannot decide anything."""
    if not exam.task:
        raise UsageError(
            "the verified threshold measures utility after every round, and there are no task rows: give --utility FILE"
        )
    if decided(0, 0, len(exam.requests), rule.asr) is False:
        raise UsageError(
            f"the verified threshold cannot show an ASR below {100 * rule.asr:g} % with {len(exam.requests)} search "
            "requests, even without a single success: give more requests, or a higher target"
        )
