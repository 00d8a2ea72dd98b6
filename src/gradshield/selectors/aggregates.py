"""Aggregates: from a row's per-token values to the row's score.

``sum``, ``mean``; ``first:k`` and ``top:k`` sum k tokens; ``top:20%`` averages the top fifth; ``push`` averages the positive
values (see `push`). An aggregate takes (n,) values, n >= 1, and returns a float.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from gradshield.errors import UsageError
from gradshield.types import Floats

AGGREGATES = {
    "sum": "the sum over all tokens",
    "mean": "the average over all tokens",
    "first:K": "the sum of the first K tokens",
    "top:K": "the sum of the K largest values",
    "top:P%": "the average of the largest P per cent",
    "push": "the positive values averaged over all tokens, a short row padded with zeros to 24 (the default)",
}


@dataclass(frozen=True)
class Aggregate:
    """A named aggregate. ``per_token``: it needs the value of every token."""

    name: str
    function: Callable[[Floats], float]
    per_token: bool = True

    def __call__(self, tokens: Floats) -> float:
        return self.function(tokens)


def largest(tokens: Floats, count: int) -> Floats:
    """The ``count`` largest values (all of them in a shorter row)."""
    return np.sort(tokens)[::-1][:count]


def push(tokens: Floats, least: int = 24) -> float:
    """Mean push toward harm: Σ max(v, 0) / max(n, ``least``), a row shorter than ``least`` tokens padded with zeros.

    A few tokens carry a row's harm, and a mean of signed values drowns them. Positive parts do not cancel; the padding keeps
    one large token of a one-word answer from outweighing a whole harmful answer.
    """
    return float(np.maximum(tokens, 0.0).sum()) / max(len(tokens), least)


def parse(text: str) -> Aggregate:
    """An aggregate by its name. Raises UsageError, which lists the names."""
    if text == "sum":
        return Aggregate(text, lambda t: float(t.sum()), per_token=False)
    if text == "mean":
        return Aggregate(text, lambda t: float(t.mean()))
    if text == "push":
        return Aggregate(text, push)
    found = re.fullmatch(r"(first|top):(\d+)(%?)", text)
    if found and int(found[2]) > 0 and not (found[3] and (found[1] == "first" or int(found[2]) > 100)):
        number = int(found[2])
        if found[3]:
            return Aggregate(text, partial(_top_share, percent=number))
        if found[1] == "top":
            return Aggregate(text, lambda t: float(largest(t, number).sum()))
        return Aggregate(text, lambda t: float(t[:number].sum()))
    raise UsageError(
        f"unknown aggregate {text!r}: choose one of {', '.join(AGGREGATES)} (K a whole number, P from 1 to 100)"
    )


def _top_share(tokens: Floats, percent: int) -> float:
    count = -(-percent * len(tokens) // 100)  # rounded up in integers: 0.07 · 100 exceeds 7 in floats
    return float(largest(tokens, count).mean())
