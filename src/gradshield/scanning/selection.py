"""What a scan decides, row by row, with what is needed to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradshield.manifests import ScanManifest
from gradshield.types import Bools, Cut, Ints, Quarantined, Scores


@dataclass(frozen=True, eq=False)
class Selection:
    """A scan's decision for every row.

    ``removed`` and ``categories`` (the kind of harm a removed row asks for, else empty) are aligned with
    ``scores.rows``. ``cuts`` is keyed like ``scores.shapes``. ``cleared`` are rows above the cut that a reviewer keeps,
    ``denied`` rows below it that a reviewer removes. ``kept``, made on first access, is ready for a trainer: the caller's own
    ``Dataset`` without the removed rows if TRL knows its shape, else the rows tokenised as they were scored. ``certified`` is
    True if the model refused its probes and no check of the scan failed (`scanning.trust`).
    """

    scores: Scores
    removed: Bools
    categories: Sequence[str]
    cuts: Mapping[str, Cut]
    quarantined: tuple[Quarantined, ...]
    cleared: tuple[int, ...]
    denied: tuple[int, ...]
    keep: Callable[[], Any] = field(repr=False)
    manifest: ScanManifest
    certified: bool = True

    @cached_property
    def kept(self) -> Any:
        """The kept rows, for a trainer."""
        return self.keep()

    @property
    def kept_rows(self) -> Ints:
        """Positions in the input of the kept rows."""
        return self.scores.rows[~self.removed]

    @property
    def removed_rows(self) -> Ints:
        """Positions in the input of the removed rows."""
        return self.scores.rows[self.removed]
