"""Fine-tune under a defence: scan, train, measure before and after, and certify.

run/
  adapter or model        as PEFT and transformers save it, with the tokenizer and a model card
  scan/                   the removed rows and why (docs/outputs.md), if the defence removes rows
  outputs-before.jsonl    every prompt with its answer and verdicts, before and after training
  outputs-after.jsonl
  report.html, manifest.json (written last: it marks a finished run)
  certificate.json        what may be claimed of the model, computed from the files above
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from gradshield import files, runs
from gradshield.columns import Coded
from gradshield.data import Format
from gradshield.errors import UsageError, first_line
from gradshield.evaluation import card, certify
from gradshield.evaluation.asr import agreement
from gradshield.evaluation.certificate import LABELLED
from gradshield.evaluation.exam import Exams, asked, changes, check_disjoint, figures
from gradshield.manifests import (
    Data,
    FoundCut,
    Named,
    RowFormat,
    Search,
    TrainingManifest,
    TrainingRecord,
    TrainingResults,
)
from gradshield.probes import requests
from gradshield.runs import CERTIFICATE, alone
from gradshield.scanning import outputs, trust
from gradshield.scanning.decide import Decision, Selection
from gradshield.scanning.rows import prepare
from gradshield.scanning.scan import select, selected
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.training import arms
from gradshield.training.course import Chosen, Course, Fitted, Job, Needs, method_of
from gradshield.training.defences import Defence, parse
from gradshield.types import EvalResult, Progress, quiet

# Files of an earlier run in the folder: weights or an adapter of another kind would be loaded instead of the new ones.
EARLIER = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", "outputs-*.jsonl"),
    *(CERTIFICATE, LABELLED),
)
WRITTEN = (*EARLIER, "tokenizer*", "*.jinja", "README.md", "report.html", "manifest.json")


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished run. ``selection`` is None if the defence removes no rows, ``verdict`` if no cut was searched.

    ``tokens`` are those of all steps of the training, without padding.
    """

    model: Any
    manifest: TrainingManifest
    before: EvalResult
    after: EvalResult
    tokens: int
    selection: Selection | None = None
    verdict: Search | None = None
    certificate: Mapping[str, Any] = field(default_factory=dict)  # the content of certificate.json


def train(
    data: Any,
    *,
    model: Any,
    output: str | Path,
    defence: str = "screen",
    tokenizer: Any = None,
    peft_config: Any = None,
    training: Mapping[str, Any] | None = None,
    needs: Needs | None = None,
    settings: ScanSettings | None = None,
    probing: Probing | None = None,
    exams: Exams | None = None,
    labels: Sequence[int] | None = None,
    format: str | Format | None = None,
    allow: Iterable[str] = (),
    gate: Callable[[Selection], None] | None = None,
    merge: bool = False,
    seed: int = 0,
    command: str = "gradshield.train",
    progress: Progress = quiet,
) -> Trained:
    """Fine-tune ``model`` on ``data`` under a defence, measure it before and after, and write everything to ``output``.

    Parameters that are not listed are those of `gradshield.scan`. An interrupted run resumes from the finished shards of the
    scan, the finished rounds of a search and the newest checkpoint of the training, if their inputs are unchanged.

    Parameters
    ----------
    output
        Folder for the model, the scan, the report, the model card and the manifest.
    defence
        As typed after ``--defence``: one of ``gradshield methods``, or several joined by ``+``.
    training
        Options of TRL's ``SFTConfig``, or ``DPOConfig`` for preference pairs, passed through; those of rendering apply to scoring
        and training (``training_args`` of `gradshield.scan`).
    needs
        What some defences need: the model before its alignment, safety rows.
    exams
        The exams before and after training, and of a verified threshold. Without them nothing is measured.
    gate
        Called with the finished scan, whose files are written, before anything trains; it may raise to stop the run.
    merge
        Save the plain model with the adapter merged in, instead of the adapter.
    seed
        Seed of the adapter, the row order and, without ``settings``, the scan.

    Raises
    ------
    UsageError, DataError, ModelError
        As in `gradshield.errors`, before training if possible.

    Examples
    --------
    >>> import gradshield as gs
    >>> from gradshield import lab
    >>> rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.05, n=36)
    >>> probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    >>> options = {**lab.recipe("dialogue"), "max_steps": 2}
    >>> done = gs.train(rows, model=lab.checkpoint("aligned"), output="run", training=options, probing=probing)
    >>> len(done.selection.removed_rows)
    2
    """
    began = time.monotonic()
    wanted, exams, options = parse(defence), exams or Exams(), dict(training or {})
    reporters = Reporters(options.pop("report_to", None), Path(output))
    if reporters.callbacks:
        if wanted.verified is not None:
            raise UsageError(
                f"report_to ({', '.join(reporters.names)}) follows one training, and a verified threshold trains once for every "
                "cut that it tries: give another threshold, or report_to none"
            )
        options.setdefault("logging_strategy", "steps")
    settings, probing, needs = settings or ScanSettings(seed=seed), probing or Probing(), needs or Needs()
    runs.check(output, WRITTEN, "outputs-after.jsonl", data=data, read=(model, needs.base, needs.origin))
    runs.check(Path(output) / runs.SCAN, outputs.WRITTEN, outputs.SCORES, data=data)
    wanted.require(needs.base, labels)
    check_disjoint(direction=probing.requests or requests(), search=exams.search.requests, report=exams.report.requests)
    if wanted.verified is not None:
        arms.check(exams.search, wanted.verified)
    rows = prepare(
        *(data, model, tokenizer, options, probing.template, format, progress, labels),
        check=lambda read: method_of(read, wanted),
    )
    job = Job(
        rows=rows,
        # So that an interrupted training resumes; the checkpoints are removed in the end.
        options={"save_strategy": "epoch", "save_total_limit": 1, **options},
        peft_config=peft_config,
        needs=needs.loaded(progress),
        labels=labels,
        settings=settings,
        probing=probing,
        allow=frozenset(allow),
        seed=seed,
    )
    course = Course(job, progress)
    check_disjoint(safety=course.safety_requests(wanted), search=exams.search.requests, report=exams.report.requests)
    with alone(output):
        run = _Run(course, job, wanted, exams, runs.prepare(output), merge, command, reporters)
        return run.finished(began, gate)


