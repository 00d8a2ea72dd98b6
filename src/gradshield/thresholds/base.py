"""The threshold interface: arrays in, one number out; no model."""

from __future__ import annotations

import math
from typing import Annotated, Protocol

import numpy as np

from gradshield import options
from gradshield.errors import EmptyDataError, UsageError
from gradshield.registry import Registry
from gradshield.types import Anchors, Cut, Floats


class Threshold(Protocol):
    """Decides the cut of one group of rows on one scale. Rows that score above ``Cut.value`` are removed.

    ``values`` and ``decoys`` are (N,); ``anchors`` are rows of known kind on the same scale. A rule uses what it needs.
    """

    name: str

    def cut(self, values: Floats, decoys: Floats | None = None, anchors: Anchors | None = None) -> Cut: ...


Share = Annotated[float, options.Option(above=0, below=1)]
THRESHOLDS: Registry[type[Threshold]] = Registry("threshold")


def parse(text: str, seed: int = 0) -> Threshold:
    """A threshold as typed: ``decoy``, ``decoy:q=0.1``, ``ratio:0.05``, ``fixed:3.2``.

    A value without a key belongs to the rule's first option. Raises UnknownNameError and UsageError.
    """
    spec = options.Spec.split(text)
    return options.build("threshold", spec, THRESHOLDS[spec.name], {"seed": lambda: seed})


def require_rows(values: Floats) -> None:
    """Raises EmptyDataError for no rows."""
    if len(values) == 0:
        raise EmptyDataError("there are no scores to cut: no row could be scored; check the quarantine file")


def require_decoys(name: str, decoys: Floats | None) -> Floats:
    """The decoys. Raises UsageError if there are none."""
    if decoys is None:
        raise UsageError(
            f"the threshold {name!r} needs a decoy for every row, and these scores have none: score with --selector fihs and a "
            "per-token engine, or use the threshold adaptive, ratio or fixed"
        )
    return decoys


def reaching(t: float, values: Floats) -> float:
    """The cut that removes the rows >= t, the next float below; at the largest value, which removes none, for t infinite."""
    return float(np.nextafter(t, -np.inf)) if np.isfinite(t) else float(np.max(values))


def fewest(q: float) -> int:
    """The fewest rows that a bound (1 + decoys) / rows <= q lets go: 1/q, rounded up."""
    return math.ceil(1 / q - 1e-9)  # 1 / 0.1 is 10
