"""One job, in a process of its own: ``python -m gradshield.gateway.job FOLDER JOB OWNER``. Read it from top to bottom.

The process claims the job and keeps the lease while it lives. Everything before the last transition may happen again: files are
fetched whole, the scan goes on from its shards and the training from its newest checkpoint. The last one happens once, since it
asks for the lease.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from filelock import Timeout

from gradshield import data, lab, runs
from gradshield.data.trl import check_names, names_of
from gradshield.errors import DataError, GradShieldError
from gradshield.evaluation.certify import certify
from gradshield.evaluation.exam import Exam, Exams, exam, exams_of, lab_exam
from gradshield.evaluation.metrics import LIKELIHOOD
from gradshield.gateway.content import Content, results
from gradshield.gateway.database import AWAY
from gradshield.gateway.settings import LAB, Policy, Settings
from gradshield.gateway.store import UNSAFE, Lost, Store, name_of
from gradshield.gateway.tables import Job
from gradshield.gateway.wire import LEAST_ROWS, Method
from gradshield.gateway.worker import configure
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.probes import read_prompts
from gradshield.scanning.decide import PREFERENCE, Selection
from gradshield.scanning.settings import Probing, ScanSettings, peft_config
from gradshield.stats import percent
from gradshield.training.course import lab_probing
from gradshield.training.defences import parse
from gradshield.training.train import Trained, train

NAMED = 1000  # rows that a message or an event names
AGAIN = 60.0  # seconds before another attempt, after a full disk or a database that was away
ORPHANED = 75  # exit status of a process that lost its job or its worker
TASK = "dialogue"  # of the lab, whose learning rate suits most of its tasks
NAMES = {"n_epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
RATES = {"supervised": 2e-5, "dpo": 1e-6}  # of full training, and TRL's own
log = structlog.get_logger("gradshield.gateway.job")


class Stopped(GradShieldError):
    """The job ends here, with a code of the wire."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


class Held(Exception):
    """The job waits for an operator."""


class Heart(threading.Thread):
    """Extends the lease, and ends the process when the job is not its own any more or its worker has ended."""

    def __init__(self, store: Store, job: str, owner: str, seconds: float) -> None:
        super().__init__(daemon=True)
        self.store, self.job, self.owner, self.seconds = store, job, owner, seconds
        self.parent, self.stopped = os.getppid(), threading.Event()

    def run(self) -> None:
        until = time.monotonic() + self.seconds
        while not self.stopped.wait(min(1.0, self.seconds / 4)):
            try:
                if os.getppid() != self.parent:
                    self.store.give_up(self.job, self.owner)
                    os._exit(ORPHANED)
                self.store.beat(self.job, self.owner, self.seconds)
                until = time.monotonic() + self.seconds
            except Lost:
                os._exit(ORPHANED)
            except Exception as error:  # a database that restarts; another may claim the job once the lease is over
                log.warning("the lease could not be extended", error=type(error).__name__)
                if time.monotonic() > until:
                    os._exit(ORPHANED)


