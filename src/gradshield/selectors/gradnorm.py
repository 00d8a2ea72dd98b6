"""The norm of a row's gradient as its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from gradshield.gradients import check_subspace, parameter_names, row_norms
from gradshield.selectors.base import SELECTORS, Measured, Selector, by_row, no_direction
from gradshield.types import Batch, Direction


@SELECTORS.register("gradnorm")
class GradNorm(Selector):
    """How far one training step on the row would move the weights: the norm of the gradient of its mean loss.

    Paper: none; the usual baseline of gradient-based selection. Equation: ‖∇_θ L(x; θ0)‖₂, L the mean over loss tokens.
    Departures: a preference pair's gradient is that of (loss of chosen - loss of rejected) over the number of their tokens;
    it is proportional to the DPO gradient at θ0 = reference.
    """

    name = "gradnorm"

    def __init__(self, subspace: str = "all", targets: Sequence[str] = ()) -> None:
        """``targets`` are the weights of the subspace of that name. Raises UsageError for an unknown subspace."""
        check_subspace(subspace)
        self.subspace, self.targets = subspace, tuple(targets)

    def prepare(self, model: nn.Module) -> Direction:
        return no_direction(self.name, model, self.subspace)

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Each row's norm over the subspace, from one backward pass per row."""
        return mean_norms(model, batch, parameter_names(model, self.subspace, self.targets))

    def settings(self) -> Mapping[str, Any]:
        return {"subspace": self.subspace, "targets": sorted(self.targets)}


def mean_norms(model: nn.Module, batch: Batch, parameters: Sequence[str]) -> Measured:
    """``sums[r]`` is the norm of the gradient of the mean loss of row r over the named parameters, at the current weights.

    A row without a loss token has norm zero.
    """
    found = row_norms(model, batch, parameters)
    rows, means, lengths = by_row(batch, found.nll.numpy())
    return Measured(rows, found.values.numpy() / np.maximum(lengths, 1), means, lengths)
