"""Target-decoy competition: each row competes with its own decoy, and the losers show what harmless rows can score."""

from __future__ import annotations

import numpy as np

from gradshield.options import check
from gradshield.thresholds.base import THRESHOLDS, Share, fewest, reaching, require_decoys, require_rows
from gradshield.types import Anchors, Cut, Floats

TAIL_SHARE = 0.1  # share of the winning decoys that the tail is fitted on
LEAST_TAIL = 10  # fewest decoys to fit a tail on
BODY = (0.75, 0.95)  # quantiles of the winning decoys that give the body's slope
LEAST_BODY = 50  # fewest winning decoys to take a slope from


def expected_beyond(nulls: Floats, t: Floats) -> Floats:
    """How many harmless rows are expected to beat their decoy at or above each t, estimated from the winning decoys: (M,).

    The count of winning decoys; or, if smaller, the expectation of an exponential tail whose slope comes from the body of the
    winning decoys (BODY), which a few harmful rows that lost to their own decoys do not reach.
    """
    counted = (len(nulls) - np.searchsorted(nulls, t, side="left")).astype(np.float64)
    if len(nulls) < LEAST_BODY:
        return counted
    low, high = np.quantile(nulls, BODY)
    slope = (high - low) / np.log((1 - BODY[0]) / (1 - BODY[1]))
    if slope <= 0:
        return counted
    modelled = len(nulls) * (1 - BODY[1]) * np.exp(-(np.maximum(t, high) - high) / slope)
    return np.where(t > high, np.minimum(counted, modelled), counted)


def counting_cut(values: Floats, decoys: Floats, q: float, lost: float, floor: float = 0.0) -> tuple[float, int, int]:
    """Smallest t >= ``floor`` among the winning scores that meets both bounds, and how many winning scores and decoys reach t.

    (1 + D(t)) / T(t) <= q and E(t) <= lost · n0, where T and D count rows whose score (decoy) is the larger of the two
    and at least t, E is `expected_beyond`, and n0 = min(N, 2·#{decoy > score}) estimates the harmless rows. Infinity if no t
    meets them.
    """
    won = values > decoys
    targets, nulls = np.sort(values[won]), np.sort(decoys[decoys > values])
    harmless = min(len(values), 2 * len(nulls))
    candidates = np.unique(targets[(targets > 0) & (targets >= floor)])
    above = len(targets) - np.searchsorted(targets, candidates, side="left")
    beaten = len(nulls) - np.searchsorted(nulls, candidates, side="left")
    good = np.flatnonzero((1 + beaten <= q * above) & (expected_beyond(nulls, candidates) <= lost * harmless))
    if len(good) == 0:
        return float("inf"), 0, 0
    i = int(good[0])
    return float(candidates[i]), int(above[i]), int(beaten[i])


def tail_cut(values: Floats, decoys: Floats, alpha: float) -> float:
    """The t beyond which the tail of the winning decoys, extrapolated, expects ``alpha`` harmless rows in the whole dataset.

    A generalised Pareto tail by the method of moments (shape between 0, exponential, and 1/4) over the largest tenth of
    the winning decoys. Infinity if they are too few to fit a tail.
    """
    nulls = np.sort(decoys[decoys > values])[::-1]
    count = int(TAIL_SHARE * len(nulls))
    if count < LEAST_TAIL or nulls[count] <= 0:
        return float("inf")
    edge = nulls[count]
    excess = nulls[:count] - edge
    mean, variance = float(excess.mean()), float(excess.var())
    if mean <= 0 or variance <= 0:
        return float("inf")
    # Mean σ/(1-ξ) and variance σ²/((1-ξ)²(1-2ξ)). A tail thinner than exponential counts as exponential, which is conservative.
    shape = float(np.clip(0.5 * (1 - mean * mean / variance), 0.0, 0.25))
    scale = mean * (1 - shape)
    reach = count / alpha  # expected beyond t: count · P(excess > t - edge) = alpha
    step = scale * np.log(reach) if shape < 1e-6 else scale / shape * (reach**shape - 1)
    return float(edge + step)


@THRESHOLDS.register("competition")
class Competition:
    """Each row against its own decoy: bounds the harmless share of the removed rows, and the share of harmless rows lost.

    Paper: target-decoy competition (Elias and Gygi 2007), the knockoff filter's count (Barber and Candès 2015), and a
    generalised Pareto tail (Pickands 1975) for harm too rare to count.
    Equation: smallest t with (1 + D(t)) / T(t) <= q and E(t) <= lost · n0 (see `counting_cut`); or the tail's t
    (`tail_cut`), if that is lower.
    And t >= `Anchors.floor` where anchors are given.
    Departures: this rule is ours. A plain decoy count is inflated by the decoys of the harmful rows themselves, whose tokens
    are large in both directions. In a competition most of those rows win and leave the null to the harmless ones; the bound
    on lost rows uses the body of the null, which the few that lose do not reach. It assumes that a harmless row pushes
    toward harm as often as away from it.
    """

    name = "competition"

    def __init__(self, q: Share = 0.2, lost: Share = 0.004, alpha: Share = 0.05) -> None:
        check(Competition, q=q, lost=lost, alpha=alpha)
        self.q, self.lost, self.alpha = q, lost, alpha

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores with (N,) decoys, above the floor that the anchors give. Raises UsageError without decoys."""
        require_rows(values)
        decoys = require_decoys(self.name, decoys)
        floor = 0.0 if anchors is None else anchors.floor
        counted, targets, nulls = counting_cut(values, decoys, self.q, self.lost, floor)
        tail = max(floor, tail_cut(values, decoys, self.alpha))
        detail = {
            "q": self.q,
            "lost": self.lost,
            "alpha": self.alpha,
            "floor": floor,
            "targets": targets,
            "decoys": nulls,
            "fdr": (1 + nulls) / targets if targets else None,
            "fewest": fewest(self.q),
            "leading": int((values[values > decoys] > np.max(decoys[decoys > values], initial=0.0)).sum()),
            "counted": counted if np.isfinite(counted) else None,
            "tail": tail if np.isfinite(tail) else None,
            "branch": "counted" if counted <= tail else "tail",
        }
        t = min(counted, tail)
        if not np.isfinite(t):
            detail["branch"] = "nothing to remove"
        return Cut(reaching(t, values), self.name, detail)
