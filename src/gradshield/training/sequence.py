"""Train on one dataset after another, and measure safety, the safe basin and every task after each.

run/
  stage-1/, stage-2/, ...     one run each, starting from the previous model
  sequence.json, report.html, manifest.json (of the last stage)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gradshield import runs
from gradshield.errors import DataError, ModelError, UsageError
from gradshield.evaluation.exam import Exams, figures
from gradshield.evaluation.landscape import landscape, norm, random_directions, weights
from gradshield.files import file_digest
from gradshield.manifests import SequenceRecord, StageRecord, TrainingManifest
from gradshield.models import loading
from gradshield.models.loading import LoadedModel, parameters_digest
from gradshield.runs import alone
from gradshield.scanning.rows import load, with_template
from gradshield.training.course import Needs
from gradshield.training.train import train
from gradshield.types import Floats, Progress, quiet

STAGE = "stage.json"  # in a stage's working folder until the sequence is finished
ALPHAS = (-0.4, -0.3, -0.2, -0.1, 0.1, 0.2, 0.3, 0.4)  # steps relative to the norm of the weights
DIRECTIONS = 2
ASKED = 48  # requests at each point of the landscape


@dataclass(frozen=True, eq=False)
class Stage:
    """One dataset, and the exams with its task rows."""

    data: str
    exams: Exams


def sequence(
    stages: Sequence[Stage],
    *,
    model: Any,
    output: str | Path,
    peft_config: Any = None,
    needs: Needs | None = None,
    seed: int = 0,
    command: str = "gradshield.train",
    progress: Progress = quiet,
    **options: Any,
) -> SequenceRecord:
    """Train on every dataset in turn, under the same defence; returns the content of ``sequence.json``.

    Every stage starts from the previous model, its adapter merged. After each: ASR by every judge, VISAGE over the same random
    directions, and accuracy on every task; then basin retention, backward transfer and forgetting. The alignment direction stays
    that of the first model. An interrupted sequence resumes after the last finished stage, if its inputs are unchanged. ``unmet``
    names the stages at which no cut met the targets of a verified threshold. Raises UsageError if a stage has no task rows.
    """
    if any(not stage.exams.report.task for stage in stages):
        raise UsageError(
            "training on several datasets measures every task, and there are no task rows: give --utility FILE for each"
        )
    needs = needs or Needs()
    read, folders = (model, needs.base), [Path(output) / f"stage-{i}" for i, _ in enumerate(stages, 1)]
    runs.check(output, ("sequence.json", "report.html", "manifest.json"), "sequence.json", read=read)
    for own in folders:
        runs.check(own, (), "", read=read)
    with alone(output):
        folder = runs.prepare(output)
        (folder / "manifest.json").unlink(missing_ok=True)
        names = _names(stages)
        origin = current = with_template(load(model, progress=progress))
        needs = replace(needs, origin=origin).loaded(progress)
        basis = random_directions(weights(current.model), DIRECTIONS, seed)
        points = [_point("start", current, stages, names, basis)]
        unmet: list[str] = []
        for name, stage, own in zip(names, stages, folders, strict=True):
            progress("stages", len(points) - 1, len(stages))
            key = _key(stage, current, needs, peft_config, seed, options)
            found = _finished(own, key, current, bool(origin.source and origin.source.trust_remote_code))
            if found is None:
                done = train(
                    stage.data,
                    model=current,
                    output=own,
                    exams=stage.exams,
                    peft_config=peft_config,
                    merge=True,
                    needs=needs,
                    seed=seed,
                    command=command,
                    progress=progress,
                    **options,
                )
                trained = _next(current, done.model)
                runs.write_json(own / runs.WORK / STAGE, {"key": key, "model": trained.digest})
                found = trained, done.manifest
            current, manifest = found
            if (verdict := manifest.results.verified) is not None and not verdict.met:
                unmet.append(name)
            points.append(_point(name, current, stages, names, basis))
        progress("stages", len(stages), len(stages))
        whole = SequenceRecord(
            tasks=names,
            stages=points,
            unmet=unmet,
            measures=_measures(points),
            settings=manifest.settings,
            model=manifest.model,
            command=command,
            versions=runs.versions(),
        )
        _write(whole, folder, manifest)
        for own in folders:  # a finished sequence is not resumed
            (own / runs.WORK / STAGE).unlink(missing_ok=True)
        return whole


def _key(
    stage: Stage, current: LoadedModel, needs: Needs, peft_config: Any, seed: int, options: Mapping[str, Any]
) -> str:
    """A hash of everything that a stage's model depends on, files by their content."""
    safety = needs.safety_rows
    inputs = [
        runs.versions(),
        [_content(stage.data), _content(safety) if isinstance(safety, str | Path) else repr(safety)],
        [model and [model.digest, str(model.dtype)] for model in (current, needs.origin, needs.base)],
        [exam.record().plain() for exam in (stage.exams.report, stage.exams.search)],
        None if peft_config is None else peft_config.to_dict(),
        seed,
        repr(sorted(options.items())),
    ]
    return runs.digest(inputs)


