"""Directions across another one, tensor by tensor, and where a rate along a line first passes a limit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from gradshield.evaluation.landscape import norm, random_directions, unit_norm

Tensors = Mapping[str, Tensor]


def orthogonal_part(direction: Tensors, to: Tensors) -> dict[str, Tensor]:
    """``direction`` without its component along ``to``, tensor by tensor; at norm 1."""
    return unit_norm({name: _across(tensor.double(), to[name].double()) for name, tensor in direction.items()})


def random_across(like: Tensors, count: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """`random_directions`, each tensor orthogonal to that of ``like`` and with its share of the norm.

    A tensor of one entry has no orthogonal direction and does not move.
    """
    found = {}
    for name, drawn in random_directions(like, count, seed).items():
        parts = {}
        for tensor, own in drawn.items():
            across = _across(own.double(), like[tensor].double())
            length = across.norm()
            parts[tensor] = across * (own.norm() / length if length > 1e-6 * own.norm() else 0.0)
        found[name] = unit_norm(parts)
    return found


def _across(tensor: Tensor, other: Tensor) -> Tensor:
    for _ in range(2):  # the first pass leaves rounding errors relative to what it removed
        tensor = tensor - other * ((tensor * other).sum() / other.square().sum())
    return tensor


def cosine(first: Tensors, second: Tensors) -> float:
    """Cosine of two directions over the same tensors."""
    dot = sum(float((first[name].double() * second[name].double()).sum()) for name in first)
    return dot / (norm(first) * norm(second))


def breaking_steps(alphas: ArrayLike, asr: ArrayLike, limit: float) -> tuple[float | None, float | None]:
    """The steps nearest to 0, on the negative and the positive side, at which a rate exceeds ``limit``.

    None if no step on that side does. A step at 0 belongs to both sides.
    """
    a, s = np.asarray(alphas, dtype=np.float64), np.asarray(asr, dtype=np.float64)
    over = a[s > limit]
    down, up = over[over <= 0], over[over >= 0]
    return (float(down.max()) if down.size else None, float(up.min()) if up.size else None)
