"""The result tables of README.md and docs/results.md are those that the figures in ``docs/`` give."""

from __future__ import annotations

import pytest

from benchmarks import readme_tables
from gradshield.stats import wilson


@pytest.mark.parametrize(
    ("document", "head"), [("README.md", "| SmolLM2"), ("docs/results.md", "| defence | cells at")]
)
def test_documents_say_what_the_figures_say(document: str, head: str) -> None:
    text = (readme_tables.ROOT / document).read_text(encoding="utf-8")
    assert readme_tables.placed(document, text) == text, "run python -m benchmarks.readme_tables --write"
    line = next(line for line in text.splitlines() if line.startswith(head))
    assert readme_tables.placed(document, text.replace(line, f"{line} once |")) == text


def test_an_entry_has_its_range_and_the_interval_of_its_worst_run() -> None:
    runs = [wilson(k, 40) for k in (40, 36, 38)] + [None]
    assert readme_tables._worst(runs, least=True) == "90.0–100 % [76.9, 96.0] n=40"
    assert readme_tables._worst(runs) == "90.0–100 % [91.2, 100] n=40"
    assert readme_tables._worst([None]) == "–"
