"""The protocol of penalties: a scalar that is added to the loss of every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from gradshield.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn


class Penalty(Protocol):
    """A scalar that is added to the training loss at the current weights.

    ``prepare`` is called once, after the adapter is added and before the first step. A call gets the trainer's collated inputs of
    one forward pass (``input_ids``, ``attention_mask``, ``labels``) and returns a scalar with a graph. ``record`` is JSON-able,
    for the manifest: the settings, and figures of this model. ``pairs``, False where it is missing, says whether it works on
    preference pairs too, whose inputs have no labels.
    """

    name: str

    def prepare(self, model: nn.Module) -> None: ...

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor: ...

    def record(self) -> Mapping[str, Any]: ...


PENALTIES: Registry[type[Penalty]] = Registry("penalty")
