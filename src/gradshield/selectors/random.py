"""Random removal, the control for every other method."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from gradshield.selectors.base import SELECTORS, Measured, Selector, by_row, no_direction
from gradshield.types import Batch, Direction, Scores


@SELECTORS.register("random")
class Random(Selector):
    """A pseudo-random number for each row from the seed and the row's content: removes as many rows blindly.

    Paper: none; the control at equal removal. Equation: SHA-256(seed, id), read as a number in [0, 1).
    Departures: none. A row gets the same number at any position; the model is never run, so the loss is reported as zero.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def prepare(self, model: nn.Module) -> Direction:
        return no_direction(self.name)

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Lengths only: the numbers are drawn in ``finish``, which has the ids."""
        rows, means, lengths = by_row(batch, np.zeros(batch.ids.shape))
        return Measured(rows, means, means, lengths)

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        values = np.fromiter((self._drawn(name) for name in ids), np.float64, len(ids))
        return Scores(raw.rows, ids, values, shapes, lengths=raw.lengths, nll=raw.nll)

    def _drawn(self, name: str) -> float:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # exact in float64

    def settings(self) -> Mapping[str, Any]:
        return {"seed": self.seed}
