"""SafeLoRA: after training, project the layers that left the alignment direction back onto it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.gradients.alignment import Alignment
from gradshield.models.modules import in_float64
from gradshield.training.asft import (
    Adapted,
    Moved,
    Operator,
    adapted_layers,
    direction_of,
    moved_weights,
    published,
)


@dataclass(frozen=True)
class SafeLoraRecord:
    """What SafeLoRA found and did. ``cosines[name]`` is None if the change or V is zero; such a layer is not changed."""

    threshold: float
    projected: tuple[str, ...]
    cosines: Mapping[str, float | None]


def cosine(b: Tensor, a: Tensor, operator: Operator) -> float | None:
    """Cosine of C ΔW and ΔW as vectors, ΔW = B A, for B (d, r) and A (r, k), from traces of (r, r); None where one is zero."""
    b, a = in_float64(b), in_float64(a)
    y, gram = Operator(in_float64(operator.matrix), operator.dense)(b), a @ a.T
    return _cosine(((y.T @ b) * gram).sum(), ((y.T @ y) * gram).sum(), ((b.T @ b) * gram).sum())


def cosine_full(delta: Tensor, operator: Operator) -> float | None:
    """``cosine`` of a change (d, k) that is not a product of thin factors."""
    moved, delta = in_float64(operator(delta)), in_float64(delta)
    return _cosine((moved * delta).sum(), moved.square().sum(), delta.square().sum())


def _cosine(inner: Tensor, one: Tensor, other: Tensor) -> float | None:
    product = float(one.clamp(min=0).sqrt() * other.clamp(min=0).sqrt())
    return float(inner) / product if product > 0 else None


def project(
    model: nn.Module,
    alignment: Alignment,
    threshold: float = 0.5,
    start: nn.Module | None = None,
) -> SafeLoraRecord:
    """Project the change of layers that left the alignment direction back onto it, in place: ΔW becomes C ΔW.

    Paper: arXiv 2405.16833. Equation: ΔW ← C ΔW where cos(C ΔW, ΔW) < τ, C = V Vᵀ/‖V‖_F, V = W_aligned - W_base.
    Departures: the cosine is computed from the thin factors of a LoRA adapter, and only B is replaced, which keeps the rank. ΔW
    is the whole adapter, including what it held before this training. A layer whose change or direction is zero has no cosine
    and is not changed.

    ``model`` is the trained model with its LoRA adapter not yet merged; or without an adapter, which needs ``start``, the model
    before training, on any device. Layers with a cosine below ``threshold`` are projected; the paper uses values from 0.3 to
    0.6. Raises UsageError for no adapter and no ``start``, an adapter other than plain LoRA, and a layer without its direction.
    """
    adapted = adapted_layers(model)
    if not adapted and start is None:
        raise UsageError(
            f"{type(model).__name__} has no LoRA adapter in use: give the model before merging, or, for training "
            "without an adapter, the starting model (start=)"
        )
    parts: list[Adapted | Moved] = [*adapted]
    if start is not None and not adapted:
        parts = [*moved_weights(model, alignment, dict(start.named_parameters()))]
    with torch.no_grad():
        cosines = {part.name: _cosine_of(part, alignment) for part in parts}
        chosen = {name for name, value in cosines.items() if value is not None and value < threshold}
        for part in parts:
            if part.name in chosen:
                _project(part, published(direction_of(alignment, part)))
    return SafeLoraRecord(threshold, tuple(name for name in cosines if name in chosen), cosines)


def _cosine_of(part: Adapted | Moved, alignment: Alignment) -> float | None:
    operator = published(direction_of(alignment, part))
    return cosine(*part.factors(), operator) if isinstance(part, Adapted) else cosine_full(part.delta(), operator)


def _project(part: Adapted | Moved, operator: Operator) -> None:
    if isinstance(part, Adapted):
        for adapter in part.adapters:
            b = part.layer.lora_B[adapter].weight
            b.copy_(operator(b.float()))
        return
    moved = operator(part.delta())
    part.weight.copy_(part.start.to(part.device).float() + (moved.T if part.transposed else moved))
