"""The page of a training run: what it says first, the rounds of its search, and nothing of anyone else's that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gradshield.report import rounds, sheet
from tests.report.pages import EVIL, assert_tame, rate, shown, specs


def figures(k: int, k2: int, utility: int | None = 150) -> dict[str, Any]:
    found: dict[str, Any] = {"judges": {"refusal-phrases": rate(k, 200), "lab-classifier": rate(k2, 200)}}
    return found | {} if utility is None else found | {"utility": rate(utility, 200), "over_refusal": rate(4, 200)}


def verdict(met: bool = True) -> dict[str, Any]:
    done = [
        {"cut": 2.5, "removed": 60, "asr": {"a": rate(20, 96), "b": rate(30, 96)}, "utility": None, "seconds": 31.0,
         "verdict": "too unsafe", "stopped_early": True},
        {"cut": 1.5, "removed": 96, "asr": {"a": rate(3, 200), "b": rate(4, 200)}, "utility": rate(170, 200), "seconds": 40.0,
         "verdict": "passes" if met else "utility short", "stopped_early": False},
    ]  # fmt: skip
    sentence = "removing 96 of 1000 rows meets both targets" if met else "no cut meets both targets"
    return {"met": met, "sentence": sentence, "stopped": "passes", "best": 1, "rounds": done}


def run(**more: Any) -> dict[str, Any]:
    return {
        "title": "GradShield · rows.jsonl", "defence": "fihs:verified", "verdict": None, "before": figures(1, 0, 20),
        "after": figures(4, 3), "rows": 1000, "removed": 96, "dropped_tokens": 0, "record": {}, "command": "gradshield train",
        "versions": {"gradshield": "1"}, "files": {"scan report": "scan/report.html"},
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("more", "tone", "standing"),
    [
        ({}, "pass", "6 % or less by every judge"),
        ({"after": figures(4, 16)}, "fail", "less safe"),
        ({"before": figures(15, 15), "after": figures(16, 15)}, "warn", "above 6 %"),
        ({"before": figures(0, 0), "after": figures(12, 12)}, "warn", "rose"),
        ({"verdict": verdict()}, "pass", "6 % or less"),
        ({"verdict": verdict(False)}, "fail", "not met"),
        ({"before": {}, "after": {}}, "warn", "not measured"),
        ({"before": {"judges": {}}, "after": {"judges": {}, "utility": rate(3, 4)}}, "warn", "not measured"),
    ],
)
def test_the_sentence_comes_first(more: dict[str, Any], tone: str, standing: str) -> None:
    found = rounds.page(run(**more))
    assert found.tone == tone
    assert standing in found.standing


def test_every_judge_is_told_before_and_after_with_interval_and_count() -> None:
    text = shown(sheet.render(rounds.page(run(verdict=verdict()))))
    assert "ASR by refusal-phrases: 0.5 % [0.1, 2.8], n = 200 before; 2.0 % [0.8, 5.0], n = 200 after." in text
    assert "ASR by lab-classifier: 0.0 % [0.0, 1.9], n = 200 before; 1.5 % [0.5, 4.3], n = 200 after." in text
    assert "Utility: 10.0 %" in text
    assert "The search: removing 96 of 1000 rows meets both targets." in text
    assert "96 of 1,000 rows were taken out" in text
    assert "+65.0 points" in text


def test_the_chart_has_every_round_and_no_utility_where_none_was_measured() -> None:
    page = sheet.render(rounds.page(run(verdict=verdict())))
    traces = {trace["name"]: trace for trace in specs(page)["rounds"]["data"] if trace.get("name")}
    assert traces["ASR, b"]["y"] == pytest.approx([31.25, 2.0])
    assert traces["utility"]["y"] == [None, 85.0]
    assert traces["ASR, a"]["marker"]["symbol"] == ["x", "star"]
    text = shown(page)
    assert "passes, this model is kept" in text
    assert "stopped before every prompt was asked" in text


def test_links_stay_beside_the_page() -> None:
    files = {
        "scan": "scan/report.html",
        "a": "javascript:alert(1)",
        "b": "//127.0.0.1:9/x",
        "c": "/etc/hosts",
        "d": "data:text/html,x",
    }
    page = sheet.render(rounds.page(run(files=files)))
    assert_tame(page)
    assert 'href="scan/report.html"' in page
    assert 'href="javascript%3Aalert%281%29"' in page
    assert 'href="127.0.0.1%3A9/x"' in page


def test_hostile_text_is_only_text() -> None:
    one = verdict()
    one["sentence"] = EVIL
    one["rounds"][0] |= {"verdict": EVIL, "asr": {EVIL: rate(1, 96)}}
    whole = run(title=EVIL, defence=EVIL, verdict=one, record={EVIL: {EVIL: EVIL}}, command=EVIL, versions={EVIL: EVIL})
    whole |= {"after": {"judges": {EVIL: rate(1, 9)}}, "files": {EVIL: EVIL}}
    assert_tame(sheet.render(rounds.page(whole)))


@pytest.mark.parametrize("whole", [{}, {"verdict": {"met": True, "sentence": "", "rounds": []}}, {"record": {"x": {}}}])
def test_missing_figures_are_no_error(whole: dict[str, Any], tmp_path: Path) -> None:
    path = rounds.write(whole, tmp_path / "report.html")
    assert_tame(path.read_text(encoding="utf-8"))
