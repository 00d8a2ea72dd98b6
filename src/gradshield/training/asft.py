"""AsFT: a penalty on the part of the weights' change that leaves the alignment direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.gradients.alignment import Alignment, largest_eigenvalue, leading
from gradshield.models.placement import in_float64
from gradshield.options import Option, check
from gradshield.training.adapters import Adapted, Moved, adapted_layers, direction_of, moved_weights
from gradshield.training.penalties import PENALTIES

PROJECTORS = ("published", "top")


@dataclass(frozen=True, eq=False)
class Operator:
    """C (d, d), symmetric, applied to thin matrices: as F Fᵀ of a factor F (d, m), or dense if that is smaller (d ≤ m).

    ``dense`` says which of the two ``matrix`` is.
    """

    matrix: Tensor
    dense: bool

    @classmethod
    def of(cls, factor: Tensor) -> Operator:
        d, m = factor.shape
        return cls(factor @ factor.T, True) if d <= m else cls(factor.contiguous(), False)

    def __call__(self, x: Tensor) -> Tensor:
        """C x, (d, n) for (d, n)."""
        return self.matrix @ x if self.dense else self.matrix @ (self.matrix.T @ x)


def published(v: Tensor) -> Operator:
    """C = V Vᵀ/‖V‖_F, as in the paper. Zero for V = 0, its limit: every change is then off the direction."""
    norm = float(torch.linalg.vector_norm(in_float64(v)))
    return Operator.of(v / norm**0.5 if norm else v)


def top(v: Tensor, energy: float) -> Operator:
    """The exact projector onto the first left singular directions of V that hold the share ``energy`` of ‖V‖²_F."""
    return Operator.of(leading(v, energy))


def penalty(b: Tensor, a: Tensor, operator: Operator, scale: float = 1.0) -> Tensor:
    """‖(I - C) ΔW‖²_F of ΔW = scale * B A, for B (d, r) and A (r, k), as scale² trace((XᵀX)(A Aᵀ)) with X = B - C B.

    No matrix of the size of C or ΔW is formed.
    """
    x = b - operator(b)
    return scale**2 * ((x.T @ x) * (a @ a.T)).sum()


def penalty_full(delta: Tensor, operator: Operator) -> Tensor:
    """‖(I - C) ΔW‖²_F of a change ΔW (d, k) that is not a product of thin factors."""
    return (delta - operator(delta)).square().sum()


@PENALTIES.register("asft")
class AsFT:
    """Penalises changes of the weights that leave the alignment direction. Needs the base model.

    Adds λ‖(I - C)ΔW‖²_F to the loss.

    Paper: arXiv 2506.08473. Equation: L + λ Σ ‖(I - C)ΔW‖²_F, ΔW = (α/r) B A, C = V Vᵀ/‖V‖_F, V = W_aligned - W_base.
    Departures: computed from the thin factors, which changes no value. C as published is not a projector, and stretches if an
    eigenvalue exceeds 2 (``record`` counts the layers); ``projector="top"`` uses the projector onto V's first left singular
    directions instead, as many as hold ``energy`` of ‖V‖²_F. A weight that alignment did not change has C = 0. ΔW is the change
    since the start of this training, also without an adapter, and for an adapter trained before, whose starting factors are then
    subtracted (at twice the rank); the paper covers neither. Other weights trained with the adapter (``modules_to_save``,
    biases) are not held.
    """

    name = "asft"
    pairs = True

    def __init__(
        self,
        alignment: Alignment,
        weight: Annotated[float, Option(least=0)] = 1.0,
        projector: Annotated[str, Option(str, choices=PROJECTORS)] = "published",
        energy: Annotated[float, Option(above=0, most=1)] = 0.9,
    ) -> None:
        check(AsFT, weight=weight, projector=projector, energy=energy)
        self.alignment, self.weight, self.projector, self.energy = alignment, weight, projector, energy
        self._held: list[tuple[Adapted | Moved, Operator]] = []
        self._largest: list[float] = []
        self._value: Tensor | None = None

    def prepare(self, model: nn.Module) -> None:
        """Find the weights that training changes, and put each operator on the device of its weight, in float32.

        In half precision, X = B - C B would be lost to rounding. The spectra take one symmetric eigenvalue problem in float64 per
        layer. Raises UsageError if the model has neither an adapter nor a trainable weight with a direction, if a layer has no
        direction, and for adapters other than plain LoRA.
        """
        parts: list[Adapted | Moved] = [part.from_now() for part in adapted_layers(model)]
        if not parts and not hasattr(model, "peft_config"):
            parts = [*moved_weights(model, self.alignment)]
        if not parts:
            raise UsageError(
                f"{type(model).__name__} has no LoRA adapter in use, and no trainable weight of a plain model that the "
                "alignment direction names: give a peft_config of type LoRA, or train the weights that the direction "
                "was computed for"
            )
        self._held, self._largest, self._value = [], [], None
        with torch.no_grad():
            for part in parts:
                v = direction_of(self.alignment, part)
                self._largest.append(largest_eigenvalue(v))
                self._held.append((part, published(v) if self.projector == "published" else top(v, self.energy)))

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """weight * Σ ‖(I - C) ΔW‖²_F over the layers, at the current weights; ``inputs`` are ignored."""
        device = next(model.parameters()).device
        total = torch.zeros((), device=device)
        # The trainer's autocast would round both terms of X before they are subtracted.
        with torch.autocast(device.type, enabled=False):
            for part, operator in self._held:
                if isinstance(part, Adapted):
                    total = total + penalty(*part.factors(), operator).to(device)
                else:
                    total = total + penalty_full(part.delta(), operator).to(device)
            total = self.weight * total
        self._value = total.detach()
        return total

    def record(self) -> Mapping[str, Any]:
        """The settings, the layers held, the largest eigenvalues of C, and the penalty's last value."""
        found: dict[str, Any] = {"weight": self.weight, "projector": self.projector, "layers": len(self._held)}
        if self.projector == "top":
            found["energy"] = self.energy
        if self._held:
            found |= {
                "changed": "adapter" if isinstance(self._held[0][0], Adapted) else "weights",
                "unchanged_by_alignment": sum(value == 0 for value in self._largest),
                "largest_eigenvalue": {"max": max(self._largest), "median": median(self._largest)},
                "layers_beyond_two": sum(value > 2 for value in self._largest),
            }
            if self.projector == "top":
                ranks = [kept(operator) for _, operator in self._held]
                found["directions"] = {"min": min(ranks), "median": median(ranks), "max": max(ranks)}
        if self._value is not None:
            found["value"] = float(self._value)
        return found


def kept(operator: Operator) -> int:
    """Directions that a projector keeps: its trace if it is dense, else the columns of its factor."""
    return round(float(operator.matrix.trace())) if operator.dense else operator.matrix.shape[1]
