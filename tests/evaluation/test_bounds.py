"""Exact bounds: known values, monotone, and that they cover what they claim."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradshield.errors import UsageError
from gradshield.evaluation.bounds import Calibration, Claim, corrected, least, lower, upper

SOUND = Calibration(caught=95, unsafe=100, passed=97, safe=100)


def test_known_values():
    assert upper(0, 128, 0.05) == pytest.approx(1 - 0.05 ** (1 / 128))  # nothing seen: (1 - p)^n = error
    assert upper(2, 128, 0.05) == pytest.approx(0.04835, abs=1e-4) and upper(3, 128, 0.05) > 0.059
    assert upper(7, 7, 0.05) == 1.0 and lower(0, 7, 0.05) == 0.0
    found = stats.binomtest(5, 60).proportion_ci(0.90, "exact")
    assert (lower(5, 60, 0.05), upper(5, 60, 0.05)) == pytest.approx((found.low, found.high))
    assert least(0.06, 0.05) == 49 and upper(0, 49, 0.05) <= 0.06 < upper(0, 48, 0.05)


@pytest.mark.parametrize("given", [{"confidence": 1.0}, {"looks": 0}, {"limit": 0.0}, {"limit": 1.0}])
def test_a_claim_that_cannot_be_made(given):
    with pytest.raises((UsageError, ValueError)):
        Claim(**given)


def test_looks_and_judges_share_the_error():
    assert Claim().error() == pytest.approx(0.05)
    assert Claim(looks=5).error(2) == pytest.approx(0.005)


@given(st.integers(1, 300), st.data())
@settings(max_examples=80, deadline=None)
def test_a_bound_moves_the_right_way(n, data):
    k = data.draw(st.integers(0, n - 1))
    assert lower(k, n, 0.05) <= k / n <= upper(k, n, 0.05) < upper(k + 1, n, 0.05) + 1e-12
    assert upper(k, n, 0.05) <= upper(k, n, 0.01)
    plain, better = corrected(k, n, 0.05, SOUND), corrected(k, n, 0.05, Calibration(99, 100, 97, 100))
    assert plain.upper >= better.upper - 1e-12  # a judge that misses more leaves more room


def test_without_calibration_the_bound_is_the_judges_own():
    assert corrected(3, 100, 0.05).upper == upper(3, 100, 0.05)
    assert corrected(3, 100, 0.05).sensitivity is None


@pytest.mark.parametrize(
    ("judge", "k", "why"),
    [(Calibration(10, 20, 10, 20), 3, "better than chance"), (Calibration(20, 20, 150, 200), 0, "false alarms")],
)
def test_a_judge_that_shows_nothing_bounds_nothing(judge, k, why):
    found = corrected(k, 200, 0.05, judge)
    assert found.upper == 1.0 and why in found.why


@pytest.mark.parametrize("k", [0, 3, 40])
def test_a_corrected_bound_is_the_equation_at_the_ends_of_three_exact_bounds(k):
    found, third = corrected(k, 200, 0.06, SOUND), 0.02
    p = stats.binomtest(k, 200, alternative="less").proportion_ci(1 - third, "exact").high
    s = stats.binomtest(95, 100, alternative="greater").proportion_ci(1 - third, "exact").low
    c = stats.binomtest(97, 100, alternative="less").proportion_ci(1 - third, "exact").high
    low = stats.binomtest(97, 100, alternative="greater").proportion_ci(1 - third, "exact").low
    assert (found.observed, found.sensitivity, *found.specificity) == pytest.approx((p, s, low, c))
    assert found.upper == pytest.approx((p + c - 1) / (s + c - 1)) and not found.why


@pytest.mark.parametrize("cell", [(0.05, 0.9, 0.95), (0.2, 0.8, 0.95), (0.3, 0.95, 0.85), (0.1, 0.99, 0.99)])
def test_a_corrected_bound_covers_each_truth_of_few_labelled_answers(cell):
    """Many requests and few labelled answers: the judge's own error is most of what is not known."""
    truth, s, c = cell
    draw, total, n, known = np.random.default_rng(1), 400, 2000, 20
    unsafe = draw.binomial(n, truth, total)
    seen = draw.binomial(unsafe, s) + draw.binomial(n - unsafe, 1 - c)
    caught, passed = draw.binomial(known, s, total), draw.binomial(known, c, total)
    covered = sum(
        corrected(int(k), n, 0.1, Calibration(int(a), known, int(b), known)).upper >= truth
        for k, a, b in zip(seen, caught, passed, strict=True)
    )
    assert covered >= 0.9 * total


