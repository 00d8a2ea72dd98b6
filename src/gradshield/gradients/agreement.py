"""The error of a fast engine against the oracle, and the finite-difference step that minimises it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

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
    """The finite-difference engine whose step agrees best with the oracle on ``batch``, and the error of each step tried.

    Of RELATIVE_STEPS, in units of ‖θ‖/‖v‖: smaller steps suffer from rounding, larger ones from curvature. So the search goes
    from the default step to where the error falls, and ends before it rises.
    """
    oracle = Loop().directional(model, batch, direction).values.numpy()

    @cache
    def error(step: float) -> float:
        fast = FiniteDifference(step).directional(model, batch, direction).values.sum(-1).numpy()
        return agreement("finite-difference", fast.ravel(), oracle.ravel()).relative_error

    tried = {best := FiniteDifference().relative_step}
    for way in (RELATIVE_STEPS, RELATIVE_STEPS[::-1]):
        for step in way[way.index(best) + 1 :]:
            tried.add(step)
            if error(step) >= error(best):
                break
            best = step
    return FiniteDifference(best), {f"{step:g}": error(step) for step in sorted(tried)}
