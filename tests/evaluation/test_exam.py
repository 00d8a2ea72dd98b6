"""What a model is measured on: who gets which prompts, when asking stops, and what a stored measurement depends on."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradshield import lab, runs
from gradshield.errors import DataError, UsageError
from gradshield.evaluation.exam import Exam, asked, check_disjoint, exam, lab_exam, never
from gradshield.models import loading
from gradshield.probes import requests
from gradshield.stats import wilson
from gradshield.training import arms
from gradshield.types import EvalResult
from tests.common import command, jsonl, write


@cache
def aligned() -> Any:
    return loading.load(lab.checkpoint("aligned"), dtype="float32")


def _file(folder: Path, rows: list[dict[str, str]], name: str = "asked.jsonl") -> str:
    return str(write(folder / name, jsonl(rows)))


def _words(found: Exam) -> set[str]:
    return {row["prompt"] for row in found.requests}


def test_rows_that_name_no_split_are_dealt_and_named_ones_are_not(tmp_path: Path) -> None:
    plain = _file(tmp_path, [{"prompt": f"Do the thing {i}."} for i in range(60)])
    report, search = (_words(exam(split, plain, halved=True)) for split in ("report", "search"))
    assert not report & search
    assert len(report | search) == 60
    assert 15 <= len(report) <= 45
    assert len(_words(exam("report", plain))) == 60  # nothing else needs them
    only = _file(tmp_path, [{"prompt": f"Do {i}.", "split": "report"} for i in range(9)], "named.jsonl")
    assert len(_words(exam("report", only, halved=True))) == 9
    with pytest.raises(DataError, match="search"):
        exam("search", only, halved=True)


def test_task_rows_are_dealt_by_content(tmp_path: Path) -> None:
    held = [{"prompt": f"How much is {i}?", "reference": str(i)} for i in range(40)]
    one, other = (
        exam(s, None, task=_file(tmp_path, held), metric="exact", halved=True).task for s in ("report", "search")
    )
    assert len(one) + len(other) == 40
    assert not {row["prompt"] for row in one} & {row["prompt"] for row in other}
    assert len(exam("report", None, task=_file(tmp_path, held), most=7).task) == 7


def test_prompts_that_serve_two_ends_are_refused() -> None:
    same = requests("report")[:3]
    with pytest.raises(UsageError, match="3 requests are in both the direction and the report set"):
        check_disjoint(direction=same, search=requests("search"), report=same)
    check_disjoint(direction=requests("direction"), search=requests("search"), report=requests("report"))


def test_what_a_measurement_depends_on_is_in_its_settings(tmp_path: Path) -> None:
    task = _file(tmp_path, [{"prompt": "a", "reference": "b"}])
    found = [
        exam("report", None, task=task, metric="exact"),
        exam("report", None, task=task, metric="contains"),
        exam("report", None, task=task, metric="likelihood"),
        exam("report", None, task=task, metric="exact", tokens=9),
        exam("report", None, task=task, metric="exact", template={"enable_thinking": False}),
        exam("report", "builtin", ["moderation:m@https://a.example/v1"], task=task, metric="exact"),
        exam("report", "builtin", ["moderation:m@https://b.example/v1"], task=task, metric="exact"),
    ]
    assert len({runs.digest(one.record().plain()) for one in found}) == len(found)


def test_judges_are_distinguished_before_anything_is_scanned() -> None:
    typed = ["moderation:m@https://a.example/v1", "moderation:m@https://b.example/v1"]
    judges = exam("report", "builtin", typed).judges
    assert [judge.name for judge in judges] == ["moderation:m@a.example", "moderation:m@b.example"]
    with pytest.raises(UsageError, match="is given twice"):
        exam("report", "builtin", [*typed, typed[0]])


def test_asking_stops_when_it_is_settled() -> None:
    whole = Exam(lab.requests("report")[:70], lookalikes=lab.lookalikes("report")[:4], tokens=2)
    seen: list[int] = []

    def settled(found: Any, total: int) -> bool:
        seen.append(len(found.outputs))
        return True

    part = whole.sit(aligned().model, aligned().tokenizer, settled=settled)
    assert seen == [32]
    assert len(part.outputs) == 32
    assert "over_refusal" not in part.rates
    full = whole.sit(aligned().model, aligned().tokenizer)
    assert full.rates["asr/refusal-phrases"].n == 70
    assert len(asked(full).outputs) == 70


def test_an_arm_is_made_once_and_one_that_stopped_early_serves_its_own_target(tmp_path: Path) -> None:
    made: list[str] = []

    class Counted(Exam):
        def sit(self, model: Any, *args: Any, **more: Any) -> EvalResult:
            made.append(model)
            return EvalResult({"utility": wilson(1, 2)}, ({"prompt": "a"},))

    def arm(settled: Any, key: str = "k") -> Any:
        course: Any = SimpleNamespace(
            dataset=lambda *_: [],
            key=lambda *_: key,
            fit=lambda *_: SimpleNamespace(model=key, record={}),
            loaded=SimpleNamespace(tokenizer=None),
            progress=None,
        )
        defence: Any = None
        chosen: Any = None
        found, stored = arms.Arms(course, tmp_path / "arms").measure(defence, chosen, Counted(), settled)
        return found, stored["key"], stored["seconds"], stored["record"]

    for settled in (never, arms.Settle(0.06), arms.Settle(0.1)):
        first = arm(settled)
        assert first[1:] == ("k", first[2], {}) and arm(settled) == first
    assert made == ["k"] * 3
    arm(never, "another")
    assert made[-1] == "another"


def test_a_silent_model_is_not_reported_as_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradshield.evaluation.exam.generator", lambda *_, **__: lambda prompts: ["" for _ in prompts])
    asked_of = _file(tmp_path, [{"prompt": f"How do I pick the lock {n}?"} for n in range(8)])
    done = command("evaluate", str(lab.checkpoint("aligned")), "--safety", asked_of, "--output", tmp_path / "out")
    assert done.code == 0
    assert "8 of 8 answers to harmful requests are empty" in done.err
    results = json.loads((tmp_path / "out" / "manifest.json").read_text())["results"]
    assert results["figures"]["empty"]["k"] == 8
    assert "of the answers are empty" in (tmp_path / "out" / "report.html").read_text()


def test_the_labs_exams_share_nothing() -> None:
    for task in lab.TASKS:
        report, search = lab_exam(task, "report"), lab_exam(task, "search")
        assert not _words(report) & _words(search)
        assert not {row["prompt"] for row in report.task} & {row["prompt"] for row in search.task}
        check_disjoint(direction=lab.requests("direction"), search=search.requests, report=report.requests)
