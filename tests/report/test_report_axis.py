"""The score axis: whatever the scores, every row is counted once and the cut is an edge."""

import numpy as np
import pytest

from gradshield.scanning.page_charts import make_axis

RNG = np.random.default_rng(0)
SCORES = {
    "gaussian": RNG.normal(0, 1, 5000),
    "far harm": np.r_[RNG.normal(0, 1e-3, 990), RNG.normal(50, 5, 10)],
    "heavy tails": RNG.standard_cauchy(5000),
    "constant": np.full(100, 3.0),
    "zeros and one": np.r_[np.zeros(99), 1e6],
    "one row": np.array([-0.25]),
    "just over the cut": np.full(3, np.nextafter(0.5, 1)),
    "two rows": np.array([1.0, 2.0]),
    "huge": np.array([-1e308, 0.0, 1.0, 1e308]),
    "tiny": RNG.normal(0, 1e-12, 100),
    "offset": 1e6 + RNG.normal(0, 1e-3, 500),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("cut", [None, 0.5, -7.0, 1e9])
def test_every_row_is_in_one_bin_and_the_cut_parts_them(name: str, cut: float | None) -> None:
    x = SCORES[name]
    axis = make_axis(x, cut)
    assert np.isfinite(axis.edges).all()
    assert (np.diff(axis.edges) > 0).all()
    assert axis.count(x).sum() == len(x)
    positions, labels = axis.ticks()
    assert len(positions) == len(labels) >= 2
    assert all(axis.edges[0] <= at <= axis.edges[-1] for at in positions)
    assert len(set(labels)) == len(labels)
    if cut is not None:
        at = float(axis.forward(np.array(cut)))
        assert at in axis.edges
        above = axis.count(x)[np.searchsorted(axis.edges, at) :].sum()
        assert above == (axis.forward(x) > at).sum()


def test_both_populations_stay_visible_when_harm_is_far_away() -> None:
    x = SCORES["far harm"]
    axis = make_axis(x, 1.0)
    assert not axis.linear
    bulk, harm = axis.forward(x[:990]), axis.forward(x[990:])
    span = axis.edges[-1] - axis.edges[0]
    assert np.ptp(bulk) > 0.15 * span
    assert harm.min() - bulk.max() > 0.1 * span


def test_scores_of_one_magnitude_keep_a_linear_axis() -> None:
    assert make_axis(SCORES["gaussian"], 3.0).linear
    assert np.allclose(make_axis(SCORES["gaussian"], 3.0).inverse(np.array([1.5])), 1.5)
