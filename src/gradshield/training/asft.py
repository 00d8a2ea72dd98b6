"""AsFT: a penalty on the part of the weights' change that leaves the alignment direction; and what training changes.

That is the factors of LoRA layers, or the model's own weights since the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.gradients.alignment import Alignment, largest_eigenvalue, leading
from gradshield.gradients.direction import plain_name
from gradshield.models.modules import in_float64
from gradshield.options import Option, check
from gradshield.training.inside import PENALTIES

PROJECTORS = ("published", "top")
# PiSSA, OLoRA and the like move part of the weight into the factors, so that B A is not the change of the weight.
UNMOVED = (True, False, "gaussian", "eva", "orthogonal", "mica")


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


# ---- what training changes -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Adapted:
    """One adapted weight: ``name`` in the plain model, PEFT's layer around it, and the adapters in use there.

    ``start`` holds the factors that the change is measured from, None if it is measured from the plain weight.
    """

    name: str
    layer: Any
    adapters: tuple[str, ...]
    start: tuple[Tensor, Tensor] | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (d, R), including the scaling, and A (R, k), in float32 and with their graph: ΔW = B A over all adapters in use.

        Measured from B₀ A₀, B A - B₀ A₀ = [B - B₀, B₀] [A; A - A₀] has twice the rank and is exactly zero at the start.
        """
        bs = [self.layer.lora_B[a].weight.float() * self.layer.scaling[a] for a in self.adapters]
        rows = [self.layer.lora_A[a].weight.float() for a in self.adapters]
        b, a = (bs[0], rows[0]) if len(bs) == 1 else (torch.cat(bs, 1), torch.cat(rows))
        if self.start is None:
            return b, a
        b0, a0 = (x.to(b.device) for x in self.start)
        return torch.cat([b - b0, b0], 1), torch.cat([a, a - a0])

    def from_now(self) -> Adapted:
        """The same weight, its change measured from the present adapters."""
        b, a = (x.detach().clone() for x in replace(self, start=None).factors())
        return replace(self, start=(b, a)) if bool(b.any()) else replace(self, start=None)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        first = self.adapters[0]
        return (self.layer.lora_B[first].weight.shape[0], self.layer.lora_A[first].weight.shape[1])

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.lora_B[self.adapters[0]].weight.device
        return device


@dataclass(frozen=True, eq=False)
class Moved:
    """One weight that trains without an adapter, and its starting value; ``transposed`` if it is stored (d_in, d_out)."""

    name: str
    weight: nn.Parameter
    start: Tensor
    transposed: bool

    def delta(self) -> Tensor:
        """ΔW (d_out, d_in), in float32 and with its graph."""
        delta = self.weight.float() - self.start.to(self.weight.device).float()
        return delta.T if self.transposed else delta

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        first, second = self.weight.shape
        return (second, first) if self.transposed else (first, second)

    @property
    def device(self) -> torch.device:
        return self.weight.device


def moved_weights(model: nn.Module, alignment: Alignment, starts: Mapping[str, Tensor] | None = None) -> list[Moved]:
    """The trainable weights of a plain model that ``alignment`` names, with a copy of each as it is now.

    With ``starts``, the starting value of each weight, all weights are returned, trainable or not. Raises UsageError for a
    missing weight.
    """
    found = []
    parameters = dict(model.named_parameters())
    for name in alignment:
        weight = parameters.get(name)
        if weight is None or (starts is not None and (name not in starts or starts[name].shape != weight.shape)):
            raise UsageError(
                f"the alignment direction names {name}, and the model or the one it started from has no such weight of "
                "that shape: compute the direction on the models of this training"
            )
        transposed = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        if starts is not None:
            found.append(Moved(name, weight, starts[name].detach(), transposed))
        elif weight.requires_grad:
            found.append(Moved(name, weight, weight.detach().clone(), transposed))
    return found


def adapted_layers(model: nn.Module) -> list[Adapted]:
    """Every layer with a LoRA adapter in use, in the order of the model.

    Raises UsageError for an adapter whose change is not scale * B @ A of one matrix, and for a merged one.
    """
    from peft.tuners.lora.layer import LoraLayer

    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            active = [a for a in layer.active_adapters if a in layer.lora_A or a in layer.lora_embedding_A]
            if active:
                _check(model, name, layer, active)
                found.append(Adapted(plain_name(f"{name}.weight"), layer, tuple(active)))
    return found


def _check(model: nn.Module, name: str, layer: Any, active: list[str]) -> None:
    kind = None
    configs = getattr(model, "peft_config", {})
    if type(layer).__name__ == "ParamWrapper":
        kind = "an adapter of fused experts"
    elif any(a in layer.lora_embedding_A for a in active):
        kind = "an adapter of an embedding"
    elif any(a in layer.lora_variant for a in active):
        kind = "a variant of LoRA such as DoRA"
    elif any(layer.lora_A[a].weight.ndim != 2 for a in active):
        kind = "an adapter of a convolution"
    elif any(a in configs and configs[a].init_lora_weights not in UNMOVED for a in active):
        kind = "an adapter initialised with part of the weight (init_lora_weights such as pissa)"
    if kind is not None:
        raise UsageError(
            f"{name} carries {kind}, and only plain LoRA on linear layers, whose change is scale * B @ A, can be held "
            "to the alignment direction: train plain LoRA (use_dora=False, init_lora_weights=True, linear target_modules)"
        )
    if layer.merged:
        raise UsageError(
            f"the adapter at {name} is already merged into its weight: do this before merging, or unmerge it"
        )


def direction_of(alignment: Alignment, part: Adapted | Moved) -> Tensor:
    """V of one weight, on its device. Raises UsageError if the alignment has none, or one of another shape."""
    v = alignment.get(part.name)
    if v is None or tuple(v.shape) != part.shape:
        got = "no such weight" if v is None else f"shape {tuple(v.shape)}"
        raise UsageError(
            f"training changes {part.name} of shape {part.shape}, and the alignment direction has {got}: compute it "
            "with the peft_config and the models of this training"
        )
    return v.to(part.device)
