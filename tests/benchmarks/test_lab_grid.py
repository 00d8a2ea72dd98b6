"""The lab's grid takes over what it finds only where it was measured in the same way."""

from __future__ import annotations

import pytest

from benchmarks import lab_grid
from gradshield import runs
from gradshield.evaluation import exam


def _names() -> set[str]:
    return {lab_grid._name(cell) for cell in lab_grid.cells(quick=True)}


def test_what_other_versions_or_another_exam_gave_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = _names()
    assert now == _names() and len(now) == 9
    monkeypatch.setattr(exam, "LAB_TOKENS", exam.LAB_TOKENS + 1)
    other = _names()
    monkeypatch.setattr(runs, "versions", lambda: {"gradshield": "0"})
    assert len(now | other | _names()) == 27
    old = [{name: value for name, value in cell.items() if name != "setting"} for cell in lab_grid.cells(quick=True)]
    assert not {lab_grid._name(cell) for cell in old} & _names()  # written before cells said so
