"""A model's modules and parameters by name, faster than torch's own methods; its modes, sizes and hidden states.

``named_modules`` nests one generator per level, and every engine calls it several times per batch. On a model with an adapter
(over 2,000 modules) that would cost more than a small batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str], take: Callable[[Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with ``take`` of the hidden states (B, T, D) of each named block as the model runs; keeps nothing else."""
    found: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = take(output if hasattr(output, "shape") else output[0])

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook_for(name)))
        yield found


class _Seen(Exception):
    """The module has run: the rest of the pass is not needed."""


def run_until(model: nn.Module, name: str, **inputs: Any) -> None:
    """Run the model up to the end of the named module, the hooks that are already on it included."""

    def seen(*_: Any) -> None:
        raise _Seen

    with model.get_submodule(name).register_forward_hook(seen), suppress(_Seen):
        model(**{"use_cache": False, **inputs})


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """``dict(model.named_modules())``: each module once, under its first name, parents before their children."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    left = [("", model)]
    while left:
        path, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        inside = f"{path}." if path else ""
        left += [(f"{inside}{name}", child) for name, child in reversed(module._modules.items()) if child is not None]
    return found


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """``dict(model.named_parameters())``: each parameter once, under its first name."""
    return parameters_of(modules_by_name(model))


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """`parameters_by_name` from the result of `modules_by_name`."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{name}" if path else name] = parameter
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each module's own mode is restored at the end."""
    modes = [(module, module.training) for module in modules_by_name(model).values()]
    try:
        if any(mode for _, mode in modes):
            model.eval()
        yield
    finally:
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode


def text_config(model: Any) -> Any:
    """The language-model part of a model's config; None for a model without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def learned_positions(model: nn.Module) -> list[int]:
    """The sizes of the model's tables of learned positions (GPT-2, OPT); rotary positions have none."""
    from torch.nn import Embedding

    tables = [(name, part) for name, part in model.named_modules() if isinstance(part, Embedding)]
    return [part.num_embeddings for name, part in tables if re.search("wpe|position", name)]


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its device; on the CPU if the device lacks float64 (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
