"""What training on one task after another does to earlier tasks and to the safe basin.

Every function takes ``accuracy`` (T + 1, T): row t holds the accuracy on every task after training on the first t, row 0 that
of the untrained model; column j is the task trained at step j + 1, and may be NaN before that step. Results are (T,), one
number per step; transfer and forgetting are NaN at the first step, which has no earlier task.

Source: arXiv 2604.17215 for the choice of figures; backward transfer as in Lopez-Paz and Ranzato (arXiv 1706.08840),
forgetting as in Chaudhry et al. (arXiv 1801.10112).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gradshield.errors import DataError
from gradshield.types import Floats


def accuracy_so_far(accuracy: ArrayLike) -> Floats:
    """After each step, the mean accuracy over the tasks trained so far (T,)."""
    table = _table(accuracy)
    return np.array([table[t, :t].mean() for t in range(1, len(table))])


def backward_transfer(accuracy: ArrayLike) -> Floats:
    """After each step, the mean over earlier tasks of accuracy now minus accuracy when learned (T,); below 0 is loss."""
    table = _table(accuracy)
    learned = np.diagonal(table[1:])  # (T,): task j right after its own training
    return np.array([_mean(table[t, : t - 1] - learned[: t - 1]) for t in range(1, len(table))])


def forgetting(accuracy: ArrayLike) -> Floats:
    """After each step, the mean over earlier tasks of the best accuracy since the task was learned minus that now (T,).

    The best is over the steps before the present one, so a new best gives a value below 0. Accuracy before a task's own
    training does not count, since losing it is not forgetting.
    """
    table = _table(accuracy)
    steps = range(1, len(table))
    return np.array([_mean(np.array([table[j + 1 : t, j].max() - table[t, j] for j in range(t - 1)])) for t in steps])


def basin_retention(visages: ArrayLike) -> Floats:
    """VISAGE after each step over VISAGE at the start (T,), from VISAGE of the models (T + 1,), the start first.

    1 is a basin as wide as before. Raises DataError if the start has no basin, or there is no step.
    """
    values = np.asarray(visages, dtype=np.float64)
    if values.ndim != 1 or values.size < 2 or not np.isfinite(values).all():
        raise DataError(
            f"basin retention takes the VISAGE of the start and of each step, got {values.tolist()}: pass two or more numbers"
        )
    if not values[0] > 0:
        raise DataError(
            f"the VISAGE at the start is {values[0]}, so there is no basin to retain: take an aligned model"
        )
    retained: Floats = values[1:] / values[0]
    return retained


def _table(accuracy: ArrayLike) -> Floats:
    table = np.asarray(accuracy, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] == 0 or table.shape[0] != table.shape[1] + 1:
        raise DataError(
            f"accuracies must be (tasks + 1, tasks), the start first, got {table.shape}: measure every task at every step"
        )
    needed = np.tri(len(table), table.shape[1], k=-1, dtype=np.bool_)  # every task from its own step on
    if not np.isfinite(table[needed]).all():
        raise DataError(
            "an accuracy is missing or not finite: measure every task at its own step and at every later one"
        )
    return table


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")
