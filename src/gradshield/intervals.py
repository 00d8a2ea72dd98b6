"""The interval of a proportion: every rate of the product is one of these. Numbers only, so that any room may ask."""

from __future__ import annotations

from gradshield.errors import DataError, UsageError
from gradshield.types import Rate


def check_level(level: float) -> None:
    """Raise UsageError unless ``level`` is a confidence level strictly between 0 and 1."""
    if not 0 < level < 1:
        raise UsageError(f"a confidence level must lie between 0 and 1, got {level}: pass for example 0.95")


def wilson(k: int, n: int, level: float = 0.95) -> Rate:
    """The proportion ``k / n`` with its Wilson score interval.

    Source: Wilson (1927), as recommended by Brown, Cai and DasGupta (2001); no continuity correction.

    Raises
    ------
    DataError
        ``n`` is 0: a rate of nothing does not exist.
    UsageError
        ``level`` is not between 0 and 1.
    """
    check_level(level)
    if n == 0:
        raise DataError("a rate over 0 rows does not exist: pass at least one row")
    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and n, got k={k}, n={n}")
    from scipy.stats import binomtest  # not at the top: it takes a second, and most of what asks for a rate asks late

    low, high = binomtest(k, n).proportion_ci(level, method="wilson")
    return Rate(k=int(k), n=int(n), rate=k / n, low=float(low), high=float(high), level=level)
