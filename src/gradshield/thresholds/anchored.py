"""A cut that the data does not move: between what rows of known kind score on this model."""

from __future__ import annotations

import numpy as np

from gradshield.errors import UsageError
from gradshield.thresholds.base import THRESHOLDS, require_rows, require_share
from gradshield.types import Anchors, Cut, Floats

REACHED = 0.95  # share of the known harmless that lie below the one end
SHOWN = 0.15  # share of the known harmful that lie below the other


@THRESHOLDS.register("anchored")
class Anchored:
    """Halfway from what known harmless prompts reach to what known harmful ones do, and at least ``least`` (the default).

    Paper: none. Equation: t = max(least, (Q_harmless(0.95) + Q_harmful(0.15)) / 2).
    Departures: ours. It looks at no row of the data, so that a row's fate depends on nothing but the row: a file may be
    doubled, cut up or mixed with another, hold one row or nothing but harm. For scores whose scale is that of the anchors, as
    those of the selector ``screen``, on which harmless prompts lie at 0 and harmful ones at 1.
    """

    name = "anchored"

    def __init__(self, least: float = 0.7) -> None:
        require_share(self.name, "least", least)
        self.least = least

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores by the anchors. Raises UsageError where there are none of one kind."""
        require_rows(values)
        if anchors is None or not len(anchors.harmful) or not len(anchors.harmless):
            raise UsageError(
                "the threshold 'anchored' needs scores of rows of known kind, and this selector gives none: use the selector "
                "screen, or the threshold competition, adaptive, ratio or fixed"
            )
        reached = float(np.quantile(anchors.harmless, REACHED))
        shown = float(np.quantile(anchors.harmful, SHOWN))
        value = max(self.least, (reached + shown) / 2)
        return Cut(value, self.name, {"least": self.least, "harmless_reach": reached, "harmful_reach": shown})
