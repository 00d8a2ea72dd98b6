"""What every engine is given, what it gives back, and what it must leave as it was.

An engine computes, for each sequence i of a batch and each direction v_k, the directional derivative

    f[k, i] = -<∇_θ L_i(θ0), v_k>,    L_i = sum of the negative log-likelihoods of the tokens in i's loss,

which is FIHS for v = ∇S (arXiv 2605.14194). Engines that declare ``per_token`` give f for every loss token instead:
(K, B, T), value t belonging to token t, zero outside the loss; its sum over T is the row's value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.models import evaluating
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


@contextmanager
def scoring(model: nn.Module, trainable: Iterable[str] = ()) -> Iterator[dict[str, nn.Parameter]]:
    """The model in evaluation mode, with gradients for ``trainable`` parameters only; all of it undone at the end.

    Yields those parameters by name. Modes and ``requires_grad`` flags are put back one by one, since a caller may have
    frozen any part of the model, and no ``.grad`` is ever written.
    """
    parameters = dict(model.named_parameters())
    flags = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    wanted = set(trainable)
    with evaluating(model):
        try:
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in wanted)
            yield {name: parameters[name] for name in parameters if name in wanted}
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Mixture-of-experts layers in their plain loop, put back at the end: the grouped kernels have no forward mode."""
    configs: list[Any] = [
        m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_experts_implementation")
    ]
    before = [(config, config._experts_implementation) for config in configs]
    try:
        for config in configs:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def experts(config: Any) -> int:
    """How many experts a layer has, as the model's config tells; 0 for a model without."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), 0)


def check_direction(model: nn.Module, direction: Direction) -> None:
    """Raises UsageError when the direction does not fit the model's parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, tensor in direction.tensors.items():
        if shapes.get(name) != tuple(tensor.shape[1:]):
            raise UsageError(
                f"the direction has {name} of shape {tuple(tensor.shape[1:])}, but the model has "
                f"{shapes.get(name, 'no such parameter')}: a direction fits only the model and subspace it was computed on"
            )


def beyond_layers(model: nn.Module) -> list[str]:
    """Names of adapter layers whose parameters act beyond their own module's forward, where a layer's hook cannot follow.

    Two are known: PEFT's adapters of fused experts (ParamWrapper reads the factors itself), and DoRA, whose training
    gradient holds the weight's norm fixed although it depends on the adapter.
    """
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ == "ParamWrapper" or getattr(module, "lora_magnitude_vector", None)
    ]


def check_layers(engine: str, model: nn.Module, direction: Direction) -> None:
    """Raises UsageError when the direction moves an adapter that an engine of hooks on layers cannot follow."""
    for name in beyond_layers(model):
        if any(tensor.startswith(f"{name}.lora_") for tensor in direction.tensors):
            raise UsageError(
                f"the engine {engine} works layer by layer, and got the adapter at {name} (DoRA, or an adapter of fused "
                "experts), whose parameters act outside their own layer: use the engine forward or loop"
            )


def owners(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Modules that hold the direction's parameters themselves, each with its own tensors by attribute name.

    A tied parameter is listed under every module that uses it, so that each use moves.
    """
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for module in model.modules():
        own = {
            attribute: tensors[by_identity[id(parameter)]]
            for attribute, parameter in module._parameters.items()
            if parameter is not None and by_identity.get(id(parameter)) in tensors
        }
        if own:
            found.append((module, own))
    return found
