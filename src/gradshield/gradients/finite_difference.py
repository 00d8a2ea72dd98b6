"""Central finite difference along the direction, its step, and the error of a fast engine against the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradshield.errors import UsageError
from gradshield.gradients.base import (
    ENGINES,
    Derivatives,
    DeviceBatch,
    Places,
    check_direction,
    check_layers,
    experts,
    followed,
    scoring,
)
from gradshield.gradients.loop import Loop
from gradshield.gradients.sparing import Prefix
from gradshield.models.loading import text_config
from gradshield.models.modules import parameters_by_name
from gradshield.models.placement import in_float64
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
        check_direction(model, direction)
        check_layers(self.name, model, direction)
        self._check_precision(model, direction)
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

    @staticmethod
    def _check_precision(model: nn.Module, direction: Direction) -> None:
        for name, parameter in parameters_by_name(model).items():
            if name in direction.tensors and parameter.dtype not in (torch.float32, torch.float64):
                raise UsageError(
                    f"the finite-difference engine got {name} in {str(parameter.dtype).removeprefix('torch.')}, where its "
                    "step is rounded away: load the model in float32, or use the engine 'perturbation' or 'forward'"
                )


@contextmanager
def shifted(places: Places, k: int, step: float) -> Iterator[None]:
    """The model at θ + step·v_k, one layer at a time: W + step·V exists only while its own layer runs.

    The caller's Parameter objects are never written to. A shifted stand-in replaces each parameter during its module's
    forward; the originals are restored after it, and again at exit after an exception. ``places`` are the modules with their
    (K, …) tensors, from `followed`.
    """
    with ExitStack() as stack:
        for module, own in places:
            stack.enter_context(_during_its_run(module, {name: v[k] for name, v in own.items()}, step))
        yield


@contextmanager
def _during_its_run(module: nn.Module, own: Mapping[str, Tensor], step: float) -> Iterator[None]:
    slots: list[tuple[dict[str, Any], str, Any, Tensor]] = []
    for name, v in own.items():
        inner, _, attribute = name.rpartition(".")
        holder: dict[str, Any] = module.get_submodule(inner)._parameters
        slots.append((holder, attribute, holder[attribute], v))

    def enter(*_: Any) -> None:
        for holder, attribute, parameter, v in slots:
            moved = torch.add(parameter.detach(), v.to(parameter), alpha=step)
            holder[attribute] = nn.Parameter(moved, requires_grad=False)

    def leave(*_: Any) -> None:
        for holder, attribute, parameter, _v in slots:
            holder[attribute] = parameter

    with module.register_forward_pre_hook(enter), module.register_forward_hook(leave):
        try:
            yield
        finally:
            leave()


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
