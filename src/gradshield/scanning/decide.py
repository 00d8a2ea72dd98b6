"""From scores to removed rows: the cut of each group, what a reviewer says of single rows, and the `Selection`. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.columns import Coded, Ids
from gradshield.errors import DataError, UsageError
from gradshield.files import read_text
from gradshield.manifests import ScanManifest
from gradshield.stats import wilson
from gradshield.thresholds import Threshold
from gradshield.types import Bools, Cut, Floats, Ints, Quarantined, Rate, Scores

ROWS, PREFERENCE = "rows", "preference"  # groups of rows that share a scale


def group(shape: str) -> str:
    """The group of a shape. Rows of one group share a scale and are cut together: preference pairs, and all others."""
    return PREFERENCE if shape == PREFERENCE else ROWS


@dataclass(frozen=True, eq=False)
class Decision:
    """``removed`` is aligned with the scores.

    ``cleared`` are input positions of rows above the cut that a reviewer keeps, ``confirmed`` of those that a reviewer says go,
    ``denied`` of rows below it that a reviewer removes.
    """

    cuts: Mapping[str, Cut]
    removed: Bools
    cleared: tuple[int, ...]
    denied: tuple[int, ...] = ()
    confirmed: tuple[int, ...] = ()

    def unread(self, rows: Ints) -> Bools:
        """Which of the scored ``rows`` (N,) go without a person's word, (N,)."""
        return self.removed & ~np.isin(rows, (*self.denied, *self.confirmed))


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection(Decision):
    """A scan's decision for every row, with what is needed to repeat it.

    ``categories`` (the kind of harm a removed row asks for, else empty) are aligned with ``scores.rows``, as are ``lines`` and
    ``files``: where a row begins (the file is empty where there is none). ``kept``, made on first access, is ready for a trainer:
    the caller's own ``Dataset`` without the removed rows if TRL knows its shape, else the rows tokenised as they were scored.
    """

    scores: Scores
    categories: Sequence[str]
    quarantined: tuple[Quarantined, ...]
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


def decide(scores: Scores, rule: Threshold, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> Decision:
    """Cut each group of rows on one scale separately, then as `reviewed`."""
    groups = Coded.of(scores.shapes)
    cuts: dict[str, Cut] = {}
    for name in sorted(groups.counts()):
        own = groups.where(name)
        decoys = None if scores.decoys is None else scores.decoys[own]
        # Anchors are plain answers, on the scale of plain rows, not of preference pairs.
        cuts[name] = rule.cut(scores.values[own], decoys, scores.anchors if name == ROWS else None)
    return reviewed(scores, cuts, allow, deny)


def reviewed(scores: Scores, cuts: Mapping[str, Cut], allow: Iterable[str] = (), deny: Iterable[str] = ()) -> Decision:
    """The decision of given cuts: rows whose id is in ``allow`` are kept and those in ``deny`` removed, whatever they score.

    Raises UsageError for an id in both.
    """
    allowed, denied = set(allow), set(deny)
    if both := sorted(allowed & denied):
        raise UsageError(f"the row {both[0]!r} is both allowed and denied: leave it out of one of the two lists")
    beyond = above(scores, cuts)
    cleared, added, confirmed = (
        _named(scores, where, wanted) for where, wanted in ((beyond, allowed), (~beyond, denied), (beyond, denied))
    )
    rows = [tuple(scores.rows[found].tolist()) for found in (cleared, added, confirmed)]
    return Decision(cuts, (beyond | added) & ~cleared, *rows)


def _named(scores: Scores, where: Bools, ids: set[str]) -> Bools:
    """The rows among ``where`` that have one of the ids, (N,)."""
    found = np.zeros_like(where)
    if ids:
        found[[i for i in np.flatnonzero(where).tolist() if scores.ids[i] in ids]] = True
    return found


def above(scores: Scores, cuts: Mapping[str, Cut]) -> Bools:
    """The rows that score above the cut of their group, (N,)."""
    groups, beyond = Coded.of(scores.shapes), np.zeros(len(scores.values), dtype=np.bool_)
    for name, cut in cuts.items():
        beyond |= groups.where(name) & (scores.values > cut.value)
    return beyond


def caught_and_lost(removed: Bools, labels: Any) -> dict[str, Rate]:
    """The removed share of the rows labelled harmful (1) and of the others; both (N,). An empty class is left out."""
    harmful = np.asarray(labels, dtype=bool)
    return {
        name: wilson(int(removed[own].sum()), int(own.sum()))
        for name, own in (("caught", harmful), ("lost", ~harmful))
        if own.any()
    }


def read_ids(path: Path | None, what: str) -> list[str]:
    """Row ids from a reviewer's list, one per line, with notes after ``#``; none without a file.

    Raises DataError, which calls the file ``what``, if it cannot be read or a line is no id.
    """
    found: list[str] = []
    if path is None:
        return found
    for at, line in enumerate(read_text(path, what).splitlines(), 1):
        if id := line.partition("#")[0].strip().lower():
            try:
                found += Ids.of([id])
            except (ValueError, OverflowError):
                raise DataError(
                    f"line {at} of {what} {path.name!r} is no row id ({id[:40]!r}): write one id a line, 16 hex digits as in "
                    "scores.parquet, and notes after a #"
                ) from None
    return found