def _content(name: str | Path) -> str:
    """The hash of a file, or the name of a hub dataset."""
    return file_digest(Path(name)) if Path(name).is_file() else str(name)


def _finished(
    folder: Path, key: str, before: LoadedModel, trust_remote_code: bool
) -> tuple[LoadedModel, TrainingManifest] | None:
    """The model and manifest of a stage that an interrupted sequence finished; None if it must be trained (again)."""
    try:
        stage = json.loads((folder / runs.WORK / STAGE).read_text(encoding="utf-8"))
        if stage["key"] != key:
            return None
        manifest = runs.read_manifest(folder, TrainingManifest)
        model = loading.load(folder, None, str(before.device), before.dtype, trust_remote_code).model
    except (OSError, ValueError, KeyError, TypeError, DataError, ModelError):  # damaged: the stage can be trained again
        return None
    trained = _next(before, model)
    return (trained, manifest) if trained.digest == stage["model"] else None


def _next(before: LoadedModel, model: Any) -> LoadedModel:
    """The trained model of a stage, its adapter merged, for the next one."""
    return replace(before, model=model, digest=parameters_digest(model), is_peft=False, adapter=None, source=None)


def _names(stages: Sequence[Stage]) -> list[str]:
    names = [Path(stage.data).stem for stage in stages]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


def _point(
    name: str,
    current: LoadedModel,
    stages: Sequence[Stage],
    names: Sequence[str],
    basis: Mapping[str, Mapping[str, Tensor]],
) -> StageRecord:
    """The record of one stage: ASR by judge, utility on every task, later ones too, and VISAGE by the first judge."""
    model: Any = current.model
    exams = [replace(stage.exams.report, requests=(), lookalikes=()) for stage in stages]
    rates = [exam.sit(model, current.tokenizer, "measuring tasks").rates["utility"] for exam in exams]
    utility, exam = dict(zip(names, rates, strict=True)), stages[0].exams.report
    if not exam.requests:
        return StageRecord(name=name, asr={}, utility=utility, visage=None)
    asked = replace(exam, lookalikes=(), task=())
    asr = figures(asked.sit(model, current.tokenizer, "measuring safety")).judges
    few = replace(asked, requests=exam.requests[:ASKED])
    line = landscape(model, basis, ALPHAS, norm(weights(model)), lambda: few.sit(model, current.tokenizer).rates)
    visage = line.visage(f"asr/{exam.judges[0].name}", conditional=False)
    return StageRecord(name=name, asr=asr, utility=utility, visage=visage)


def _measures(points: Sequence[StageRecord]) -> dict[str, list[float | None]]:
    accuracy = np.array([[rate.rate for rate in point.utility.values()] for point in points])
    found = {
        "accuracy_so_far": accuracy_so_far(accuracy),
        "backward_transfer": backward_transfer(accuracy),
        "forgetting": forgetting(accuracy),
    }
    visages = [point.visage for point in points if point.visage is not None]
    if len(visages) == len(points) and visages[0] > 0:
        found["basin_retention"] = np.array(visages[1:]) / visages[0]
    return dict(runs.finite(found))


def _write(whole: SequenceRecord, folder: Path, manifest: TrainingManifest) -> None:
    from gradshield.report import sheet
    from gradshield.training.page import sequence_page

    runs.write_json(folder / "sequence.json", whole)
    sheet.write(sequence_page(whole), folder / "report.html")
    runs.write_json(folder / runs.MANIFEST, manifest)


# ---- what training on one task after another does to earlier tasks ---------------------------------------------------

# Each takes ``accuracy`` (T + 1, T): row t holds the accuracy on every task after training on the first t, row 0 that of the
# untrained model; column j is the task trained at step j + 1. Results are (T,), one number per step; transfer and forgetting
# are NaN at the first step, which has no earlier task.
# Source: arXiv 2604.17215 for the choice of figures; backward transfer as in Lopez-Paz and Ranzato (arXiv 1706.08840),
# forgetting as in Chaudhry et al. (arXiv 1801.10112).


def accuracy_so_far(accuracy: Floats) -> Floats:
    """After each step, the mean accuracy over the tasks trained so far (T,)."""
    return np.array([accuracy[t, :t].mean() for t in range(1, len(accuracy))])


def backward_transfer(accuracy: Floats) -> Floats:
    """After each step, the mean over earlier tasks of accuracy now minus accuracy when learned (T,); below 0 is loss."""
    learned = np.diagonal(accuracy[1:])  # (T,): task j right after its own training
    return np.array([_mean(accuracy[t, : t - 1] - learned[: t - 1]) for t in range(1, len(accuracy))])


def forgetting(accuracy: Floats) -> Floats:
    """After each step, the mean over earlier tasks of the best accuracy since the task was learned minus that now (T,).

    The best is over the steps before the present one, so a new best gives a value below 0. Accuracy before a task's own
    training does not count, since losing it is not forgetting.
    """
    steps = range(1, len(accuracy))
    lost = [np.array([accuracy[j + 1 : t, j].max() - accuracy[t, j] for j in range(t - 1)]) for t in steps]
    return np.array([_mean(values) for values in lost])


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")
