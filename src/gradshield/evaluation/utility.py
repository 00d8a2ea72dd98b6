"""Utility: the model's answers on held-out rows of the task, by the task's own score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradshield.errors import EmptyDataError
from gradshield.evaluation.generate import Generate
from gradshield.stats import mean_interval
from gradshield.types import EvalResult

Row = Mapping[str, Any]


def utility(generate: Generate, rows: Sequence[Row], score: Callable[[Row, str], float], seed: int = 0) -> EvalResult:
    """Mean of ``score(row, answer)`` over ``rows`` as the rate ``utility``; ``outputs`` holds each row's score.

    Scores of only 0 and 1 give a proportion with its Wilson interval, others a mean with a bootstrap interval under ``seed``.

    Parameters
    ----------
    rows
        Mappings with ``prompt`` (text or chat messages) and whatever ``score`` reads, such as a reference.
    score
        Maps a row and the model's answer to a number between 0 and 1.

    Raises
    ------
    EmptyDataError
        There are no rows.
    DataError
        A score lies outside [0, 1].
    """
    if len(rows) == 0:
        raise EmptyDataError("there is no row to measure utility on: pass at least one")
    answers = generate([row["prompt"] for row in rows])
    scores = [float(score(row, answer)) for row, answer in zip(rows, answers, strict=True)]
    outputs = tuple(
        {**row, "answer": answer, "score": value} for row, answer, value in zip(rows, answers, scores, strict=True)
    )
    return EvalResult({"utility": mean_interval(scores, seed=seed)}, outputs)
