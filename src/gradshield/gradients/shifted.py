"""The model at θ + step·v, without writing to the caller's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradshield.gradients.base import Places
from gradshield.gradients.lowrank import Lora


@contextmanager
def shifted(places: Places, loras: Iterable[tuple[Any, Lora]], k: int, step: float) -> Iterator[None]:
    """The model at θ + step·v_k, one layer at a time: W + step·V exists only while its own layer runs.

    The caller's Parameter objects are never written to. A shifted stand-in replaces each parameter during its module's
    forward; the originals are restored after it, and again at exit after an exception. A LoRA layer runs as one matrix,
    W + s (B + step·V_B)(A + step·V_A), which is less work than its factors on every token.

    ``places`` are the modules with their (K, …) tensors, from `followed`, and ``loras`` the layers with an adapter: both are
    collected once for all passes over a batch.
    """
    left = {module: {name: v[k] for name, v in own.items()} for module, own in places}
    with ExitStack() as stack:
        for layer, lora in loras:
            if (lora.a not in left and lora.b not in left) or layer.base_layer in left:
                continue
            if _fits_one(layer, lora):
                factors = [left.pop(factor, {}) for factor in (lora.a, lora.b)]
                stack.enter_context(_during(layer, *_as_one(layer, lora, factors, step)))
        for module, own in left.items():
            stack.enter_context(_during(module, *_as_it_is(module, own, step)))
        yield


@contextmanager
def _during(module: nn.Module, enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """Call ``enter`` before each run of the module and ``leave`` after it, and again at the end in case a run raised."""
    handles = [
        module.register_forward_pre_hook(lambda *_: enter()),
        module.register_forward_hook(lambda *_: leave()),
    ]
    try:
        yield
    finally:
        leave()
        for handle in handles:
            handle.remove()


def _as_it_is(
    module: nn.Module, own: Mapping[str, Tensor], step: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    slots: list[tuple[dict[str, Any], str, Any, Tensor]] = []
    for name, v in own.items():
        inner, _, attribute = name.rpartition(".")
        holder: dict[str, Any] = module.get_submodule(inner)._parameters
        slots.append((holder, attribute, holder[attribute], v))

    def enter() -> None:
        for holder, attribute, parameter, v in slots:
            holder[attribute] = _stand_in(_moved(parameter, v, step))

    def leave() -> None:
        for holder, attribute, parameter, _ in slots:
            holder[attribute] = parameter

    return enter, leave


def _as_one(
    layer: Any, lora: Lora, own: list[dict[str, Tensor]], step: float
) -> tuple[Callable[[], None], Callable[[], None]]:
    base, weight, disabled = layer.base_layer, layer.base_layer._parameters["weight"], layer._disable_adapters

    def enter() -> None:
        a, b = (_moved(f.weight, v.get("weight"), step) for f, v in zip((lora.a, lora.b), own, strict=True))
        left, right = (a.mT, b.mT) if type(base) is Conv1D else (b, a)
        base._parameters["weight"] = _stand_in(torch.addmm(weight.detach(), left, right, alpha=lora.scale))
        layer._disable_adapters = True

    def leave() -> None:
        base._parameters["weight"] = weight
        layer._disable_adapters = disabled

    return enter, leave


def _fits_one(layer: Any, lora: Lora) -> bool:
    """Whether all weights have one full-precision dtype: half precision would lose the step."""
    kinds = {layer.base_layer.weight.dtype, lora.a.weight.dtype, lora.b.weight.dtype}
    return type(layer.base_layer) in (nn.Linear, Conv1D) and kinds in ({torch.float32}, {torch.float64})


def _moved(parameter: Tensor, v: Tensor | None, step: float) -> Tensor:
    return parameter.detach() if v is None else torch.add(parameter.detach(), v.to(parameter), alpha=step)


def _stand_in(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