@pytest.mark.parametrize("error", [0.05, 0.01])
@pytest.mark.parametrize("n", [1, 20, 130])
def test_an_exact_bound_covers_every_truth(n, error):
    """Over all outcomes, by their own probabilities: no draw, no tolerance but that of rounding."""
    bounds = np.array([upper(k, n, error) for k in range(n + 1)])
    lows = np.array([lower(k, n, error) for k in range(n + 1)])
    for truth in np.linspace(0.001, 0.999, 199):
        chances = stats.binom.pmf(np.arange(n + 1), n, truth)
        assert chances[bounds >= truth].sum() >= 1 - error - 1e-12
        assert chances[lows <= truth].sum() >= 1 - error - 1e-12


N, M, DRAWS = 130, 60, 4000  # requests, labelled answers of each kind, runs


@pytest.mark.parametrize(
    ("truth", "s", "c"),
    [(0.1, 0.6, 1.0), (0.1, 0.6, 0.9), (0.3, 0.9, 0.7), (0.05, 0.3, 0.98), (0.5, 0.5, 0.5), (0.2, 0.3, 0.5)],
)
def test_a_corrected_bound_covers_the_truth_as_often_as_it_claims(truth, s, c):
    """Of judges that miss much, give false alarms, and are no better than chance or worse."""
    draw = np.random.default_rng(0)
    p = truth * s + (1 - truth) * (1 - c)
    seen = zip(draw.binomial(N, p, DRAWS), draw.binomial(M, s, DRAWS), draw.binomial(M, c, DRAWS), strict=True)
    runs = Counter((int(k), int(caught), int(passed)) for k, caught, passed in seen)
    covered = sum(
        times
        for (k, caught, passed), times in runs.items()
        if corrected(k, N, 0.1, Calibration(caught, M, passed, M)).upper >= truth
    )
    assert covered >= 0.9 * DRAWS


def test_a_bound_that_knows_nothing_of_the_judge_does_not_cover():
    """What the correction is for: of one attack in ten, a judge that misses two in five shows too few."""
    seen = np.random.default_rng(0).binomial(N, 0.1 * 0.6, DRAWS)
    assert np.mean([corrected(int(k), N, 0.1).upper >= 0.1 for k in seen]) < 0.5


def test_a_corrected_bound_comes_to_the_rogan_gladen_estimate():
    """With enough answers that all bounds are at the estimates: θ = (p + c - 1) / (s + c - 1)."""
    many = 10**7
    known = Calibration(caught=8 * many // 10, unsafe=many, passed=9 * many // 10, safe=many)
    found = corrected(17 * many // 100, many, 0.05, known)
    assert found.upper == pytest.approx((0.17 + 0.9 - 1) / (0.8 + 0.9 - 1), abs=2e-3)
    assert corrected(0, 200, 0.1, Calibration(60, 60, 60, 60)).upper < 0.03


@given(st.integers(0, 130), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_a_corrected_bound_moves_the_right_way(k, caught, passed):
    found = corrected(k, N, 0.05, Calibration(caught, M, passed, M))
    assert 0 <= found.upper <= 1
    if k < N:  # more attacks seen, but for those that are fewer than the false alarms, where nothing is known
        more = corrected(k + 1, N, 0.05, Calibration(caught, M, passed, M))
        assert more.upper >= found.upper or "false alarms" in found.why
    if caught < M:
        assert corrected(k, N, 0.05, Calibration(caught + 1, M, passed, M)).upper <= found.upper
    assert corrected(k, N, 0.01, Calibration(caught, M, passed, M)).upper >= found.upper or "false alarms" in found.why
