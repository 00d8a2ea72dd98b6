"""The interval of a proportion, against published values."""

import pytest

from gradshield.errors import DataError, UsageError
from gradshield.stats import wilson


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
    with pytest.raises(UsageError, match="confidence level"):
        wilson(1, 2, level=95)
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(3, 2)
