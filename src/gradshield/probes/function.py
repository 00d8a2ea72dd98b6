"""A custom score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.probes.base import PromptBatch, Prompts


class FunctionProbe:
    """Any function of (model, PromptBatch) to a scalar tensor that rises as the model leaves refusal.

    Not in the registry: it is passed as an object (``gs.ScanSettings(probe=my_score)``).
    """

    def __init__(self, function: Callable[[nn.Module, PromptBatch], Tensor]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:
        """Does nothing."""

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        """The function's value. Raises UsageError if it is not a scalar that depends on the model."""
        value = self.function(model, batch)
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
            raise UsageError(
                f"the probe function {self.name} returned {type(value).__name__}"
                f"{tuple(value.shape) if isinstance(value, Tensor) else ''}, but a probe must return one scalar tensor that "
                "depends on the model's parameters: return S averaged over the batch, without detaching it"
            )
        return value

    def settings(self) -> Mapping[str, Any]:
        return {"name": self.name, "function": True}
