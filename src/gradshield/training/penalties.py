"""Penalties, scalars that join the loss of every step: their protocol, and a mix-in to put before a trainer of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Penalised:
    """Adds the sum of ``penalties`` to the loss of every optimiser step, once for any gradient accumulation.

    ``class MyTrainer(Penalised, SFTTrainer): penalties = (AsFT(alignment),)``. The evaluation loss is unchanged.
    """

    penalties: Sequence[Penalty] = ()
    _prepared: Any = None

    def train(self, *args: Any, **more: Any) -> Any:
        self._prepare(self.model)  # type: ignore[attr-defined] # before a checkpoint replaces the start
        return super().train(*args, **more)  # type: ignore[misc]

    def _prepare(self, model: Any) -> Any:
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)  # type: ignore[attr-defined]
        for penalty in self.penalties if plain is not self._prepared else ():
            penalty.prepare(plain)
        self._prepared = plain
        return plain

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = dict(inputs)  # a trainer removes the labels
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not model.training or not self.penalties:
            return found
        plain = self._prepare(model)
        added = _sum(self, plain, given) / _undivided(self, num_items_in_batch)
        return (found[0] + added, *found[1:]) if return_outputs else found + added


def _sum(trainer: Any, model: Any, inputs: Any) -> Any:
    """The sum of the penalties at the current weights, under the trainer's autocast; a penalty may turn it off.

    Accelerate's own autocast covers only the model's forward: a frozen reference would run in another precision, and its
    distance from the model would be rounding error.
    """
    with trainer.accelerator.autocast():
        return sum(penalty(model, inputs) for penalty in trainer.penalties)


def _undivided(trainer: Any, num_items_in_batch: Any) -> int:
    """The number of batches in this optimiser step if the trainer will not divide the loss by it, else 1.

    Follows the rule of ``Trainer.training_step``, which does not divide a loss normalised by the items of the whole step.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = counted or trainer.compute_loss_func is not None
    return int(trainer.current_gradient_accumulation_steps) if scaled else 1


def penalised(trainer: type, penalties: Sequence[Penalty]) -> type:
    """A subclass of ``trainer`` (``SFTTrainer``, ``Trainer`` or a subclass of them) with these penalties in its loss."""
    return type(f"Penalised{trainer.__name__}", (Penalised, trainer), {"penalties": tuple(penalties)})
