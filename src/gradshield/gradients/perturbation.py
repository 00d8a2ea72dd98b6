"""A scalar per row, zero in value, scales every layer's response to the direction; its gradient is the derivative.

Each layer that holds parameters of the direction computes f(x; W) + Σ_k e[k, i] d_k(x), where d_k is the layer's exact
derivative along V_k at fixed input. At e = 0 nothing changes, and ∂(Σ L)/∂e[k, i] is row i's derivative along v_k. The
backward pass is over activations only: no weight gradient is formed, and any attention kernel may run.

A LoRA layer whose B is still zero runs without its adapter, and d_k = s V_k A x is never computed: its product with the
gradient g at the output is <g V_k, s A x>, in as many dimensions as the adapter has ranks, for all directions at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers.pytorch_utils import Conv1D

from gradshield.errors import UsageError
from gradshield.gradients.base import (
    ENGINES,
    Derivatives,
    DeviceBatch,
    Places,
    check_direction,
    followed,
    plain_kernels,
    scoring,
)
from gradshield.models.logits import output_head
from gradshield.models.modules import in_float64, modules_by_name
from gradshield.types import Batch, Direction


def layer_derivative(module: nn.Module, own: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """The derivative of the module's output along ``own`` (its parameters' directions), at fixed input.

    Linear maps are their own derivative; any other layer (norms with an offset, fused experts, routers) is differentiated
    in forward mode.
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
    values = {name: module.get_parameter(name).detach() for name in own}
    return jvp(lambda p: functional_call(module, p, args, kwargs), (values,), (dict(own),))[1]


class _Rows:
    """Maps each entry of an activation to its row, for every token layout that layers use."""

    def __init__(self, data: DeviceBatch, model: nn.Module) -> None:
        self.count, self.width = data.ids.shape
        self.gathered = {id(m) for m in output_head(model).modules()}
        self.predicting = data.loss[:, 1:].nonzero()[:, 0]  # (M,) row of each gathered position
        self.each = torch.arange(self.count, device=data.ids.device).repeat_interleave(self.width)  # (B·T,)

    def of(self, module: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, int]:
        """The row of each position of an activation, flat, and the number of leading dimensions that hold positions.

        Supported are (1, M, …) in the head, whose input was gathered, (B, T, …), and (B·T, …), as in routers and experts.
        """
        if id(module) in self.gathered and shape[:2] == (1, len(self.predicting)):
            return self.predicting, 2
        if shape[:2] == (self.count, self.width):
            return self.each, 2
        if shape[:1] == (self.count * self.width,):
            return self.each, 1
        raise UsageError(
            f"the perturbation engine got an activation of shape {shape} from {type(module).__name__}, and it can "
            "separate rows only in (B, T, …) or (B·T, …): use the engine forward or loop"
        )

    def scale(self, e: Tensor, module: nn.Module, like: Tensor) -> Tensor:
        """e (B,) broadcast to multiply the module's activation, in its dtype and on its device.

        An activation that all rows share, (1, T, …) (learned positions), becomes (B, T, …).
        """
        shape = tuple(like.shape)
        if shape[:2] == (1, self.width) and id(module) not in self.gathered:
            laid = e.unsqueeze(1)
        else:
            rows, lead = self.of(module, shape)
            laid = e[rows].reshape(shape[:lead])
        return laid.reshape(*laid.shape, *([1] * (len(shape) - laid.dim()))).to(like)


@contextmanager
def _perturbed(model: nn.Module, places: Places, e: Tensor, rows: _Rows) -> Iterator[None]:
    """Hooks that add Σ_k e[k]·d_k to the output of every layer in ``places`` (with the direction's tensors)."""
    busy = False  # layer_derivative may call the module again, whose hook must then do nothing

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

    left = dict(places)
    with ExitStack() as stack:
        for layer in modules_by_name(model).values():
            lora = lora_of(layer)
            if lora is not None and lora.b in left and not bool(lora.b.weight.any()):
                left.pop(lora.a, None)  # B = 0: the derivative along A is zero
                stack.enter_context(_low_rank(layer, lora, left.pop(lora.b)["weight"], e, rows))
        for module, own in left.items():
            like = module.get_parameter(next(iter(own)))
            per_k = [{n: v[k].to(like) for n, v in own.items()} for k in range(len(e))]
            stack.enter_context(module.register_forward_hook(hook_for(per_k), with_kwargs=True))
        yield


@contextmanager
def _low_rank(layer: Any, lora: Lora, factor: Tensor, e: Tensor, rows: _Rows) -> Iterator[None]:
    """Run a LoRA layer at B = 0 without its adapter; its output carries the derivatives along ``factor`` (K, out, R)."""
    factor = factor.to(lora.b.weight)

    def enter(_layer: nn.Module, _args: Any) -> None:
        layer._disable_adapters = True

    def leave(_layer: nn.Module, args: Any, output: Tensor) -> Any:
        layer._disable_adapters = False
        with torch.no_grad():
            inner = nn.functional.linear(args[0].detach().to(lora.a.weight.dtype), lora.a.weight) * lora.scale
        places, _ = rows.of(layer, tuple(inner.shape))
        places = places.to(inner.device)
        return _Product.apply(e, output, inner.flatten(0, -2), factor, places)  # type: ignore[no-untyped-call]

    with layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave):
        try:
            yield
        finally:
            layer._disable_adapters = False


class _Product(torch.autograd.Function):
    """The identity; the gradient g of its output gives e[k, i] the sum of <g V_k, s A x> over row i's positions."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, output: Tensor, inner: Tensor, factor: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(inner, factor, places)  # (P, R), (K, out, R), (P,)
        ctx.count, ctx.device = e.shape[1], e.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        inner, factor, places = ctx.saved_tensors
        count, out, rank = factor.shape
        flat = g.reshape(-1, out).to(factor.dtype) @ factor.transpose(0, 1).reshape(out, count * rank)
        each = (flat.unflatten(1, (count, rank)).float() * inner.unsqueeze(1).float()).sum(-1)  # (P, K)
        found = each.new_zeros(ctx.count, count).index_add_(0, places, each)
        return found.T.to(ctx.device), g, None, None, None


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

    Row sums only: a layer's response at one position affects the loss of every later token.
    """

    name = "perturbation"
    per_token = False

    def directional(self, model: nn.Module, batch: Batch, direction: Direction) -> Derivatives:
        """(K, B) derivatives, all K in one forward and one backward pass.

        Raises UsageError for parameters that act outside their own layer, and for activations whose rows cannot be separated.
        """
        check_direction(model, direction, layers_of=self.name)
        data = DeviceBatch.of(batch, model)
        shape = len(direction.names), data.ids.shape[0]
        with scoring(model), plain_kernels(model), torch.enable_grad():
            e = torch.zeros(shape, device=data.ids.device, requires_grad=True)
            with _perturbed(model, followed(model, direction.tensors), e, _Rows(data, model)):
                losses = data.nll(model)
                gradient = torch.zeros_like(e)
                if losses.requires_grad:  # False if no layer with a moved parameter ran
                    (gradient,) = torch.autograd.grad(losses.sum(), e)
        return Derivatives(-in_float64(gradient).cpu(), in_float64(losses.detach()).cpu())


# ---- LoRA layers: y = W x + s B A x, with B = 0 before training ------------------------------------------------------


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
