"""The norm of every row's gradient from one forward and one activation-only backward pass for the whole batch.

A layer that computes y = W x has the row gradient Σ_p g_p ⊗ x_p, where x_p is its input at position p and g_p the gradient
of the row's loss at its output. Its squared norm is Σ_{p,q} <x_p, x_q> <g_p, g_q> (two Gram matrices), or the sum of squares
of the product itself, whichever is less work. A row's gradient exists for one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from gradshield.errors import UsageError
from gradshield.gradients.base import DeviceBatch, all_followed, beyond_layers, eager_experts, followed, owners, scoring
from gradshield.gradients.layout import Layout
from gradshield.gradients.perturbation import layer_derivative
from gradshield.models.logits import output_head, token_nll
from gradshield.models.modules import modules_by_name, parameters_by_name
from gradshield.models.placement import in_float64
from gradshield.types import Batch, Ints

_TEMPORARY = 2**22  # most entries of temporary tensors in one layer
_ELSEWHERE = "measure the rows with the method norms of the engine loop, or leave these parameters out"


@dataclass(frozen=True, eq=False)
class Norms:
    """``values[r]`` is the L2 norm of the gradient of row ``rows[r]``'s loss; rows are in order of first appearance.

    A row's loss is the sum over its sequences of coefficient times negative log-likelihood, in nats, so that a preference
    pair has one gradient. ``nll`` is (B, T), the loss of each token. Both tensors are on the CPU, in float64.
    """

    values: Tensor
    rows: Ints
    nll: Tensor


def row_norms(model: nn.Module, batch: Batch, parameters: Sequence[str]) -> Norms:
    """Norms of the rows' gradients over the named parameters (a tied one counts once, with all of its uses).

    Measured in evaluation mode, without dropout; the model is bit-identical afterwards, with every mode, flag and ``.grad``
    unchanged. Equal to `Loop.norms` up to rounding.

    Raises UsageError like `check_norms`, for a parameter that several layers share other than the token embedding and the
    output head, and for one that is read outside its own layer.
    """
    check_norms(model, parameters)
    data = DeviceBatch.of(batch, model)
    head = output_head(model)
    named = parameters_by_name(model)
    layout = Layout(batch, data, head)
    with scoring(model), eager_experts(model), torch.enable_grad():
        anchor = torch.zeros((), device=data.ids.device, requires_grad=True)
        ghosts = _Ghosts(model, {name: named[name] for name in parameters}, layout, anchor)
        with (
            all_followed(model, ghosts.places, data, "row_norms", _ELSEWHERE),
            ghosts.watching(),
        ):
            losses = token_nll(model, data.ids, data.attention, data.loss)
            weights = torch.as_tensor(batch.coefficients, dtype=losses.dtype, device=losses.device)
            total = (losses.sum(1) * weights).sum()
            if total.requires_grad:  # False if no layer with a wanted parameter ran
                torch.autograd.grad(total, anchor, allow_unused=True)
    return Norms(ghosts.norms(), layout.rows, in_float64(losses.detach()).cpu())


def check_norms(model: nn.Module, parameters: Sequence[str]) -> None:
    """Raises UsageError for parameters that the model does not have, or that hooks on layers cannot follow."""
    named = parameters_by_name(model)
    unknown = [name for name in parameters if name not in named]
    if unknown:
        raise UsageError(
            f"the model has no parameter {unknown[0]!r}: name parameters as model.named_parameters() does, a tied one by its "
            "first name"
        )
    wanted = {name: named[name] for name in parameters}
    beyond = [f"{name}." for name in beyond_layers(model) if any(p.startswith(f"{name}.lora_") for p in wanted)]
    holders = {id(m) for m, _ in owners(model, wanted) if isinstance(m, nn.ParameterDict | nn.ParameterList)}
    beyond += [name for name, module in modules_by_name(model).items() if id(module) in holders]
    if beyond:
        raise UsageError(
            f"gradient norms of a batch are computed layer by layer, and the parameters at {beyond[0].rstrip('.')} act "
            f"outside their own layer (DoRA, IA³, or an adapter of embeddings or fused experts): {_ELSEWHERE}"
        )


class _Tap(torch.autograd.Function):
    """Passes a layer's outputs on unchanged, and gives their gradients to a callback in the backward pass.

    The anchor is a scalar that requires a gradient, so that the outputs do too, though no weight does.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, callback: Callable[[tuple[Tensor, ...]], None], *outputs: Tensor) -> Any:
        ctx.callback = callback
        return tuple(output.detach() for output in outputs)  # not views: a model may change them in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.callback(gradients)
        return (None, None, *gradients)


