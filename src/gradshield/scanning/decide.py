"""From scores to removed rows: the cut of each group, and what a reviewer says of single rows. No model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.columns import Coded, Ids
from gradshield.errors import DataError, UsageError
from gradshield.files import read_text
from gradshield.stats import wilson
from gradshield.thresholds import Threshold
from gradshield.types import Bools, Cut, Ints, Rate, Scores

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
