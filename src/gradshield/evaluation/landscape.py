"""The safety landscape: a model's rates as its weights move along a line, and the width of the safe basin.

    lines = random_directions(weights(model), count=3, seed=0)
    found = landscape(model, lines, alphas=np.linspace(-0.5, 0.5, 21), unit=norm(weights(model)), measure=rates)
    found.visage("asr/refusal-phrases")

A direction maps a parameter's name to a tensor of its shape. A point of a line is theta + a * unit * d with d of norm 1 over all
tensors together, so ``unit`` defines a step of 1: the norm of the weights (steps relative to the model) or the norm of the
alignment vector (a step of -1 along it is the base model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from gradshield.errors import DataError, UsageError
from gradshield.models.modules import in_float64
from gradshield.types import Floats, Rate

Tensors = Mapping[str, Tensor]
Measure = Callable[[], Mapping[str, Rate]]


@dataclass(frozen=True)
class Landscape:
    """Rates along lines through one model's weights.

    ``rates[direction][measure]`` is a tuple of one Rate (with its n and Wilson interval) per step of ``alphas``, in units of
    ``unit``. Point 0 is the model itself, measured once and shared by every line.
    """

    alphas: tuple[float, ...]
    unit: float
    rates: Mapping[str, Mapping[str, tuple[Rate, ...]]]

    def curve(self, direction: str, measure: str) -> Floats:
        """The rate at every step (A,). Raises UsageError for an unknown direction or measure."""
        for kind, name, there in (
            ("direction", direction, self.rates),
            ("rate", measure, self.rates.get(direction, {})),
        ):
            if name not in there:
                raise UsageError(f"the landscape has no {kind} {name!r}: choose one of {', '.join(there) or 'none'}")
        return np.array([rate.rate for rate in self.rates[direction][measure]])

    def visage(
        self,
        measure: str,
        directions: Sequence[str] | None = None,
        highest: float = 1.0,
        conditional: bool = True,
    ) -> float:
        """``visage`` of the rate, averaged over ``directions`` (None for all)."""
        names = list(self.rates) if directions is None else list(directions)
        curves = [self.curve(name, measure) for name in names]
        return float(np.mean([visage(self.alphas, curve, highest, conditional) for curve in curves]))


def visage(alphas: ArrayLike, asr: ArrayLike, highest: float = 1.0, conditional: bool = True) -> float:
    """The safe basin along one line: the mean of S_max - S(a) over a in (-A, A), over those a where S(a) < S_max.

    0 if no point lies below ``highest``. The mean over a is an integral: each step covers half the distance to its neighbours,
    so that steps may be uneven. ``Landscape.visage`` averages lines.

    ``highest`` is S_max. The paper does not say whether it is the highest observed or the highest possible rate; 1 by default,
    so that models are compared on the same scale. ``conditional`` excludes points at S_max from the mean (as published, read as
    a conditional expectation). This measures the depth of the basin, not its width: a narrow basin in an otherwise unsafe model
    scores like a wide one. False counts such points as 0, so that a wider basin always scores higher.

    Source: arXiv 2604.17215, after Peng et al. (arXiv 2405.17374). Raises DataError if steps and rates differ in number, a step
    is repeated, a value is not finite, or the steps are not on both sides of 0.
    """
    a, s = np.asarray(alphas, dtype=np.float64), np.asarray(asr, dtype=np.float64)
    if a.ndim != 1 or a.shape != s.shape:
        raise DataError(f"VISAGE takes one rate per step, got {a.size} steps and {s.size} rates: pass as many of each")
    if not (np.isfinite(a).all() and np.isfinite(s).all()):
        raise DataError("VISAGE takes finite steps and rates, and some are not finite: leave out those points")
    order = np.argsort(a)
    a, s = a[order], s[order]
    if a.size < 3 or not a[0] < 0 < a[-1] or (np.diff(a) == 0).any():
        raise DataError("VISAGE takes three or more different steps on both sides of 0: pass for example -0.5 to 0.5")
    edges = np.concatenate([a[:1], (a[1:] + a[:-1]) / 2, a[-1:]])
    lengths = np.diff(edges)
    inside = lengths * (s < highest)
    over = inside.sum() if conditional else lengths.sum()
    return float((inside * (highest - s)).sum() / over) if over > 0 else 0.0


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by name (not copies)."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def norm(tensors: Tensors) -> float:
    """Euclidean norm over all tensors together."""
    return math.sqrt(sum(float(in_float64(tensor).square().sum()) for tensor in tensors.values()))


def unit_norm(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors in float32, scaled to norm 1 over all together. Raises UsageError if they are zero or not finite."""
    length = norm(tensors)
    if not (math.isfinite(length) and length > 0):
        raise UsageError(f"a direction must have a finite norm above 0, got {length}: use another direction")
    return {name: tensor.float() / length for name, tensor in tensors.items()}


