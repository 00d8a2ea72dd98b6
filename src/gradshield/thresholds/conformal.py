"""A cut from the scores of known clean rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gradshield.errors import DataError
from gradshield.options import check
from gradshield.thresholds.base import THRESHOLDS, Share, require_rows
from gradshield.types import Anchors, Cut, Floats


@THRESHOLDS.register("conformal")
class Conformal:
    """The score that at most a share alpha of exchangeable clean rows exceeds, from a file of clean rows' scores.

    Paper: split conformal prediction (Vovk et al. 2005).
    Equation: t = the ⌈(m + 1)(1 - α)⌉-th smallest of m clean scores.
    Departures: none. ``clean`` is an array of scores, or the ``scores.parquet`` of a scan of clean rows with the same
    model and settings.
    """

    name = "conformal"

    def __init__(self, clean: Floats | str | Path, alpha: Share = 0.01) -> None:
        check(Conformal, alpha=alpha)
        self.clean, self.alpha = clean, alpha

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut:
        """Cut of (N,) scores. Raises DataError if there are too few clean rows for alpha, or they span several groups."""
        require_rows(values)
        clean = np.sort(self._scores())
        m = len(clean)
        k = math.ceil((m + 1) * (1 - self.alpha) - 1e-9)  # rounding may lift a whole number
        if k > m:
            raise DataError(
                f"the threshold 'conformal' got {m} clean rows, and alpha = {self.alpha:g} needs at least "
                f"{math.ceil(1 / self.alpha - 1e-9) - 1}: give more clean rows, or a larger alpha"
            )
        return Cut(float(clean[k - 1]), self.name, {"alpha": self.alpha, "clean_rows": m, "rank": k})

    def _scores(self) -> Floats:
        if isinstance(self.clean, np.ndarray):
            return self.clean
        path = Path(self.clean)
        if not path.is_file():
            raise DataError(
                f"the clean scores {str(path)!r} are not a file: give the scores.parquet of a scan of clean rows"
            )
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path, columns=[n for n in pq.read_schema(path).names if n in ("score", "group")])
            scores = np.asarray(table["score"].to_numpy(), dtype=np.float64)
        except (pa.ArrowException, KeyError) as error:
            raise DataError(
                f"the clean scores {path.name!r} could not be read ({type(error).__name__}): "
                "give the scores.parquet of a scan of clean rows"
            ) from error
        groups = sorted(set(table["group"].to_pylist())) if "group" in table.column_names else []
        if len(groups) > 1:
            raise DataError(
                f"the clean scores {path.name!r} span {len(groups)} groups of rows ({', '.join(groups)}), whose scales differ: "
                "give the scores.parquet of a scan of clean rows of the group to be cut"
            )
        return scores
