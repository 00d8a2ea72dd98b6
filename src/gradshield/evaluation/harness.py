"""Bridges to common evaluation harnesses.

lm_eval_tasks    tasks of lm-evaluation-harness, by name or from the user's YAML files
inspect_task     an Inspect task file

Both run the model in this process and return rates with n and intervals. Both are optional: pip install 'gradshield[harness]'.

Trust: an Inspect task file is Python, and a YAML task may name Python functions of files next to it. This is the user's own
code, run with the user's rights because the user named the file; nothing here fetches or searches for one.
"""

from __future__ import annotations

import copy
import glob
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradshield.errors import DataError, UsageError
from gradshield.evaluation.generate import Generate
from gradshield.models.modules import evaluating
from gradshield.stats import mean_interval
from gradshield.types import EvalResult, Rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'gradshield[harness]'"
MESSAGE_CHARACTERS = 300  # of another program's error message


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    include: str | Path | None = None,
) -> EvalResult:
    """Scores of tasks of lm-evaluation-harness as rates ``lm-eval/<task>/<metric>``, the filter's name after a comma.

    A rate is the mean of a metric's scores over the documents, if they lie between 0 and 1 and the harness reports the same
    mean; perplexities and corpus-level figures are left out. Prompts use the tokenizer's chat
    template if it has one. ``outputs`` has one mapping per document and filter. The model, its mode and the tokenizer are
    restored; the harness sets the random seeds.

    ``tasks`` are names, whose data may come from the hub; ``limit`` is the most documents per task; ``include`` is a folder of
    the user's own YAML tasks. Raises UsageError if lm-eval is not installed or a task is unknown, DataError if no metric of
    these tasks is a mean of scores between 0 and 1.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(f"lm-eval is not installed, and tasks of it were given: run {INSTALL}") from None
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    if include is not None and not set(tasks) <= set(manager.all_tasks):  # indexing the built-in tasks is slow
        manager = TaskManager(include_path=str(include))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise UsageError(
            f"lm-eval has no task {', '.join(map(repr, unknown)) or 'to run'}: name tasks that `lm-eval ls tasks` lists, "
            "or the folder of your own"
        )
    with _unchanged(model):
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=16)
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            apply_chat_template=bool(getattr(tokenizer, "chat_template", None)),
            log_samples=True,
            bootstrap_iters=0,
        )
    outputs = tuple(_lm_eval_outputs(found["samples"]))
    return EvalResult(_lm_eval_rates(outputs, found["results"]), outputs)


def _lm_eval_outputs(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    for task, rows in samples.items():
        for row in rows:
            yield {
                "task": task,
                "filter": row["filter"],
                "prompt": _first_argument(row["arguments"]),
                "reference": row["target"],
                "answer": row["filtered_resps"][0] if len(row["filtered_resps"]) == 1 else row["filtered_resps"],
                "scores": {n: row[n].item() if hasattr(row[n], "item") else row[n] for n in row["metrics"]},
            }


def _first_argument(arguments: Any) -> str:
    """The model's input: the first of a document's requests (its choices)."""
    first = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return str(first["arg_0"] if isinstance(first, Mapping) else first[0])


def _lm_eval_rates(outputs: Iterable[Mapping[str, Any]], reported: Mapping[str, Mapping[str, Any]]) -> dict[str, Rate]:
    scores: dict[tuple[str, str, str], list[Any]] = {}
    for row in outputs:
        for name, value in row["scores"].items():
            scores.setdefault((row["task"], name, row["filter"]), []).append(value)
    rates = {}
    for (task, name, filtered), values in scores.items():
        own = reported.get(task, {}).get(f"{name},{filtered}")
        if not _bounded(values) or not isinstance(own, int | float):
            continue
        rate = mean_interval([float(value) for value in values])
        if math.isclose(rate.rate, own, rel_tol=1e-9, abs_tol=1e-9):
            rates[f"lm-eval/{task}/{name}" + ("" if filtered == "none" else f",{filtered}")] = rate
    return _some(rates, "lm-eval")


def inspect_task(task_file: str | Path, generate: Generate, limit: int | None = None) -> EvalResult:
    """Scores of an Inspect task file as rates ``inspect/<task>/<scorer>``.

    The file is the user's own Python code, and is run. ``generate`` answers its solver's calls to the model: greedily, with its
    own limit on new tokens, batching calls that wait at the same time. The task's sampling options are ignored, and so are its
    epochs, which would all be equal. ``outputs`` has one mapping per sample.

    Raises UsageError if inspect-ai is not installed or there is no such file, DataError if the task failed or none of its
    scorers gives scores between 0 and 1.
    """
    try:
        import inspect_ai
    except ImportError:
        raise UsageError(f"inspect-ai is not installed, and an Inspect task file was given: run {INSTALL}") from None
    path = Path(task_file).resolve()
    if not path.is_file():
        raise UsageError(f"there is no Inspect task file {Path(task_file)}: give an existing .py file")
    # Inspect reads the name of a task file as a pattern relative to the working directory.
    with tempfile.TemporaryDirectory() as folder, _logging_unchanged(), chdir(path.parent):
        logs = inspect_ai.eval(
            glob.escape(path.name),
            model=_answering(generate),
            log_dir=folder,
            limit=limit,
            epochs=1,
            display="none",
            max_samples=256,
            log_level="critical",
        )
        # Samples are read from the log file lazily.
        finished = [(log, list(log.samples or ())) for log in logs if log.status == "success"]
    for log in logs:
        if log.status != "success":
            why = str(log.error.message if log.error else log.status)[:MESSAGE_CHARACTERS]
            raise DataError(
                f"the Inspect task {log.eval.task} of {path.name} did not finish ({why}): fix the task file"
            )
    outputs = tuple(_inspect_outputs(finished))
    scores: dict[str, list[float]] = {}
    for row in outputs:
        for name, value in row["scores"].items():
            scores.setdefault(f"inspect/{row['task']}/{name}", []).append(value)
    rates = {name: mean_interval(values) for name, values in scores.items() if _bounded(values)}
    return EvalResult(_some(rates, "Inspect"), outputs)


def _inspect_outputs(logs: Iterable[tuple[Any, Sequence[Any]]]) -> Iterator[dict[str, Any]]:
    from inspect_ai.scorer import value_to_float

    as_number = value_to_float()
    for log, samples in logs:
        for sample in samples:
            asked = sample.input if isinstance(sample.input, str) else [turn.model_dump() for turn in sample.input]
            scalars = {n: s.value for n, s in (sample.scores or {}).items() if isinstance(s.value, str | int | float)}
            yield {
                "task": log.eval.task,
                "prompt": asked,
                "reference": sample.target,
                "answer": sample.output.completion,
                "scores": {name: as_number(value) for name, value in scalars.items()},
            }


def _answering(generate: Generate) -> Any:
    """An Inspect model that answers with ``generate``; calls that wait at the same time form one batch."""
    import anyio
    from inspect_ai.model import ModelAPI, ModelOutput, get_model, modelapi

    @modelapi(name="gradshield")
    class Answering(ModelAPI):
        def __init__(self, model_name: str, *given: Any, **named: Any) -> None:
            super().__init__(model_name, *given, **named)
            self.lock: anyio.Lock | None = None
            self.waiting: list[dict[str, Any]] = []

        def max_connections(self) -> int:
            return 256

        async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
            if tools:
                raise UsageError(
                    "the Inspect task gives the model tools, which are not supported: use one without tools"
                )
            call: dict[str, Any] = {"prompt": [{"role": turn.role, "content": turn.text} for turn in input]}
            self.waiting.append(call)
            self.lock = self.lock or anyio.Lock()  # bound to Inspect's event loop
            async with self.lock:
                if not call.keys() & {"answer", "error"}:
                    await anyio.sleep(0.01)  # lets other calls arrive
                    self.answer_all()
            if "error" in call:
                raise call["error"]
            return ModelOutput.from_content("gradshield", call["answer"])

        def answer_all(self) -> None:
            calls, self.waiting = self.waiting, []
            try:
                answers = generate([call["prompt"] for call in calls])
            except Exception as error:  # raised in every caller, where Inspect reports it
                for call in calls:
                    call["error"] = error
                return
            for call, answer in zip(calls, answers, strict=True):
                call["answer"] = answer

    return get_model("gradshield/in-process", memoize=False)


def _bounded(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and 0 <= value <= 1 for value in values)


def _some(rates: dict[str, Rate], harness: str) -> dict[str, Rate]:
    if not rates:
        raise DataError(
            f"{harness} gave no score between 0 and 1 for any row of these tasks: use a task with a metric like accuracy"
        )
    return rates


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Restore the model's parameters (a harness may tie them) and modes on exit."""
    slots = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        with evaluating(model):
            yield
    finally:
        for module, parameters in slots:
            module._parameters.update(parameters)


@contextmanager
def _logging_unchanged() -> Iterator[None]:
    """Restore the root logger on exit."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
