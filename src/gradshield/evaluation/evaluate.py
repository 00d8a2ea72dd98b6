"""How safe and how useful a model is: the exam of a training, on any model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from gradshield import runs
from gradshield.errors import UsageError
from gradshield.evaluation import page
from gradshield.evaluation.asr import agreement
from gradshield.evaluation.certificate import LABELLED
from gradshield.evaluation.exam import Exam, asked, figures
from gradshield.evaluation.harness import inspect_task, lm_eval_tasks
from gradshield.manifests import EvaluationManifest, EvaluationResults
from gradshield.models.loading import LoadedModel, ModelSource
from gradshield.report import sheet
from gradshield.scanning.rows import load, with_template
from gradshield.types import Progress, Rate, quiet


def evaluate(
    model: str | Path | LoadedModel | ModelSource,
    exam: Exam,
    *,
    output: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    inspect: Path | None = None,
    limit: int | None = None,
    command: str = "gradshield.evaluate",
    progress: Progress = quiet,
) -> EvaluationResults:
    """Measure a model: ``figures`` of the exam, ``agreement`` of its judges, ``harness`` of lm-eval and Inspect.

    Parameters
    ----------
    model
        A folder, a hub name or a loaded model.
    exam
        What to measure, and by which judges.
    output
        A folder for every answer (``outputs.jsonl``), the page (``report.html``) and the figures (``manifest.json``).
    lm_eval, inspect, limit
        Tasks of lm-eval, an Inspect task file, and how many samples of each.

    Raises
    ------
    UsageError
        There is nothing to measure.
    DataError
        ``output`` holds another command's results, or another process is writing there.
    ModelError
        The model cannot be loaded.

    Examples
    --------
    >>> import gradshield as gs
    >>> from gradshield import lab
    >>> found = gs.evaluate(lab.checkpoint("aligned"), gs.Exam(requests=lab.requests("report")[:4]))
    >>> found.figures.judges["refusal-phrases"].k
    0
    """
    if not (exam.requests or exam.task or lm_eval or inspect):
        raise UsageError("there is nothing to measure: give --safety, --utility, --lm-eval or --inspect")
    if output is not None:
        runs.check(output, ("outputs.jsonl", "report.html", "manifest.json"), "outputs.jsonl", read=(model,))
    with runs.alone(output):
        loaded = with_template(load(model, progress=progress))
        measured = exam.sit(loaded.model, loaded.tokenizer, "measuring", progress)
        harness: dict[str, Rate] = {}
        if lm_eval:
            found = lm_eval_tasks(cast(Any, loaded.model), loaded.tokenizer, list(lm_eval), limit=limit)
            harness |= found.rates
        if inspect is not None:
            found = inspect_task(inspect, exam.generator(loaded.model, loaded.tokenizer), limit=limit)
            harness |= found.rates
        results = EvaluationResults(
            figures=figures(measured),
            agreement=list(agreement(asked(measured))) if exam.requests else [],
            harness=harness,
        )
        if output is not None:
            manifest = EvaluationManifest(
                command=command,
                versions=runs.versions(),
                model=runs.model_of(loaded),
                settings=exam.record(),
                results=results,
            )
            folder = runs.prepare(output)
            for name in (runs.CERTIFICATE, LABELLED):  # of the answers that were there before
                (folder / name).unlink(missing_ok=True)
            runs.write_lines(folder / "outputs.jsonl", measured.outputs)
            sheet.write(page.page(manifest, measured.outputs), folder / "report.html")
            runs.write_json(folder / runs.MANIFEST, manifest)
        return results
