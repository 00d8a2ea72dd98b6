"""The engine interface, and the context managers that keep the model unchanged.

An engine computes, for each sequence i of a batch and each direction v_k, the directional derivative

    f[k, i] = -<∇_θ L_i(θ0), v_k>,    L_i = sum of the negative log-likelihoods of the tokens in i's loss,

which is FIHS for v = ∇S (arXiv 2605.14194). Engines that declare ``per_token`` give f for every loss token instead:
(K, B, T), value t belonging to token t, zero outside the loss; its sum over T is the row's value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as _Conv

from gradshield.errors import UsageError
from gradshield.models.logits import token_nll
from gradshield.models.modules import evaluating, in_float64, modules_by_name, parameters_by_name, parameters_of
from gradshield.registry import Registry
from gradshield.types import Batch, Direction


@dataclass(frozen=True, eq=False)
class Derivatives:
    """``values`` is (K, B), or (K, B, T) from a per-token engine; ``nll`` is (B, T), the loss of each token, in nats.

    Both are on the CPU, in float64.
    """

    values: Tensor
    nll: Tensor


class Engine(Protocol):
    """Directional derivatives of the loss. Stateless between batches; leaves the model bit-identical."""

    name: str
    per_token: bool

    def directional(self, model: nn.Module, batch: Batch, direction: Direction) -> Derivatives: ...


ENGINES: Registry[type[Engine]] = Registry("engine")
# For errors: options that work with an engine that gives row sums only, which have no decoys.
ROW_SUMS = "--aggregate sum and a --threshold that needs no decoys (adaptive, ratio:5%, fixed:VALUE)"


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """A Batch as tensors on the model's device."""

    ids: Tensor
    attention: Tensor
    loss: Tensor

    @classmethod
    def of(cls, batch: Batch, model: nn.Module) -> DeviceBatch:
        device = next(model.parameters()).device
        return cls(
            ids=torch.as_tensor(batch.ids, dtype=torch.long, device=device),
            attention=torch.as_tensor(batch.attention, dtype=torch.long, device=device),
            loss=torch.as_tensor(batch.loss, dtype=torch.bool, device=device),
        )

    def nll(self, model: nn.Module) -> Tensor:
        """`token_nll` of the whole batch: (B, T)."""
        return token_nll(model, self.ids, self.attention, self.loss)


@contextmanager
def scoring(model: nn.Module, trainable: Iterable[str] = ()) -> Iterator[dict[str, nn.Parameter]]:
    """The model in evaluation mode, with gradients for ``trainable`` parameters only, which it yields by name.

    Modes and ``requires_grad`` flags are restored one by one, since the caller may have frozen any part of the model, and no
    ``.grad`` is ever written.
    """
    parameters, wanted = parameters_by_name(model), set(trainable)
    flags = [parameter.requires_grad for parameter in parameters.values()]
    with evaluating(model):
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in wanted)
            yield {name: parameters[name] for name in parameters if name in wanted}
        finally:
            for parameter, flag in zip(parameters.values(), flags, strict=True):
                parameter.requires_grad_(flag)


def gradient(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """∇loss by parameter; those that it does not reach are left out (an expert that no token was routed to)."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def norm(tensors: Iterable[Tensor]) -> float:
    """The L2 norm of all tensors together, in float64."""
    return float(sum(float(in_float64(t.detach()).square().sum()) for t in tensors) ** 0.5)


@contextmanager
def plain_kernels(model: nn.Module, attention: bool = False) -> Iterator[None]:
    """Run mixture-of-experts layers as a plain loop, and with ``attention`` torch's own kernels; restored at the end.

    The grouped kernels of experts, and other attention kernels, have no forward mode.
    """
    values: dict[str, Callable[[Any], Any]] = {"_experts_implementation": lambda _: "eager"}
    if attention:
        plain = "sdpa" if getattr(model, "_supports_sdpa", True) else "eager"
        # The name without "_internal" would also set nested configs, which could not all be restored.
        values["_attn_implementation_internal"] = lambda name: name if name in (None, "eager", "sdpa") else plain
    configs = {id(found): found for m in modules_by_name(model).values() if (found := getattr(m, "config", None))}
    before = [(c, name, getattr(c, name)) for c in configs.values() for name in values if hasattr(c, name)]
    try:
        for config, name, given in before:
            setattr(config, name, values[name](given))
        yield
    finally:
        for config, name, given in before:
            setattr(config, name, given)


def check_direction(model: nn.Module, direction: Direction, layers_of: str = "") -> None:
    """Raises UsageError if the direction does not fit the model's parameters.

    Also if it moves an adapter `beyond_layers`, for an engine that works layer by layer: the one named ``layers_of``.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters_by_name(model).items()}
    for name, tensor in direction.tensors.items():
        if shapes.get(name) != tuple(tensor.shape[1:]):
            raise UsageError(
                f"the direction has {name} of shape {tuple(tensor.shape[1:])}, but the model has "
                f"{shapes.get(name, 'no such parameter')}: a direction fits only the model and subspace it was computed on"
            )
    for name in beyond_layers(model) if layers_of else ():
        if any(tensor.startswith(f"{name}.lora_") for tensor in direction.tensors):
            raise UsageError(
                f"the engine {layers_of} works layer by layer, and got the adapter at {name} (DoRA, or an adapter of fused "
                "experts), whose parameters act outside their own layer: use the engine forward or loop"
            )


def beyond_layers(model: nn.Module) -> list[str]:
    """Names of adapter layers whose parameters act outside their own module's forward, beyond the reach of a layer's hook.

    These are PEFT's adapters of fused experts (ParamWrapper reads the factors itself), and DoRA, whose training gradient
    holds the weight's norm fixed although it depends on the adapter. Convolutions that a model reads itself are not included:
    the module around them is hooked instead (`followed`).
    """
    return [
        name
        for name, module in modules_by_name(model).items()
        if type(module).__name__ == "ParamWrapper" or getattr(module, "lora_magnitude_vector", None)
    ]


Places = Sequence[tuple[nn.Module, Mapping[str, Tensor]]]
"""Modules, each with tensors by parameter name: the result of `followed`."""


def followed(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Modules in whose forward the direction's parameters act, each with its tensors by their name in it.

    That is the owner (every one of a tied parameter, so that each use moves), except for convolutions, which are listed under
    their parent (``conv.weight``): LFM2, Mamba and similar models read a convolution's weights themselves and never run it.
    """
    modules = modules_by_name(model)
    names = {id(parameter): name for name, parameter in parameters_of(modules).items() if name in tensors}
    found: dict[str, dict[str, Tensor]] = {}
    for path, owner in modules.items():
        own = {slot: tensors[names[id(p)]] for slot, p in owner._parameters.items() if id(p) in names}
        if not own:
            continue
        place = path
        while place and isinstance(modules[place], _Conv | nn.ModuleList | nn.ModuleDict):
            place = place.rpartition(".")[0]
        inner = path.removeprefix(place).removeprefix(".")
        found.setdefault(place, {}).update({f"{inner}.{slot}".removeprefix("."): v for slot, v in own.items()})
    return [(modules[place], own) for place, own in found.items()]
