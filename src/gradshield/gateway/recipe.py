"""What a job trains with: the settings, and what its request chose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradshield import lab
from gradshield.data.trl import check_names, names_of
from gradshield.evaluation.exam import Exam, Exams, exam, exams_of, lab_exam
from gradshield.evaluation.metrics import LIKELIHOOD
from gradshield.gateway.settings import LAB, Settings
from gradshield.gateway.wire import Method
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.probes import read_prompts
from gradshield.scanning.settings import Probing, peft_config
from gradshield.training.course import lab_probing
from gradshield.training.defences import parse

TASK = "dialogue"  # of the lab, whose learning rate suits most of its tasks
NAMES = {"n_epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size"}
RATES = {"supervised": 2e-5, "dpo": 1e-6}  # of full training, and TRL's own


@dataclass(frozen=True)
class Recipe:
    """Arguments of `gradshield.train`."""

    model: Path | str
    training: dict[str, Any]
    peft_config: Any
    probing: Probing
    exams: Exams


def recipe(settings: Settings, model: str, method: Method, defence: str) -> Recipe:
    """The recipe of a job on a model of the settings. Raises UsageError and DataError for what the settings name."""
    where, searching = settings.models[model], parse(defence).verified is not None
    if where == LAB:
        own = {
            name: value for name, value in lab.recipe(TASK).items() if name != "save_strategy"
        }  # checkpoints are kept here
        training, lora = {**own, **settings.training}, {**lab.LORA, **settings.lora}
        probing = lab_probing()
        exams = Exams(_lab("report"), _lab("search") if searching else Exam())
        start: Path | str = lab.checkpoint("aligned")
    else:
        training, lora, start = {"assistant_only_loss": None, **settings.training}, settings.lora, where
        probing = Probing(
            requests=read_prompts(settings.probes) if settings.probes else (),
            lookalikes=read_prompts(settings.lookalikes) if settings.lookalikes else (),
        )
        exams = exams_of(settings.safety, settings.judges, None, None, settings.max_new_tokens, "", searching)
    check_names(training)
    known = names_of(method.type == "dpo")  # the settings hold options of both methods
    training = {name: value for name, value in training.items() if name in known}
    return Recipe(start, {**training, **_chosen(training, method)}, peft_config(lora), probing, exams)


def loaded(start: Path | str, name: str) -> LoadedModel:
    """A recipe's model, in reports under its name on the wire where it lies in a folder of the server. Raises ModelError."""
    found = loading.load(start)
    return replace(found, name=name, adapter=found.adapter and name) if Path(start).is_dir() else found


def validated(exams: Exams, file: str) -> Exams:
    """The exams with the likelihood of a validation file's answers, of which a search has half. Raises DataError."""
    searching = bool(exams.search.requests)

    def of(split: str, own: Exam) -> Exam:
        held = exam(split, None, task=file, metric=LIKELIHOOD, halved=searching)
        return replace(own, task=held.task, metric=held.metric)

    return Exams(of("report", exams.report), of("search", exams.search) if searching else exams.search)


def _lab(split: str) -> Exam:
    return replace(lab_exam(TASK, split), task=(), score=None, metric="")


def _chosen(training: dict[str, Any], method: Method) -> dict[str, Any]:
    """The hyperparameters that the request names, as options of TRL's."""
    wanted = {name: value for name, value in method.hyperparameters.model_dump().items() if value != "auto"}
    if (times := wanted.pop("learning_rate_multiplier", None)) is not None:
        wanted["learning_rate"] = training.get("learning_rate", RATES[method.type]) * times
    return {NAMES.get(name, name): value for name, value in wanted.items()}
