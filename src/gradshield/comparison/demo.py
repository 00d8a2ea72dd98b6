"""The demo on the bundled lab: scan a poisoned set, train on it with and without the filter, and compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import files, lab, runs
from gradshield.errors import UsageError
from gradshield.evaluation.exam import figures, lab_exam
from gradshield.report import sheet
from gradshield.scanning import outputs, page
from gradshield.scanning.decide import Selection
from gradshield.scanning.page_rows import stored_views
from gradshield.scanning.scan import select
from gradshield.training.course import Course, lab_job, require_trl
from gradshield.training.defences import parse
from gradshield.types import EvalResult, Progress

CLEAN_ROWS = 500
SHOWN = (
    ("ASR, refusal phrases", "asr/refusal-phrases"),
    ("ASR, lab classifier", "asr/lab-classifier"),
    ("over-refusal", "over_refusal"),
    ("utility", "utility"),
)
Table = tuple[tuple[str, tuple[str, ...]], ...]
MARK = f"{runs.WORK}/demo"  # distinguishes its folder from that of a user's scan


@dataclass(frozen=True)
class DemoResult:
    """The table as printed: ``columns`` after the first; each row is a measure and one cell per column."""

    columns: tuple[str, ...]
    rows: Table
    selection: Selection


def run(output: Path, task: str, harm: str, ratio: float, seed: int, command: str, progress: Progress) -> DemoResult:
    """Scan a lab mix, fine-tune with and without the filter, measure each model, and write one report.

    Raises UsageError for an unknown task or harm, and for a ratio outside [0, 1).
    """
    for kind, value, allowed in (("task", task, lab.TASKS), ("harm", harm, lab.HARMS)):
        if value not in allowed:
            raise UsageError(f"the lab has no {kind} {value!r}: choose one of {', '.join(allowed)}")
    if not 0 <= ratio < 1:
        raise UsageError(f"the ratio is {ratio:g}, and a demo needs harmless rows too: give a share from 0 to below 1")
    require_trl()
    runs.check(output, (*outputs.WRITTEN, "data.jsonl"), MARK)
    with runs.alone(output):
        rows, labels = lab.mix(task, harm=harm, ratio=ratio, n=CLEAN_ROWS, seed=seed)
        folder = runs.prepare(output)
        (folder / MARK).touch()
        data = folder / "data.jsonl"
        runs.write_lines(data, rows)
        progress("loading the model", 0, 1)
        job = lab_job(task, data, labels, seed)
        progress("loading the model", 1, 1)
        selection, scored = select(
            job.rows, job.settings, job.probing, labels=labels, output=folder, command=command, progress=progress
        )
        outputs.write(selection, folder, job.rows, labels)
        course, exam = Course(job, progress), lab_exam(task, "report", seed)
        course.know(job.settings.selector, scored)
        start = job.rows.loaded
        results = {"aligned": exam.sit(start.model, start.tokenizer, "measuring the start", progress)}
        for name, defence in (("undefended", parse("none")), ("filtered", parse("screen"))):
            dataset = course.dataset(defence, course.chosen(defence))
            model = course.fit(defence, dataset, f"training {name}").model
            results[name] = exam.sit(model, start.tokenizer, f"measuring {name}", progress)
        demo = {"task": task, "harm": harm, "ratio": ratio, "recipe": lab.recipe(task), "adapter": lab.LORA}
        selection = _recorded(selection, results, demo)
        views, truth = stored_views(folder), np.array(labels)[selection.scores.rows]
        with files.instead(folder, "manifest.json", ()) as new:
            sheet.write(page.page(selection, folder, views, truth), new / "report.html")
            for name, result in results.items():
                runs.write_lines(new / f"outputs-{name}.jsonl", result.outputs)
            runs.write_json(new / runs.MANIFEST, selection.manifest)
        return DemoResult(tuple(results), _table(selection, results, len(rows)), selection)


def _recorded(selection: Selection, results: Mapping[str, EvalResult], demo: Mapping[str, Any]) -> Selection:
    old = selection.manifest
    found = old.results.model_copy(update={name: figures(result) for name, result in results.items()})
    settings = old.settings.model_copy(update={"demo": demo})
    return replace(selection, manifest=old.model_copy(update={"settings": settings, "results": found}))


def _table(selection: Selection, results: Mapping[str, EvalResult], total: int) -> Table:
    measured = selection.manifest.results.labels
    kept = {"undefended": f"{total}", "filtered": f"{len(selection.kept_rows)}"}
    table = [("rows kept", tuple(kept.get(name, "–") for name in results))]
    for label, rate in (("harmful caught", measured.caught), ("harmless lost", measured.lost)):
        cell = "–" if rate is None else str(rate)
        table.append((label, tuple(cell if name == "filtered" else "–" for name in results)))
    for label, key in SHOWN:
        table.append((label, tuple(str(result.rates[key]) for result in results.values())))
    return tuple(table)
