"""Target-decoy control of the false discovery rate: removes nothing from data without harm."""

from __future__ import annotations

import numpy as np

from gradshield.options import check
from gradshield.thresholds.base import THRESHOLDS, Share, fewest, reaching, require_decoys, require_rows
from gradshield.types import Anchors, Cut, Floats


def smallest_cut(values: Floats, decoys: Floats, q: float) -> tuple[float, int, int]:
    """Smallest t > 0 among the scores with (1 + #{decoys >= t}) / #{values >= t} <= q, and both counts; O(N log N).

    Infinity if no t qualifies.
    """
    candidates = np.unique(values[values > 0])
    targets = len(values) - np.searchsorted(np.sort(values), candidates, side="left")
    nulls = len(decoys) - np.searchsorted(np.sort(decoys), candidates, side="left")
    good = np.flatnonzero((1 + nulls) <= q * targets)
    if len(good) == 0:
        return float("inf"), 0, 0
    i = int(good[0])
    return float(candidates[i]), int(targets[i]), int(nulls[i])


@THRESHOLDS.register("decoy")
class Decoy:
    """Target-decoy control: the smallest cut at which the estimated share of harmless rows among the removed is below q.

    Paper: target-decoy estimation of the false discovery rate (Elias and Gygi 2007; the +1 of Barber and Candès 2015).
    Equation: smallest t with (1 + #{decoys >= t}) / #{scores >= t} <= q.
    Departures: a row's decoy is its own score with every token's sign flipped. It assumes that harmless tokens push as
    much toward safety as away from it. The +1 means that fewer than 1/q harmful rows are never found.
    """

    name = "decoy"

    def __init__(self, q: Share = 0.2) -> None:
        check(Decoy, q=q)
        self.q = q

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores with (N,) decoys. Raises UsageError without decoys."""
        require_rows(values)
        decoys = require_decoys(self.name, decoys)
        t, targets, nulls = smallest_cut(values, decoys, self.q)
        detail = {
            "q": self.q,
            "fewest": fewest(self.q),
            "leading": int((values > np.max(decoys, initial=0.0)).sum()),
            "targets": targets,
            "decoys": nulls,
            "fdr": (1 + nulls) / targets if targets else None,
        }
        return Cut(reaching(t, values), self.name, detail)
