"""Forward-mode differentiation: dual numbers carry the direction through one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradshield.errors import UsageError, first_line
from gradshield.gradients.base import (
    ENGINES,
    ROW_SUMS,
    Derivatives,
    DeviceBatch,
    check_direction,
    plain_kernels,
    scoring,
)
from gradshield.models.modules import in_float64, parameters_by_name
from gradshield.types import Batch, Direction


class _TokenLoss(nn.Module):
    """The loss of a batch as a module, so that functional_call can swap the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: DeviceBatch) -> Tensor:
        return data.nll(self.model)


@ENGINES.register("forward")
class Forward:
    """Dual numbers through one forward pass: exact, per-token values, any dtype; attention in its math form.

    The fused attention kernels have no forward-mode derivative, so memory grows with T² per head.
    """

    name = "forward"
    per_token = True

    def directional(self, model: nn.Module, batch: Batch, direction: Direction) -> Derivatives:
        """(K, B, T) derivatives, one dual pass per direction. Raises UsageError for a layer without forward mode."""
        check_direction(model, direction)
        data = DeviceBatch.of(batch, model)
        wrapped = _TokenLoss(model)
        values: list[Tensor] = []
        nll = torch.zeros(0)
        with (
            scoring(model),
            plain_kernels(model, attention=True),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            parameters = parameters_by_name(model)
            for k in range(len(direction.names)):
                with forward_ad.dual_level():
                    duals = {
                        f"model.{name}": forward_ad.make_dual(parameters[name].detach(), v[k].to(parameters[name]))
                        for name, v in direction.tensors.items()
                    }
                    try:
                        primal, tangent = forward_ad.unpack_dual(functional_call(wrapped, duals, (data,)))
                    except NotImplementedError as error:  # a kernel without forward mode, as of 4 bits on CUDA
                        raise UsageError(
                            f"the engine forward got a layer without a forward-mode derivative ({first_line(error)}): load "
                            "the model in float32 for finite-difference (--dtype float32), or use --engine perturbation with "
                            f"{ROW_SUMS}"
                        ) from error
                    if tangent is None:  # the direction does not reach the loss
                        tangent = torch.zeros_like(primal)
                    values.append(-in_float64(tangent).cpu())
                    nll = in_float64(primal).cpu()
        return Derivatives(torch.stack(values), nll)
