"""The oracle: one backward pass per sequence, its gradient dotted with the direction. Slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gradshield.gradients.base import ENGINES, Derivatives, DeviceBatch, check_direction, scoring
from gradshield.gradients.norms import Norms
from gradshield.models.logits import token_nll
from gradshield.models.placement import in_float64, parts_of
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
        count, width = whole.ids.shape
        values = torch.zeros(len(direction.names), count, dtype=torch.float64)
        nll = torch.zeros(count, width, dtype=torch.float64)
        with scoring(model, direction.tensors) as parameters, torch.enable_grad():
            for i in range(count):
                length = int(whole.attention[i].sum())
                row = slice(i, i + 1), slice(0, length)
                losses = token_nll(model, whole.ids[row], whole.attention[row], whole.loss[row])
                gradient = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
                values[:, i] = -self._dot(dict(zip(parameters, gradient, strict=True)), direction)
                nll[i, :length] = in_float64(losses[0].detach()).cpu()
        return Derivatives(values, nll)

    def norms(self, model: nn.Module, batch: Batch, parameters: Sequence[str]) -> Norms:
        """`row_norms` the slow way, for any parameters: one backward pass per sequence, unpadded."""
        whole = DeviceBatch.of(batch, model)
        nll = torch.zeros(whole.ids.shape, dtype=torch.float64)
        totals: dict[int, list[Tensor]] = {}
        with scoring(model, parameters) as trainable, torch.enable_grad():
            for i, row in enumerate(batch.rows.tolist()):
                length = int(whole.attention[i].sum())
                part = slice(i, i + 1), slice(0, length)
                losses = token_nll(model, whole.ids[part], whole.attention[part], whole.loss[part])
                gradient = torch.autograd.grad(losses.sum(), list(trainable.values()), allow_unused=True)
                total = totals.setdefault(row, [torch.zeros_like(p) for p in trainable.values()])
                for sofar, g in zip(total, gradient, strict=True):
                    if g is not None:  # a parameter the row does not reach
                        sofar.add_(g, alpha=float(batch.coefficients[i]))
                nll[i, :length] = in_float64(losses[0].detach()).cpu()
        squares = [sum(float(in_float64(t).square().sum()) for t in total) for total in totals.values()]
        return Norms(torch.tensor(squares, dtype=torch.float64).sqrt(), np.array(list(totals), dtype=np.int64), nll)

    @staticmethod
    def _dot(gradient: dict[str, Tensor | None], direction: Direction) -> Tensor:
        total = torch.zeros(len(direction.names), dtype=torch.float64)
        for name, g in gradient.items():
            if g is None:  # a parameter the row does not reach (an expert it was not routed to)
                continue
            v = direction.tensors[name].to(g.device)
            for own, other in zip(parts_of(v.flatten(1)), parts_of(g.flatten()), strict=True):
                total += (in_float64(own) @ in_float64(other)).cpu()
        return total
