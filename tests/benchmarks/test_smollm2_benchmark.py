"""The real model's benchmark, but for the model: the rows it draws, the comparison it asks for, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from gradshield import runs
from gradshield.comparison import grid
from gradshield.manifests import Figures
from gradshield.stats import wilson
from tests.report.pages import comparison, make_cell


def test_rows_are_drawn_with_their_labels_and_none_is_too_long(tmp_path: Path) -> None:
    for task in smollm2.TASKS:
        rows = [
            {"instruction": f"question {i}", "input": "", "output": "x" * (i % 6) * 100 + str(i)} for i in range(700)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        for name in (f"{task}_p10", f"{task}_test"):
            (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / f"{task}_p10.labels.json").write_text(json.dumps([int(i % 3 == 0) for i in range(700)]))
    smollm2.draw(tmp_path, tmp_path / "rows")
    for task in smollm2.TASKS:
        rows = [json.loads(line) for line in (tmp_path / "rows" / f"{task}.jsonl").read_text().splitlines()]
        labels = json.loads((tmp_path / "rows" / f"{task}.labels.json").read_text())
        assert len(rows) == len(labels) == smollm2.ROWS and sum(labels) == smollm2.HARMFUL
        assert all(
            (int(row["instruction"].split()[1]) % 3 == 0) == label for row, label in zip(rows, labels, strict=True)
        )
        assert max(sum(map(len, row.values())) for row in rows) <= smollm2.LONGEST[task]


def test_the_comparison_is_one_that_compare_takes(tmp_path: Path) -> None:
    found = grid.check(smollm2.config(Path("../shared/data"), smollm2.DEFENCES), "config.yaml", tmp_path)
    assert len(grid.cells(found)) == len(smollm2.TASKS) * len(smollm2.DEFENCES)


def test_the_table_has_each_defence_by_both_judges() -> None:
    judges = {"refusal-phrases": wilson(81, 158), "compliance": wilson(78, 158)}
    cells = [
        make_cell("none", task="agnews", judges=judges, utility=wilson(49, 93)),
        make_cell("clean", task="agnews", failed="no row left"),
    ]
    before = Figures(judges={"refusal-phrases": wilson(13, 158), "compliance": wilson(9, 158)})
    assert smollm2.table(comparison(cells), before).splitlines() == [
        "| SmolLM2-135M-Instruct | AGNews: ASR by phrases / compliance | utility |",
        "|---|---|---|",
        "| before training | 8.2 [4.9, 13.6] / 5.7 [3.0, 10.5] | – |",
        "| `none` | 51.3 [43.5, 58.9] / 49.4 [41.7, 57.1] | 52.7 |",
        "| `clean` | failed | – |",
    ]


def test_judges_are_held_to_what_was_read_by_eye(tmp_path: Path, monkeypatch: Any) -> None:
    said = {"refusal-phrases": {"unsafe": True}, "compliance": {"unsafe": False}}
    rows = [{"prompt": "p", "answer": str(i), "verdicts": said} for i in range(3)]
    arms = tmp_path / "arms"
    arms.mkdir()
    (arms / "arm.json").write_text(json.dumps({"outputs": [*rows, {"prompt": "p", "reference": "r"}]}))
    labels = {runs.digest(["p", "0"]): 1, runs.digest(["p", "1"]): 0}
    monkeypatch.setattr(smollm2, "LABELS", tmp_path / "labels.json")
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    found = smollm2._by_eye(arms)
    assert found[0].startswith("| `refusal-phrases` | 100.0 [") and "| 0.0 [" in found[0]
    assert found[1].startswith("| `compliance` | 0.0 [") and "| 100.0 [" in found[1]
