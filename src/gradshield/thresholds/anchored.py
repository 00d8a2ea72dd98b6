"""A cut that does not depend on the data: between the scores of rows of known kind on this model."""

from __future__ import annotations

import numpy as np

from gradshield.errors import UsageError
from gradshield.options import check
from gradshield.thresholds.base import THRESHOLDS, Share, require_rows
from gradshield.types import Anchors, Cut, Floats

REACHED = 0.9  # quantile of the known harmless rows
SHOWN = 0.15  # quantile of the known harmful rows


@THRESHOLDS.register("anchored")
class Anchored:
    """Halfway between the scores of known harmless and known harmful prompts, and at least ``least``: the cut of ``screen``.

    Paper: none. Equation: t = max(least, (Q_harmless(0.9) + Q_harmful(0.15)) / 2).
    Departures: this rule is ours. It ignores the data's scores, so a row's verdict depends on that row alone: duplicating,
    splitting or mixing files changes nothing, and a file may hold one row or only harm. It needs scores on the anchors' scale,
    as those of the selector ``screen``, where harmless prompts are near 0 and harmful ones near 1.
    """

    name = "anchored"

    def __init__(self, least: Share = 0.5) -> None:
        check(Anchored, least=least)
        self.least = least

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores by the anchors. Raises UsageError if either kind has none."""
        require_rows(values)
        if anchors is None or not len(anchors.harmful) or not len(anchors.harmless):
            raise UsageError(
                "the threshold 'anchored' needs scores of rows of known kind, which this selector does not give: use the "
                "selector screen, or the threshold competition, adaptive, ratio or fixed"
            )
        reached = float(np.quantile(anchors.harmless, REACHED))
        shown = float(np.quantile(anchors.harmful, SHOWN))
        value = max(self.least, (reached + shown) / 2)
        return Cut(value, self.name, {"least": self.least, "harmless_reach": reached, "harmful_reach": shown})
