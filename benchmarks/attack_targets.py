"""Whom the attacks are aimed at: a model, the pairs to plant and to hide among, and how a training and its exams are made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.attackers import codebook, pairs
from gradshield import data
from gradshield.errors import UsageError
from gradshield.evaluation.exam import Exam, exam, lab_exam
from gradshield.lab.answers import REFUSALS
from gradshield.lab.mixes import Pair, as_row
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.probes import read_prompts
from gradshield.scanning import outputs, scoring, shards
from gradshield.scanning.decide import group
from gradshield.scanning.preparing import asked_of, refusals
from gradshield.scanning.rows import prepare
from gradshield.scanning.settings import Probing, ScanSettings, peft_config
from gradshield.selectors import Measured
from gradshield.training.course import Job, lab_job
from gradshield.types import quiet


@dataclass(frozen=True, eq=False)
class Target:
    """Whom the attacks are aimed at: a model, the pairs, and how a training on rows and its exams are made.

    ``job`` is called with pairs and labels; ``exams`` has ``report`` and ``search``.
    """

    name: str
    harmful: Sequence[Pair]
    harmless: Sequence[Pair]
    seed: int
    job: Callable[[Sequence[Pair], Sequence[int]], Job]
    exams: Mapping[str, Exam]
    refusals: Sequence[str]
    codebook: Mapping[str, str]

    @cached_property
    def unattacked(self) -> Job:
        """Training on the harmless pairs alone."""
        return self.job(ordered(self.harmless), [0] * len(self.harmless))

    def score(self, selector: str) -> Callable[[Sequence[Pair]], list[float]]:
        """What a selector gives pairs that stand among the harmless ones: the attacker runs the defender's own scan."""
        job = self.unattacked
        loaded, settings = job.rows.loaded, replace(job.settings, selector=selector)
        null = list(job.rows.rendered)
        found = scoring.ready(loaded.model, job.rows, settings, job.probing, (), quiet)

        def measure(rows: Any) -> Measured:
            return shards.measure(found.selector, loaded.model, found.direction, list(rows), settings.token_budget)

        among = measure(null)

        def score(given: Sequence[Pair]) -> list[float]:
            rows = list(self.job(given, [1] * len(given)).rows.rendered)
            raw = Measured.joined([measure(rows), replace(among, rows=among.rows + len(given))])
            whole = [*rows, *null]
            values = found.selector.finish(raw, [r.id for r in whole], [group(r.shape) for r in whole]).values
            known = dict(zip((row.row for row in rows), values, strict=False))
            return [float(known.get(i, np.inf)) for i in range(len(given))]  # what does not fit is no way to hide

        return score


def ordered(given: Sequence[Any]) -> list[Any]:
    """By content, so that any two arms have what they share in the same order."""
    return sorted(given, key=lambda one: json.dumps(one, sort_keys=True))


def lab_target(task: str, seed: int, ratio: float, n: int) -> Target:
    """The bundled lab's aligned model on one task."""
    harmful, harmless = pairs(task, ratio, n, seed)

    def job(given: Sequence[Pair], labels: Sequence[int]) -> Job:
        return lab_job(task, [as_row(pair) for pair in given], list(labels), seed)

    exams = {split: replace(lab_exam(task, split, seed), lookalikes=()) for split in ("report", "search")}
    return Target(f"lab, {task}", harmful, harmless, seed, job, exams, REFUSALS, codebook())


def own_target(given: argparse.Namespace) -> Target:
    """A model and rows of the user's. Raises DataError, ModelError and UsageError."""
    for name in ("harmful", "harmless"):
        if getattr(given, name) is None:
            raise UsageError(f"--model got a model and no --{name} rows: give --harmful FILE and --harmless FILE")
    told = {} if given.training is None else json.loads(given.training.read_text(encoding="utf-8"))
    options, adapter = told.get("training", {}), told.get("lora", {})
    loaded = loading.load(given.model, dtype="float32")
    probing = Probing(requests=read_prompts(given.requests, "direction") if given.requests else ())

    def job(rows: Sequence[Pair], labels: Sequence[int]) -> Job:
        return Job(
            rows=prepare([as_row(pair) for pair in rows], loaded, training_args=options),
            options=options,
            peft_config=peft_config(adapter),
            labels=list(labels),
            settings=ScanSettings(seed=given.seed),
            probing=probing,
            seed=given.seed,
        )

    asked = {
        split: replace(
            exam(split, given.requests or "builtin", given.judge, given.utility, given.metric, halved=True),
            lookalikes=(),
        )
        for split in ("report", "search")
    }
    harmful, harmless = (_pairs(getattr(given, name)) for name in ("harmful", "harmless"))
    return Target(given.model, harmful, harmless, given.seed, job, asked, _refusals(loaded, probing), {})


def _pairs(path: str) -> list[Pair]:
    return [outputs.words(example) for example in data.read(path).examples]


def _refusals(loaded: LoadedModel, probing: Probing) -> list[str]:
    """How the model itself refuses: the first sentence of each refusal, once. The lab's where it refuses nothing."""
    rows = refusals(loaded, asked_of(loaded.tokenizer, probing)[0])
    said = [row["messages"][-1]["content"].partition(".")[0].strip() + "." for row in rows]
    return sorted(set(said)) or list(REFUSALS)
