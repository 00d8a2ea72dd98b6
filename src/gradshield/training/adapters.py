"""The weights that training changes: the factors of LoRA layers, or the model's own weights since the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.gradients.alignment import Alignment
from gradshield.gradients.direction import plain_name

# PiSSA, OLoRA and the like move part of the weight into the factors, so that B A is not the change of the weight.
UNMOVED = (True, False, "gaussian", "eva", "orthogonal", "mica")


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