@dataclass(frozen=True, eq=False)
class _Run:
    """One run, stage by stage."""

    course: Course
    job: Job
    defence: Defence
    exams: Exams
    folder: Path
    merge: bool
    command: str
    reporters: Reporters

    def finished(self, began: float, gate: Callable[[Selection], None] | None) -> Trained:
        """Run all stages; writes the manifest last, and then the certificate, which holds its hash."""
        for name in (CERTIFICATE, "manifest.json"):  # a certificate must not outlive its model
            (self.folder / name).unlink(missing_ok=True)
        selection = self._scanned()
        if selection is not None and gate is not None:
            gate(selection)
        before = self._measured(self.course.loaded.model, "measuring the start")
        tried = arms.Arms(self.course, self.folder / runs.WORK / "rounds", self.merge)
        verdict = None
        if self.defence.verified is not None:
            verdict, chosen = tried.search(self.defence, self.exams.search)
        else:
            chosen = self.course.chosen(self.defence)
        dataset = self.course.dataset(self.defence, chosen)
        key = self.course.key(self.defence, dataset)
        fitted = tried.models[key][0] if key in tried.models else self._fitted(dataset, key)
        after = self._measured(fitted.model, "measuring the end")
        removed = self.course.beyond(chosen)
        if selection is not None and (removed != selection.removed).any():
            selection = self._recut(selection, replace(chosen, removed=removed))
        results = TrainingResults(
            **self.course.counts(chosen),
            trained=len(dataset),
            cuts={name: FoundCut(rule=cut.rule, value=cut.value) for name, cut in chosen.cuts.items()},
            before=figures(before),
            after=figures(after),
            changed=changes(before, after),
            agreement=list(agreement(asked(after))) if self.exams.report.requests else [],
            record=dict(fitted.record),
            verified=verdict,
            uncertified=next(iter(trust.of_run(selection.manifest.results.doubts)), None) if selection else None,
            seconds=round(time.monotonic() - began, 1),
        )
        self.reporters.finish(logged(before, after, {"rows_removed": results.removed, "rows_trained": results.trained}))
        manifest = self._manifest(results)
        self._save(fitted.model, manifest, before, after)
        certificate = certify.write(self.folder)
        return Trained(fitted.model, manifest, before, after, fitted.tokens, selection, verdict, certificate)

    def _scanned(self) -> Selection | None:
        """The scan of the defence, in its own folder; None if it removes no rows."""
        if self.defence.selector is None:
            return None
        selection, scored = select(
            self.job.rows,
            self.course.settings(self.defence),
            self.job.probing,
            peft_config=self.job.peft_config,
            allow=self.job.allow,
            labels=self.job.labels,
            output=self.folder / runs.SCAN,
            command=self.command,
            progress=self.course.progress,
        )
        self.course.know(self.defence.selector, scored)
        outputs.write(selection, self.folder / runs.SCAN, self.job.rows, self.job.labels)
        return selection

    def _recut(self, selection: Selection, chosen: Chosen) -> Selection:
        """Rewrite the scan's folder with the cut that was trained on."""
        assert chosen.scored is not None
        decision, old = Decision(chosen.cuts, chosen.removed, ()), selection.manifest
        again = selected(
            self.job.rows,
            chosen.scored,
            decision,
            Coded.of(selection.categories).only(chosen.removed),
            self.job.labels,
            lambda results: old.model_copy(update={"results": results}),
            old.results.seconds,
            searched=True,
        )
        outputs.write(again, self.folder / runs.SCAN, self.job.rows, self.job.labels)
        return again

    def _fitted(self, dataset: Sequence[Mapping[str, Any]], key: str) -> Fitted:
        """Train, with checkpoints under the key of this training unless the options turn them off."""
        checkpoints = self.folder / runs.WORK / "checkpoints" / key
        saving = self.job.options.get("save_strategy", "no") != "no"
        return self.course.fit(
            self.defence,
            dataset,
            "training",
            self.merge,
            callbacks=self.reporters.callbacks,
            output_dir=str(checkpoints) if saving else None,
            resume=saving and checkpoints.exists(),
        )

    def _measured(self, model: Any, stage: str) -> EvalResult:
        return self.exams.report.sit(model, self.course.loaded.tokenizer, stage, self.course.progress)

    def _manifest(self, results: TrainingResults) -> TrainingManifest:
        rows, job, base = self.job.rows, self.job, self.job.needs.base
        return TrainingManifest(
            command=self.command,
            versions=runs.versions(),
            data=Data.model_validate(rows.read.source),
            model=runs.model_of(rows.loaded),
            settings=TrainingRecord(
                defence=self.defence.spec,
                method=method_of(rows.read),
                training={**job.options, "online": self.defence.training},
                render=asdict(rows.config),
                template=dict(job.probing.template or {}),
                answer_prefix=job.probing.answer_prefix,
                probe_sha256=runs.digest([dict(p) for p in job.probing.requests or requests()]),
                safety_sha256=self.course.safety_digest(self.defence),
                format=RowFormat.model_validate(rows.read.examples.format),
                peft=None if job.peft_config is None else job.peft_config.to_dict(),
                base=base and Named(name=base.name, sha256=base.digest),
                scan=self.course.settings(self.defence).record(),
                seed=job.seed,
                merged=self.merge,
                report=self.exams.report.record(),
                search=self.exams.search.record() if self.defence.verified is not None else None,
            ),
            results=results,
        )

    def _save(self, model: Any, manifest: TrainingManifest, before: EvalResult, after: EvalResult) -> None:
        from gradshield.report import sheet
        from gradshield.training import page

        if self.defence.selector is None:
            shutil.rmtree(self.folder / runs.SCAN, ignore_errors=True)
        old = [path.name for pattern in EARLIER for path in self.folder.glob(pattern)]
        with files.instead(self.folder, "manifest.json", old) as new:
            if (self.folder / "README.md").exists():  # the rest of the card is kept
                shutil.copy(self.folder / "README.md", new)
            model.save_pretrained(new)
            self.course.loaded.tokenizer.save_pretrained(new)
            for name, result in (("before", before), ("after", after)):
                runs.write_lines(new / f"outputs-{name}.jsonl", result.outputs)
            card.write(new, manifest)
            sheet.write(page.page(manifest, self.defence.selector is not None), new / "report.html")
            runs.write_json(new / runs.MANIFEST, manifest)
        shutil.rmtree(self.folder / runs.WORK / "checkpoints", ignore_errors=True)


