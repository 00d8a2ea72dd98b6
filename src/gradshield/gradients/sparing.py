"""Work that a pass can skip: layers whose output does not change.

A direction that moves only the last layers does not change their input, so the layers below run once for all passes over a batch,
which is exact. A model that does not allow this is detected during the pass and then runs in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gradshield.errors import ModelError
from gradshield.gradients.subspace import decoder_layers
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
