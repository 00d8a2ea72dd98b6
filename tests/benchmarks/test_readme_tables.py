"""The README's tables of the lab are those that the figures in ``docs/`` give."""

from __future__ import annotations

from benchmarks import readme_tables
from gradshield.intervals import wilson


def test_the_readme_says_what_the_figures_say() -> None:
    text = (readme_tables.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_tables.placed(text) == text, "python -m benchmarks.readme_tables --write puts the figures in"
    head = "| defence | cells at 6 % or below"
    assert readme_tables.placed(text.replace(f"{head}", f"{head}, once")) == text


def test_an_entry_has_its_range_and_the_interval_of_its_worst_run() -> None:
    runs = [wilson(k, 40).as_dict() for k in (40, 36, 38)] + [None]
    assert readme_tables._worst(runs, least=True) == "90.0–100 % [76.9, 96.0] n=40"
    assert readme_tables._worst(runs) == "90.0–100 % [91.2, 100] n=40"
    assert readme_tables._worst([None]) == "–"
