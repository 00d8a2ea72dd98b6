"""The page of an exam: its verdict against every case, the answers behind its figures, and hostile text."""

from __future__ import annotations

from typing import Any

import pytest

from gradshield.evaluation import page as examined
from gradshield.manifests import EvaluationManifest, EvaluationResults, Figures, JudgeAgreement
from gradshield.report import sheet
from gradshield.stats import wilson
from tests.report.pages import EVIL, EXAM, MODEL, assert_tame, shown


def answer(
    prompt: str, *unsafe: bool | None, category: str | None = "fraud", reply: str = "a placeholder"
) -> dict[str, Any]:
    verdicts = {f"judge-{i}": {"unsafe": found, "reason": f"reason {i}"} for i, found in enumerate(unsafe)}
    return {"prompt": prompt, "category": category, "answer": reply, "verdicts": verdicts}


def refused(prompt: str, unsafe: bool) -> dict[str, Any]:
    return {"prompt": prompt, "answer": "no", "verdicts": {"refusal-phrases": {"unsafe": unsafe, "reason": ""}}}


def page(
    figures: Figures,
    asked: list[Any] | None = None,
    lookalikes: list[Any] | None = None,
    task: list[Any] | None = None,
    agreement: list[JudgeAgreement] | None = None,
    **more: Any,
) -> sheet.Sheet:
    """The page of an exam with these answers; ``more`` are fields of its manifest."""
    parts = [asked or [], lookalikes or [], task or []]
    harness = more.pop("harness", {})
    found = {
        "command": "gradshield evaluate", "versions": {"gradshield": "1"}, "model": MODEL,
        "settings": EXAM.model_copy(update={"n": tuple(map(len, parts))}),
        "results": EvaluationResults(figures=figures, agreement=agreement or [], harness=harness),
    }  # fmt: skip
    return examined.page(EvaluationManifest.model_validate(found | more), [row for part in parts for row in part])


def exam(k: int = 0, n: int = 200, **more: Any) -> sheet.Sheet:
    figures = Figures(judges={"judge-0": wilson(k, n)}, over_refusal=wilson(3, 50), utility=wilson(40, 50))
    return page(**{"figures": figures, "asked": [answer(f"request {i}", i < k) for i in range(n)]} | more)


@pytest.mark.parametrize(
    ("k", "n", "tone"),
    [
        (0, 200, "pass"),  # 0 [0, 1.9]
        (2, 128, "pass"),  # the least that proves it: 1.6 [0.4, 5.5]
        (3, 128, "warn"),  # 2.3 [0.8, 6.7]
        (0, 30, "warn"),  # nothing complied, of too few
        (13, 200, "fail"),  # 6.5
    ],
)
def test_green_only_where_the_interval_is_under_the_mark(k: int, n: int, tone: str) -> None:
    assert exam(k, n).tone == tone


def test_without_a_request_safety_is_said_not_to_be_measured() -> None:
    found = page(Figures(judges={}, utility=wilson(4, 5)))
    assert (found.tone, found.standing) == ("warn", "Safety was not measured")


def test_an_undecided_judge_counts_against_the_model_and_is_reported() -> None:
    asked = [answer("first", None), answer("second", False)]
    figures = Figures(judges={"judge-0": wilson(1, 2)}, undecided={"judge-0": wilson(1, 2)})
    text = shown(sheet.render(page(figures, asked)))
    assert "could not decide on 1 of 2 answers; these count as unsafe" in text
    assert "judge-0: undecided" in text
    assert "first" in text
    assert "second" not in text  # it was safe: no answer of interest


@pytest.mark.parametrize(("empty", "tone"), [(0, "pass"), (200, "warn")])
def test_a_model_that_answers_nothing_is_not_called_safe(empty: int, tone: str) -> None:
    found = exam(figures=Figures(judges={"judge-0": wilson(0, 200)}, empty=wilson(empty, 200)))
    assert found.tone == tone
    assert ("of the answers are empty" in found.standing) == (tone == "warn")
    assert any("Empty answers" in fact for fact in found.facts)


def test_every_kind_of_request_has_its_own_rate() -> None:
    asked = [
        answer("a", True, category="fraud"),
        answer("b", False, category="fraud"),
        answer("c", False, category=None),
    ]
    (chart,) = next(s for s in exam(asked=asked).sections if s.id == "categories").charts
    (trace,) = chart.spec["data"]
    assert trace["y"] == [50.0, 0.0]  # the worst kind first
    assert chart.spec["layout"]["xaxis"]["ticktext"] == ["fraud", examined.UNSORTED]
    assert trace["error_y"]["array"][0] == pytest.approx(100 * wilson(1, 2).high - 50)


def test_the_answers_that_judges_differ_on_are_shown() -> None:
    asked = [answer("alike", True, True), answer("differs", True, False), answer("fine", False, False)]
    one = JudgeAgreement(judges=("judge-0", "judge-1"), n=3, kappa=0.4, low=0.1, high=0.7, differ=(1,))
    found = exam(asked=asked, agreement=[one])
    judges = next(s for s in found.sections if s.id == "judges")
    assert [line[0] for line in judges.tables[1].rows] == ["differs"]
    text = shown(sheet.render(found))
    assert "0.40" in text
    assert "0.10 to 0.70" in text


def test_refused_lookalikes_and_missed_task_rows_are_shown_and_bounded() -> None:
    task = [{"prompt": f"row {i}", "answer": "5", "reference": "4", "score": i / 100} for i in range(101)]
    found = exam(lookalikes=[refused("kind", False), refused("answered", True)], task=task)
    kept, missed = (next(s for s in found.sections if s.id == name).tables[0] for name in ("refused", "missed"))
    assert [line[0] for line in kept.rows] == ["kind"]
    assert missed.rows[0][0] == "row 0"
    assert len(missed.rows) == examined.SHOWN
    assert missed.hint == "40 more in outputs.jsonl."  # of 100 below full


def test_hostile_text_stays_text() -> None:
    turns = [{"role": EVIL, "content": EVIL}]
    one = JudgeAgreement(judges=(EVIL, EVIL), n=1, kappa=None, low=None, high=None, differ=(0,))
    said = {"verdicts": {EVIL: {"unsafe": True, "reason": EVIL}}}
    asked = [answer(EVIL, category=EVIL, reply=EVIL) | said, answer("x") | said | {"prompt": turns}]
    found = page(
        Figures(judges={EVIL: wilson(2, 2)}, undecided={EVIL: wilson(1, 2)}), asked, [refused(EVIL, False)],
        [{"prompt": turns, "reference": EVIL, "score": 0.0}], [one], harness={EVIL: wilson(1, 2)}, command=EVIL,
        versions={EVIL: EVIL}, model=MODEL.model_copy(update={"name": EVIL}),
    )  # fmt: skip
    assert_tame(sheet.render(found))
