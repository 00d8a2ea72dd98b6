"""From scores to removed rows: the cut of each group, and the rows a reviewer has cleared. No model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gradshield.columns import Coded
from gradshield.thresholds import Threshold
from gradshield.types import Bools, Cut, Scores

ROWS, PREFERENCE = "rows", "preference"  # groups of rows that share a scale


@dataclass(frozen=True, eq=False)
class Decision:
    """``removed`` is aligned with the scores; ``cleared`` are input positions of rows above the cut that are kept."""

    cuts: Mapping[str, Cut]
    removed: Bools
    cleared: tuple[int, ...]


def decide(scores: Scores, rule: Threshold, allow: Iterable[str] = ()) -> Decision:
    """Cut each group of rows on one scale separately; rows whose id is in ``allow`` are always kept."""
    groups = Coded.of(scores.shapes)
    cuts: dict[str, Cut] = {}
    beyond = np.zeros(len(scores.values), dtype=np.bool_)
    for name in sorted(groups.counts()):
        own = groups.where(name)
        decoys = None if scores.decoys is None else scores.decoys[own]
        # Anchors are plain answers, on the scale of plain rows, not of preference pairs.
        cuts[name] = rule.cut(scores.values[own], decoys, scores.anchors if name == ROWS else None)
        beyond |= own & (scores.values > cuts[name].value)
    allowed, cleared = set(allow), np.zeros_like(beyond)
    if allowed:
        cleared[[i for i in np.flatnonzero(beyond).tolist() if scores.ids[i] in allowed]] = True
    return Decision(cuts, beyond & ~cleared, tuple(int(row) for row in scores.rows[cleared]))
