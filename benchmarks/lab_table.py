"""The lab grid as a table to read and a file for scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradshield.types import Rate

INTRODUCTION = """# The scan on the lab

`python -m benchmarks.lab_grid --output lab-grid/` makes this page and `lab_results.json`, which holds every cell with its
manifest. The bundled aligned model, the lab's own `direction` requests as probes, all defaults. *None* trains on every row,
*filtered* on what the scan keeps, *clean* on the harmless rows alone; the arms of a cell share recipe and order of rows, and
arms with the same rows are one run. ASR is by refusal phrases on 200 `report` requests that serve nothing else; the lab's
classifier judge is in the JSON, apart. Rates have their 95 % Wilson interval and n; the difference in utility is paired over the
200 test rows, in points. At 100 % harm there is nothing left to train on.

"""
HEAD = (
    "| task | harm | seed | caught | lost | ASR none | ASR filtered | ASR clean | utility filtered − clean | AUROC FIHS |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def write(cells: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write ``lab_results.md`` and ``lab_results.json`` from finished cells."""
    from gradshield import lab
    from gradshield.runs import finite, versions

    ordered = sorted(
        cells, key=lambda c: (c["harm"] not in ("none", "explicit"), c["task"], c["ratio"], c["harm"], c["seed"])
    )
    manifest = {
        "command": "python -m benchmarks.lab_grid",
        "versions": versions(),
        "lab": json.loads((lab.checkpoint("aligned").parents[1] / "lab.json").read_text(encoding="utf-8")),
        "recipes": {task: lab.recipe(task) for task in lab.TASKS},
        "adapter": lab.LORA,
        "seconds": round(sum(c["seconds"] for c in cells), 1),
    }
    text = json.dumps(finite({"manifest": manifest, "cells": ordered}), indent=1)
    (folder / "lab_results.json").write_text(text + "\n", encoding="utf-8")
    lines = [INTRODUCTION, HEAD, *(_line(cell) for cell in ordered), "\n", _baselines(ordered)]
    (folder / "lab_results.md").write_text("".join(lines), encoding="utf-8")
    print("".join(lines))


def rate(value: Mapping[str, Any] | None) -> str:
    """``12.0 % [8.2, 17.2] n=200``."""
    return str(Rate(**value)) if value else "–"


def _line(cell: Mapping[str, Any]) -> str:
    arms, measured = cell["arms"], cell["scan"].get("labels", {})
    fihs = next((a for a in measured.get("aurocs", []) if a["name"] == "FIHS"), None)
    difference = cell.get("utility_filtered_minus_clean")
    columns = [
        cell["task"],
        f"{100 * cell['ratio']:g} % {cell['harm']}" if cell["ratio"] else "none",
        str(cell["seed"]),
        rate(measured.get("caught")),
        rate(measured.get("lost")),
        *(rate(arms[name]["asr"]) if name in arms else "–" for name in ("none", "filtered", "clean")),
        f"{100 * difference['difference']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
        if difference
        else "–",
        f"{fihs['auroc']:.4f}" if fihs else "–",
    ]
    return "| " + " | ".join(columns) + " |\n"


def _baselines(cells: Sequence[Mapping[str, Any]]) -> str:
    """AUROC of the score beside the trivial baselines, averaged over the seeds of each task and harm."""
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cell in cells:
        for entry in cell["scan"].get("labels", {}).get("aurocs", []):
            if entry.get("auroc") is not None:
                place = table.setdefault((cell["task"], f"{100 * cell['ratio']:g} % {cell['harm']}"), {})
                place.setdefault(entry["name"], []).append(entry["auroc"])
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = ["| task | harm | " + " | ".join(names) + " |\n", "|---" * (len(names) + 2) + "|\n"]
    for (task, harm), row in table.items():
        values = (f"{sum(row[n]) / len(row[n]):.3f} ({len(row[n])})" if n in row else "–" for n in names)
        lines.append(f"| {task} | {harm} | " + " | ".join(values) + " |\n")
    return (
        "Mean AUROC over the seeds (how many in brackets), next to the trivial baselines on the same rows:\n\n"
        + "".join(lines)
    )
