"""A million scores are cut in seconds, and large sets as the slow way cuts them."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks.thresholds import PORTION, rules, scores
from gradshield.thresholds import adaptive
from gradshield.thresholds.adaptive import Adaptive

SHAPES = ("one hump", "long tail", "two humps")


@pytest.mark.slow
@pytest.mark.parametrize("name", rules())
def test_a_million_scores(name: str) -> None:
    values, decoys = scores(10**6)
    began = time.process_time()
    cut = rules()[name].cut(values, decoys)
    assert time.process_time() - began < 5
    assert np.isfinite(cut.value)
    assert 0 < (values > cut.value).mean() < 0.5


def _drawn(shape: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    if shape == "one hump":
        return rng.normal(2, 3, count)
    if shape == "long tail":
        return rng.gamma(2, 1, count)
    return np.concatenate([rng.normal(0, 1, count * 9 // 10), rng.normal(6, 1, count // 10)])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_adaptive_on_many_rows_is_the_fit_to_all(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what the fit's own stopping rule leaves open: a thousandth of a nat a row."""
    values = _drawn(shape, 60_000)
    fast = Adaptive().cut(values)
    monkeypatch.setattr(adaptive, "MANY", len(values))
    slow = Adaptive().cut(values)
    assert fast.detail["log_likelihood_1"] == slow.detail["log_likelihood_1"]
    assert fast.detail["log_likelihood_2"] >= slow.detail["log_likelihood_2"] - 1e-3 * len(values)
    assert fast.detail["branch"] == slow.detail["branch"]
    assert abs(fast.value - slow.value) < 0.1 * values.std()
    assert abs((values > fast.value).mean() - (values > slow.value).mean()) < 0.01


def test_scores_of_the_benchmark_hold_what_there_is_to_find() -> None:
    values, decoys = scores(20_000)
    harmful = int(PORTION * len(values))
    assert values[:harmful].mean() > 3 * values[harmful:].mean()
    assert abs(values[harmful:].mean() - decoys[harmful:].mean()) < 0.05
