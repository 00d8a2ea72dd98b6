"""The oracle: one backward pass per row, its gradient dotted with the direction, or its norm. Slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.gradients.base import ENGINES, Derivatives, DeviceBatch, check_direction, gradient, scoring
from gradshield.models.logits import token_nll
from gradshield.models.modules import in_float64
from gradshield.types import Batch, Direction


@ENGINES.register("loop")
class Loop:
    """One backward pass per row, dotted with the direction; exact and slow, the oracle for every other engine.

    Paper: arXiv 2605.14194, FIHS as defined. Departures: none.
    """

    name = "loop"
    per_token = False

    def directional(self, model: nn.Module, batch: Batch, direction: Direction) -> Derivatives:
        """(K, B) derivatives; every sequence runs alone and unpadded."""
        check_direction(model, direction)
        whole = DeviceBatch.of(batch, model)
        values = torch.zeros(len(direction.names), len(whole.ids), dtype=torch.float64)
        nll = torch.zeros(whole.ids.shape, dtype=torch.float64)
        with scoring(model, direction.tensors) as parameters, torch.enable_grad():
            for i in range(len(whole.ids)):
                losses = _alone(model, whole, i)
                along = torch.zeros(len(direction.names), dtype=torch.float64)
                for name, g in gradient(losses.sum(), parameters).items():
                    v = direction.tensors[name].to(g.device)
                    along += (in_float64(v.flatten(1)) @ in_float64(g.flatten())).cpu()
                values[:, i] = -along
                nll[i, : len(losses)] = in_float64(losses.detach()).cpu()
        return Derivatives(values, nll)


def row_norms(model: nn.Module, batch: Batch, parameters: Sequence[str]) -> Derivatives:
    """``values[r]`` (R,) is the L2 norm of the gradient of row r's loss over the named parameters, in order of first appearance.

    A row's loss is the sum over its sequences of coefficient times negative log-likelihood, in nats, so that a preference pair
    has one gradient. One backward pass per row, in evaluation mode, without dropout.
    """
    whole = DeviceBatch.of(batch, model)
    nll = torch.zeros(whole.ids.shape, dtype=torch.float64)
    squares = []
    with scoring(model, parameters) as trainable, torch.enable_grad():
        for row in dict.fromkeys(batch.rows.tolist()):
            total = torch.zeros((), device=whole.ids.device)
            for i in np.flatnonzero(batch.rows == row).tolist():
                losses = _alone(model, whole, i)
                total = total + float(batch.coefficients[i]) * losses.sum()
                nll[i, : len(losses)] = in_float64(losses.detach()).cpu()
            squares.append(sum(float(in_float64(g).square().sum()) for g in gradient(total, trainable).values()))
    return Derivatives(torch.tensor(squares, dtype=torch.float64).sqrt(), nll)


def _alone(model: nn.Module, whole: DeviceBatch, i: int) -> Tensor:
    """The loss of each token of sequence i, which runs alone and unpadded: (T,)."""
    part = slice(i, i + 1), slice(0, int(whole.attention[i].sum()))
    return token_nll(model, whole.ids[part], whole.attention[part], whole.loss[part])[0]
