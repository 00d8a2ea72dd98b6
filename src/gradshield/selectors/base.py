"""Measure and decide are apart: what a row-selection method is, whatever it measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import nn

from gradshield.registry import Registry
from gradshield.types import Batch, Direction, Floats, Ints, Scores


@dataclass(frozen=True, eq=False)
class Measured:
    """What one batch gave, by row; no state across rows, so that any distributed map can make it.

    ``sums[i]`` is the row's own value; ``tokens[i]`` its per-token values in order (chosen before rejected, each times
    its sequence's coefficient), None from an engine without them. ``nll`` is the mean loss in nats, ``lengths`` the number
    of loss tokens.
    """

    rows: Ints
    sums: Floats
    nll: Floats
    lengths: Ints
    tokens: tuple[Floats, ...] | None = None

    @staticmethod
    def joined(parts: Sequence[Measured]) -> Measured:
        """All parts as one, in the order of the input's rows."""
        rows = np.concatenate([p.rows for p in parts])
        order = np.argsort(rows, kind="stable")
        whole = [p.tokens for p in parts]
        tokens = None if any(t is None for t in whole) else [values for t in whole for values in t or ()]
        return Measured(
            rows[order],
            np.concatenate([p.sums for p in parts])[order],
            np.concatenate([p.nll for p in parts])[order],
            np.concatenate([p.lengths for p in parts])[order],
            None if tokens is None else tuple(tokens[i] for i in order),
        )


class Selector(Protocol):
    """A method that scores rows. ``measure`` sees one batch at a time; ``finish`` sees the whole dataset, in numpy.

    ``rule`` is the threshold that cuts its scores where none is named. ``settings`` is JSON-able: everything but rows, model and
    direction that a measured number depends on. ``prepare`` of a method that has no direction gives one without tensors.
    """

    name: str
    rule: str

    def prepare(self, model: nn.Module) -> Direction: ...

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured: ...

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores: ...

    def settings(self) -> Mapping[str, Any]: ...


SELECTORS: Registry[type[Selector]] = Registry("selector")
