"""A scalar per row, zero in value, scales every layer's response to the direction; its gradient is the derivative.

Each layer that holds parameters of the direction computes f(x; W) + Σ_k e[k, i] d_k(x), where d_k is the layer's exact
derivative along V_k at fixed input. At e = 0 nothing changes, and ∂(Σ L)/∂e[k, i] is row i's derivative along v_k. The
backward pass is over activations only: no weight gradient is formed, and any attention kernel may run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers.pytorch_utils import Conv1D

from gradshield.errors import UsageError
from gradshield.gradients.base import (
    ENGINES,
    Derivatives,
    DeviceBatch,
    check_direction,
    check_layers,
    eager_experts,
    owners,
    scoring,
)
from gradshield.logits import output_head, token_nll
from gradshield.types import Batch, Direction


def layer_derivative(module: nn.Module, own: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The derivative of the module's output along ``own`` (its parameters' directions), at fixed input.

    Linear maps are their own derivative and are applied directly; any other layer (norms with an offset, fused
    experts, routers) goes through forward-mode differentiation of its own code.
    """
    kind = type(module)
    if kind is nn.Linear:
        weight = own.get("weight")
        if weight is None:
            return own["bias"].expand(*args[0].shape[:-1], -1)
        return nn.functional.linear(args[0], weight, own.get("bias"))
    if kind is nn.Embedding and not args[0].is_floating_point():
        return nn.functional.embedding(args[0], own["weight"])
    if kind is Conv1D and "weight" in own:
        out = args[0] @ own["weight"]
        return out + own["bias"] if "bias" in own else out
    values = {name: module._parameters[name].detach() for name in own}  # type: ignore[union-attr]
    return jvp(lambda p: functional_call(module, p, args, kwargs), (values,), (dict(own),))[1]


class _Rows:
    """Which row each entry of an activation belongs to, whatever shape the layer keeps its tokens in."""

    def __init__(self, data: DeviceBatch, head: nn.Module) -> None:
        self.count, self.width = data.ids.shape
        self.head = head
        self.predicting = data.loss[:, 1:].nonzero()[:, 0]  # (M,) row of each gathered logit

    def scale(self, e: Tensor, module: nn.Module, like: Tensor) -> Tensor:
        """e (B,) laid out to multiply the module's activation, in its dtype.

        Known are (1, M, V) from the head, whose input was gathered; (B, T, …); (B·T, …), as routers and experts keep
        their tokens; and (1, T, …), an activation that all rows share (learned positions), which becomes (B, T, …).
        """
        shape = tuple(like.shape)
        if module is self.head:
            laid = e[self.predicting].unsqueeze(0)
        elif shape[:2] == (self.count, self.width):
            laid = e.unsqueeze(1)
        elif shape[:1] == (self.count * self.width,):
            laid = e.repeat_interleave(self.width)
        elif shape[:2] == (1, self.width):
            laid = e.unsqueeze(1)
        else:
            raise UsageError(
                f"the perturbation engine got an activation of shape {shape} from {type(module).__name__}, and it can "
                "tell rows apart only in (B, T, …) or (B·T, …): use the engine forward or loop"
            )
        return laid.reshape(*laid.shape, *([1] * (len(shape) - laid.dim()))).to(like.dtype)


@contextmanager
def _perturbed(model: nn.Module, direction: Direction, e: Tensor, rows: _Rows) -> Iterator[None]:
    """Hooks that add Σ_k e[k]·d_k to the output of every layer that holds parameters of the direction."""
    busy = False  # layer_derivative may call the module again: its own hook must stay out of the way

    def hook_for(per_k: list[dict[str, Tensor]]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            nonlocal busy
            if busy:
                return None
            busy = True
            try:
                with torch.no_grad():
                    inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
                    extra = [layer_derivative(module, own, inputs, kwargs) for own in per_k]
            finally:
                busy = False
            for k, d in enumerate(extra):
                output = _add(module, output, d, e[k], rows)
            return output

        return hook

    handles = []
    try:
        for module, own in owners(model, direction.tensors):
            like = next(p for p in module._parameters.values() if p is not None)
            per_k = [{n: v[k].to(like) for n, v in own.items()} for k in range(len(direction.names))]
            handles.append(module.register_forward_hook(hook_for(per_k), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(module: nn.Module, output: Any, derivative: Any, e: Tensor, rows: _Rows) -> Any:
    if isinstance(output, Tensor):
        return output + rows.scale(e, module, output) * derivative
    if isinstance(output, tuple):
        return tuple(
            _add(module, o, d, e, rows) if isinstance(o, Tensor) and o.is_floating_point() else o
            for o, d in zip(output, derivative, strict=True)
        )
    raise UsageError(
        f"the perturbation engine got a {type(output).__name__} from {type(module).__name__}, and it needs tensors: use the "
        "engine forward or loop"
    )


@ENGINES.register("perturbation")
class Perturbation:
    """A zero scalar per row on every layer's response: one forward and one activation-only backward; bf16 and GPU.

    Gives row sums only: a layer's response at one position feeds the loss of every later token.
    """

    name = "perturbation"
    per_token = False

    def directional(self, model: nn.Module, batch: Batch, direction: Direction) -> Derivatives:
        """(K, B) derivatives, all K in one forward and one backward pass."""
        check_direction(model, direction)
        check_layers(self.name, model, direction)
        data = DeviceBatch.of(batch, model)
        shape = len(direction.names), data.ids.shape[0]
        with scoring(model), eager_experts(model), torch.enable_grad():
            e = torch.zeros(shape, device=data.ids.device, requires_grad=True)
            with _perturbed(model, direction, e, _Rows(data, output_head(model))):
                losses = token_nll(model, data.ids, data.attention, data.loss)
                (gradient,) = torch.autograd.grad(losses.sum(), e)
        return Derivatives(-gradient.double().cpu(), losses.detach().double().cpu())
