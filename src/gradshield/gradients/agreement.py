"""The error of a fast engine against the oracle, and the finite-difference step that minimises it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from gradshield.gradients.finite_difference import FiniteDifference
from gradshield.gradients.loop import Loop
from gradshield.types import Batch, Direction, Floats

RELATIVE_STEPS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class EngineAgreement:
    """``relative_error`` is ‖f − o‖/‖o‖ over n rows, ``spearman`` their rank correlation (nan below three rows)."""

    engine: str
    n: int
    relative_error: float
    spearman: float


def agreement(engine: str, fast: Floats, oracle: Floats) -> EngineAgreement:
    """Compare the row sums of a fast engine with the oracle's, both (n,)."""
    from scipy.stats import spearmanr

    size = float(np.linalg.norm(oracle))
    error = float(np.linalg.norm(fast - oracle)) / size if size else float(np.linalg.norm(fast))
    rank = float(spearmanr(fast, oracle).statistic) if len(oracle) > 2 and np.ptp(oracle) > 0 else float("nan")
    return EngineAgreement(engine, len(oracle), error, rank)


def calibrated(model: nn.Module, batch: Batch, direction: Direction) -> tuple[FiniteDifference, dict[str, float]]:
    """The finite-difference engine whose step agrees best with the oracle on ``batch``, and the error of each step.

    Tries RELATIVE_STEPS, in units of ‖θ‖/‖v‖: smaller steps suffer from rounding, larger ones from curvature.
    """
    oracle = Loop().directional(model, batch, direction).values.numpy()
    errors = {}
    for step in RELATIVE_STEPS:
        fast = FiniteDifference(step).directional(model, batch, direction).values.sum(-1).numpy()
        errors[step] = agreement("finite-difference", fast.ravel(), oracle.ravel()).relative_error
    best = min(errors, key=lambda step: errors[step])
    return FiniteDifference(best), {f"{step:g}": error for step, error in errors.items()}
