"""What a scan decides, row by row, with what is needed to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gradshield.manifests import ScanManifest
from gradshield.types import Bools, Cut, Floats, Ints, Quarantined, Scores


@dataclass(frozen=True, eq=False)
class Marks:
    """Each row's decision as new columns, for ``dataset.map(marks, batched=True, with_indices=True)``.

    All fields are (N,), aligned. ``datasets`` hashes a mapped function by its content, so it holds arrays and nothing else.
    """

    rows: Ints
    values: Floats
    removed: Bools
    categories: Sequence[str]

    def __call__(self, batch: Mapping[str, Any], indices: Sequence[int]) -> dict[str, list[Any]]:
        """The columns for the rows at these positions in the input; None for a row that was not scored."""
        places = np.searchsorted(self.rows, indices)
        found = [p if p < len(self.rows) and self.rows[p] == i else None for p, i in zip(places, indices, strict=True)]
        return {
            "gradshield_score": [None if p is None else float(self.values[p]) for p in found],
            "gradshield_removed": [None if p is None else bool(self.removed[p]) for p in found],
            "gradshield_category": [None if p is None else str(self.categories[p]) for p in found],
        }


@dataclass(frozen=True, eq=False)
class Selection:
    """A scan's decision for every row.

    ``removed`` and ``categories`` (the kind of harm a removed row asks for, else empty) are aligned with ``scores.rows``, as are
    ``lines`` and ``files``: where a row begins (the file is empty where there is none). ``cuts`` is keyed like ``scores.shapes``.
    ``cleared`` are rows above the cut that a reviewer keeps, ``confirmed`` those that a reviewer says go, ``denied`` rows below
    it that a reviewer removes. ``kept``, made on first access, is ready for a trainer: the caller's own ``Dataset`` without the
    removed rows if TRL knows its shape, else the rows tokenised as they were scored.
    """

    scores: Scores
    removed: Bools
    categories: Sequence[str]
    cuts: Mapping[str, Cut]
    quarantined: tuple[Quarantined, ...]
    cleared: tuple[int, ...]
    denied: tuple[int, ...]
    confirmed: tuple[int, ...]
    keep: Callable[[], Any]
    manifest: ScanManifest
    lines: Ints
    files: Sequence[str]

    def __repr__(self) -> str:
        said = "certified" if self.certified else "not certified: see manifest.results.doubts"
        return f"<Selection: {int(self.removed.sum()):,} of {len(self.removed):,} rows removed, {said}>"

    @property
    def certified(self) -> bool:
        """Whether the model refused its probes and no check of the scan failed (`scanning.trust`)."""
        return self.manifest.results.certified

    @cached_property
    def kept(self) -> Any:
        return self.keep()

    @property
    def marks(self) -> Marks:
        """Score, decision and kind of harm as columns of a ``Dataset``."""
        return Marks(self.scores.rows, self.scores.values, self.removed, self.categories)

    @property
    def kept_rows(self) -> Ints:
        """Positions in the input of the kept rows."""
        return self.scores.rows[~self.removed]

    @property
    def removed_rows(self) -> Ints:
        """Positions in the input of the removed rows."""
        return self.scores.rows[self.removed]
