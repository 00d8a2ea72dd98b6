"""LoRA layers: y = W x + s B A x, with B = 0 before training.

PEFT computes both terms for every token. An engine that knows the layer can save work: it runs the one matrix W + s B A, or
only the first term if B is zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from gradshield.models.modules import modules_by_name


class Lora(NamedTuple):
    """A PEFT layer's factors, A (R, in) and B (out, R), and the scale s of their product."""

    a: nn.Linear
    b: nn.Linear
    scale: float


def lora_of(layer: Any) -> Lora | None:
    """The factors of a module that computes exactly W x + s B A x; None for any other module.

    Excluded: several active adapters, a disabled or merged one, one with a bias, DoRA and other variants, and adapters of
    embeddings or fused experts.
    """
    if "lora_A" not in layer._modules or not hasattr(layer, "base_layer") or not hasattr(layer, "lora_variant"):
        return None
    running = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(running) != 1 or layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    a, b = layer.lora_A[running[0]], layer.lora_B[running[0]]
    if not (type(a) is type(b) is nn.Linear and a.bias is None and b.bias is None):
        return None
    return Lora(a, b, float(layer.scaling[running[0]]))


def loras(model: nn.Module) -> list[tuple[Any, Lora]]:
    """Every layer of the model that `lora_of` knows, with its factors."""
    found = ((layer, lora_of(layer)) for layer in modules_by_name(model).values())
    return [(layer, lora) for layer, lora in found if lora is not None]


def starting(lora: Lora) -> bool:
    """Whether B is zero, so that the adapter adds nothing and only its derivative along B is nonzero."""
    weight: Tensor = lora.b.weight
    return not bool(weight.any())
