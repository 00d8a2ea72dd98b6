"""The direction v = ∇S of a differentiable score, and its file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradshield.errors import DataError, ScoreError
from gradshield.files import replacing
from gradshield.gradients.base import scoring
from gradshield.models.placement import in_float64
from gradshield.types import Direction

Score = Callable[[nn.Module], Tensor]


def gradient_direction(model: nn.Module, scores: Mapping[str, Iterable[Score]], parameters: list[str]) -> Direction:
    """∇S for each named score, over the named parameters.

    ``scores[name]`` is one or more callables whose values sum to S (chunks of the probe set, so that one chunk's graph is
    alive at a time). All gradients are in memory at once. Raises ScoreError if one is zero or not finite.
    """
    gradients = {name: _gradient(model, parts, parameters) for name, parts in scores.items()}
    names = tuple(gradients)
    norms = [_norm(gradient.values()) for gradient in gradients.values()]
    for name, norm in zip(names, norms, strict=True):
        if not norm > 0 or norm == float("inf"):
            raise ScoreError(
                f"the gradient of the unsafety score {name!r} has norm {norm}, and a direction must be finite and not "
                "zero: check the model's weights, or choose another probe"
            )
    with torch.no_grad():
        theta = _norm(p for n, p in model.named_parameters() if n in set(parameters))
        scales = tuple(theta / norm for norm in norms)
        moved = [p for p in parameters if any(bool(gradients[name][p].any()) for name in names)]
        tensors = {p: _joined([gradients[name].pop(p) for name in names]) for p in moved}
    return Direction(tensors, names, scales, digest(names, tensors))


def _joined(parts: list[Tensor]) -> Tensor:
    """One parameter's gradients as (K, …); a single one is not copied, to save memory."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def _gradient(model: nn.Module, parts: Iterable[Score], parameters: list[str]) -> dict[str, Tensor]:
    with scoring(model, parameters) as trainable, torch.enable_grad():
        total = {name: torch.zeros_like(p) for name, p in trainable.items()}
        for part in parts:
            found = torch.autograd.grad(part(model), list(trainable.values()), allow_unused=True)
            for name, g in zip(trainable, found, strict=True):
                if g is not None:
                    total[name] += g
    return total


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(sum(float(in_float64(t.detach()).pow(2).sum()) for t in tensors) ** 0.5)


def digest(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the directions' names, the parameters' names and the bytes of every tensor."""
    sha = hashlib.sha256(json.dumps(names).encode())
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save(direction: Direction, path: Path) -> None:
    """Write the direction as safetensors, atomically, with its digest in the header."""
    header = {
        "names": json.dumps(direction.names),
        "scales": json.dumps(direction.scales),
        "digest": direction.digest,
    }
    with replacing(path) as part:
        save_file({name: t.detach().cpu().contiguous() for name, t in direction.tensors.items()}, part, header)


def load(path: Path) -> Direction:
    """Read a saved direction. Raises DataError if the file is not one, or its bytes do not match its digest."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        names, scales = (tuple(json.loads(header[key])) for key in ("names", "scales"))
        if digest(names, tensors) != header["digest"]:
            raise DataError(f"the saved direction {path.name} does not match its digest")
        return Direction(tensors, names, scales, header["digest"])
    except (SafetensorError, KeyError) as error:
        raise DataError(f"the saved direction {path.name} could not be read ({error})") from error
