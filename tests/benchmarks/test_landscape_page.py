"""The page of a safety landscape: where each line breaks, against a plain search, and gaps that do not pretend to be zero."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import landscape_page as landscape
from gradshield.report import sheet
from tests.report.pages import EVIL, assert_tame, rate, shown, specs

ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def line(*successes: int) -> dict[str, Any]:
    return {"asr/refusal-phrases": [rate(k, 100) for k in successes], "answered/x": [rate(90, 100)] * len(successes)}


def whole(**more: Any) -> dict[str, Any]:
    rates = {"alignment": line(90, 7, 0, 0, 10), "random-0": line(0, 0, 0, 0, 50), "random-1": line(8, 0, 0, 0, 0)}
    return {
        "alphas": ALPHAS,
        "unit": 17.5,
        "rates": rates,
        "visage": {"alignment": {"asr/refusal-phrases": 0.75}},
    } | more


steps = st.lists(st.integers(-8, 8), min_size=1, max_size=9, unique=True).map(sorted)


@settings(deadline=None)
@given(steps.flatmap(lambda a: st.tuples(st.just(a), st.lists(st.integers(0, 50), min_size=len(a), max_size=len(a)))))
def test_breaks_against_walking_outward(found: tuple[list[int], list[int]]) -> None:
    alphas, successes = found

    def walk(sign: int) -> float | None:
        for distance in range(9):
            at = sign * distance
            if at in alphas and successes[alphas.index(at)] / 50 > 0.06:
                return float(at)
        return None

    rates = [rate(k, 50) for k in successes]
    assert landscape.breaks([float(a) for a in alphas], rates) == (walk(-1), walk(1))


def test_the_direction_set_apart_is_told_beside_each_kind_of_other() -> None:
    found = landscape.page(whole())
    assert found.tone == "pass"
    assert "ASR of 0" in found.standing
    (fact,) = found.facts
    assert fact == (
        "ASR, refusal-phrases: alignment at −0.5 and +1; random (2 directions, at the earliest) at −1 and +1."
    )


def test_an_unsafe_model_is_no_pass() -> None:
    assert landscape.page(whole(rates={"alignment": line(0, 0, 40, 0, 0)})).tone == "fail"
    assert landscape.page(whole(alphas=[-1, -0.5, 0.1, 0.5, 1.0])).tone == "warn"


def test_each_measure_has_a_chart_with_every_line() -> None:
    page = sheet.render(landscape.page(whole()))
    found = specs(page)
    assert set(found) == {"line-0", "line-1"}
    lines = [trace for trace in found["line-0"]["data"] if trace["mode"] == "lines+markers"]
    assert [trace["name"] for trace in lines] == ["random", "random", "alignment"]
    assert [trace["showlegend"] for trace in lines] == [True, False, True]
    assert lines[-1]["y"] == pytest.approx([90.0, 7.0, 0.0, 0.0, 10.0])
    assert lines[-1]["line"]["width"] > lines[0]["line"]["width"]
    bands = [trace for trace in found["line-0"]["data"] if trace.get("fill")]
    assert len(bands) == 3
    assert max(bands[-1]["y"]) == pytest.approx(100 * rate(90, 100)["high"])
    text = shown(page)
    assert "0.750" in text
    assert "–" in text  # no VISAGE for the others


def test_another_direction_can_be_set_apart() -> None:
    found = landscape.page(whole(highlight="random-1"))
    assert found.facts[0].startswith("ASR, refusal-phrases: random-1 at −1; alignment")


def test_hostile_names_are_only_text() -> None:
    rates = {EVIL: {f"asr/{EVIL}": [rate(1, 9), None, {"rate": math.nan, "low": 0, "high": 1, "n": 4}]}}
    page = landscape.page({"alphas": [-1, 0, 1], "unit": 2.0, "rates": rates, "title": EVIL, "about": EVIL, "highlight": EVIL,
                           "command": EVIL, "versions": {EVIL: EVIL}, "visage": {EVIL: {f"asr/{EVIL}": None}}})  # fmt: skip
    assert_tame(sheet.render(page))


@pytest.mark.parametrize(
    "empty", [{}, {"alphas": [], "rates": {}}, {"alphas": [0.0], "unit": None, "rates": {"a": {}}}]
)
def test_missing_figures_are_no_error(empty: dict[str, Any], tmp_path: Path) -> None:
    assert_tame(landscape.write(empty, tmp_path / "landscape.html").read_text(encoding="utf-8"))