class _Ghosts:
    """Hooks on the layers of one pass that accumulate each row's squared gradient norm."""

    def __init__(self, model: nn.Module, wanted: Mapping[str, Tensor], layout: Layout, anchor: Tensor) -> None:
        self.places = followed(model, wanted)
        self.layout, self.anchor = layout, anchor
        self.squares: list[Tensor] = []  # one (R,) a layer, in float32 or better
        self.users: dict[int, list[nn.Module]] = {}  # modules that used a parameter so far, by its id
        self.shared: dict[int, Tensor] = {}  # rows of a tied head's gradient at the batch's own tokens
        self.busy = False  # measuring may call a layer again, whose hook must then do nothing

    def norms(self) -> Tensor:
        if not self.squares:
            return torch.zeros(self.layout.count, dtype=torch.float64)
        return torch.stack([in_float64(s) for s in self.squares]).sum(0).clamp_min(0.0).sqrt().cpu()

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for module, own in self.places:
                handles.append(module.register_forward_hook(self._hook(own), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, own: Mapping[str, Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if self.busy:
                return None
            self._note_use(module, own)
            single = isinstance(output, Tensor)
            if not single and not isinstance(output, tuple):
                raise UsageError(
                    f"gradient norms got a {type(output).__name__} from {type(module).__name__}, and need tensors: {_ELSEWHERE}"
                )
            outputs: list[Any] = [self.layout.unshared(module, o) for o in ([output] if single else output)]
            tapped = [i for i, o in enumerate(outputs) if _taps(o)]
            callback = self._callback(module, own, args, kwargs)
            passed = _Tap.apply(self.anchor, callback, *(outputs[i] for i in tapped))  # type: ignore[no-untyped-call]
            for i, o in zip(tapped, passed, strict=True):
                outputs[i] = o
            return outputs[0] if single else tuple(outputs)

        return hook

    def _note_use(self, module: nn.Module, own: Mapping[str, Tensor]) -> None:
        """Raises UsageError for a second use of a parameter whose cross term is not known."""
        for parameter in own.values():
            users = self.users.setdefault(id(parameter), [])
            users.append(module)
            known = len(users) == 2 and _scale(users[0]) is not None and self.layout.gathered(users[1])
            if len(users) > 1 and not (known and type(users[1]) is nn.Linear):
                raise UsageError(
                    f"gradient norms got a parameter of {type(module).__name__} that is used {len(users)} times in one pass, "
                    f"and only one shared by the token embedding and the output head can be followed: {_ELSEWHERE}"
                )

    def _callback(self, module: nn.Module, own: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """The function that measures the layer from its outputs' gradients; it keeps the inputs it needs."""
        inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        first = inputs[0] if inputs else next(iter(kwargs.values()))
        version = first._version
        measure: Callable[[tuple[Tensor, ...]], None]
        if type(module) in (nn.Linear, Conv1D):
            measure = partial(self._linear, module, own, first)
        elif _scale(module) is not None and not first.is_floating_point():
            measure = partial(self._embedding, module, own["weight"], first)
        elif "norm" in type(module).__name__.lower() and (slopes := self._slopes(module, own, inputs, kwargs)):
            measure = partial(self._elementwise, module, slopes)
        else:
            measure = partial(self._general, module, own, inputs, kwargs)

        def callback(gradients: tuple[Tensor, ...]) -> None:
            if first._version != version:
                raise UsageError(
                    f"the input of {type(module).__name__} was changed in place after it was used: {_ELSEWHERE}"
                )
            with torch.no_grad():
                measure(gradients)

        return callback

    # ---- kinds of layers ------------------------------------------------------------------------------------------

    def _linear(self, module: nn.Module, own: Mapping[str, Tensor], x: Tensor, gradients: tuple[Tensor, ...]) -> None:
        """A matrix product (its transpose has the same norm) and its bias."""
        (g,) = gradients
        for x_part, g_part, rows in self.layout.stacks(module, x, g):
            if "weight" in own:
                self._add(outer_squares(x_part, g_part), rows)
            if "bias" in own:
                self._add(g_part.sum(1).square().sum(1), rows)
        if "weight" in own and len(self.users[id(own["weight"])]) == 2:
            self.shared[id(own["weight"])] = self.layout.at_tokens(x, g)

    def _embedding(self, module: Any, weight: Tensor, ids: Tensor, gradients: tuple[Tensor, ...]) -> None:
        """Gradients of a table entry are summed over a row's tokens before squaring."""
        g = self.layout.apart(module, _precise(gradients[0]) * (_scale(module) or 1.0))
        ids = self.layout.apart(module, ids)
        if module.padding_idx is not None:
            g = g * (ids != module.padding_idx).unsqueeze(-1)
        rows = self.layout.of_sequence.unsqueeze(1)  # (B, 1)
        entries, place = (rows * len(weight) + ids).unique(return_inverse=True)
        table = g.new_zeros(len(entries), g.shape[-1]).index_add_(0, place.flatten(), g.flatten(0, 1))
        self._add(g.new_zeros(self.layout.count).index_add_(0, entries // len(weight), table.square().sum(1)))
        if id(weight) in self.shared:
            cross = (self.shared.pop(id(weight)) * g).sum((1, 2))  # (B,)
            self._add(2.0 * g.new_zeros(self.layout.count).index_add_(0, self.layout.of_sequence, cross))

    def _slopes(self, module: nn.Module, own: Mapping[str, Tensor], args: Any, kwargs: Any) -> list[Tensor] | None:
        """A norm layer's output j depends only on entry j of its weight, so one derivative along all ones gives them all.

        None if a parameter does not have one entry per output.
        """
        self.busy = True
        try:
            with torch.no_grad():
                found = [layer_derivative(module, {n: torch.ones_like(p)}, args, kwargs) for n, p in own.items()]
        finally:
            self.busy = False
        fits = all(isinstance(d, Tensor) and d.shape[-1:] == p.shape for d, p in zip(found, own.values(), strict=True))
        return found if fits else None

    def _elementwise(self, module: nn.Module, slopes: list[Tensor], gradients: tuple[Tensor, ...]) -> None:
        (g,) = gradients
        for slope in slopes:
            for x_part, g_part, rows in self.layout.stacks(module, slope, g):
                self._add((x_part * g_part).sum(1).square().sum(1), rows)

    def _general(self, module: nn.Module, own: Mapping[str, Tensor], args: Any, kwargs: Any, gradients: Any) -> None:
        """Any other layer (routers, fused experts): its gradient, row by row, on the row's part of its input."""
        self.busy = True
        try:
            squares = [self._of_row(r, module, own, args, kwargs, gradients) for r in range(self.layout.count)]
        finally:
            self.busy = False
        self._add(torch.stack(squares))

    def _of_row(self, row: int, module: nn.Module, own: Any, args: Any, kwargs: Any, gradients: Any) -> Tensor:
        values = {name: p.detach().requires_grad_() for name, p in own.items()}
        with torch.enable_grad():
            inner = {key: self.layout.part(module, value, row) for key, value in kwargs.items()}
            found = functional_call(module, values, tuple(self.layout.part(module, a, row) for a in args), inner)
        outputs = [o for o in ([found] if isinstance(found, Tensor) else found) if _taps(o)]
        pairs = [
            (o, self.layout.part(module, g, row).sum_to_size(o.shape))  # summed if its sequences share the output
            for o, g in zip(outputs, gradients, strict=True)
            if o.requires_grad
        ]
        ends, weights = [o for o, _ in pairs], [g for _, g in pairs]
        each = torch.autograd.grad(ends, list(values.values()), weights, allow_unused=True)
        return torch.stack(
            [_precise(g).square().sum() for g in each if g is not None] or [gradients[0].new_zeros(())]
        ).sum()

    def _add(self, squares: Tensor, rows: slice = slice(None)) -> None:
        if rows == slice(None):
            self.squares.append(squares)
            return
        whole = squares.new_zeros(self.layout.count)
        whole[rows] = squares
        self.squares.append(whole)


def outer_squares(x: Tensor, g: Tensor) -> Tensor:
    """‖Σ_p g_p ⊗ x_p‖² for each row: ``x`` (R, P, I) and ``g`` (R, P, O) give (R,), by the cheaper of two exact methods."""
    positions, ins, outs = x.shape[1], x.shape[2], g.shape[2]
    gram = positions * (ins + outs) < ins * outs
    step = max(1, _TEMPORARY // max(1, positions**2 if gram else ins * outs))
    found = []
    for a, b in zip(_precise(x).split(step), _precise(g).split(step), strict=True):
        left, right = (a @ a.mT, b @ b.mT) if gram else ((product := b.mT @ a), product)
        found.append((left * right).sum((1, 2)))
    return torch.cat(found)


def _taps(output: Any) -> bool:
    """Whether a layer's output can have a gradient."""
    return isinstance(output, Tensor) and output.is_floating_point()


def _precise(x: Tensor) -> Tensor:
    """At least float32: half precision cannot hold a sum of many squares."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _scale(module: Any) -> float | None:
    """The factor of a token embedding on its entries; None for any other layer."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    if type(module) is nn.Embedding:
        return 1.0
    scale: Any = getattr(module, "embed_scale", None)
    return float(scale) if type(module).__name__.endswith("ScaledWordEmbedding") else None
