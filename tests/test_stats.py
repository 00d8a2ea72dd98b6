"""Intervals and tests against published values, against scipy, and against what an interval promises: coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from gradshield import stats
from gradshield.errors import DataError
from gradshield.stats import wilson


def _pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    return np.array(a), np.array(b)


def test_mcnemar_equals_the_published_example() -> None:
    # Fagerland, Lydersen and Laake (2013): airway hyper-responsiveness, exact conditional p = 0.070.
    result = stats.mcnemar(*_pairs(1, 1, 7, 12))
    assert (result.n, result.only_before, result.only_after) == (21, 1, 7)
    assert result.p == pytest.approx(0.0703125, abs=1e-9)


def test_mcnemar_without_a_change_finds_none() -> None:
    assert stats.mcnemar([True, False], [True, False]).p == 1.0
    with pytest.raises(DataError, match="neither 0 nor 1"):
        stats.mcnemar([0.5, 0], [1, 0])


def test_tango_equals_the_published_example() -> None:
    # Fagerland, Lydersen and Laake (2014), table III: -0.286 (-0.517 to -0.026).
    result = stats.paired_difference(*_pairs(1, 1, 7, 12))
    assert result.method == "tango"
    assert (result.difference, result.low, result.high) == pytest.approx((-6 / 21, -0.517, -0.026), abs=5e-4)


def test_tango_bounds_are_where_the_score_test_rejects() -> None:
    """An independent route: maximise the trinomial likelihood under the difference, then test it."""
    only_a, only_b, n = 9, 4, 60
    result = stats.paired_difference(*_pairs(20, only_a, only_b, n - 20 - only_a - only_b))
    for delta in (result.low, result.high):
        grid = np.linspace(max(0.0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 400_001)  # P(only b)
        likelihood = (
            only_a * np.log(grid + delta) + only_b * np.log(grid) + (n - only_a - only_b) * np.log1p(-2 * grid - delta)
        )
        q = grid[likelihood.argmax()]
        z = (only_a - only_b - n * delta) / np.sqrt(n * (2 * q + delta * (1 - delta)))
        assert abs(z) == pytest.approx(scipy_stats.norm.ppf(0.975), abs=1e-3)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_tango_holds_its_estimate_and_turns_with_its_sides(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [p[0] for p in pairs], [p[1] for p in pairs]
    one, other = stats.paired_difference(a, b), stats.paired_difference(b, a)
    assert -1 <= one.low <= one.difference <= one.high <= 1
    assert one.high - one.low > 0  # no certainty from a handful of pairs, even when none differs
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)


def test_paired_real_scores_cover_the_true_difference() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        row = generator.normal(0.5, 0.3, size=80)  # what the two sides share, and an unpaired interval would pay for
        result = stats.paired_difference(row + generator.normal(0.03, 0.05, 80), row, seed=seed)
        covered += result.low <= 0.03 <= result.high
        assert result.method == "bootstrap"
        assert result.high - result.low < 0.04
    assert 0.89 <= covered / 200 <= 0.99


def test_paired_real_scores_repeat_under_their_seed_and_agree_with_t() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.random(500), generator.random(500)
    result = stats.paired_difference(a, b, seed=3)
    assert result == stats.paired_difference(a, b, seed=3) != stats.paired_difference(a, b, seed=4)
    expected = scipy_stats.ttest_rel(a, b).confidence_interval()
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=4e-3)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(DataError, match="same length, got 2 and 1"):
        stats.paired_difference([1, 0], [1])
    with pytest.raises(DataError, match="0 pairs"):
        stats.mcnemar([], [])
    with pytest.raises(DataError, match="finite"):
        stats.paired_difference([np.nan, 0.1], [0.2, 0.3])


def test_a_mean_of_scores_has_its_interval() -> None:
    scores = np.random.default_rng(5).beta(2, 3, size=400)
    rate = stats.mean_interval(scores)
    expected = scipy_stats.t.interval(0.95, 399, scores.mean(), scipy_stats.sem(scores))
    assert rate.rate == pytest.approx(scores.mean())
    assert (rate.low, rate.high) == pytest.approx(expected, abs=3e-3)
    assert rate.k == round(scores.sum())


def test_a_mean_is_told_from_a_count_whatever_its_sum() -> None:
    assert all(stats.counted(wilson(k, 200)) for k in (0, 1, 181, 200))
    halves = stats.mean_interval([0.5, 0.5, 1, 1])
    assert halves.rate == halves.k / halves.n
    assert not stats.counted(halves)
    assert not stats.counted(stats.mean_interval([1 / 3, 1, 1]))


def test_a_mean_of_yes_and_no_is_a_proportion() -> None:
    assert stats.mean_interval([1, 0, 1, True]) == wilson(3, 4)
    with pytest.raises(DataError, match=r"row 1 scored 1\.5"):
        stats.mean_interval([0.2, 1.5])
    with pytest.raises(DataError, match="0 rows"):
        stats.mean_interval([])


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_table(k: int, n: int, low: float, high: float) -> None:
    rate = wilson(k, n)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-5)
    assert (rate.k, rate.n, rate.rate) == (k, n, k / n)


def test_the_promise_of_the_methods_page_needs_128_rows() -> None:
    assert wilson(2, 128).high < 0.06 < wilson(2, 80).high


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="0 rows"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(3, 2)
