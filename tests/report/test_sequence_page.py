"""The page of training in turn: every stage, every task, and measures next to their stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradshield.report import sheet
from gradshield.training import page_sequence
from tests.report.pages import EVIL, assert_tame, rate, shown, specs


def stage(name: str, k: int, first: int, second: int, visage: float | None) -> dict[str, Any]:
    asr = {"refusal-phrases": rate(k, 200), "lab-classifier": rate(k // 2, 200)}
    return {
        "name": name,
        "asr": asr,
        "utility": {"news": rate(first, 100), "sums": rate(second, 100)},
        "visage": visage,
    }


def run(last: int = 4, **more: Any) -> dict[str, Any]:
    return {
        "tasks": ["news", "sums"],
        "stages": [stage("start", 0, 10, 5, 0.8), stage("news", 2, 90, 6, 0.7), stage("sums", last, 70, 60, 0.4)],
        "measures": {
            "accuracy_so_far": [0.9, 0.65], "backward_transfer": [None, -0.2], "forgetting": [None, 0.2],
            "basin_retention": [0.875, 0.5],
        },
        "command": "gradshield train a b", "versions": {"gradshield": "1"},
    } | more  # fmt: skip


@pytest.mark.parametrize(("last", "tone"), [(4, "pass"), (12, "pass"), (13, "fail"), (90, "fail")])
def test_the_end_decides(last: int, tone: str) -> None:
    whole = run(last)
    whole["stages"][-1]["utility"]["news"] = rate(88, 100)
    whole["measures"]["forgetting"] = [None, 0.02]
    assert page_sequence.page(whole).tone == tone


def test_what_was_forgotten_is_no_pass_and_is_named() -> None:
    found = page_sequence.page(run())
    assert found.tone == "warn"
    assert "utility does not last" in found.standing
    assert found.facts[0].startswith("Forgetting is 0.200")
    assert found.facts[1].replace("\u00a0", " ") == "Utility on news fell from 90.0 % to 70.0 %."
    assert page_sequence.page(run(measures={})).tone == "warn"  # the stages say it too


def test_a_sequence_that_learned_nothing_is_no_pass() -> None:
    whole = run(measures={})
    whole["stages"] = [stage(name, 0, 1, 2, None) for name in ("start", "news", "sums")]
    found = page_sequence.page(whole)
    assert found.tone == "warn"
    assert "No task is learned at the end" in found.facts[0]


def test_no_worse_than_a_bad_start_is_a_warning() -> None:
    whole = run(20)
    whole["stages"][0] = stage("start", 20, 10, 5, 0.8)
    assert page_sequence.page(whole).tone == "warn"


def test_measures_are_next_to_their_stage() -> None:
    lines = [line for line in page_sequence.markdown(run()).splitlines() if line.startswith("| ")]
    start, news, sums = (
        next(line for line in lines if line.startswith(f"| {name} |")) for name in ("start", "news", "sums")
    )
    assert start.endswith("| 0.8 | – | – | – | – |")
    assert news.endswith("| 0.7 | 0.900 | – | – | 0.875 |")
    assert sums.endswith("| 0.4 | 0.650 | −0.200 | 0.200 | 0.500 |")
    assert "70.0 % [60.4, 78.1] n=100" in sums


def test_the_charts_hold_every_stage() -> None:
    page = sheet.render(page_sequence.page(run()))
    found = specs(page)
    assert set(found) == {"safety", "tasks", "basin"}
    tasks = {trace["name"]: trace["y"] for trace in found["tasks"]["data"] if trace.get("name")}
    assert tasks == {"news": [10.0, 90.0, 70.0], "sums": [5.0, 6.0, 60.0]}
    assert found["basin"]["data"][0]["y"] == [0.8, 0.7, 0.4]
    band = found["safety"]["data"][0]
    assert len(band["x"]) == 6  # up along the upper bounds and back along the lower
    assert "VISAGE: 0.8 at the start; 0.4 at the end." in shown(page)


def test_a_gap_in_the_figures_is_a_gap() -> None:
    whole = run()
    whole["stages"][1] |= {"asr": {}, "utility": {"news": None}, "visage": None}
    found = specs(sheet.render(page_sequence.page(whole)))
    safety = next(trace for trace in found["safety"]["data"] if trace.get("name") == "refusal-phrases")
    assert safety["y"] == [0.0, None, 2.0]
    assert found["basin"]["data"][0]["y"] == [0.8, None, 0.4]


def test_hostile_names_are_only_text() -> None:
    bad = {"name": EVIL, "asr": {EVIL: rate(1, 9)}, "utility": {EVIL: rate(2, 9)}, "visage": 0.3}
    whole = {
        "tasks": [EVIL],
        "stages": [bad, bad],
        "measures": {EVIL: [0.5]},
        "command": EVIL,
        "versions": {EVIL: EVIL},
    }
    assert_tame(sheet.render(page_sequence.page(whole)))
    assert "<script" not in page_sequence.markdown(whole).split("Command:")[0]


@pytest.mark.parametrize(
    "whole",
    [{}, {"tasks": ["a"], "stages": [{"name": "start", "asr": {}, "utility": {}, "visage": None}], "measures": {}}],
)
def test_missing_figures_are_no_error(whole: dict[str, Any], tmp_path: Path) -> None:
    assert_tame(page_sequence.write(whole, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page_sequence.markdown(whole)


def test_settings_and_model_are_shown_if_given() -> None:
    text = shown(
        sheet.render(page_sequence.page(run(settings={"training": {"max_steps": 3}}, model={"name": "some/model"})))
    )
    assert "Model some/model" in text
    assert "Training max steps 3" in text
