"""From scores to removed rows: the cut of each group, and what a reviewer says of single rows. No model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradshield.columns import Coded
from gradshield.errors import UsageError
from gradshield.stats import wilson
from gradshield.thresholds import Threshold
from gradshield.types import Bools, Cut, Rate, Scores

ROWS, PREFERENCE = "rows", "preference"  # groups of rows that share a scale


def group(shape: str) -> str:
    """The group of a shape. Rows of one group share a scale and are cut together: preference pairs, and all others."""
    return PREFERENCE if shape == PREFERENCE else ROWS


@dataclass(frozen=True, eq=False)
class Decision:
    """``removed`` is aligned with the scores.

    ``cleared`` are input positions of rows above the cut that a reviewer keeps, ``denied`` of rows below it that a
    reviewer removes.
    """

    cuts: Mapping[str, Cut]
    removed: Bools
    cleared: tuple[int, ...]
    denied: tuple[int, ...] = ()


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
    cleared, added = np.zeros_like(beyond), np.zeros_like(beyond)
    for wanted, where, found in ((allowed, beyond, cleared), (denied, ~beyond, added)):
        if wanted:
            found[[i for i in np.flatnonzero(where).tolist() if scores.ids[i] in wanted]] = True
    rows = [tuple(int(row) for row in scores.rows[found]) for found in (cleared, added)]
    return Decision(cuts, (beyond | added) & ~cleared, *rows)


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
