"""Run an `OnlineSelection` inside a Hugging Face trainer: a mix-in to put before the trainer in a class's bases.

    class Trainer(Selecting, SFTTrainer): ...
    trainer = Trainer(...); trainer.online = OnlineModerate()

The candidates are the trainer's own collated batches; rows that are not chosen are removed before the step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gradshield.data.trl import IGNORED
from gradshield.errors import UsageError
from gradshield.types import Batch, Bools

if TYPE_CHECKING:
    from torch import nn

    from gradshield.types import OnlineSelection

logger = logging.getLogger(__name__)


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


class Selecting:
    """Trainer mix-in: before every step the ``online`` method selects the rows of the batch that train.

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
            own = cast(Any, self)
            if (rows := own.args.per_device_train_batch_size) < self.online.least:
                logger.warning(
                    "%s selects among the rows of one batch, and per_device_train_batch_size is %d: give at least %d (and fewer "
                    "gradient_accumulation_steps), or it removes too few rows, or none",
                    self.online.name,
                    rows,
                    self.online.least,
                )
            with self._bare(own.model) as plain:
                self.online.begin(plain)
            own.add_callback(_correction(self.online))
        return super().train(*args, **more)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """One micro-batch, without the rows that were not chosen."""
        own = cast(Any, self)
        if self.online is not None:
            inputs = own._prepare_inputs(inputs)
            batch = as_batch(inputs)
            with self._bare(model) as plain:
                chosen = self.online.choose(plain, batch)
            if num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch * (_tokens(batch, chosen) / max(_tokens(batch), 1))
            inputs = _taken(inputs, chosen)
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    @contextmanager
    def _bare(self, model: nn.Module) -> Iterator[nn.Module]:
        """The plain model without autocast around its forward, which is restored on exit."""
        plain: Any = cast(Any, self).accelerator.unwrap_model(model, keep_torch_compile=False)
        wrapped, bare = vars(plain).get("forward"), vars(plain).get("_original_forward")
        if bare is None:
            yield plain
            return
        plain.forward = bare
        try:
            yield plain
        finally:
            plain.forward = wrapped


def _tokens(batch: Batch, chosen: Bools | slice = slice(None)) -> int:
    return int(batch.loss[chosen].sum())


def _taken(inputs: dict[str, Any], chosen: Bools) -> dict[str, Any]:
    """The chosen rows of every tensor, without columns that hold only padding."""
    import torch

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
