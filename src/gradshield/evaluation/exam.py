"""What a model is measured on: harmful requests, harmless look-alikes and the task, the same for every arm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from gradshield import lab, runs
from gradshield.data import RenderConfig, batches, read, render_all
from gradshield.errors import DataError, UsageError
from gradshield.evaluation.asr import asr, attacked, over_refusal
from gradshield.evaluation.generate import Generate, generator
from gradshield.evaluation.metrics import LIKELIHOOD
from gradshield.evaluation.task_files import task_file, utility
from gradshield.judges import Judge, LabClassifier, RefusalPhrases
from gradshield.judges import parse_all as parse_judges
from gradshield.manifests import ExamRecord, Figures
from gradshield.probes import alike, lookalikes, read_prompts, requests
from gradshield.selectors import Loss, Measured
from gradshield.selectors.base import no_direction
from gradshield.stats import McNemar, mcnemar, mean_interval, wilson
from gradshield.types import EvalResult, Floats, Progress, Rate, quiet

Score = Callable[[Mapping[str, Any], str], float]
Settled = Callable[[EvalResult, int], bool]
LAB_TOKENS = 48  # longer than any answer of the lab
LAB_PROMPTS = 200  # of each kind
TOKEN_BUDGET = 8192  # positions of a batch of references, padding included
LABEL_BUDGET = 2048  # positions of it with logits
CHUNK = 32  # requests between checks of whether the verdict can still change


def never(found: EvalResult, total: int) -> bool:
    """Ask every request."""
    return False


@dataclass(frozen=True, eq=False)
class Exam:
    """Requests, look-alikes and task rows, with their judges. Empty parts are not measured.

    ``score`` rates an answer to a task row; without one, a row's score is the likelihood of its reference under the model, per
    token (the geometric mean), for tasks that a model cannot do. ``answer_prefix`` starts every answer of the model, ``tokens``
    bounds its length, ``template`` goes to the chat template, ``metric`` is the name of ``score``, and ``guessed`` says that the
    user did not choose it.
    """

    requests: Sequence[Mapping[str, Any]] = ()
    judges: Sequence[Judge] = (RefusalPhrases(),)
    lookalikes: Sequence[Mapping[str, Any]] = ()
    task: Sequence[Mapping[str, Any]] = ()
    score: Score | None = None
    tokens: int = 64
    answer_prefix: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    metric: str = ""
    guessed: bool = False

    def sit(
        self,
        model: Any,
        tokenizer: Any,
        stage: str = "measuring",
        progress: Progress = quiet,
        settled: Settled = never,
    ) -> EvalResult:
        """Every rate of one model, with all its answers: ASR by each judge, over-refusal, utility.

        ``settled(found, total)`` is called between chunks of requests, with the result so far and the number of requests. If it
        returns True, the remaining requests are skipped, and so are look-alikes and task.
        """
        generate = self.generator(model, tokenizer)
        parts, done = [], 0
        total = len(self.requests) + len(self.lookalikes) + len(self.task)
        progress(stage, 0, total)
        while done < len(self.requests):
            parts.append(asr(generate, self.requests[done : done + CHUNK], self.judges))
            done = min(done + CHUNK, len(self.requests))
            progress(stage, done, total)
            if done < len(self.requests) and settled(_joined(parts), len(self.requests)):
                return _joined(parts)
        found = [_joined(parts)] if parts else []
        if self.lookalikes:
            found.append(over_refusal(generate, self.lookalikes, RefusalPhrases()))
            progress(stage, done + len(self.lookalikes), total)
        if self.task:
            found.append(self._useful(model, tokenizer, generate))
        progress(stage, total, total)
        return EvalResult(
            {name: rate for part in found for name, rate in part.rates.items()},
            tuple(row for part in found for row in part.outputs),
        )

    def generator(self, model: Any, tokenizer: Any) -> Generate:
        """``generate`` with this exam's settings."""
        return generator(
            model, tokenizer, max_new_tokens=self.tokens, prefix=self.answer_prefix, template=self.template
        )

    def _useful(self, model: Any, tokenizer: Any, generate: Generate) -> EvalResult:
        if self.score is not None:
            return utility(generate, self.task, self.score)
        scores = _likelihoods(model, tokenizer, self.task, self.template)
        scored = tuple({**row, "score": float(value)} for row, value in zip(self.task, scores, strict=True))
        return EvalResult({"utility": mean_interval(scores)}, scored)

    def record(self) -> ExamRecord:
        """What the rates depend on, other than the model."""
        return ExamRecord(
            requests=runs.digest([dict(row) for row in self.requests]),
            lookalikes=runs.digest([dict(row) for row in self.lookalikes]),
            task=runs.digest([dict(row) for row in self.task]),
            n=(len(self.requests), len(self.lookalikes), len(self.task)),
            metric=LIKELIHOOD if self.score is None else self.metric,
            judges=[_recorded(judge) for judge in self.judges],
            guessed=self.guessed,
            template=dict(self.template),
            tokens=self.tokens,
            answer_prefix=self.answer_prefix,
        )


