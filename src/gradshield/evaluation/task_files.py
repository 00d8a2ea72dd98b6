"""A user's file of held-out rows, and utility: the model's answers on them, by the task's own score.

task = task_file("held-out.jsonl")           # or task_file(path, metric="number")
result = utility(generate, task.rows, task.score)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradshield.data.formats import read
from gradshield.data.raw_files import open_file
from gradshield.errors import DataError, EmptyDataError
from gradshield.evaluation import metrics
from gradshield.evaluation.generate import Generate
from gradshield.stats import mean_interval
from gradshield.types import Conversation, EvalResult, Example, Quarantined


@dataclass(frozen=True, eq=False)
class Task:
    """A user's held-out rows, ready for ``utility``.

    ``rows`` have ``prompt`` (text or messages), ``reference``, and ``metric`` if the row names one. ``score`` takes a row and
    an answer. ``metric`` is the metric of the other rows, and ``guessed`` says that the user did not choose it. ``set_aside``
    are unusable rows, each with its line and the reason.
    """

    rows: tuple[Row, ...]
    score: Callable[[Row, str], float]
    metric: str
    guessed: bool
    set_aside: tuple[Quarantined, ...]


def task_file(path: str | Path, metric: str | None = None) -> Task:
    """Read held-out rows: training rows of any shape ``data.read`` knows, or ``{"prompt", "reference", "metric"?}``.

    The final assistant turn (of a preference pair, the chosen one) is the reference, and everything before it is the prompt. A
    plain-text prompt is asked as a user turn.

    ``metric`` is a name that ``metrics.metric`` takes, for rows that name none; None guesses it from the references
    (``metrics.guess``). Raises UnknownNameError for an unknown metric, EmptyDataError if no row can be used, and as
    ``metrics.metric`` and ``data.read`` do.
    """
    if metric is not None:
        metrics.metric(metric)  # an unknown name is reported before the file is read
    opened = list(enumerate(open_file(Path(path))[1]))
    records = [(row, record) for row, record in opened if not record.reason]
    aside = [record.set_aside(row) for row, record in opened if record.reason]
    try:
        result = read([_answered(record.value) for _, record in records])
    except DataError:
        read(Path(path))  # the same error, about the file
        raise
    for bad in result.quarantined:
        row, record = records[bad.row]
        aside.append(record.set_aside(row, bad.reason))
    rows: list[Row] = []
    for example in result.examples:
        row, record = records[example.row]
        found = _row(example, record.value)
        if isinstance(found, str):
            aside.append(record.set_aside(row, found))
        else:
            rows.append(found)
    aside.sort(key=lambda bad: bad.row)
    if not rows:
        raise EmptyDataError(
            f"{path} has no row with a prompt and a reference (line {aside[0].line}: {aside[0].reason}): "
            "give rows that end with an answer"
        )
    unnamed = [row["reference"] for row in rows if "metric" not in row] or [row["reference"] for row in rows]
    name = metric or metrics.guess(unnamed)
    return Task(tuple(rows), _scorer(rows, name), name, metric is None, tuple(aside))


def _scorer(rows: Sequence[Row], name: str) -> Callable[[Row, str], float]:
    """A score by each row's own metric; the labels of a choice are those of the rows that share it."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row.get("metric", name), []).append(row["reference"])
    built = {own: metrics.metric(own, shared) for own, shared in references.items()}
    return lambda row, answer: built[row.get("metric", name)](row["reference"], answer)


def _answered(value: Any) -> Any:
    """A row of prompt and reference in a shape that ``read`` knows; any other row unchanged."""
    if not isinstance(value, Mapping) or not _is_reference_row(value):
        return value
    prompt, reference = value["prompt"], value["reference"]
    if isinstance(prompt, list):
        return {"messages": [*prompt, {"role": "assistant", "content": reference}]}
    return {"prompt": prompt, "completion": reference}


def _is_reference_row(value: Mapping[str, Any]) -> bool:
    others = any(value.get(key) is not None for key in ("completion", "messages", "chosen"))
    return not others and value.get("prompt") is not None and value.get("reference") is not None


def _row(example: Example, value: Mapping[str, Any]) -> dict[str, Any] | str:
    """The row for ``utility``, or the reason why it cannot be used."""
    best = max(example.conversations, key=lambda conversation: conversation.coefficient)
    found = _parts(best) if best.coefficient > 0 else None
    if found is None:
        return "it has no prompt followed by a text answer to train toward"
    row = {"prompt": found[0], "reference": found[1]}
    own = value.get("metric") if _is_reference_row(value) else None
    if own is None:
        return row
    return {**row, "metric": own} if isinstance(own, str) else "its metric is not a name"


def _parts(conversation: Conversation) -> tuple[Any, str] | None:
    if conversation.messages is None:
        prompt, reference = conversation.prompt, conversation.completion.strip()
        return (prompt, reference) if prompt.strip() and reference else None
    turns = list(conversation.messages)
    answers: list[str] = []
    while turns and turns[-1]["role"] == "assistant":
        answers.insert(0, _text(turns.pop().get("content")))
    reference = "\n".join(answer for answer in answers if answer).strip()
    return (turns, reference) if turns and reference else None


def _text(content: Any) -> str:
    """The text of a turn: a string, or the text parts of a list."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


Row = Mapping[str, Any]


def utility(generate: Generate, rows: Sequence[Row], score: Callable[[Row, str], float], seed: int = 0) -> EvalResult:
    """Mean of ``score(row, answer)`` over ``rows`` as the rate ``utility``; ``outputs`` holds each row's score.

    Scores of only 0 and 1 give a proportion with its Wilson interval, others a mean with a bootstrap interval under ``seed``.

    ``rows`` are mappings with ``prompt`` (text or chat messages) and whatever ``score`` reads, such as a reference; ``score``
    maps a row and the model's answer to a number between 0 and 1. Raises EmptyDataError for no rows, DataError for a score
    outside [0, 1].
    """
    if len(rows) == 0:
        raise EmptyDataError("there is no row to measure utility on: pass at least one")
    answers = generate([row["prompt"] for row in rows])
    scores = [float(score(row, answer)) for row, answer in zip(rows, answers, strict=True)]
    outputs = tuple(
        {**row, "answer": answer, "score": value} for row, answer, value in zip(rows, answers, scores, strict=True)
    )
    return EvalResult({"utility": mean_interval(scores, seed=seed)}, outputs)
