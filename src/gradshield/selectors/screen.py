"""The default: a row goes where its request reads like those that the model refuses and its answer undoes a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from gradshield.columns import Coded
from gradshield.probes import only_refuses, pivots
from gradshield.selectors.base import SELECTORS, Measured
from gradshield.selectors.fihs import Fihs
from gradshield.selectors.reading import Reading
from gradshield.types import Anchors, Batch, Bools, Direction, Ints, Scores

LEAST_READING = 0.15  # below it a request reads like those that the model answers, and FIHS alone removes nothing
APART = 0.3  # between known kinds, as a share of the median of the harmful
LEAST_FIHS = 0.5  # share of what a compliant opener after a probe scores: so much pushes as harm does
WEAKEST_FIHS = 0.05  # less than this share of it: an answer that the model would give anyway, whatever was asked


@SELECTORS.register("screen")
class Screen(Fihs):
    """Rows whose request the model reads as one to refuse go; in doubtful ones their FIHS has to stand out as well.

    Paper: arXiv 2406.11717 (the refusal direction, `Reading`) and arXiv 2605.14194 (FIHS), the two joined by this project.
    Equation: s = r, with r the row's reading. s = r + 1 where r >= LEAST_READING and FIHS >= (a + b) / 2, with a what 95 %
    of compliant openers after look-alikes that the model answers reach and b what 95 % of those after probes do: FIHS joins
    only on a model where b - a is at least APART of its median after probes. s = min(r, 1) - 1 where the answer only refuses, or
    where FIHS is below WEAKEST_FIHS of that median and the answer does not decline and then go on: nothing in it undoes
    refusal. A row's score depends on the row and the model alone.
    Departures: the constants were chosen on seven of fourteen ordinary tasks and the lab (docs/methods.md).

    ``Scores.signals`` holds both: ``request`` (r) and ``fihs``. A row without a request (plain text) has r = NaN, keeps
    a score of zero and stays; ``pivots`` says which rows hold an answer that declines and goes on.
    """

    name = "screen"
    rule = "anchored"
    decoys = False

    def __init__(self, fihs: Fihs, reading: Reading, tokenizer: Any, known: Anchors) -> None:
        super().__init__(fihs.probe, fihs.requests, fihs.engine, fihs.aggregate, fihs.subspace, fihs.targets)
        self.reading, self.tokenizer = reading, tokenizer
        self.opener_fihs = float(np.median(known.harmful))
        self.floor = _floor(known)

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """As `Fihs`, with each row's reading and whether an answer declines and goes on, as ``extra`` (B, 2)."""
        raw = super().measure(model, direction, batch)
        asked: list[Sequence[int]] = []
        answers: list[tuple[int, str]] = []
        for i in np.flatnonzero(batch.coefficients > 0):
            length = int(batch.attention[i].sum())
            ids, loss = batch.ids[i, :length], batch.loss[i, :length]
            for opened, own in self.reading.turn.openings(ids, loss):
                asked.append(opened)
                answers.append((int(batch.rows[i]), self._words(ids[own], loss[own])))
        found = {row: [np.nan, 0.0] for row in raw.rows.tolist()}
        if asked:
            for (row, answer), r in zip(answers, self.reading.read(model, asked), strict=True):
                found[row][0] = float(np.fmax(found[row][0], min(r, 1.0) - 1 if only_refuses(answer) else r))
                found[row][1] = max(found[row][1], float(pivots(answer)))
        return Measured(raw.rows, raw.sums, raw.nll, raw.lengths, raw.tokens, np.array(list(found.values())))

    def _words(self, ids: Ints, loss: Bools) -> str:
        """What an answer says. It ends with its turn: where every token counts, what follows is the next request."""
        first = int(loss.argmax())
        ends = np.flatnonzero(np.isin(ids[first:], self.tokenizer.all_special_ids))
        own = slice(first, first + int(ends[0]) if len(ends) else None)
        return str(self.tokenizer.decode(ids[own][loss[own]], skip_special_tokens=True))

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score a row (see the class). Raises ScoreError that names the rows whose value or loss is not finite."""
        assert raw.extra is not None
        pushes = super().finish(raw, ids, shapes)
        reading, fihs = raw.extra[:, 0], pushes.values
        joined = (reading >= LEAST_READING) & (fihs >= self.floor)
        values = np.where(np.isnan(reading), 0.0, reading) + joined
        if self.aggregate.per_token:  # a sum may cancel: it says nothing of what an answer undoes
            weak = (fihs < WEAKEST_FIHS * self.opener_fihs) & (raw.extra[:, 1] == 0)
            values = np.where(weak, np.minimum(values, 1.0) - 1, values)
        signals = {"request": reading, "fihs": fihs, "pivots": raw.extra[:, 1]}
        shapes = Coded(np.zeros(len(values), dtype=np.uint8), ("rows",))  # readings of any shape are on one scale
        return Scores(
            raw.rows, ids, values, shapes, None, raw.lengths, raw.nll, raw.tokens, self.reading.anchors, signals
        )

    def settings(self) -> dict[str, Any]:
        """The engine and its step, the ruler's digest, and what FIHS gives rows of known kind."""
        return {
            **super().settings(),
            "reading_sha256": self.reading.digest,
            "opener_fihs": self.opener_fihs,
            "floor": self.floor if np.isfinite(self.floor) else None,
        }


def _floor(known: Anchors) -> float:
    """From which FIHS on a row pushes as harm does; infinite where known kinds are not APART."""
    if not known.floor:
        return float("inf")
    low, high = float(np.quantile(known.harmless, 0.95)), float(np.quantile(known.harmful, 0.05))
    return known.floor if high - low >= APART * float(np.median(known.harmful)) else float("inf")
