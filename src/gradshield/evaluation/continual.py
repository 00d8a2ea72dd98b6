"""What training on one task after another does to earlier tasks.

Every function takes ``accuracy`` (T + 1, T): row t holds the accuracy on every task after training on the first t, row 0 that
of the untrained model; column j is the task trained at step j + 1, and may be NaN before that step. Results are (T,), one
number per step; transfer and forgetting are NaN at the first step, which has no earlier task.

Source: arXiv 2604.17215 for the choice of figures; backward transfer as in Lopez-Paz and Ranzato (arXiv 1706.08840),
forgetting as in Chaudhry et al. (arXiv 1801.10112).
"""

from __future__ import annotations

import numpy as np

from gradshield.types import Floats


def accuracy_so_far(accuracy: Floats) -> Floats:
    """After each step, the mean accuracy over the tasks trained so far (T,)."""
    return np.array([accuracy[t, :t].mean() for t in range(1, len(accuracy))])


def backward_transfer(accuracy: Floats) -> Floats:
    """After each step, the mean over earlier tasks of accuracy now minus accuracy when learned (T,); below 0 is loss."""
    learned = np.diagonal(accuracy[1:])  # (T,): task j right after its own training
    return np.array([_mean(accuracy[t, : t - 1] - learned[: t - 1]) for t in range(1, len(accuracy))])


def forgetting(accuracy: Floats) -> Floats:
    """After each step, the mean over earlier tasks of the best accuracy since the task was learned minus that now (T,).

    The best is over the steps before the present one, so a new best gives a value below 0. Accuracy before a task's own
    training does not count, since losing it is not forgetting.
    """
    steps = range(1, len(accuracy))
    lost = [np.array([accuracy[j + 1 : t, j].max() - accuracy[t, j] for j in range(t - 1)]) for t in steps]
    return np.array([_mean(values) for values in lost])


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")