class Run:
    """A claimed job, stage by stage."""

    def __init__(self, settings: Settings, store: Store, content: Content, job: Job, owner: str) -> None:
        self.settings, self.store, self.content, self.job, self.owner = settings, store, content, job, owner
        self.folder = settings.job_folder(job.id)
        self.policy = Policy.model_validate(job.policy)
        self.stage, self.reported, self.steps = "", 0.0, 0
        self.found: dict[str, Any] = {}

    def whole(self) -> None:
        """Validate, scan, train, check and serve. Raises Stopped, Held, Lost and the errors of `gradshield.train`."""
        if self.job.attempt > self.settings.attempts:
            raise Stopped("server_error", f"The job was interrupted {self.settings.attempts} times and is given up.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with chdir(self.folder):  # what is read and written there is called by its own name in reports and errors
            rows, validation = (self._file(param) for param in ("training_file", "validation_file"))
            if self.job.status == "validating_files":
                self._say("Files validated, moving job to queued state", status="queued")
            began = "resumed" if self.job.attempt > 1 else "started"
            self._say(f"Fine-tuning job {began}", status="running")
            assert rows is not None  # every job has a training file
            self._served(self._trained(rows, validation))

    def _file(self, param: str) -> str | None:
        """The name of a file of the job, in its folder. Raises Stopped if it was deleted, or its rows cannot be used."""
        if (file := getattr(self.job, param)) is None:
            return None
        path = Path(f"{param}.jsonl")
        try:
            if not path.exists():
                self.content.fetch(file, path)
        except FileNotFoundError:
            raise Stopped(f"invalid_{param}", f"The file {file} was deleted.", param) from None
        if self.job.status == "validating_files":
            self._say(f"Validating {param.replace('_', ' ')}: {file}")
            if problem := _problem(path.name, self.job.method["type"]):
                raise Stopped(f"invalid_{param}", problem, param)
        return path.name

    def _trained(self, rows: str, validation: str | None) -> Trained:
        decision = self.job.decision or {}
        return train(
            rows,
            **self._recipe(validation),
            output=".",
            defence=self.policy.defence,
            settings=ScanSettings(seed=self.job.seed, threshold=decision.get("threshold")),
            allow=decision.get("released", ()),
            gate=self._gate,
            seed=self.job.seed,
            command=f"gradshield serve ({self.job.id})",
            progress=self._progress,
        )

    def _recipe(self, validation: str | None) -> dict[str, Any]:
        """What the job trains with. Raises Stopped; what the operator's own files lack is said in the log alone."""
        name, known = self.job.model, self.settings.models
        if name not in known:
            message = f"The model {name!r} is not offered any more: choose one of {', '.join(known)}."
            raise Stopped("invalid_job", message, "model")
        try:
            found = recipe(self.settings, name, Method.model_validate(self.job.method), self.policy.defence)
        except GradShieldError as error:
            raise ours(error, self.job.id) from None
        if validation is not None:
            try:
                found["exams"] = validated(found["exams"], validation)
            except DataError as error:
                raise Stopped("invalid_validation_file", str(error), "validation_file") from None
        elif found["exams"].search.requests:
            message = "The policy searches the cut by training, and measures every cut on a validation file: give one."
            raise Stopped("invalid_validation_file", message, "validation_file")
        return found | {"model": loaded(found["model"], name)}

    def _gate(self, selection: Selection) -> None:
        """What the policy says of the scan. Raises Stopped or Held."""
        found = selection.manifest.results
        rows = selection.removed_rows[:NAMED].tolist()
        what: dict[str, Any] = {
            "rows": found.read,
            "removed": found.removed,
            "kept": found.kept,
            "quarantined": found.quarantined,
            "released": found.cleared,
            "categories": found.categories,
            "certified": found.certified,
            "doubts": found.doubts,
            "cuts": {name: {"rule": cut.rule, "value": cut.value} for name, cut in selection.cuts.items()},
            "removed_rows": rows,
        }
        self.found["scan"] = what = runs.finite(what)
        self.store.note(self.job.id, self.owner, result=self.found)
        kinds = ", ".join(f"{name} {count}" for name, count in found.categories.items())
        said = f"{found.removed} of {found.scored} rows are harmful" + (f" ({kinds})" if kinds else "")
        self._say(f"Scan finished: {said}", "warn" if found.removed else "info", what)
        if self.job.decision is not None:
            return
        if not found.certified:
            doubt = f"The scan is not certified ({found.uncertified}), so an operator has to look at it"
            self._hold("not_certified", doubt, found.removed)
        if not found.removed:
            return
        if self.policy.rows == "reject":
            numbers = ", ".join(map(str, rows[:100])) + (", ..." if len(rows) > 100 else "")
            raise Stopped("harmful_rows", f"{said}: fix or remove rows {numbers} (counted from 0).", "training_file")
        if self.policy.rows == "review":
            self._hold("review", f"{said}: the job waits for an operator's review", found.removed)
        self._say(f"Training on the other {found.kept} rows")

    def _hold(self, code: str, message: str, removed: int) -> None:
        self._keep()
        own = parse(self.policy.defence)
        why = {"code": code, "message": message, "removed": removed, "movable": own.spec == own.selector}
        self.store.hold(self.job.id, self.owner, why, message)
        raise Held

    def _served(self, done: Trained) -> None:
        """List the model, or withhold it if a judge's upper bound is over the policy's limit. Raises Stopped and Lost."""
        predicate = done.certificate["predicate"]
        if predicate["claim"]["limit"] != self.policy.limit:
            predicate = certify(".", limit=self.policy.limit)["predicate"]
        upper = max((judge["upper"] for judge in predicate["judges"].values()), default=None)
        outcome, limit = done.manifest.results, percent(self.policy.limit)
        self.found["trained"] = outcome.trained
        self.found["safety"] = {
            "before": runs.finite(outcome.before),
            "after": runs.finite(outcome.after),
            "upper": upper,
            "limit": self.policy.limit,
            "certified": predicate["certified"],
            "reason": predicate["reason"],
        }
        self.store.note(self.job.id, self.owner, result=self.found, trained_tokens=done.tokens)
        if upper is None:
            unknown = "No request was asked of the trained model, so that its safety is unknown: it is withheld."
            raise Stopped(UNSAFE, unknown)
        if upper > self.policy.limit:
            may = f"The trained model may answer up to {percent(upper)} of harmful requests"
            raise Stopped(UNSAFE, f"{may}, and the limit is {limit}: it is withheld.")
        self._say(f"Safety check passed: at most {percent(upper)} of harmful requests are answered (limit {limit})")
        self.store.finish(self.job.id, self.owner, name_of(self.job), result_files=self._keep())

    def _keep(self) -> list[str]:
        """Make the results that there are downloadable; the ids of their files, which are the same each time."""
        ids = []
        for path, name, _ in (one for one, _ in results(self.folder) if one.name):
            ids.append(id := "file-" + hashlib.sha256(f"{self.job.id}/{name}".encode()).hexdigest()[:32])
            with (self.folder / path).open("rb") as source:
                size, sha256 = self.content.keep(id, source)
            self.store.add_file(self.job.project_id, id, f"{self.job.id}/{name}", "fine-tune-results", size, sha256)
        self.store.note(self.job.id, self.owner, result_files=ids)
        return ids

    def _say(self, message: str, level: str = "info", data: dict[str, Any] | None = None, **fields: Any) -> None:
        self.store.say(self.job.id, self.owner, message, level, data, **fields)

    def _progress(self, stage: str, done: int, total: int) -> None:
        """An event for each stage, and for each tenth of the training; the numbers in between once a second."""
        if stage != self.stage:
            self.stage, self.reported, self.steps = stage, 0.0, 0
            self._say(f"{stage[:1].upper()}{stage[1:]}")
        if time.monotonic() - self.reported > 1 or done == total:
            self.reported = time.monotonic()
            self.store.note(self.job.id, self.owner, stage=stage, done=done, total=total)
        if stage == "training" and done:
            self._stepped(done, total)

    def _stepped(self, done: int, total: int) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > self.steps:
            self.steps = tenth
            self.store.step(self.job.id, self.owner, done, total)
        for folder in (self.folder / runs.WORK / "checkpoints").glob("*/checkpoint-*"):
            step = folder.name.rpartition("-")[2]
            if step.isdigit() and int(step) < done:  # it is whole once a later step is taken
                self.store.add_checkpoint(self.job.id, self.owner, int(step), {"step": int(step)})


def _problem(file: str, method: str) -> str:
    """What is wrong with the rows of a file: broken ones, ones of another method, or fewer than ten. Empty if nothing is."""
    try:
        read = data.read(file)
    except DataError as error:
        return str(error)
    if read.quarantined:
        lines = ", ".join(f"line {bad.line}: {bad.reason}" for bad in read.quarantined[:5])
        return f"{len(read.quarantined)} rows cannot be used ({lines})."
    shapes = read.examples.shapes
    pairs, wanted = shapes.where(PREFERENCE), "preference pairs"
    others = ~pairs
    if method == "supervised":
        others, wanted = pairs | shapes.where("kto"), "rows of one answer, without a label"
    for i in np.flatnonzero(others)[:1].tolist():
        line = read.source.lines[int(read.examples.rows[i])]
        return f"Line {line} is of the shape {shapes[i]}: the method {method} takes {wanted}."
    few = f"The file has {len(read.examples)} rows, and at least {LEAST_ROWS} are needed."
    return few if len(read.examples) < LEAST_ROWS else ""


def recipe(settings: Settings, model: str, method: Method, defence: str) -> dict[str, Any]:
    """Arguments of `train` for a model of the settings and what a request chose. Raises UsageError and DataError."""
    where, searching = settings.models[model], parse(defence).verified is not None
    training, lora = {"assistant_only_loss": None, **settings.training}, settings.lora
    if where == LAB:
        where, lora = str(lab.checkpoint("aligned")), {**lab.LORA, **lora}
        training = {**lab.recipe(TASK), "save_strategy": "epoch", **settings.training}  # checkpoints are kept here
        probing, exams = lab_probing(), Exams(_lab("report"), _lab("search") if searching else Exam())
    else:
        asked, alike = (read_prompts(one) if one else () for one in (settings.probes, settings.lookalikes))
        probing = Probing(requests=asked, lookalikes=alike)
        exams = exams_of(settings.safety, settings.judges, None, None, settings.max_new_tokens, "", searching)
    check_names(training)
    known = names_of(method.type == "dpo")  # the settings hold options of both methods
    training = {name: value for name, value in training.items() if name in known}
    wanted = {name: value for name, value in method.hyperparameters.model_dump().items() if value != "auto"}
    if (times := wanted.pop("learning_rate_multiplier", None)) is not None:
        wanted["learning_rate"] = training.get("learning_rate", RATES[method.type]) * times
    training |= {NAMES.get(name, name): value for name, value in wanted.items()}
    return {"model": where, "training": training, "peft_config": peft_config(lora), "probing": probing, "exams": exams}


def _lab(split: str) -> Exam:
    return replace(lab_exam(TASK, split), task=(), score=None, metric="")


def loaded(start: str, name: str) -> LoadedModel:
    """A recipe's model, in reports under its name on the wire where it is in a folder of the server. Raises ModelError."""
    found = loading.load(start)
    return replace(found, name=name, adapter=found.adapter and name) if Path(start).is_dir() else found


def validated(exams: Exams, file: str) -> Exams:
    """The exams with the likelihood of a validation file's answers, of which a search has half. Raises DataError."""
    searching = bool(exams.search.requests)

    def of(split: str, own: Exam) -> Exam:
        held = exam(split, None, task=file, metric=LIKELIHOOD, halved=searching)
        return replace(own, task=held.task, metric=held.metric)

    return Exams(of("report", exams.report), of("search", exams.search) if searching else exams.search)


def ours(error: GradShieldError, job: str) -> Stopped:
    """What a job's owner reads of an error in what the operator chose; the log alone names it."""
    log.error("the settings, a model, a judge or a file of the server cannot be used", error=str(error))
    said = "The server's settings, models or judges do not work for this job: ask its operator, and name the job"
    return Stopped("server_error", f"{said} {job}.")


def failed(run: Run, error: GradShieldError) -> None:
    """The last transition of a job that cannot go on. An error that is not about the owner's rows is the operator's."""
    if isinstance(error, DataError):
        error = Stopped("invalid_training_file", str(error))
    elif not isinstance(error, Stopped):
        error = ours(error, run.job.id)
    run.store.fail(run.job.id, run.owner, error.code, str(error), error.param, result_files=run._keep())


def main(arguments: Sequence[str]) -> int:
    """Run a job, if it is to be run and nobody runs it."""
    folder, id, owner = arguments
    settings = Settings.read(Path(folder))
    store = Store(settings.database_url, settings.webhooks)
    job = store.claim(id, owner, settings.lease)
    if job is None:
        return 0
    warnings.showwarning = lambda message, *_, **__: log.warning("warning", text=str(message))  # for the operator
    structlog.contextvars.bind_contextvars(job=id, attempt=job.attempt)
    run = Run(settings, store, Content(settings.files_url), job, owner)
    heart = Heart(store, id, owner, settings.lease)
    heart.start()
    try:
        run.whole()
    except (Lost, Held):
        pass
    except GradShieldError as error:
        full = getattr(error.__context__, "errno", None) in runs.FULL
        if full or isinstance(error.__context__, Timeout):  # another process has not let go of the folder yet
            return _again(run, error)
        failed(run, error)
    except OSError as error:
        return _again(run, error)
    except AWAY as error:  # the job goes on when its lease is over, or when its worker ends it
        log.warning("the database cannot be reached", error=str(error))
        return ORPHANED
    except Exception as error:
        log.error("the job failed", exc_info=error)
        message = f"The server had an error ({type(error).__name__}) and could not finish the job."
        store.fail(id, owner, "server_error", message)
    finally:
        heart.stopped.set()
    return 0


def _again(run: Run, error: Exception) -> int:
    """Let the job wait for another attempt."""
    log.error("the job cannot go on now", error=str(error))
    run._say("The server cannot use the job's files now: the job goes on later", "warn")
    run.store.give_up(run.job.id, run.owner, AGAIN)
    return 0


if __name__ == "__main__":
    configure()
    raise SystemExit(main(sys.argv[1:]))
