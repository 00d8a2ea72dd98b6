"""Work that a pass can skip: layers whose output does not change, and positions whose logits are not needed.

Both are exact. A direction that moves only the last layers does not change their input, so the layers below run once for all
passes over a batch. After the last layer's attention positions are independent, so its MLP is needed only where a loss token
is predicted. A model that does not allow this is detected during the pass and then runs in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gradshield.errors import ModelError
from gradshield.gradients.base import DeviceBatch
from gradshield.gradients.subspace import decoder_layers
from gradshield.models.logits import output_head, predicting, token_nll
from gradshield.models.modules import modules_by_name


class Prefix:
    """The decoder layers below the first one that a direction moves: they run only in the first pass over a batch.

    ``passing`` wraps each pass over one batch; from pass to pass only parameters of the direction may differ. Later passes
    run everything if the first one shows that they must: a parameter below moves (an embedding), a layer runs more than
    once, or one passes on more than its single output.
    """

    def __init__(self, model: nn.Module, moved: Iterable[nn.Module]) -> None:
        """``moved`` are the modules that hold the direction's parameters (`followed`)."""
        layers = _layers(model)
        self._moved = list(moved)
        own = {id(module) for module in self._moved}
        moves = [any(id(module) in own for module in modules_by_name(layer).values()) for layer in layers]
        count = moves.index(True) if any(moves) else 0
        self._below, self._first = layers[:count], layers[count : count + 1]
        self._known = not self._below  # without layers below there is nothing to record
        self._output: Tensor | None = None  # of the last layer below: (B, T, D)

    @contextmanager
    def passing(self, reached: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """One pass; yields whether the layers below are skipped. ``reached`` is called after they ran and were recorded."""
        if self._output is not None:
            with self._skipping(self._output):
                yield True
        elif self._known:
            yield False
        else:
            with self._recording(reached):
                yield False

    @contextmanager
    def _recording(self, reached: Callable[[], None]) -> Iterator[None]:
        order = [*self._below, *self._first]
        ran: list[nn.Module] = []
        fits: list[bool] = []
        outputs: list[Tensor] = []

        def below(module: nn.Module, _args: Any, output: Any) -> None:
            ran.append(module)
            fits.append(isinstance(output, Tensor))
            if module is order[-2] and isinstance(output, Tensor):
                outputs.append(output.clone())  # later layers may write into it
                reached()

        def first(module: nn.Module, args: Any, kwargs: Any) -> None:
            ran.append(module)
            fits.append(_plain([*args, *kwargs.values()]))

        def moving(_module: nn.Module, _args: Any) -> None:
            fits.append(bool(outputs))

        with ExitStack() as hooks:
            for layer in self._below:
                hooks.enter_context(
                    layer.register_forward_hook(below, prepend=True)
                )  # before the caller's hooks, which run in every pass
            hooks.enter_context(order[-1].register_forward_pre_hook(first, with_kwargs=True))
            for module in self._moved:
                hooks.enter_context(module.register_forward_pre_hook(moving))
            yield
        self._known = True
        if all(fits) and [id(module) for module in ran] == [id(module) for module in order]:
            self._output = outputs[0]

    @contextmanager
    def _skipping(self, output: Tensor) -> Iterator[None]:
        slots = [vars(layer) for layer in self._below]
        before = [{"forward": slot["forward"]} if "forward" in slot else {} for slot in slots]
        try:
            for slot in slots:
                slot["forward"] = lambda *_args, **_kwargs: output.clone()
            yield
        finally:
            for slot, forward in zip(slots, before, strict=True):
                slot.pop("forward", None)
                slot.update(forward)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers; empty if they cannot be found."""
    try:
        return list(decoder_layers(model)[1])
    except ModelError:
        return []


def _plain(values: Iterable[Any]) -> bool:
    """Whether a layer's arguments hold nothing that an earlier layer could have written into (a cache, a dict)."""
    return all(
        v is None or isinstance(v, Tensor | bool | int | float | str) or (isinstance(v, tuple) and _plain(v))
        for v in values
    )


def answer_nll(model: nn.Module, data: DeviceBatch) -> Tensor:
    """`token_nll`, (B, T), with the last layer's MLP run only at the M positions that predict a loss token.

    A model that runs that MLP more than once in a pass needs all positions, and is run again in full.
    """
    last = _last_mlp(model)
    where = predicting(data.loss)
    entries = where.flatten().nonzero().squeeze(1)  # (M,)
    if last is None or len(entries) in (0, where.numel()):
        return token_nll(model, data.ids, data.attention, data.loss)
    with _gathered(last, tuple(where.shape), entries) as calls:
        found = token_nll(model, data.ids, data.attention, data.loss)
    return found if len(calls) == 1 else token_nll(model, data.ids, data.attention, data.loss)


def gathering(model: nn.Module) -> list[nn.Module]:
    """The modules that see only the M positions in `answer_nll`: the head, and the last layer's MLP if it has one."""
    last = _last_mlp(model)
    return [output_head(model)] if last is None else [output_head(model), last]


def _last_mlp(model: nn.Module) -> nn.Module | None:
    layers = _layers(model)
    found = getattr(layers[-1], "mlp", None) if layers else None
    return found if isinstance(found, nn.Module) else None


@contextmanager
def _gathered(module: nn.Module, shape: tuple[int, ...], entries: Tensor) -> Iterator[list[bool]]:
    """The module sees M of the (B, T) positions, as (1, M, D), and gives zero at the others. Yields one item per call.

    A module with a second per-position argument (BLOOM's adds the residual itself) sees all positions.
    """
    calls: list[bool] = []

    def gather(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        by_position = [isinstance(a, Tensor) and tuple(a.shape[:2]) == shape for a in (*args, *kwargs.values())]
        calls.append(bool(args) and by_position[0] and sum(by_position) == 1)
        if not calls[-1]:
            return None
        return (args[0].flatten(0, 1).index_select(0, entries.to(args[0].device)).unsqueeze(0), *args[1:]), kwargs

    def scatter(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _spread(output, shape, entries) if calls[-1] else None

    with (
        module.register_forward_pre_hook(gather, prepend=True, with_kwargs=True),
        module.register_forward_hook(scatter),
    ):
        yield calls


def _spread(output: Any, shape: tuple[int, ...], entries: Tensor) -> Any:
    """(1, M, D) as (B, T, D), zero where nothing was gathered; applied to each such tensor of a tuple."""
    if isinstance(output, tuple):
        return tuple(_spread(o, shape, entries) for o in output)
    if not isinstance(output, Tensor) or output.shape[:2] != (1, len(entries)):
        return output
    out = output.new_zeros(shape[0] * shape[1], *output.shape[2:])
    return out.index_copy(0, entries.to(out.device), output[0]).unflatten(0, shape)