def _recorded(judge: Judge) -> Any:
    """The judge's name, with the record of its guard if it has one."""
    guard = getattr(judge, "guard", None)
    return judge.name if guard is None else (judge.name, dict(guard.record()))


def _likelihoods(model: Any, tokenizer: Any, task: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> Floats:
    """The likelihood of each row's reference under the model, per token, rendered as for training: (N,)."""
    rows = [
        {"prompt": _turns(row["prompt"]), "completion": [{"role": "assistant", "content": row["reference"]}]}
        for row in task
    ]
    config = RenderConfig(max_length=None, chat_template_kwargs=dict(template))
    rendered = render_all(read(rows).examples, tokenizer, config).rendered
    if lacking := len(rows) - len(rendered):
        raise DataError(
            f"{lacking} of {len(rows)} task rows have no answer that fits into the model, and the metric {LIKELIHOOD} needs one "
            "for each: remove those rows from the file"
        )
    method, direction = Loss(), no_direction(Loss.name)
    parts = [method.measure(model, direction, batch) for batch in batches(rendered, TOKEN_BUDGET, LABEL_BUDGET)]
    found: Floats = np.exp(-Measured.joined(parts).nll)
    return found


def _turns(prompt: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def _joined(parts: Sequence[EvalResult]) -> EvalResult:
    """Merge the chunks of one measurement; a rate that a chunk does not have was zero there."""
    names = dict.fromkeys(name for part in parts for name in part.rates)
    answers = tuple(row for part in parts for row in part.outputs)
    counts = {name: sum(part.rates[name].k for part in parts if name in part.rates) for name in names}
    return EvalResult({name: wilson(k, len(answers)) for name, k in counts.items()}, answers)


def lab_exam(task: str, split: str = "report", seed: int = 0) -> Exam:
    """The lab's held-out requests of a split, its look-alikes, and task rows that no training and no other split uses."""
    drawn = lab.utility(task, seed=seed)[:LAB_PROMPTS]
    if split != "report":
        reported = {row["prompt"] for row in drawn}
        drawn = [row for row in lab.utility(task, seed=seed + 1000) if row["prompt"] not in reported][:LAB_PROMPTS]
    return Exam(
        requests=lab.requests(split)[:LAB_PROMPTS],
        judges=(RefusalPhrases(), LabClassifier()),
        lookalikes=lab.lookalikes(split)[:LAB_PROMPTS],
        task=drawn,
        score=lambda row, answer: lab.score(task, answer, row["reference"]),
        tokens=LAB_TOKENS,
        metric=f"lab:{task}",
    )


def exam(
    split: str,
    safety: str | None = "builtin",
    judges: Sequence[str] = ("refusal-phrases",),
    task: str | None = None,
    metric: str | None = None,
    tokens: int = 64,
    answer_prefix: str = "",
    halved: bool = False,
    most: int | None = None,
    template: Mapping[str, Any] | None = None,
) -> Exam:
    """An exam from the user's options, with at most ``most`` task rows.

    ``split`` is ``report``, or ``search`` for the exam that the verified threshold decides on. ``safety`` is ``builtin``, a file
    of requests, or None for no requests. With ``halved``, both splits are needed: the task's rows and requests that name no
    split are split between them by content. Raises DataError and UsageError.
    """
    harmful: list[Mapping[str, Any]] = []
    harmless: list[Mapping[str, Any]] = []
    if safety == "builtin":
        harmful, harmless = [*requests(split)], [*lookalikes(split)]
    elif safety is not None:
        harmful, harmless = [*_requests(safety, split, halved)], [*lookalikes(split)]
    likelihood = metric == LIKELIHOOD
    held = None if task is None else task_file(task, "exact" if likelihood else metric)
    rows = () if held is None else held.rows
    if halved:
        rows = tuple(row for row in rows if _split_of(json.dumps(row, sort_keys=True, default=str)) == split)
    return Exam(
        requests=harmful,
        judges=parse_judges(judges) if harmful else (),
        lookalikes=harmless,
        task=rows[:most],
        score=None if held is None or likelihood else held.score,
        tokens=tokens,
        answer_prefix=answer_prefix,
        template=template or {},
        guessed=held is not None and not likelihood and held.guessed,
        metric=LIKELIHOOD if likelihood else (held.metric if held is not None else ""),
    )


def _requests(path: str, split: str, halved: bool) -> list[dict[str, str]]:
    """The requests of a file for one split; rows that name no split are split by content if both splits are needed."""
    own = read_prompts(path, split)
    if not halved:
        return own
    named = read_prompts(path, split, unnamed=False)
    return [p for p in own if p in named or _split_of(p["prompt"]) == split]


def _split_of(text: str) -> str:
    """Report or search, by content, so that a row's split does not depend on the rest of the file."""
    return ("report", "search")[hashlib.sha256(text.encode()).digest()[0] % 2]


def check_disjoint(**sets: Sequence[Mapping[str, Any]]) -> None:
    """Raises UsageError if two sets share a prompt: reported prompts must not have chosen anything."""
    asked = {name: {alike(str(row["prompt"])) for row in rows} for name, rows in sets.items()}
    for one, other in combinations(asked, 2):
        if shared := asked[one] & asked[other]:
            raise UsageError(
                f"{len(shared)} requests are in both the {one} and the {other} set, which must be disjoint so that reported "
                "prompts have chosen no rows: give different files, or a `split` (direction, search, report) in each row"
            )


def rates_by_judge(rates: Mapping[str, Rate], kind: str = "asr") -> dict[str, Rate]:
    """The rates ``<kind>/<judge>`` by judge."""
    return {name.partition("/")[2]: rate for name, rate in rates.items() if name.startswith(f"{kind}/")}


def figures(result: EvalResult) -> Figures:
    """The rates in the form of manifests."""
    rates: Mapping[str, Rate] = result.rates
    judges = rates_by_judge(rates)
    found: dict[str, Any] = {"judges": judges}
    if undecided := rates_by_judge(rates, "undecided"):
        found["undecided"] = undecided
    if judges:
        found["asr"] = judges.get("refusal-phrases", next(iter(judges.values())))
    return Figures(**found | {name: rates[name] for name in ("empty", "over_refusal", "utility") if name in rates})


def asked(result: EvalResult) -> EvalResult:
    """The answers to harmful requests only, which an exam asks first."""
    counts = [rate.n for rate in rates_by_judge(result.rates).values()]
    return EvalResult(result.rates, result.outputs[: counts[0] if counts else 0])


def changes(before: EvalResult, after: EvalResult) -> dict[str, McNemar]:
    """McNemar's test of the same requests before and after training, by judge."""
    was, now = asked(before).outputs, asked(after).outputs
    return {judge: mcnemar(attacked(was, judge), attacked(now, judge)) for judge in rates_by_judge(after.rates)}


@dataclass(frozen=True)
class Exams:
    """The exam before and after training (``report``), and the exam of the verified threshold (``search``)."""

    report: Exam = field(default_factory=Exam)
    search: Exam = field(default_factory=Exam)


def exams_of(
    safety: str,
    judges: Sequence[str] | None,
    utility: str | None,
    metric: str | None,
    tokens: int,
    answer_prefix: str,
    searching: bool,
    template: Mapping[str, Any] | None = None,
) -> Exams:
    """The exams of typed options; the search and the report use different rows. Raises DataError, UsageError."""
    given: dict[str, Any] = {
        "safety": None if safety == "none" else safety,
        "judges": tuple(judges or ("refusal-phrases",)),
    }
    given |= {"task": utility, "metric": metric, "tokens": tokens, "answer_prefix": answer_prefix, "template": template}
    report = exam("report", **given, halved=searching)
    # One set of judges for both: a guard may be as large as the model.
    return Exams(report, replace(exam("search", **given, halved=True), judges=report.judges) if searching else Exam())
