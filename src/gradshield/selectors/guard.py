"""Guard: an external model's verdict on each row's responses, independent of the model that is trained."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from gradshield.data.render import runs
from gradshield.errors import EndpointError
from gradshield.judges.guards import Guard, of_rows, parse
from gradshield.options import Given
from gradshield.selectors.base import SELECTORS, Measured, Selector, listed, members
from gradshield.types import Batch, Direction, Ints, Scores

Decode = Callable[[Sequence[int]], str]
Turn = tuple[str, str]  # the text before a response, and the response


@SELECTORS.register("guard")
class GuardFilter(Selector):
    """The probability, by a guard model or a moderation endpoint, that a row's response is unsafe.

    Paper: arXiv 2312.06674 (Llama Guard), used here as a filter of training data. Equation: s(x) = max over the row's
    responses y of P(unsafe | text before y, y).
    Departures: the paper rates live conversations, not rows. The text before a response is that of the rendered row, without
    special tokens; a response that training moves away from (of a preference pair, or label false) does not count. A row that
    the guard cannot judge scores 1 and is named in a warning: an unjudged row is not kept.
    """

    name = "guard"
    rule = "fixed:0.5"
    travels = False

    def __init__(self, guard: Guard, decode: Decode) -> None:
        self.guard, self.decode = guard, decode

    @classmethod
    def parse(cls, text: str, given: Given) -> GuardFilter:
        """The selector for a guard as typed (``NAME``, ``classifier:NAME``, ``llm:MODEL@URL``); ``given`` has a ``tokenizer``.

        Raises UsageError.
        """
        tokenizer = given["tokenizer"]()

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        return cls(parse(of_rows(text)), decode)

    def prepare(self, model: nn.Module) -> Direction:
        """No direction: ``tensors`` is empty, and the digest is the guard's. Raises if the guard cannot work."""
        self.guard.ready()
        record = json.dumps(self._record, sort_keys=True).encode()
        return Direction({}, (), (), hashlib.sha256(record).hexdigest())

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Each row's score; NaN where the guard could not judge, which ``finish`` counts as 1. ``nll`` is not measured (NaN).

        Raises EndpointError if the guard's endpoint has stopped answering: the scan can be resumed later.
        """
        turns = [self._turns(batch, i) if batch.coefficients[i] > 0 else [] for i in range(len(batch.ids))]
        flat = [turn for own in turns for turn in own]
        opinions = iter(self.guard.opinions([before for before, _ in flat], [answer for _, answer in flat]))
        found = [[next(opinions) for _ in own] for own in turns]
        if lost := [opinion for own in found for opinion in own if opinion.lost]:
            raise EndpointError(lost[0].reason)
        rows, sequences = members(batch)
        values = np.zeros(len(rows))
        for n, own in enumerate(sequences):
            row = [opinion for i in own for opinion in found[i]]
            known = [opinion.probability for opinion in row if opinion.probability is not None]
            worst = max(known, default=0.0)
            # One unsafe response is enough, even if others could not be judged.
            values[n] = worst if worst > 0.5 or len(known) == len(row) else np.nan
            if np.isnan(values[n]):
                reason = next(opinion.reason for opinion in row if opinion.probability is None)
                warnings.warn(f"the guard could not judge row {rows[n]}: {reason}", stacklevel=2)
        lengths: Ints = np.array([int(batch.loss[own].sum()) for own in sequences], dtype=np.int64)
        return Measured(rows, values, np.full(len(rows), np.nan), lengths)

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score per row; rows that could not be judged score 1 and are named in a warning."""
        unknown = np.isnan(raw.sums)
        if unknown.any():
            warnings.warn(
                f"{unknown.sum()} of {len(raw.rows)} rows could not be judged by {self.guard.name} and count as unsafe "
                f"({listed(raw.rows[unknown])}): look at them by hand",
                stacklevel=2,
            )
        values = np.where(unknown, 1.0, raw.sums)
        return Scores(raw.rows, ids, values, shapes, lengths=raw.lengths)

    def settings(self) -> Mapping[str, Any]:
        return {"guard": self._record}

    @cached_property
    def _record(self) -> dict[str, Any]:
        return dict(self.guard.record())

    def _turns(self, batch: Batch, i: int) -> list[Turn]:
        """Every run of loss tokens in sequence ``i``, with everything before it, as text."""
        length = int(batch.attention[i].sum())
        ids, loss = batch.ids[i, :length], batch.loss[i, :length].copy()
        if length > 1:
            loss[0] = loss[1]  # the first token has no loss since nothing predicts it, but it is part of the text
        return [(self.decode(ids[: run.start].tolist()), self.decode(ids[run].tolist())) for run in runs(loss)]
