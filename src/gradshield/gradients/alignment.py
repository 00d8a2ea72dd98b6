"""The alignment direction: what alignment training did to each weight matrix, V = W_aligned - W_base.

Methods that keep fine-tuning near an aligned model treat V as the safe direction, and stretch it by C = V Vᵀ/‖V‖_F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradshield.errors import ModelError, UsageError
from gradshield.gradients.direction import plain_name
from gradshield.models.modules import in_float64

Alignment = Mapping[str, Tensor]
"""One V for each weight matrix by its name in the model without an adapter: (outputs, inputs), whatever the layer's own layout,
so that a LoRA update ``scale * B @ A`` has its shape; float32, on the CPU.
"""


def alignment(aligned: nn.Module, base: nn.Module, names: Sequence[str]) -> Alignment:
    """V of each weight matrix in ``names``; vectors (biases) are skipped, since an adapter's factors do not move them.

    ``names`` come from ``gradients.target_names``. Raises ModelError if the two models do not have the same matrices, or one is
    not the plain matrix of a linear layer, and UsageError if there is no matrix or all are equal.
    """
    first, second = _owned(aligned), _owned(base)
    tensors = {}
    for name in sorted({plain_name(n) for n in names}):
        if name not in first or name not in second:
            where = "aligned" if name not in first else "base"
            raise ModelError(
                f"the {where} model has no weight {name}, and both models must have every weight that the adapter "
                "changes: give the base model that this aligned model was made from"
            )
        if first[name][1].ndim != 1:
            tensors[name] = _difference(name, *first[name], second[name][1])
    if not tensors:
        raise UsageError(
            "there is no weight matrix to take the alignment direction of: give a peft_config whose target modules are "
            "linear layers"
        )
    if not any(bool(v.any()) for v in tensors.values()):
        raise UsageError(
            f"the aligned and the base model are identical in all {len(tensors)} weights, so there is no alignment direction: "
            "give as base the model before its alignment (the one without -Instruct or -chat)"
        )
    return tensors


def _owned(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    return {
        plain_name(f"{prefix}.{attribute}" if prefix else attribute): (module, parameter)
        for prefix, module in model.named_modules()
        for attribute, parameter in module.named_parameters(recurse=False)
    }


def _difference(name: str, owner: nn.Module, one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        raise ModelError(
            f"{name} has shape {tuple(one.shape)} in the aligned model and {tuple(other.shape)} in the base model, and "
            "they must be equal: give the base model that this aligned model was made from"
        )
    transposed = type(owner).__name__ == "Conv1D"  # GPT-2's, of transformers
    if one.ndim != 2 or not (transposed or isinstance(owner, nn.Linear)):
        raise ModelError(
            f"{name} of shape {tuple(one.shape)} belongs to a {type(owner).__name__}, and an alignment direction covers "
            "linear layers only: leave embeddings, convolutions and fused experts out of the adapter's targets"
        )
    if not (one.is_floating_point() and other.is_floating_point()):
        raise ModelError(
            f"{name} is {one.dtype} in one model and {other.dtype} in the other, and quantised weights cannot be "
            "subtracted: load both models unquantised"
        )
    with torch.no_grad():
        v = one.detach().to("cpu", torch.float32) - other.detach().to("cpu", torch.float32)
    if not bool(v.isfinite().all()):
        raise ModelError(f"{name} has values that are not finite in one of the models: check both models' files")
    return v.T.contiguous() if transposed else v


def largest_eigenvalue(v: Tensor) -> float:
    """The largest eigenvalue of C = V Vᵀ/‖V‖_F of one (d_out, d_in) matrix; 0 for V = 0.

    I - C shrinks a direction whose eigenvalue is between 0 and 2 and stretches one above 2: there the published penalty punishes
    the alignment direction itself, harder than any other. Exact, from the smaller Gram matrix in float64.
    """
    squares = torch.linalg.eigvalsh(_gram(v)).clamp(min=0)  # squared singular values, ascending
    norm = float(squares.sum().sqrt())
    return float(squares[-1]) / norm if norm else 0.0


def leading(v: Tensor, energy: float) -> Tensor:
    """Orthonormal basis (d_out, q) of the fewest left singular directions that hold a share ``energy`` of ‖V‖²_F.

    With ``energy`` 1 it is the whole column space, up to the rounding of float64. Float32; q = 0 for V = 0.
    """
    squares, vectors = torch.linalg.eigh(_gram(v))
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    # Singular values that are zero within float64 rounding do not count.
    floor = float(squares[0]) * max(v.shape) * torch.finfo(torch.float64).eps
    rank = int((squares > floor).sum())
    reached = squares.cumsum(0) >= energy * squares.sum()
    q = rank if energy == 1 else min(rank, int((~reached).sum()) + 1)
    basis = vectors[:, :q]
    if v.shape[0] > v.shape[1]:
        basis = torch.linalg.qr(in_float64(v) @ basis).Q
    out: Tensor = basis.to(v.device, torch.float32).contiguous()
    return out


def _gram(v: Tensor) -> Tensor:
    wide = in_float64(v)
    return wide @ wide.T if v.shape[0] <= v.shape[1] else wide.T @ wide
