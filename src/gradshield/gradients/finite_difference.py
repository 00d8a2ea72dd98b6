"""Central finite difference along the direction, its step, and the error of a fast engine against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradshield.errors import ModelError, UsageError
from gradshield.gradients.base import ENGINES, Derivatives, DeviceBatch, Places, check_direction, followed, scoring
from gradshield.gradients.direction import decoder_layers
from gradshield.gradients.loop import Loop
from gradshield.models.modules import in_float64, modules_by_name, parameters_by_name, text_config
from gradshield.types import Batch, Direction, Floats


class _Routing(TorchFunctionMode):  # type: ignore[misc]
    """Records which experts a pass chose, and makes later passes choose the same.

    A router's choice is discrete: a finite step can flip it, and the difference would measure the jump, not the slope. The
    oracle's derivative holds the choice fixed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.chosen: list[Tensor] = []
        self.below = 0  # choices made in the layers that later passes skip
        self.turn: int | None = None  # None while recording

    def mark(self) -> None:
        self.below = len(self.chosen)

    def replay(self, skipping: bool) -> _Routing:
        self.turn = self.below if skipping else 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return result
        if self.turn is None:
            self.chosen.append(result.indices)
            return result
        indices = self.chosen[self.turn]
        self.turn += 1
        scores = args[0] if args else kwargs["input"]
        return type(result)((scores.gather(-1, indices), indices))


@ENGINES.register("finite-difference")
class FiniteDifference:
    """[L(θ-εv) - L(θ+εv)] / 2ε: two batched forward passes, per-token values, any kernel; float32 or float64 only.

    ``relative_step`` is ε in units of ‖θ‖/‖v‖ over the subspace: too small loses the difference to float32 rounding, too
    large adds curvature. The default is the middle of the flat range of the error against the oracle (docs/methods.md);
    `calibrated` finds the best step for a model.
    """

    name = "finite-difference"
    per_token = True

    def __init__(self, relative_step: float = 1e-4) -> None:
        self.relative_step = relative_step

    def directional(self, model: nn.Module, batch: Batch, direction: Direction) -> Derivatives:
        """(K, B, T) derivatives. Raises UsageError on a half-precision model, which would round the step away."""
        check_direction(model, direction, layers_of=self.name)
        for name, parameter in parameters_by_name(model).items():
            if name in direction.tensors and parameter.dtype not in (torch.float32, torch.float64):
                raise UsageError(
                    f"the finite-difference engine got {name} in {str(parameter.dtype).removeprefix('torch.')}, where its "
                    "step is rounded away: load the model in float32, or use the engine 'perturbation' or 'forward'"
                )
        data = DeviceBatch.of(batch, model)
        places = followed(model, direction.tensors)
        prefix = Prefix(model, [module for module, _ in places])

        def losses() -> Tensor:
            return in_float64(data.nll(model)).cpu()

        with scoring(model), torch.no_grad():
            routing = _Routing() if experts(text_config(model)) else None
            if routing is not None:
                with routing, prefix.passing(routing.mark):
                    losses()
            values = []
            for k in range(len(direction.names)):
                step = self.relative_step * direction.scales[k]
                sides = []
                for sign in (1.0, -1.0):
                    with (
                        shifted(places, k, sign * step),
                        prefix.passing() as skipping,
                        routing.replay(skipping) if routing else nullcontext(),
                    ):
                        sides.append(losses())
                plus, minus = sides
                values.append((minus - plus) / (2.0 * step))
        return Derivatives(torch.stack(values), (plus + minus) / 2.0)