def random_directions(like: Tensors, count: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """``count`` random directions of norm 1, by name (``random-0``...), with Gaussian entries drawn under ``seed``.

    ``like`` sets the names, shapes and relative norms: each tensor's share of the norm is its share in ``like``. Pass the
    weights to move every tensor by the same fraction of itself. Raises UsageError if ``like`` is zero.
    """
    shares = {name: float(in_float64(tensor).norm()) for name, tensor in unit_norm(like).items()}
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(count):
        drawn = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in like.items()}
        found[f"random-{i}"] = unit_norm(
            {name: tensor * (shares[name] / tensor.norm()) for name, tensor in drawn.items()}
        )
    return found


@contextmanager
def moved(model: nn.Module, direction: Tensors, step: float) -> Iterator[None]:
    """The model at theta + step * direction; on exit it holds its own parameters again, the same objects and bits.

    The caller's parameters are never written to: meanwhile, every module's slot holds a moved stand-in, one per parameter, so
    that tied weights stay tied. In half precision a step below a weight's rounding does not move it. Costs one copy of the
    moved tensors. Raises UsageError if the direction does not fit the model.
    """
    own = dict(model.named_parameters())
    for name, tensor in direction.items():
        if name not in own or own[name].shape != tensor.shape:
            there = tuple(own[name].shape) if name in own else "no such parameter"
            raise UsageError(
                f"the direction has {name} of shape {tuple(tensor.shape)}, but the model has {there}: "
                "use a direction that was computed on this model"
            )
    stand_ins = {}
    for name, tensor in direction.items():
        here = own[name].detach()
        shifted = torch.add(here.float(), tensor.to(here.device, torch.float32), alpha=step).to(here.dtype)
        stand_ins[id(own[name])] = nn.Parameter(shifted, requires_grad=False)
    slots = [
        (module._parameters, slot, p)
        for module in model.modules()
        for slot, p in module._parameters.items()
        if id(p) in stand_ins
    ]
    try:
        for holder, slot, parameter in slots:
            holder[slot] = stand_ins[id(parameter)]
        yield
    finally:
        for holder, slot, parameter in slots:
            holder[slot] = parameter


def landscape(
    model: nn.Module,
    directions: Mapping[str, Tensors],
    alphas: ArrayLike,
    unit: float,
    measure: Measure,
) -> Landscape:
    """Measure the model at theta + a * unit * d for every step a and every direction d (scaled to norm 1 first).

    ``measure`` is called with the moved weights in place and returns rates by name, such as the ``rates`` of
    ``evaluation.asr.asr`` with a ``generate`` on this model. ``unit`` is the length of a step of 1, in the norm of the weights.
    Raises UsageError if there is no direction or no step, a step is repeated, or a direction does not fit.
    """
    steps = sorted(float(a) for a in np.asarray(alphas, dtype=np.float64).ravel())
    if not directions or not steps or any(a == b for a, b in pairwise(steps)) or not np.isfinite(steps).all():
        raise UsageError(f"a landscape takes directions and different finite steps, got {len(directions)} and {steps}")
    here = measure() if 0 in steps else None
    found: dict[str, dict[str, tuple[Rate, ...]]] = {}
    for name, direction in directions.items():
        line = unit_norm(direction)
        points: list[Mapping[str, Rate]] = []
        for a in steps:
            if a == 0 and here is not None:
                points.append(here)
                continue
            with moved(model, line, a * unit):
                points.append(measure())
        # A rate that only some points have (an undecided judge) has no curve.
        names = [key for key in points[0] if all(key in point for point in points)]
        found[name] = {key: tuple(point[key] for point in points) for key in names}
    return Landscape(tuple(steps), float(unit), found)
