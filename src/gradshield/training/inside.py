"""What acts inside training, as mix-ins to put before a Hugging Face trainer in a class's bases.

    class Trainer(Selecting, Penalised, SFTTrainer): ...
    trainer = Trainer(...); trainer.online = OnlineModerate(); trainer.penalties = (AsFT(alignment),)

`Penalised` adds scalars to the loss of every step; `Selecting` trains on the rows of a batch that an `OnlineSelection` chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from gradshield.data.trl import IGNORED
from gradshield.errors import UsageError
from gradshield.registry import Registry
from gradshield.types import Batch, Bools

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import Trainer

    from gradshield.selectors.base import OnlineSelection
else:
    Trainer = object

logger = logging.getLogger(__name__)


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


class Penalised(Trainer):
    """Adds the sum of ``penalties`` to the loss of every optimiser step, once for any gradient accumulation.

    ``class MyTrainer(Penalised, SFTTrainer): penalties = (AsFT(alignment),)``. The evaluation loss is unchanged.
    """

    penalties: Sequence[Penalty] = ()
    _prepared: Any = None

    def train(self, *args: Any, **more: Any) -> Any:
        self._prepare(self.model)  # before a checkpoint replaces the start
        return super().train(*args, **more)

    def _prepare(self, model: Any) -> Any:
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        for penalty in self.penalties if plain is not self._prepared else ():
            penalty.prepare(plain)
        self._prepared = plain
        return plain

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        given = dict(inputs)  # a trainer removes the labels
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training or not self.penalties:
            return found
        added = _sum(self, self._prepare(model), given) / _undivided(self, num_items_in_batch)
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


class Selecting(Trainer):
    """Before every step the ``online`` method selects the rows of the trainer's own collated batch that train.

    The loss is the mean over the tokens of the chosen rows. With gradient accumulation, rows are chosen per micro-batch, which
    keeps the weight that its tokens had in the step. Raises UsageError for packed sequences.

    Under mixed precision the method measures in the stored precision of the weights, without autocast, as a scan does:
    differences of nearby weights would otherwise be bf16 rounding. The step itself is the trainer's.

    If the method has an attribute ``position``, it is set to the batch that training starts with: 0, or later after a resume,
    where each step counts as all its micro-batches. Its other state, such as the counts of ``record``, covers this process only.
    """

    online: OnlineSelection | None = None
    _begun = False

    def train(self, *args: Any, **more: Any) -> Any:
        """Start the method, before a checkpoint replaces the start, then train."""
        if self.online is not None and not self._begun:
            self._begun = True
            if (rows := self.args.per_device_train_batch_size) < self.online.least:
                logger.warning(
                    "%s selects among the rows of one batch, and per_device_train_batch_size is %d: give at least %d (and fewer "
                    "gradient_accumulation_steps), or it removes too few rows, or none",
                    self.online.name,
                    rows,
                    self.online.least,
                )
            with self._bare(self.model) as plain:
                self.online.begin(plain)
            self.add_callback(_correction(self.online))
        return super().train(*args, **more)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One micro-batch, without the rows that were not chosen."""
        if self.online is not None:
            inputs = self._prepare_inputs(inputs)
            batch = as_batch(inputs)
            with self._bare(model) as plain:
                chosen = self.online.choose(plain, batch)
            if num_items_in_batch is not None:
                share = int(batch.loss[chosen].sum()) / max(int(batch.loss.sum()), 1)
                num_items_in_batch = num_items_in_batch * share
            inputs = _taken(inputs, chosen)
        return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def _bare(self, model: Any) -> Iterator[Any]:
        """The plain model without autocast around its forward, which is restored on exit."""
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        wrapped, bare = vars(plain).get("forward"), vars(plain).get("_original_forward")
        if bare is None:
            yield plain
            return
        plain.forward = bare
        try:
            yield plain
        finally:
            plain.forward = wrapped


def as_batch(inputs: dict[str, Any]) -> Batch:
    """A trainer's collated inputs as a Batch of rows 0 to B - 1. Raises UsageError for packed or left-padded sequences."""
    labels = inputs["labels"].cpu().numpy()
    attention = inputs.get("attention_mask")
    real = np.ones(labels.shape, bool) if attention is None else attention.cpu().numpy().astype(bool)
    if "position_ids" in inputs or not (np.diff(real.astype(np.int8), axis=1) <= 0).all():
        raise UsageError(
            "rows are selected inside training one sequence at a time, and this trainer packs them or pads on the left: set "
            "packing=False, padding_free=False and a tokenizer that pads on the right"
        )
    loss = labels != IGNORED
    loss[:, 0] = False
    rows = np.arange(len(labels), dtype=np.int64)
    return Batch(inputs["input_ids"].cpu().numpy(), real, loss, rows, np.ones(len(labels)))


def _taken(inputs: dict[str, Any], chosen: Bools) -> dict[str, Any]:
    """The chosen rows of every tensor, without columns that hold only padding."""
    index = torch.as_tensor(np.flatnonzero(chosen))
    count, width = inputs["input_ids"].shape
    kept = {
        name: value[index.to(value.device)] if torch.is_tensor(value) and value.shape[:1] == (count,) else value
        for name, value in inputs.items()
    }
    attention = kept.get("attention_mask")
    longest = width if attention is None else int(attention.sum(1).max())
    return {
        name: value[:, :longest] if torch.is_tensor(value) and value.shape[1:2] == (width,) else value
        for name, value in kept.items()
    }


def _correction(online: OnlineSelection) -> Any:
    from transformers import TrainerCallback

    class Correction(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if hasattr(online, "position"):
                online.position = state.global_step * args.gradient_accumulation_steps

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            online.correct(more["model"])

    return Correction()