# ---- what follows a training -----------------------------------------------------------------------------------------


class Reporters:
    """The callbacks of transformers' ``report_to``: no name, one or several. Their end of training waits for `finish`.

    Raises UsageError for a name that transformers does not have, or a package that is not installed.
    """

    def __init__(self, report_to: str | Sequence[str] | None, folder: Path) -> None:
        given = [report_to] if isinstance(report_to, str) else list(report_to or ())
        self.names = [name for name in given if name != "none"]
        self._waiting: list[Callable[[Mapping[str, float]], None]] = []
        try:
            self.callbacks = [callback() for callback in get_reporting_integration_callbacks(self.names)]
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError(
                f"report_to cannot use {', '.join(self.names)} ({first_line(error, most=None)}): install it, or give none"
            ) from None
        for callback in self.callbacks:
            if getattr(callback, "logging_dir", "") is None:  # TensorBoard's is else in the folder of the checkpoints
                callback.logging_dir = str(folder / "tensorboard")
            callback.on_train_end = partial(self._wait, callback, callback.on_train_end)

    def _wait(self, callback: Any, end: Callable[..., None], args: Any, state: Any, control: Any, **_more: Any) -> None:
        def ended(values: Mapping[str, float]) -> None:
            callback.on_log(args, state, control, logs=dict(values))
            end(args, state, control)

        self._waiting.append(ended)

    def finish(self, values: Mapping[str, float]) -> None:
        """Log values after the last step, and end the run; nothing where no training has ended."""
        for ended in self._waiting:
            ended(values)


def logged(before: EvalResult, after: EvalResult, counts: Mapping[str, float]) -> dict[str, float]:
    """Every rate as a number, and the counts, by names that all of them take; trackers group them under ``eval``."""
    rates = {f"before_{name}": rate.rate for name, rate in before.rates.items()}
    rates |= {name: rate.rate for name, rate in after.rates.items()}
    return {"eval_" + re.sub(r"[^\w .-]", "_", name): float(value) for name, value in (rates | dict(counts)).items()}