def experts(config: Any) -> int:
    """The number of experts per layer in the language model's config; 0 without experts."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    parts = (config, getattr(config, "ffn_config", None))  # DBRX keeps them here
    return next((getattr(part, name) for part in parts for name in names if getattr(part, name, None)), 0)


Slot = tuple[
    dict[str, Any], str, nn.Parameter, Tensor
]  # a module's parameters, a name in them, what is there, and its v_k


@contextmanager
def shifted(places: Places, k: int, step: float) -> Iterator[None]:
    """The model at θ + step·v_k, one layer at a time: W + step·V exists only while its own layer runs.

    The caller's Parameter objects are never written to. A shifted stand-in replaces each parameter during its module's
    forward; the originals are restored after it, and again at exit after an exception. ``places`` are the modules with their
    (K, …) tensors, from `followed`.
    """

    def enter(slots: list[Slot], *_: Any) -> None:
        for holder, attribute, parameter, v in slots:
            moved = torch.add(parameter.detach(), v.to(parameter), alpha=step)
            holder[attribute] = nn.Parameter(moved, requires_grad=False)

    def leave(slots: list[Slot], *_: Any) -> None:
        for holder, attribute, parameter, _v in slots:
            holder[attribute] = parameter

    with ExitStack() as stack:
        for module, own in places:
            slots: list[Slot] = []
            for name, v in own.items():
                inner, _, attribute = name.rpartition(".")
                holder: dict[str, Any] = module.get_submodule(inner)._parameters
                slots.append((holder, attribute, holder[attribute], v[k]))
            stack.callback(leave, slots)
            stack.enter_context(module.register_forward_pre_hook(partial(enter, slots)))
            stack.enter_context(module.register_forward_hook(partial(leave, slots)))
        yield


RELATIVE_STEPS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class EngineAgreement:
    """``relative_error`` is ‖f − o‖/‖o‖ over n rows, ``spearman`` their rank correlation (nan below three rows)."""

    engine: str
    n: int
    relative_error: float
    spearman: float


def agreement(engine: str, fast: Floats, oracle: Floats) -> EngineAgreement:
    """Compare the row sums of a fast engine with the oracle's, both (n,)."""
    from scipy.stats import spearmanr

    size = float(np.linalg.norm(oracle))
    error = float(np.linalg.norm(fast - oracle)) / size if size else float(np.linalg.norm(fast))
    rank = float(spearmanr(fast, oracle).statistic) if len(oracle) > 2 and np.ptp(oracle) > 0 else float("nan")
    return EngineAgreement(engine, len(oracle), error, rank)


def calibrated(model: nn.Module, batch: Batch, direction: Direction) -> tuple[FiniteDifference, dict[str, float]]:
    """The finite-difference engine whose step agrees best with the oracle on ``batch``, and the error of each step tried.

    Of RELATIVE_STEPS, in units of ‖θ‖/‖v‖: smaller steps suffer from rounding, larger ones from curvature. So the search goes
    from the default step to where the error falls, and ends before it rises.
    """
    oracle = Loop().directional(model, batch, direction).values.numpy()

    @cache
    def error(step: float) -> float:
        fast = FiniteDifference(step).directional(model, batch, direction).values.sum(-1).numpy()
        return agreement("finite-difference", fast.ravel(), oracle.ravel()).relative_error

    tried = {best := FiniteDifference().relative_step}
    for way in (RELATIVE_STEPS, RELATIVE_STEPS[::-1]):
        for step in way[way.index(best) + 1 :]:
            tried.add(step)
            if error(step) >= error(best):
                break
            best = step
    return FiniteDifference(best), {f"{step:g}": error(step) for step in sorted(tried)}


# ---- layers below the first that moves -------------------------------------------------------------------------------


class Prefix:
    """The decoder layers below the first one that a direction moves: they run only in the first pass over a batch.

    ``passing`` wraps each pass over one batch; from pass to pass only parameters of the direction may differ. Later passes
    run everything if the first one shows that they must: a parameter below moves (an embedding), a layer runs more than
    once, or one passes on more than its single output.
    """

    def __init__(self, model: nn.Module, moved: Iterable[nn.Module]) -> None:
        """``moved`` are the modules that hold the direction's parameters (`followed`)."""
        layers: list[nn.Module] = []
        with suppress(ModelError):  # without known layers, none is below
            layers = list(decoder_layers(model)[1])
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
        if (output := self._output) is None:
            with nullcontext() if self._known else self._recording(reached):
                yield False
            return
        with ExitStack() as stack:
            for own in map(vars, self._below):
                if "forward" in own:
                    stack.callback(own.update, forward=own["forward"])
                else:
                    stack.callback(own.pop, "forward", None)
                own["forward"] = lambda *_args, output=output, **_kwargs: output.clone()
            yield True

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
            for layer in self._below:  # before the caller's hooks, which run in every pass
                hooks.enter_context(layer.register_forward_hook(below, prepend=True))
            hooks.enter_context(order[-1].register_forward_pre_hook(first, with_kwargs=True))
            for module in self._moved:
                hooks.enter_context(module.register_forward_pre_hook(moving))
            yield
        self._known = True
        if all(fits) and [id(module) for module in ran] == [id(module) for module in order]:
            self._output = outputs[0]


def _plain(values: Iterable[Any]) -> bool:
    """Whether a layer's arguments hold nothing that an earlier layer could have written into (a cache, a dict)."""
    return all(
        v is None or isinstance(v, Tensor | bool | int | float | str) or (isinstance(v, tuple) and _plain(v))
        for v in values
    )
