"""The loss of a row as its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradshield.gradients.base import DeviceBatch, scoring
from gradshield.models.logits import token_nll
from gradshield.models.placement import in_float64
from gradshield.selectors.base import SELECTORS, Measured, by_row, no_direction, require_finite
from gradshield.types import Batch, Direction, Scores


@SELECTORS.register("loss")
class Loss:
    """How surprised the model is by the row's answer: the mean loss of its tokens, whose exponential is the perplexity.

    Paper: none; the usual loss filter. Equation: mean over loss tokens of -log p(token).
    Departures: a preference pair's value is the mean over the tokens of both answers, without sign.
    """

    name = "loss"
    rule = "ratio:10%"
    travels, probed = True, False

    def prepare(self, model: nn.Module) -> Direction:
        """No tensors: a loss has no direction."""
        return no_direction(self.name, model)

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Each row's mean loss in nats, from one forward pass; zero for a row without a loss token."""
        data = DeviceBatch.of(batch, model)
        with scoring(model), torch.no_grad():
            nll = token_nll(model, data.ids, data.attention, data.loss)
        rows, means, lengths = by_row(batch, in_float64(nll).cpu().numpy())
        return Measured(rows, means, means, lengths)

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score per row. Raises ScoreError naming the rows whose loss is not finite."""
        require_finite(raw)
        return Scores(raw.rows, ids, raw.sums, shapes, lengths=raw.lengths, nll=raw.nll)

    def settings(self) -> Mapping[str, Any]:
        """Empty: the loss depends only on the model and the row."""
        return {}
