"""From a row's tokens to the row: how the per-token values are counted.

``sum``, ``mean``; ``first:k`` and ``top:k`` add up k tokens; ``top:20%`` averages the top fifth; ``crest:p%,k`` — see
`crest`. An aggregate takes (n,) values, n >= 1, and gives a float.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from gradshield.errors import UsageError
from gradshield.types import Floats

AGGREGATES = {
    "sum": "all tokens added up",
    "mean": "the average over all tokens",
    "first:K": "the first K tokens added up",
    "top:K": "the K largest values added up",
    "top:P%": "the average of the largest P per cent",
    "crest": "the average of the largest fifth, a short row filled up with zeros to five tokens (the default)",
}


@dataclass(frozen=True)
class Aggregate:
    """A named way to count a row's tokens. ``per_token`` says whether it needs their values one by one."""

    name: str
    function: Callable[[Floats], float]
    per_token: bool = True

    def __call__(self, tokens: Floats) -> float:
        return self.function(tokens)


def largest(tokens: Floats, count: int) -> Floats:
    """The ``count`` largest values (all of them in a shorter row)."""
    return np.sort(tokens)[::-1][:count]


def crest(tokens: Floats, share: float = 0.2, least: int = 5) -> float:
    """Sum of the largest m values over m, m = max(``least``, ⌈``share``·n⌉): the top tokens' average, short rows zero-filled.

    A few tokens carry a row's harm. A fixed number of them misses part of a long row; a fixed share of a short row is
    one token, and a single token is noisy. Counting at least ``least`` positions, absent ones as zero, suits both.
    """
    count = max(least, math.ceil(share * len(tokens)))
    return float(largest(tokens, count).sum()) / count


def parse(text: str) -> Aggregate:
    """An aggregate by its name. Raises UsageError, which lists what there is."""
    if text == "sum":
        return Aggregate(text, lambda t: float(t.sum()), per_token=False)
    if text == "mean":
        return Aggregate(text, lambda t: float(t.mean()))
    if text == "crest":
        return Aggregate(text, crest)
    found = re.fullmatch(r"(first|top):(\d+)(%?)", text)
    if found and int(found[2]) > 0 and not (found[3] and (found[1] == "first" or int(found[2]) > 100)):
        number = int(found[2])
        if found[3]:
            return Aggregate(text, partial(_top_share, share=number / 100))
        if found[1] == "top":
            return Aggregate(text, lambda t: float(largest(t, number).sum()))
        return Aggregate(text, lambda t: float(t[:number].sum()))
    raise UsageError(f"unknown aggregate {text!r}: choose one of {', '.join(AGGREGATES)} (K a whole number, P from 1 to 100)")


def _top_share(tokens: Floats, share: float) -> float:
    return float(largest(tokens, max(1, math.ceil(share * len(tokens)))).mean())
