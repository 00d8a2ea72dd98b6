"""Confidence intervals of proportions and means, and paired tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradshield.errors import DataError, UsageError
from gradshield.types import Floats, Rate

LEVEL = 0.95  # confidence of the intervals that take no level of their own


def percent(share: float) -> str:
    """A bound in percent, rounded up so that the claim is never tighter than the bound."""
    return f"{math.ceil(1e4 * share - 1e-9) / 100:g} %"


def check_level(level: float) -> None:
    """Raise UsageError unless ``level`` is a confidence level strictly between 0 and 1."""
    if not 0 < level < 1:
        raise UsageError(f"a confidence level must lie between 0 and 1, got {level}: pass for example 0.95")


def wilson(k: int, n: int) -> Rate:
    """The proportion ``k / n`` with its Wilson score interval.

    Source: Wilson (1927), as recommended by Brown, Cai and DasGupta (2001); no continuity correction. Raises DataError if ``n``
    is 0.
    """
    if n == 0:
        raise DataError("a rate over 0 rows is undefined: pass at least one row")
    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and n, got k={k}, n={n}")
    low, high = _wilson(int(k), int(n))
    return Rate(k=int(k), n=int(n), rate=k / n, low=low, high=high)


def counted(rate: Rate) -> bool:
    """Whether a rate is ``k`` of ``n``, not a mean of real scores, of which ``k`` is only the rounded sum.

    A mean may have a whole sum, but not Wilson's interval. Another SciPy version may round its last digits differently.
    """
    low, high = _wilson(rate.k, rate.n)
    pairs = (rate.rate, rate.k / rate.n), (rate.low, low), (rate.high, high)
    return all(math.isclose(*pair, rel_tol=0, abs_tol=1e-9) for pair in pairs)


@lru_cache(4096)  # SciPy also computes the exact p-value each time, and a search asks for the same few rates
def _wilson(k: int, n: int) -> tuple[float, float]:
    from scipy.stats import binomtest  # not at the top: the import takes a second

    low, high = binomtest(k, n).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


RESAMPLES = 4000
_CHUNK = 1 << 22  # numbers drawn at once while resampling: 32 MB of float64


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test of ``n`` pairs, of which ``only_before`` and ``only_after`` are True on one side alone."""

    n: int
    only_before: int
    only_after: int
    p: float


@dataclass(frozen=True)
class Difference:
    """``mean(a) - mean(b)`` over ``n`` pairs, its interval at confidence ``level``, and the interval's name."""

    difference: float
    low: float
    high: float
    n: int
    level: float
    method: str


def mcnemar(before: ArrayLike, after: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test on paired yes/no outcomes: a binomial test on the pairs that differ.

    Raises DataError when the two are empty, of different lengths, or not 0/1.
    """
    from scipy.stats import binomtest

    b, a = _paired(before, after)
    if not (_binary(b) and _binary(a)):
        raise DataError("McNemar's test compares yes/no outcomes, and some values are neither 0 nor 1")
    only_before = int(((b == 1) & (a == 0)).sum())
    only_after = int(((b == 0) & (a == 1)).sum())
    discordant = only_before + only_after
    p = float(binomtest(only_before, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(n=len(b), only_before=only_before, only_after=only_after, p=p)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int = 0) -> Difference:
    """Interval for ``mean(a) - mean(b)`` where ``a[i]`` and ``b[i]`` were measured on the same row.

    Outcomes that are all 0 or 1 get Tango's score interval (Tango 1998, Statistics in Medicine 17:891-908), which
    has a width even if no pair differs. Real scores get the percentile bootstrap over pairs, with ``seed``.

    Raises DataError when the two are empty or of different lengths.
    """
    left, right = _paired(a, b)
    n = len(left)
    if _binary(left) and _binary(right):
        only_a, only_b = int((left > right).sum()), int((left < right).sum())
        low, high = _tango(only_a, only_b, n)
        return Difference((only_a - only_b) / n, low, high, n, LEVEL, "tango")
    differences = left - right
    low, high = bootstrap(np.mean, (differences,), LEVEL, seed)
    return Difference(float(differences.mean()), low, high, n, LEVEL, "bootstrap")


def mean_interval(values: ArrayLike, seed: int = 0) -> Rate:
    """The mean of scores between 0 and 1 with its interval: Wilson when all are 0 or 1, else percentile bootstrap.

    ``k`` of a mean is the sum of the scores rounded to a whole number.

    Raises DataError when there is no score, or one outside [0, 1].
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size == 0:
        raise DataError("a mean over 0 rows is undefined: pass at least one row")
    outside = np.flatnonzero(~((scores >= 0) & (scores <= 1)))
    if outside.size:
        raise DataError(f"a score must lie between 0 and 1, and row {outside[0]} scored {scores[outside[0]]}")
    if _binary(scores):
        return wilson(int(scores.sum()), scores.size)
    low, high = bootstrap(np.mean, (scores,), LEVEL, seed)
    mean = float(scores.mean())
    return Rate(k=round(float(scores.sum())), n=scores.size, rate=mean, low=low, high=high)


def bootstrap(
    statistic: Callable[..., Floats], columns: Sequence[NDArray[Any]], level: float, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic(*columns, axis=-1)`` over rows, each column (N,), from ``RESAMPLES``.

    Rows are drawn whole: the columns of one row stay together. Resamples for which the statistic is NaN are left out.
    """
    from scipy import stats

    n = len(columns[0])
    if n == 1:  # every resample is the one row, which SciPy refuses
        low = high = float(statistic(*columns, axis=-1))
        return low, high
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", stats.DegenerateDataWarning
        )  # about NaN in SciPy's own interval, which is not used
        found = stats.bootstrap(
            columns,
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, _CHUNK // n),
            vectorized=True,
            paired=True,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    drawn = found.bootstrap_distribution
    low, high = np.nanquantile(drawn, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def score_bounds(
    distance: Callable[[float], float], estimate: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Invert a score test: the two values around ``estimate``, within ``bounds``, where ``distance`` changes sign.

    ``distance(value)`` is negative where the value is compatible with the data and positive where it is not. A side
    on which every value is compatible gives its bound.
    """

    from scipy import optimize

    def edge(bound: float) -> float:
        if bound == estimate or distance(bound) <= 0:
            return bound
        # Just off the estimate: if its variance is 0, the distance at the estimate itself is 0, not negative.
        inside = estimate + 1e-9 * (bound - estimate)
        return float(optimize.brentq(distance, *sorted((inside, bound)), xtol=1e-12))

    return edge(bounds[0]), edge(bounds[1])


def _tango(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """Tango's score interval for ``(only_a - only_b) / n``, the discordant counts of ``n`` pairs."""
    from scipy.special import ndtri

    z2 = float(ndtri((1 + LEVEL) / 2)) ** 2

    def distance(delta: float) -> float:
        # Equation 6 of the paper: q is the restricted maximum-likelihood estimate of P(only b) at this delta.
        linear = (2 * n - only_a + only_b) * delta - only_a - only_b
        constant = -only_b * delta * (1 - delta)
        q = (np.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        # Multiplied out, so that nothing is divided by a variance of 0 at the ends of [-1, 1].
        return float((only_a - only_b - n * delta) ** 2 - z2 * variance)

    return score_bounds(distance, (only_a - only_b) / n, (-1.0, 1.0))


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise DataError(f"paired outcomes must have the same length, got {left.size} and {right.size}")
    if left.size == 0:
        raise DataError("a comparison of 0 pairs is undefined: pass at least one pair")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise DataError("paired outcomes must be finite numbers, and some are not")
    return left, right


def _binary(values: Floats | Sequence[float]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())
