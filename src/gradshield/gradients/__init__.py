"""Directional derivatives of the loss: one slow oracle, three fast engines, and their agreement."""

from __future__ import annotations

import torch
from torch import nn

from gradshield.errors import UsageError
from gradshield.gradients.base import ENGINES, ROW_SUMS, Derivatives, Engine, beyond_layers
from gradshield.gradients.direction import (
    SUBSPACES,
    adapted,
    check_subspace,
    gradient_direction,
    parameter_names,
    target_names,
)
from gradshield.gradients.finite_difference import EngineAgreement, FiniteDifference, agreement, calibrated
from gradshield.gradients.forward import Forward
from gradshield.gradients.loop import Loop, row_norms
from gradshield.gradients.perturbation import Perturbation


def pick(name: str, model: nn.Module, per_token: bool) -> Engine:
    """The engine to use. ``auto`` decides by precision, architecture and whether per-token values are needed.

    float32 or float64: finite difference (cheapest, per token). Half precision: forward mode if per-token values are
    needed, else perturbation. 8 bits: perturbation. Raises UsageError if a named engine cannot give the per-token values
    needed, or does not support 8 bits.
    """
    rounding = any(p.dtype == torch.int8 for p in model.parameters())
    if rounding and (per_token or name in ("forward", "finite-difference")):
        raise UsageError(
            "a layer in 8 bits rounds its input, which only the engines perturbation and loop support, and they give row sums "
            f"only: load the model in 4 bits (--quantize 4bit), or use --engine auto with {ROW_SUMS}"
        )
    if name == "auto":
        if rounding:
            return Perturbation()
        if beyond_layers(model):
            return Forward()
        if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point()):
            return FiniteDifference()
        return Forward() if per_token else Perturbation()
    engine = ENGINES[name]()
    if per_token and not engine.per_token:
        able = ", ".join(n for n in ENGINES if ENGINES[n].per_token)
        raise UsageError(
            f"the engine {name!r} gives row sums only, and the chosen aggregate needs per-token values: use one of {able}, "
            f"or {ROW_SUMS}"
        )
    return engine
