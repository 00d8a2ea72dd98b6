"""Cut by a rule of your own: anything with a ``name`` and a ``cut`` of arrays.

Registered, the rule has a name that `ScanSettings` takes with its options. Runs on a CPU in under a minute with the
bundled lab model: python examples/own_threshold.py
"""

from __future__ import annotations

import tempfile

import numpy as np

import gradshield as gs
from gradshield import lab
from gradshield.thresholds import THRESHOLDS
from gradshield.types import Anchors, Cut, Floats


@THRESHOLDS.register("mad")
class MedianDeviations:
    """Rows further than k median absolute deviations above the median go.

    Paper: none. Departures: none.
    """

    name = "mad"

    def __init__(self, k: float = 6.0) -> None:
        self.k = k

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores. What is put in ``detail`` is printed in the report."""
        median = float(np.median(values))
        deviation = float(np.median(np.abs(values - median)))
        return Cut(median + self.k * deviation, self.name, {"k": self.k, "median": median, "deviation": deviation})


def main() -> None:
    rows, _ = lab.mix("choice", harm="explicit", ratio=0.1, n=90)
    probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    with tempfile.TemporaryDirectory() as folder:
        settings = gs.ScanSettings(selector="fihs", threshold="mad:k=6")
        first = gs.scan(rows, model=lab.checkpoint("aligned"), settings=settings, probing=probing, output=folder)
        print("mad:k=6", len(first.removed_rows), "removed")
        for rule in ("mad:k=10", "decoy", "adaptive", "ratio:5%"):  # saved scores are cut again without the model
            print(rule, len(gs.cut(folder, rule).removed_rows), "removed")


if __name__ == "__main__":
    main()
