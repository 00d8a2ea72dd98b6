"""The models that a course trains and what is measured of each, and the search of the verified threshold among them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradshield import runs
from gradshield.errors import UsageError
from gradshield.evaluation.exam import Exam, Settled, never, rates_by_judge
from gradshield.manifests import Round, Search
from gradshield.thresholds.verified import Trial, Verified, futile
from gradshield.training.course import Chosen, Course, Fitted
from gradshield.training.defences import Defence
from gradshield.types import EvalResult


class Arms:
    """Trained models by the key of their training: equal ones are trained once, and their figures are files in ``folder``.

    Of the models, only the last and the best of a search stay in memory.
    """

    def __init__(self, course: Course, folder: Path, merge: bool = True) -> None:
        self.course, self.folder, self.merge = course, folder, merge
        self.models: dict[str, tuple[Fitted, float]] = {}  # with the seconds of the training
        self._best = ""

    def measure(
        self, defence: Defence, chosen: Chosen, exam: Exam, settled: Settled = never, stage: str = "training"
    ) -> tuple[EvalResult, Mapping[str, Any]]:
        """The result of a trained model on an exam, and its stored record: the ``key``, the training's ``record``, and the
        ``seconds`` that both took, whichever run spent them.

        The file's name covers all that its figures depend on. A measurement that may stop early is stored under its target.
        """
        dataset = self.course.dataset(defence, chosen)
        key = self.course.key(defence, dataset)
        early = f"-asr{settled.asr:g}" if isinstance(settled, Settle) else ""
        path = self.folder / f"{key}-{runs.digest(exam.record().plain())[:12]}{early}.json"
        if (known := _stored(path, key)) is not None:
            return known
        if key not in self.models:
            self._forget()
            began = time.monotonic()
            fitted = self.course.fit(defence, dataset, stage, self.merge)
            self.models[key] = fitted, time.monotonic() - began
        fitted, trained = self.models[key]
        began = time.monotonic()
        tokenizer = self.course.loaded.tokenizer
        found = exam.sit(fitted.model, tokenizer, f"measuring {stage}", self.course.progress, settled)
        seconds = round(trained + time.monotonic() - began, 3)
        arm = {"key": key, "seconds": seconds, "record": dict(fitted.record)}
        self.folder.mkdir(exist_ok=True)
        runs.write_json(path, arm | runs.finite(found))
        return found, arm

    def _forget(self) -> None:
        self.models = {key: kept for key, kept in self.models.items() if key == self._best}

    def search(self, defence: Defence, exam: Exam) -> tuple[Search, Chosen]:
        """Search the cut of a defence's scores, starting with the default cut; the verdict, and the rows of its best round.

        Each round trains on the rows below a cut and is measured on ``exam``, the search prompts. The target of utility is the
        user's. Without one, it is the lower bound of the utility after removing as many random rows as the default cut
        removes: a filter is compared at an equal number of rows, since fewer rows mean fewer steps, and the bound allows for
        the spread between equivalent fine-tunes. Raises UsageError if the exam cannot decide anything.
        """
        rule = defence.verified
        assert rule is not None
        check(exam, rule)
        scored, decision = self.course.decision(defence)
        (start,) = (cut.value for cut in decision.cuts.values())  # pairs train apart from other rows
        keys: list[str] = []
        count = 0

        def examined(chosen: Chosen, settled: Settled) -> tuple[EvalResult, Mapping[str, Any]]:
            nonlocal count
            count += 1
            return self.measure(defence, chosen, exam, settled, f"round {count}")

        def trial(cut: float) -> Trial:
            found, arm = examined(self.course.chosen(defence, cut), Settle(rule.asr))
            keys.append(arm["key"])
            rates = rates_by_judge(found.rates)
            asked = next(iter(rates.values())).n
            early = asked < len(exam.requests)
            return Trial(rates, found.rates.get("utility"), float(arm["seconds"]), stopped_early=early)

        def after(_done: Sequence[Round], best: int) -> None:
            self._best = keys[best]

        target = rule.utility
        if target is None:
            # The rule subtracts its tolerance from the target, and the bound already includes slack.
            drawn = self.course.drawn(int(decision.removed.sum()))
            target = examined(drawn, never)[0].rates["utility"].low + rule.tolerance
        verdict = rule.search(scored.scores.values, start, trial, target, after=after)
        self._forget()
        return verdict, self.course.chosen(defence, verdict.kept.cut)


@dataclass(frozen=True)
class Settle:
    """Whether the ASR by some judge exceeds ``asr`` whatever the remaining answers are."""

    asr: float

    def __call__(self, found: EvalResult, total: int) -> bool:
        return any(futile(rate.k, total, self.asr) for rate in rates_by_judge(found.rates).values())


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


def _stored(path: Path, key: str) -> tuple[EvalResult, Mapping[str, Any]] | None:
    """A finished measurement; None if it is missing or damaged."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, whole = runs.measured(stored), stored["key"] == key and math.isfinite(stored["seconds"])
        dict(stored["record"])
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return (found, stored) if whole and found.rates and found.outputs else None
