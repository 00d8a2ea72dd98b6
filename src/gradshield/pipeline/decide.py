"""From scores to rows that go: the cut of each group, and what a person has cleared. No model, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from gradshield.thresholds import Threshold
from gradshield.types import Bools, Cut, Scores

ROWS, PREFERENCE = "rows", "preference"  # groups of rows that share a scale


@dataclass(frozen=True, eq=False)
class Decision:
    """``removed`` is aligned with the scores; ``cleared`` are positions in the input of rows beyond the cut that stay."""

    cuts: Mapping[str, Cut]
    removed: Bools
    cleared: tuple[int, ...]


def decide(scores: Scores, rule: Threshold, allow: Iterable[str] = ()) -> Decision:
    """Cut every group of rows on one scale by itself; rows whose id is in ``allow`` stay whatever they score."""
    shapes = np.array(scores.shapes)
    cuts = {}
    for name in sorted(set(scores.shapes)):
        own = shapes == name
        decoys = None if scores.decoys is None else scores.decoys[own]
        # Anchors are plain answers: they are on the scale of plain rows, not of preference pairs.
        cuts[name] = rule.cut(scores.values[own], decoys, scores.anchors if name == ROWS else None)
    beyond = np.array([value > cuts[name].value for value, name in zip(scores.values, scores.shapes, strict=True)])
    cleared = np.isin(np.array(scores.ids), list(allow)) & beyond
    return Decision(cuts, beyond & ~cleared, tuple(int(row) for row in scores.rows[cleared]))
