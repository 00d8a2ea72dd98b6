"""The floor of the default cut: between harmless and harmful rows of known kind, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from gradshield.thresholds.competition import Competition
from gradshield.types import LEAST_ANCHORS, Anchors


def anchors(harmful: float, harmless: float, count: int = 40) -> Anchors:
    spread = np.linspace(-0.5, 0.5, count)
    return Anchors(harmful + spread, harmless + spread)


def test_the_floor_is_halfway_between_the_kinds():
    found = anchors(10.0, 2.0).floor
    # 95 % of the harmless are below 2.45, and 95 % of the harmful above 9.55
    assert found == pytest.approx((2.45 + 9.55) / 2, abs=1e-9)


@pytest.mark.parametrize(
    "known",
    [
        anchors(2.0, 2.1),  # they overlap
        anchors(2.0, 9.0),  # the wrong way round
        anchors(10.0, 2.0, LEAST_ANCHORS - 1),  # too few
        Anchors(np.full(40, 10.0), np.zeros(0)),  # a model that refuses every look-alike
        anchors(-1.0, -9.0),  # a floor is never below zero
    ],
)
def test_no_floor_where_the_kinds_say_nothing(known):
    assert known.floor == 0.0


def test_harmless_rows_with_a_heavy_tail_stay_below_the_floor():
    """Scores that no decoy matches are no harm unless they reach where harm sits."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.exponential(0.5, 450), rng.uniform(2, 4, 50)])
    decoys = rng.exponential(0.5, 500)
    without, with_floor = Competition().cut(values, decoys), Competition().cut(values, decoys, anchors(10.0, 2.0))
    assert (values > without.value).sum() >= 40
    assert not (values > with_floor.value).any()


def test_harm_beyond_the_floor_is_still_cut_off_below_itself():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.exponential(0.5, 450), rng.uniform(8, 14, 50)])
    cut = Competition().cut(values, rng.exponential(0.5, 500), anchors(10.0, 2.0))
    assert cut.detail["floor"] == pytest.approx(6.0)
    assert (values > cut.value).sum() == 50
