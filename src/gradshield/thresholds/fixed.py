"""A given cut."""

from __future__ import annotations

from gradshield.thresholds.base import THRESHOLDS, require_rows
from gradshield.types import Anchors, Cut, Floats


@THRESHOLDS.register("fixed")
class Fixed:
    """Remove the rows that score above a given value.

    Paper: none. Departures: none.
    """

    name = "fixed"

    def __init__(self, value: float) -> None:
        self.value = value

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """The given value, for any (N,) scores."""
        require_rows(values)
        return Cut(self.value, self.name)
