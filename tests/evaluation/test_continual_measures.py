"""The continual-learning measures against plain loops, and on a case worked out manually."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradshield.training.sequence import accuracy_so_far, backward_transfer, forgetting

# Three tasks. The first is learned to 0.8, falls to 0.5 and comes back to 0.6; the second falls from 0.9 to 0.7.
BY_HAND = np.array([[0.1, 0.2, 0.3], [0.8, 0.2, 0.3], [0.5, 0.9, 0.4], [0.6, 0.7, 1.0]])

tables = st.integers(1, 6).flatmap(
    lambda t: arrays.arrays(np.float64, (t + 1, t), elements=st.floats(0, 1, allow_subnormal=False))
)


def slow_forgetting(table: np.ndarray, t: int) -> float:
    lost = []
    for j in range(t - 1):
        best = -math.inf
        for moment in range(1, t):
            if moment >= j + 1:
                best = max(best, table[moment][j])
        lost.append(best - table[t][j])
    return sum(lost) / len(lost)


def slow_transfer(table: np.ndarray, t: int) -> float:
    return sum(table[t][j] - table[j + 1][j] for j in range(t - 1)) / (t - 1)


def test_by_hand() -> None:
    np.testing.assert_allclose(accuracy_so_far(BY_HAND), [0.8, 0.7, 2.3 / 3])
    np.testing.assert_allclose(backward_transfer(BY_HAND), [np.nan, -0.3, -0.2])
    np.testing.assert_allclose(forgetting(BY_HAND), [np.nan, 0.3, 0.2])


@given(tables)
def test_as_the_slow_twins(table: np.ndarray) -> None:
    so_far, transfer, forgot = accuracy_so_far(table), backward_transfer(table), forgetting(table)
    assert np.isnan(transfer[0]) and np.isnan(forgot[0])
    for t in range(1, len(table)):
        assert so_far[t - 1] == pytest.approx(sum(table[t][:t]) / t)
        if t > 1:
            assert transfer[t - 1] == pytest.approx(slow_transfer(table, t))
            assert forgot[t - 1] == pytest.approx(slow_forgetting(table, t))
            assert forgot[t - 1] >= -transfer[t - 1] - 1e-12  # the best is at least what was learned


def test_what_is_not_learned_yet_need_not_be_measured() -> None:
    unmeasured = np.where(np.tri(4, 3, k=-1, dtype=bool), BY_HAND, np.nan)
    for measure in (accuracy_so_far, backward_transfer, forgetting):
        np.testing.assert_array_equal(measure(unmeasured), measure(BY_HAND))
