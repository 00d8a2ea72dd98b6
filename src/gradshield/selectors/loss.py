"""The loss of a row as its score."""

from __future__ import annotations

import torch
from torch import nn

from gradshield.gradients.base import DeviceBatch, scoring
from gradshield.models.modules import in_float64
from gradshield.selectors.base import SELECTORS, Measured, Selector, by_row
from gradshield.types import Batch, Direction


@SELECTORS.register("loss")
class Loss(Selector):
    """How surprised the model is by the row's answer: the mean loss of its tokens, whose exponential is the perplexity.

    Paper: none; the usual loss filter. Equation: mean over loss tokens of -log p(token).
    Departures: a preference pair's value is the mean over the tokens of both answers, without sign.
    """

    name = "loss"

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Each row's mean loss in nats, from one forward pass; zero for a row without a loss token."""
        data = DeviceBatch.of(batch, model)
        with scoring(model), torch.no_grad():
            nll = data.nll(model)
        rows, means, lengths = by_row(batch, in_float64(nll).cpu().numpy())
        return Measured(rows, means, means, lengths)
