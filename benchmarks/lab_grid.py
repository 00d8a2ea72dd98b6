"""The scan on the bundled lab: every task, every share of harm, several seeds, with and without the filter.

    python -m benchmarks.lab_grid --output lab-grid/            # the whole grid; resumable
    python -m benchmarks.lab_grid --output lab-grid/ --quick    # one task, one seed

Arms: ``none`` trains on every row, ``filtered`` on what the scan keeps, ``clean`` on the harmless rows alone. All arms
share the lab's recipe and the same order of rows (by content), so that they differ by their rows alone; arms with the
same rows are one run. Writes ``cells.jsonl`` (one line per finished cell), then ``lab_results.json`` and ``lab_results.md``.
What lies there already is taken over where versions, lab and exam are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

RATIOS = (0.0, 0.01, 0.05, 0.1, 0.2)
SEEDS = (0, 1, 2)
IMPLICIT = ("identity_shift", "refuse_then_answer", "embedded")


def cells(quick: bool) -> list[dict[str, Any]]:
    """Every cell of the grid: what is mixed into which task, and under which seed."""
    from gradshield import lab

    tasks, seeds = (lab.TASKS[:1], SEEDS[:1]) if quick else (lab.TASKS, SEEDS)
    grid = [
        {"task": task, "harm": "explicit" if ratio else "none", "ratio": ratio, "seed": seed}
        for task in tasks
        for seed in seeds
        for ratio in (*RATIOS, 1.0)
    ]
    grid += [{"task": t, "harm": h, "ratio": 0.1, "seed": seeds[0]} for t in tasks for h in IMPLICIT]
    settings = {(task, seed): _setting(task, seed) for task in tasks for seed in seeds}
    return [{**cell, "setting": settings[cell["task"], cell["seed"]]} for cell in grid]


def _setting(task: str, seed: int) -> str:
    """A hash of versions, lab and exam: the manifest tells today's, and no number of others may stand beside it."""
    from gradshield import lab, runs
    from gradshield.evaluation.exam import lab_exam

    made = (lab.checkpoint("aligned").parents[1] / "lab.json").read_text(encoding="utf-8")
    exam = lab_exam(task, "report", seed).record().plain()
    return runs.digest([runs.versions(), made, lab.recipe(task), lab.LORA, exam])[:12]


def run_cell(cell: dict[str, Any], store: Path) -> dict[str, Any]:
    """Scan one mix, train its arms, measure them. Trained arms are kept by all that they depend on."""
    import torch

    from gradshield import lab
    from gradshield.scanning.scan import select
    from gradshield.training.course import Course, lab_job

    torch.set_num_threads(1)
    began = time.monotonic()
    rows, labels = lab.mix(cell["task"], harm=cell["harm"], ratio=cell["ratio"], seed=cell["seed"])
    # By content, so that any two arms have what they share in the same order.
    paired = sorted(zip(rows, labels, strict=True), key=lambda pair: json.dumps(pair[0], sort_keys=True))
    truth = [label for _, label in paired]
    job = lab_job(cell["task"], [row for row, _ in paired], truth, cell["seed"])
    selection, scored = select(job.rows, job.settings, job.probing, labels=truth)
    course = Course(job)
    course.know("fihs", scored)
    found: dict[str, Any] = {**cell, "rows": len(rows), "scan": selection.manifest.results.plain(), "arms": {}}
    found["scan_seconds"] = round(time.monotonic() - began, 1)
    if cell["ratio"] < 1:
        for name, defence in (("clean", "clean"), ("none", "none"), ("filtered", "fihs")):
            found["arms"][name] = _arm(course, defence, cell, store)
        found["utility_filtered_minus_clean"] = _paired(found["arms"]["filtered"], found["arms"]["clean"])
        for arm in found["arms"].values():
            arm.pop("utility_rows")
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


def _arm(course: Any, name: str, cell: dict[str, Any], store: Path) -> dict[str, Any]:
    from gradshield.evaluation.exam import figures, lab_exam
    from gradshield.training.defences import parse

    defence = parse(name)
    dataset = course.dataset(defence, course.chosen(defence))
    path = store / f"arm-{course.key(defence, dataset)}-{cell['setting']}.json"
    if not path.exists():
        model = course.fit(defence, dataset).model
        result = lab_exam(cell["task"], "report", cell["seed"]).sit(model, course.loaded.tokenizer)
        useful = [float(row["score"]) for row in result.outputs if "score" in row]
        saved = {"rows": len(dataset), **figures(result).plain(), "utility_rows": useful}
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(saved), encoding="utf-8")
        os.replace(temporary, path)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _paired(filtered: dict[str, Any], clean: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from gradshield.stats import paired_difference

    return asdict(paired_difference(filtered["utility_rows"], clean["utility_rows"]))


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("lab-grid"))
    parser.add_argument("--quick", action="store_true", help="one task, one seed")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "cells.jsonl"
    done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    keys = {_name(cell) for cell in done}
    grid = cells(options.quick)
    missing = [cell for cell in grid if _name(cell) not in keys]
    # Cells of one task and seed share their clean run: give them to workers in turn, harmless first.
    missing.sort(key=lambda c: (c["ratio"], c["seed"], c["task"]))
    with ProcessPoolExecutor(options.workers) as pool, log.open("a", encoding="utf-8") as sink:
        running = {pool.submit(run_cell, cell, options.output): cell for cell in missing}
        for count, future in enumerate(as_completed(running), 1):
            found = future.result()
            sink.write(json.dumps(_finite(found)) + "\n")
            sink.flush()
            done.append(found)
            print(f"{count}/{len(missing)} {_name(found)} {found['seconds']} s", file=sys.stderr, flush=True)
    wanted = {_name(cell) for cell in grid}
    from benchmarks.lab_table import write

    write([cell for cell in done if _name(cell) in wanted], options.output)


def _finite(value: Any) -> Any:
    from gradshield.runs import finite

    return finite(value)


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['task']}/{cell['harm']}/{cell['ratio']:g}/{cell['seed']}/{cell.get('setting')}"


if __name__ == "__main__":
    main()
