"""Token masking: exclude from the loss the tokens that push a row beyond the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from gradshield.types import Floats, Rendered


def masked(row: Rendered, values: Floats, cut: float, aggregate: Callable[[Floats], float]) -> Rendered:
    """The row with the fewest highest-scoring loss tokens masked that bring its score down to the cut.

    ``values`` (n,) are the FIHS of the row's loss tokens in order, ``aggregate`` scores those that remain. If no number of tokens
    suffices, all are masked.
    """
    kept = np.ones(len(values), dtype=bool)
    for t in np.argsort(-values, kind="stable"):
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
