"""A penalty on the KL divergence of the model's predictions from those of the starting model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradshield.data.trl import IGNORED
from gradshield.errors import UsageError
from gradshield.gradients.base import scoring
from gradshield.models.logits import logits_at, predicting
from gradshield.options import Option, check
from gradshield.training.inside import PENALTIES


def divergence(reference: Tensor, current: Tensor) -> Tensor:
    """Mean over positions of KL(p_reference || p_current), in nats, for logits (M, V) each; 0 where M is 0."""
    p, q = reference.log_softmax(-1), current.log_softmax(-1)
    return functional.kl_div(q, p, log_target=True, reduction="sum") / max(len(current), 1)


@PENALTIES.register("kl")
class FrozenReferenceKL:
    """Keeps predictions on the answers close to the model before training: adds λ times their KL divergence to the loss.

    Paper: none; the usual regulariser of fine-tuning with a reference, as a baseline. Equation: L + λ mean_t KL(p_θ0(· | x_<t) ||
    p_θ(· | x_<t)), the mean over the response tokens of the batch.
    Departures: θ0 is the model with its adapter disabled if that is the starting model (a LoRA adapter whose change is still
    zero), else a frozen copy, which takes the memory of another model. It runs without dropout, p_θ as in training. Costs one
    more pass with gradient and one without, since a trainer does not expose its logits.
    """

    name = "kl"

    def __init__(self, weight: Annotated[float, Option(least=0)] = 0.1) -> None:
        check(FrozenReferenceKL, weight=weight)
        self.weight = weight
        self._copy: nn.Module | None = None
        self._value: Tensor | None = None

    def prepare(self, model: nn.Module) -> None:
        """Choose the source of θ0's logits. Raises UsageError for a soft prompt, which changes a sequence's length."""
        self._value, self._copy = None, None
        configs = getattr(model, "peft_config", {}).values()
        if any(config.is_prompt_learning for config in configs):
            raise UsageError(
                "the penalty kl got a soft prompt (prompt or prefix tuning), and it compares predictions token by "
                "token: train a LoRA adapter or the weights themselves"
            )
        if not _starts_without(model):
            self._copy = _frozen(model)

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """weight * mean KL, a scalar, from ``input_ids``, ``attention_mask`` and ``labels``, all (B, T), of one batch.

        Raises UsageError for packed batches, which these three do not describe.
        """
        if "labels" not in inputs or "attention_mask" not in inputs or "position_ids" in inputs:
            raise UsageError(
                f"the penalty kl got a batch with {', '.join(sorted(inputs))}, and it needs input_ids, attention_mask "
                "and labels of sequences that are not packed: train with packing=False and padding_free=False"
            )
        ids, attention, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        where = predicting(labels != IGNORED)
        with torch.no_grad(), self._reference(model) as start:
            reference = logits_at(start, ids, attention, where)
        value = self.weight * divergence(reference, logits_at(model, ids, attention, where))
        self._value = value.detach()
        return value

    @contextmanager
    def _reference(self, model: nn.Module) -> Iterator[nn.Module]:
        if self._copy is not None:
            yield self._copy
            return
        adapted: Any = model
        # PEFT makes every part of an adapter trainable when it is enabled again; scoring restores modes and flags.
        with scoring(model), adapted.disable_adapter():
            yield model

    def record(self) -> Mapping[str, Any]:
        """The weight, the source of the reference, and the penalty's last value."""
        reference = "adapter switched off" if self._copy is None else "frozen copy"
        found: dict[str, Any] = {"weight": self.weight, "reference": reference}
        if self._value is not None:
            found["value"] = float(self._value)
        return found


def _starts_without(model: nn.Module) -> bool:
    """Whether the model without its adapter is θ0 and stays so: only LoRA that changes nothing yet, and nothing else trains."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if any(p.requires_grad and ".lora_" not in name for name, p in model.named_parameters()):
        return False
    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    return bool(layers) and all(
        isinstance(layer, LoraLayer) and not layer.merged and not any(_changes(layer, a) for a in layer.active_adapters)
        for layer in layers
    )


def _changes(layer: Any, adapter: str) -> bool:
    """Whether a LoRA adapter may change its weight now; it does not if one of its factors is zero."""
    if adapter in layer.lora_A:
        return any(bool(p.any()) for p in layer.lora_B[adapter].parameters())
    if adapter in layer.lora_embedding_A:
        return bool(layer.lora_embedding_A[adapter].any()) and bool(layer.lora_embedding_B[adapter].any())
    return False


def _frozen(model: nn.Module) -> nn.Module:
    """A frozen copy in eval mode, with its own weights."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for module in frozen.modules():
        # A forward that a trainer bound to the original would use the original's weights.
        vars(module).pop("forward", None)
    return frozen
