"""A model's modules and parameters by name, faster than torch's own methods.

``named_modules`` nests one generator per level, and every engine calls it several times per batch. On a model with an adapter
(over 2,000 modules) that would cost more than a small batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Seen(Exception):
    """The module has run: the rest of the pass is not needed."""


def run_until(model: nn.Module, name: str, **inputs: Any) -> None:
    """Run the model up to the end of the named module, the hooks that are already on it included."""

    def seen(*_: Any) -> None:
        raise _Seen

    handle = model.get_submodule(name).register_forward_hook(seen)
    try:
        with suppress(_Seen):
            model(**{"use_cache": False, **inputs})
    finally:
        handle.remove()


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
