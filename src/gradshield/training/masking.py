"""Rows that keep their place but not their harm: the tokens that push a row beyond the cut leave its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gradshield.types import Floats, Rendered


def masked(row: Rendered, values: Floats, cut: float, aggregate: Callable[[Floats], float]) -> Rendered:
    """The row without the fewest highest-scoring loss tokens whose absence brings its score down to the cut.

    ``values`` (n,) are the FIHS of the row's loss tokens in order, ``aggregate`` counts those that remain. Where no number
    of tokens is enough, all of them leave.
    """
    order = np.argsort(-values, kind="stable")
    kept = np.ones(len(values), dtype=bool)
    for t in order:
        if aggregate(values[kept]) <= cut:
            break
        kept[t] = False
        if not kept.any():
            break
    sequences, start = [], 0
    for tokens in row.sequences:
        places = np.flatnonzero(tokens.loss)
        loss = tokens.loss.copy()
        loss[places[~kept[start : start + len(places)]]] = False
        sequences.append(replace(tokens, loss=loss))
        start += len(places)
    return replace(row, sequences=tuple(sequences))
