"""Bridges to the harnesses that people measure with already, so that their numbers stand beside ours.

lm_eval_tasks    tasks of lm-evaluation-harness, by name or from the user's own YAML files
inspect_task     an Inspect task file

Both run the model in this process and give back rates with n and intervals. Both are optional: pip install 'gradshield[harness]'.

Trust: an Inspect task file is Python, and a YAML task may name Python functions of files beside it. They are the user's
own code and run with the user's rights because the user asked for that very file; nothing here fetches or finds one.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradshield.errors import DataError, UsageError
from gradshield.evaluation.generate import Generate
from gradshield.models.loading import evaluating
from gradshield.stats import mean_interval
from gradshield.types import EvalResult, Rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "pip install 'gradshield[harness]'"
MESSAGE_CHARACTERS = 300  # of another program's complaint


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    include: str | Path | None = None,
    chat_template: bool | None = None,
    batch_size: int = 16,
) -> EvalResult:
    """Scores of tasks of lm-evaluation-harness as rates ``lm-eval/<task>/<metric>``, the filter's name after a comma.

    A rate is the mean of a metric's scores over the documents, where those lie between 0 and 1 and their mean is what the
    harness reports itself; perplexities and figures of a whole corpus are left out. ``outputs`` has one mapping per
    document and filter. The model, its mode and the tokenizer are as before afterwards; the harness sets the random seeds.

    Parameters
    ----------
    tasks
        Names of tasks; their data comes from the hub where the task says so.
    limit
        Most documents of a task; None takes all.
    include
        Folder of the user's own YAML tasks.
    chat_template
        Whether prompts are rendered with the tokenizer's chat template; None where it has one.

    Raises
    ------
    UsageError
        lm-eval is not installed, there is no such task, or a template was asked of a tokenizer that has none.
    DataError
        No metric of these tasks is a mean of scores between 0 and 1.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UsageError(f"lm-eval is not installed, and tasks of it were asked for: run {INSTALL}") from None
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat_template and not has_template:
        raise UsageError("the tokenizer has no chat template, and one was asked for: leave chat_template out")
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    if include is not None and not set(tasks) <= set(manager.all_tasks):  # reading all its own tasks takes long
        manager = TaskManager(include_path=str(include))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown or not tasks:
        raise UsageError(
            f"lm-eval has no task {', '.join(map(repr, unknown)) or 'to run'}: name tasks that `lm-eval ls tasks` lists, "
            "or the folder of your own"
        )
    with _unchanged(model):
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            apply_chat_template=has_template if chat_template is None else chat_template,
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
                "scores": {name: _plain(row[name]) for name in row["metrics"]},
            }


def _first_argument(arguments: Any) -> str:
    """The text that the model was given: of several requests of one document (its choices), the first's."""
    first = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return str(first["arg_0"] if isinstance(first, Mapping) else first[0])


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


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


def inspect_task(
    task_file: str | Path, generate: Generate, limit: int | None = None, log_dir: str | Path | None = None
) -> EvalResult:
    """Scores of an Inspect task file as rates ``inspect/<task>/<scorer>``.

    The file is the user's own Python code, and is run. Its solver's calls to the model are answered by ``generate``: greedy,
    with its own bound on new tokens, in batches of the calls that wait at the same time. What the task asks of sampling
    is left out, and so are its epochs, since every one would say the same. ``outputs`` has one mapping per sample.

    Parameters
    ----------
    log_dir
        Folder for Inspect's own log, which ``inspect view`` opens; None keeps none.

    Raises
    ------
    UsageError
        inspect-ai is not installed, or there is no such file.
    DataError
        The task failed, or no scorer of it gives scores between 0 and 1.
    """
    try:
        import inspect_ai
    except ImportError:
        raise UsageError(f"inspect-ai is not installed, and a task file of it was given: run {INSTALL}") from None
    path = Path(task_file).resolve()
    if not path.is_file():
        raise UsageError(f"there is no Inspect task file {Path(task_file)}: name an existing .py file")
    kept = None if log_dir is None else str(Path(log_dir).resolve())
    # Inspect reads the name of a task file as a pattern, below the folder it runs in.
    with tempfile.TemporaryDirectory() as folder, _logging_unchanged(), contextlib.chdir(path.parent):
        logs = inspect_ai.eval(
            glob.escape(path.name),
            model=_answering(generate),
            log_dir=kept or folder,
            limit=limit,
            epochs=1,
            display="none",
            max_samples=256,
            log_level="critical",
        )
        # Its samples stand in the log file until they are asked for.
        finished = [(log, list(log.samples or ())) for log in logs if log.status == "success"]
    for log in logs:
        if log.status != "success":
            why = str(log.error.message if log.error else log.status)[:MESSAGE_CHARACTERS]
            raise DataError(
                f"the Inspect task {log.eval.task} of {path.name} did not finish ({why}): mend the task file"
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
    """An Inspect model whose calls are answered by ``generate``, all that wait together in one batch."""
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
                raise UsageError("the Inspect task gives the model tools, which are not supported: take a task without")
            call: dict[str, Any] = {"prompt": [{"role": turn.role, "content": turn.text} for turn in input]}
            self.waiting.append(call)
            self.lock = self.lock or anyio.Lock()  # bound to the loop that Inspect runs
            async with self.lock:
                if not call.keys() & {"answer", "error"}:
                    await anyio.sleep(0.01)  # the others arrive meanwhile
                    self.answer_all()
            if "error" in call:
                raise call["error"]
            return ModelOutput.from_content("gradshield", call["answer"])

        def answer_all(self) -> None:
            calls, self.waiting = self.waiting, []
            try:
                answers = generate([call["prompt"] for call in calls])
            except Exception as error:  # told to every caller, in whose own task Inspect reports it
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
            f"{harness} gave no score between 0 and 1 for any row of these tasks: take a task with a metric like accuracy"
        )
    return rates


@contextmanager
def _unchanged(model: PreTrainedModel) -> Iterator[None]:
    """The model's parameters (a harness may tie them again) and modes, put back at the end."""
    slots = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        with evaluating(model):
            yield
    finally:
        for module, parameters in slots:
            module._parameters.update(parameters)


@contextmanager
def _logging_unchanged() -> Iterator[None]:
    """The root logger as it was, after a program that sets it up for itself."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
