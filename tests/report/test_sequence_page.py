"""The page of training in turn: every stage, every task, and measures next to their stage."""

from __future__ import annotations

from typing import Any

import pytest

from gradshield.manifests import SequenceRecord, StageRecord
from gradshield.report import sheet
from gradshield.stats import wilson
from gradshield.training.page import sequence_page
from tests.report.pages import EVIL, MODEL, SETTINGS, assert_tame, shown, specs

MEASURES = {
    "accuracy_so_far": [0.9, 0.65],
    "backward_transfer": [None, -0.2],
    "forgetting": [None, 0.2],
    "basin_retention": [0.875, 0.5],
}


def stage(name: str, k: int, first: int, second: int, visage: float | None) -> StageRecord:
    asr = {"refusal-phrases": wilson(k, 200), "lab-classifier": wilson(k // 2, 200)}
    return StageRecord(
        name=name, asr=asr, utility={"news": wilson(first, 100), "sums": wilson(second, 100)}, visage=visage
    )


def run(*stages: StageRecord, measures: dict[str, list[float | None]] = MEASURES, **more: Any) -> sheet.Sheet:
    """The page of these stages, else of three whose last has lost some of the first task."""
    usual = (stage("start", 0, 10, 5, 0.8), stage("news", 2, 90, 6, 0.7), stage("sums", 4, 70, 60, 0.4))
    found = {
        "tasks": ["news", "sums"], "stages": stages or usual, "unmet": [], "measures": measures, "settings": SETTINGS,
        "model": MODEL, "command": "gradshield train a b", "versions": {"gradshield": "1"},
    }  # fmt: skip
    return sequence_page(SequenceRecord.model_validate(found | more))


@pytest.mark.parametrize(("last", "tone"), [(4, "pass"), (12, "pass"), (13, "fail"), (90, "fail")])
def test_the_end_decides(last: int, tone: str) -> None:
    stages = (stage("start", 0, 10, 5, 0.8), stage("news", 2, 90, 6, 0.7), stage("sums", last, 88, 60, 0.4))
    assert run(*stages, measures={"forgetting": [None, 0.02]}).tone == tone


def test_what_was_forgotten_is_no_pass_and_is_named() -> None:
    found = run()
    assert found.tone == "warn"
    assert "utility does not last" in found.standing
    assert found.facts[0].startswith("Forgetting is 0.200")
    assert found.facts[1].replace("\u00a0", " ") == "Utility on news fell from 90.0 % to 70.0 %."
    assert run(measures={}).tone == "warn"  # the stages say it too


def test_a_sequence_that_learned_nothing_is_no_pass() -> None:
    found = run(*(stage(name, 0, 1, 2, None) for name in ("start", "news", "sums")), measures={})
    assert found.tone == "warn"
    assert "No task is learned at the end" in found.facts[0]


def test_no_worse_than_a_bad_start_is_a_warning() -> None:
    stages = (stage("start", 20, 10, 5, 0.8), stage("news", 2, 90, 6, 0.7), stage("sums", 20, 70, 60, 0.4))
    assert run(*stages).tone == "warn"


def test_measures_are_next_to_their_stage() -> None:
    (table,) = next(s for s in run().sections if s.id == "measures").tables
    assert table.rows == (("news", "0.900", "–", "–", "0.875"), ("sums", "0.650", "−0.200", "0.200", "0.500"))


def test_the_charts_hold_every_stage() -> None:
    page = sheet.render(run())
    found = specs(page)
    assert set(found) == {"safety", "tasks", "basin"}
    tasks = {trace["name"]: trace["y"] for trace in found["tasks"]["data"] if trace.get("name")}
    assert tasks == {"news": [10.0, 90.0, 70.0], "sums": [5.0, 6.0, 60.0]}
    assert found["basin"]["data"][0]["y"] == [0.8, 0.7, 0.4]
    band = found["safety"]["data"][0]
    assert len(band["x"]) == 6  # up along the upper bounds and back along the lower
    text = shown(page)
    assert "VISAGE: 0.8 at the start; 0.4 at the end." in text
    assert "Model some/model" in text


def test_a_sequence_without_requests_has_its_tasks_only() -> None:
    bare = [stage(name, 0, 50, 50, None).model_copy(update={"asr": {}}) for name in ("start", "news", "sums")]
    found = run(*bare, measures={})
    assert (found.tone, found.standing) == ("warn", "Safety was not measured")
    page = sheet.render(found)
    assert_tame(page)
    assert set(specs(page)) == {"tasks"}


def test_hostile_names_are_only_text() -> None:
    bad = StageRecord(name=EVIL, asr={EVIL: wilson(1, 9)}, utility={EVIL: wilson(2, 9)}, visage=0.3)
    assert_tame(sheet.render(run(bad, bad, measures={EVIL: [0.5]}, tasks=[EVIL], command=EVIL, versions={EVIL: EVIL})))
