"""What a scan costs, in arithmetic: the operations of a forward pass over rows, and the hours that a device takes for them.

A pass over a row of T tokens, l of them in the loss, takes 2 P T + 2 H l + 4 N D T² operations: P parameters in the layers
and H in the head multiply and add once a token, and attention in N layers of width D once a pair of tokens. Heads run on the
loss tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from gradshield.gradients.base import experts, experts_used
from gradshield.models.loading import text_config
from gradshield.models.logits import output_head
from gradshield.types import Floats

# What each fast engine takes over all weights, in forward passes: means of two models on two cores (docs/performance.md).
PASSES = {"finite-difference": 2.0, "perturbation": 3.2, "forward": 3.3}


@dataclass(frozen=True)
class Shape:
    """A model's size: active parameters of its layers, parameters of its head, layers, width of attention."""

    body: int
    head: int
    layers: int
    width: int

    @classmethod
    def of(cls, model: nn.Module) -> Shape:
        """Embeddings are looked up, not multiplied; of a mixture's experts those count that a token goes through."""
        config: Any = text_config(model)
        head: Any = output_head(model).weight
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        active = _active(config)
        body = 0.0
        for name, parameter in model.named_parameters():
            if id(parameter) not in tables and parameter is not head:
                body += _entries(parameter) * (active if ".experts." in name else 1.0)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(round(body), head.numel(), config.num_hidden_layers, width * config.num_attention_heads)

    def forward(self, tokens: Floats, loss: Floats) -> Floats:
        """Operations of one pass over sequences of so many ``tokens``, so many of them in the ``loss``."""
        length = np.asarray(tokens, np.float64)
        return 2 * self.body * length + 2 * self.head * np.asarray(loss) + 4 * self.layers * self.width * length**2


@dataclass(frozen=True)
class Spread:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_estimate(seconds: Floats, work: Floats, whole: float, count: int) -> Spread:
    """Seconds for the ``whole`` work, from a random sample of its ``count`` parts (Cochran 1977, the ratio estimator).

    Work explains most of what a part takes, so that few parts are enough; the sample that is everything has no spread left.
    """
    n, rate = len(seconds), seconds.sum() / work.sum()
    value = float(rate * whole)
    if n < 2:
        return Spread(value, value if n == count else 0.0, value if n == count else float("inf"))
    left = seconds - rate * work
    error = np.sqrt((1 - n / count) * (left**2).sum() / (n * (n - 1))) / work.mean() * whole
    return Spread(value, max(0.0, float(value - 1.96 * error)), float(value + 1.96 * error))


def hours(operations: float, kept: float, passes: float) -> float:
    """Hours of one device that keeps ``kept`` operations a second, for passes of so many operations each."""
    return passes * operations / kept / 3600


def _entries(parameter: nn.Parameter) -> int:
    """Of the weight that was packed, where a base is in 4 bits: two of its entries lie in a byte."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _active(config: Any) -> float:
    """The share of a mixture's experts that a token goes through; 1 for other models."""
    count, used = experts(config), experts_used(config)
    return used / count if count and used else 1.0
