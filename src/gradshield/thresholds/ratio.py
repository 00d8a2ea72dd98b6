"""Remove a given share of the rows."""

from __future__ import annotations

import numpy as np

from gradshield.options import check
from gradshield.thresholds.base import THRESHOLDS, Share, require_rows
from gradshield.types import Anchors, Cut, Floats


@THRESHOLDS.register("ratio")
class Ratio:
    """Remove the highest-scoring share of the rows, whatever they score.

    Paper: the fixed-budget baseline of arXiv 2605.14194's comparisons. Departures: ties at the cut are all kept.
    """

    name = "ratio"

    def __init__(self, share: Share = 0.1) -> None:
        check(Ratio, share=share)
        self.share = share

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores: at most ⌊share · N⌋ rows are above it."""
        require_rows(values)
        count = int(self.share * len(values) + 1e-9)  # 0.29 · 100 is less than 29 in floating point
        return Cut(float(np.sort(values)[::-1][count]), self.name, {"share": self.share})
