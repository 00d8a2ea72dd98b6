"""Penalties in a trainer of one's own: a class to put before ``SFTTrainer`` or ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradshield.training.base import Penalty


class Penalised:
    """Adds the sum of ``penalties`` to the loss of every optimiser step, once whatever the gradient accumulation.

    ``class MyTrainer(Penalised, SFTTrainer): penalties = (AsFT(alignment),)``. An evaluation's loss is left as it is.
    """

    penalties: Sequence[Penalty] = ()
    _prepared: Any = None

    def train(self, *args: Any, **more: Any) -> Any:
        self._prepare(self.model)  # type: ignore[attr-defined] # before a checkpoint is loaded over the start
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
        given = dict(inputs)  # a trainer takes the labels out of it
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not model.training or not self.penalties:
            return found
        plain = self._prepare(model)
        added = _sum(self, plain, given) / _undivided(self, num_items_in_batch)
        return (found[0] + added, *found[1:]) if return_outputs else found + added


def _sum(trainer: Any, model: Any, inputs: Any) -> Any:
    """All penalties at the current weights, inside the trainer's autocast; one that must not be rounded turns it off.

    Accelerate puts its autocast around the model's own forward alone: a frozen reference beside the model would answer in
    another precision, and its distance from the model would be rounding.
    """
    with trainer.accelerator.autocast():
        return sum(penalty(model, inputs) for penalty in trainer.penalties)


def _undivided(trainer: Any, num_items_in_batch: Any) -> int:
    """The batches of this optimiser step where the trainer will not divide the loss by them, else 1.

    ``Trainer.training_step`` leaves undivided what was normalised by the items of the whole step: its rule, repeated.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = counted or trainer.compute_loss_func is not None
    return int(trainer.current_gradient_accumulation_steps) if scaled else 1


def penalised(trainer: type, penalties: Sequence[Penalty]) -> type:
    """The class ``trainer`` (``SFTTrainer``, ``Trainer`` or one derived from them) with these penalties in its loss."""
    return type(f"Penalised{trainer.__name__}", (Penalised, trainer), {"penalties": tuple(penalties)})
