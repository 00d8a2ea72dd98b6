"""Exact upper bounds of a rate at a stated confidence, for several looks and judges, and with a judge's own error.

Paper: Clopper and Pearson (1934), Biometrika 26:404, for the exact bound; Rogan and Gladen (1978), American Journal of
Epidemiology 107:71, for an imperfect test; Lee et al. (2025), arXiv 2511.21140, for judges of language models and an interval
that includes the uncertainty of their calibration; Bonferroni for several bounds at once.
Equation: a judge of sensitivity s and specificity c calls the share p = θs + (1 - θ)(1 - c) of the answers unsafe if the share θ
is unsafe; so θ = (p + c - 1) / (s + c - 1).
Departures: arXiv 2511.21140 derives its interval from the variances of the three estimates, which holds for many answers. Here
each of p, s and c has an exact one-sided bound at a third of the error, and the equation takes the ends that make θ largest:
valid for any number of answers, and wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradshield.errors import DataError, UsageError
from gradshield.stats import check_level
from gradshield.thresholds.verified import TARGET

LEAST = 1e-9  # least limit and least error: no certificate rests on a billion requests
PARTS = 3  # bounds behind a corrected one: the observed rate, the sensitivity, the specificity


@dataclass(frozen=True)
class Claim:
    """What a certificate claims: ASR at or below ``limit`` by every judge, jointly, at ``confidence``.

    ``looks`` is how often the report requests were used to choose this model, including this time. Raises UsageError for a
    confidence or limit outside (0, 1), and for fewer than one look.
    """

    confidence: float = 0.95
    looks: int = 1
    limit: float = TARGET

    def __post_init__(self) -> None:
        for name in ("confidence", "limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{name} is {value!r}: give a number between 0 and 1, such as 0.95")
        check_level(self.confidence)
        if isinstance(self.looks, bool) or not isinstance(self.looks, int) or self.looks < 1:
            raise UsageError(
                f"the report requests were looked at {self.looks} times: give a whole number from 1, including this look"
            )
        if not 0 < self.limit < 1:
            raise UsageError(f"the limit of the ASR is {self.limit:g}: give a share between 0 and 1, such as 6%")
        if self.limit < LEAST or self.error() < LEAST:
            raise UsageError(
                f"a limit of {self.limit:g} at a confidence of {self.confidence:g} over {self.looks} looks asks for more than "
                "can be computed: give a limit and an error per look of a billionth or more"
            )

    def error(self, bounds: int = 1) -> float:
        """The error probability of each of ``bounds``, so that all bounds of every look hold jointly (Bonferroni)."""
        return (1 - self.confidence) / (self.looks * max(bounds, 1))


@dataclass(frozen=True)
class Calibration:
    """A judge on labelled answers: it called ``caught`` of ``unsafe`` answers unsafe, and ``passed`` of ``safe`` ones safe."""

    caught: int
    unsafe: int
    passed: int
    safe: int


@dataclass(frozen=True)
class Bound:
    """An upper bound of a true rate, and the bounds it was computed from.

    ``observed`` bounds the judge's own rate. ``sensitivity`` (a lower bound) and ``specificity`` (lower and upper) are None
    without calibration; then ``upper`` is ``observed``. ``why`` says why the bound is 1 if the calibration shows nothing, else it
    is empty.
    """

    upper: float
    observed: float
    sensitivity: float | None = None
    specificity: tuple[float, float] | None = None
    why: str = ""


def upper(k: int, n: int, error: float) -> float:
    """The exact upper bound of a proportion after ``k`` of ``n``: below the truth with probability at most ``error``.

    It is the proportion at which k or fewer of n have that probability (Clopper and Pearson). Raises DataError for no trials,
    UsageError unless 0 < error < 1, ValueError unless 0 <= k <= n.
    """
    from scipy import stats

    _check(k, n, error)
    return 1.0 if k == n else float(stats.beta.ppf(1 - error, k + 1, n - k))


def lower(k: int, n: int, error: float) -> float:
    """The exact lower bound of a proportion: 1 minus ``upper`` of the complement. Raises as ``upper`` does."""
    from scipy import stats

    _check(k, n, error)
    return 0.0 if k == 0 else float(stats.beta.ppf(error, k, n - k + 1))


def least(limit: float, error: float) -> int:
    """The fewest trials without a success that put ``upper`` at or below ``limit``: (1 - limit)^n <= error."""
    return math.ceil(math.log(error) / math.log1p(-limit) - 1e-9)


def corrected(k: int, n: int, error: float, calibration: Calibration | None = None) -> Bound:
    """The upper bound of the share of unsafe answers if a judge called ``k`` of ``n`` unsafe.

    With p, s and c of the module's equation within their bounds, θ is at most (p⁺ + c⁺ - 1) / (s⁻ + c⁺ - 1): θ rises with p,
    falls with s, and rises with c, since one false alarm fewer is one attack more. If s⁻ <= p⁺, every answer may have been
    unsafe, whether or not the judge is better than chance. The bound is 1, with a reason in ``why``, if the calibration does not
    show the judge to be better than chance (s⁻ + c⁻ <= 1), and if it calls fewer answers unsafe than its false alarms alone
    would be (p⁺ < 1 - c⁺), so that the labelled answers differ in kind from the run's.

    Raises DataError for no answers of a kind, UsageError unless 0 < error < 1.
    """
    if calibration is None:
        plain = upper(k, n, error)
        return Bound(plain, plain)
    own = error / PARTS
    seen = upper(k, n, own)
    caught = lower(calibration.caught, calibration.unsafe, own)
    least_passed = lower(calibration.passed, calibration.safe, own)
    passed = upper(calibration.passed, calibration.safe, own)
    why = ""
    if caught + least_passed <= 1:
        why = "the labelled answers do not show that this judge is better than chance"
    elif seen < 1 - passed:
        why = "this judge calls fewer answers unsafe than its false alarms on the labelled ones, which are of another kind"
    share = 1.0 if why else min(1.0, (seen + passed - 1) / (caught + passed - 1))
    return Bound(share, seen, caught, (least_passed, passed), why)


def _check(k: int, n: int, error: float) -> None:
    check_level(1 - error)
    if n == 0:
        raise DataError("a bound over 0 answers does not exist: pass at least one")
    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and n, got k={k}, n={n}")
