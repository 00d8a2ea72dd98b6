"""The direction v = ∇S of a differentiable score, its file, and the parameter subspace that it is taken over.

Of the weights that training changes, ``lora`` takes the adapter at its seeded initialisation, with the modules that it trains
in full; ``targets`` the weights themselves: the same score averaged over initialisations, without the noise of a random A.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradshield.errors import DataError, ModelError, ScoreError, UsageError
from gradshield.files import replacing
from gradshield.gradients.base import gradient, norm, scoring
from gradshield.models.modules import modules_by_name, text_config
from gradshield.types import Direction

if TYPE_CHECKING:
    from peft import PeftConfig

Score = Callable[[nn.Module], Tensor]


def gradient_direction(model: nn.Module, scores: Mapping[str, Iterable[Score]], parameters: list[str]) -> Direction:
    """∇S for each named score, over the named parameters.

    ``scores[name]`` is one or more callables whose values sum to S (chunks of the probe set, so that one chunk's graph is
    alive at a time). All gradients are in memory at once. Raises ScoreError if one is zero or not finite.
    """
    gradients = {name: _gradient(model, parts, parameters) for name, parts in scores.items()}
    names = tuple(gradients)
    sizes = [norm(found.values()) for found in gradients.values()]
    for name, size in zip(names, sizes, strict=True):
        if not 0 < size < float("inf"):
            raise ScoreError(
                f"the gradient of the unsafety score {name!r} has norm {size}, and a direction must be finite and not "
                "zero: check the model's weights, or choose another probe"
            )
    with torch.no_grad():
        theta = norm(p for n, p in model.named_parameters() if n in set(parameters))
        scales = tuple(theta / size for size in sizes)
        moved = [p for p in parameters if any(bool(gradients[name][p].any()) for name in names)]
        tensors = {}
        for p in moved:
            parts = [gradients[name].pop(p) for name in names]
            tensors[p] = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)  # one is not copied
    return Direction(tensors, names, scales, digest(names, tensors))


def _gradient(model: nn.Module, parts: Iterable[Score], parameters: list[str]) -> dict[str, Tensor]:
    with scoring(model, parameters) as trainable, torch.enable_grad():
        total = {name: torch.zeros_like(p) for name, p in trainable.items()}
        for part in parts:
            for name, g in gradient(part(model), trainable).items():
                total[name] += g
    return total


def digest(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the directions' names, the parameters' names and the bytes of every tensor."""
    sha = hashlib.sha256(json.dumps(names).encode())
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def save(direction: Direction, path: Path) -> None:
    """Write the direction as safetensors, atomically, with its digest in the header."""
    header = {name: json.dumps(getattr(direction, name)) for name in ("names", "scales")} | {"digest": direction.digest}
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


# ---- subspaces -------------------------------------------------------------------------------------------------------

SUBSPACES = {
    "all": "every parameter of the model",
    "targets": "the weights that the adapter of a peft_config will change",
    "lora": "the adapter that will be trained, at its seeded initialisation",
    "last:k": "the last k decoder layers (last:2) or a share of them (last:25%), and the final norm",
}
_LAST = re.compile(r"last:(\d+)(%?)")


def check_subspace(subspace: str) -> None:
    """Raises UsageError if the name is not one of SUBSPACES."""
    if subspace in ("all", "targets", "lora"):
        return
    found = _LAST.fullmatch(subspace)
    if not found or int(found[1]) == 0 or (found[2] and int(found[1]) > 100):
        raise UsageError(
            f"unknown subspace {subspace!r}: use all, targets, lora, last:K with K layers (last:2), or last:P% with a share "
            "of the layers from 1 to 100 (last:25%)"
        )


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks. Raises ModelError if they cannot be found."""
    wanted = getattr(text_config(model), "num_hidden_layers", None)
    lists = {name: m for name, m in modules_by_name(model).items() if isinstance(m, nn.ModuleList) and len(m) == wanted}
    if not lists:
        raise ModelError(
            f"the decoder layers of {type(model).__name__} could not be found, and the subspace last:k and methods that read "
            "hidden states need them: use the subspace all or lora, or the selector fihs"
        )
    return min(lists.items(), key=lambda item: item[0].count("."))


def parameter_names(model: nn.Module, subspace: str, targets: Sequence[str] = ()) -> list[str]:
    """Names of the subspace's parameters; ``model`` must already hold its adapter when the subspace is ``lora``.

    ``targets`` are those of `target_names`. Raises UsageError for an unknown subspace, and for one with weights that have no
    gradient (4 or 8 bits); ModelError if the model has no such parameters.
    """
    check_subspace(subspace)
    found = dict(model.named_parameters())
    if subspace == "all":
        names = list(found)
    elif subspace == "targets":
        names = [name for name in found if name in set(targets)]
    elif subspace == "lora":
        names = [name for name in found if _is_adapter(name)]
    else:
        names = _last(model, subspace, found)
    if subspace == "targets" and not targets:
        raise UsageError(
            "the subspace targets needs the peft_config that says which weights training will change: give it "
            "(--lora-config FILE), or use the subspace all"
        )
    if subspace == "lora" and not names:
        raise ModelError(
            "the subspace lora got a model without an adapter: give the peft_config that training will use "
            "(--lora-config FILE), or use the subspace all"
        )
    if whole := [name for name in names if not found[name].is_floating_point()]:
        raise UsageError(
            f"the subspace {subspace} has {len(whole)} weights in {found[whole[0]].dtype} ({whole[0]}, …), which have no "
            "gradient: score the adapter that will be trained on them (--subspace lora --lora-config FILE)"
        )
    return names


def _last(model: nn.Module, subspace: str, names: Iterable[str]) -> list[str]:
    """The parameters of the last decoder layers, then of the norms that their output goes through."""
    prefix, layers = decoder_layers(model)
    found = _LAST.fullmatch(subspace)
    assert found is not None  # check_subspace
    count = max(1, round(len(layers) * int(found[1]) / 100)) if found[2] else int(found[1])
    if count > len(layers):
        raise UsageError(
            f"the subspace {subspace} asks for {count} layers, but the model has {len(layers)}: ask for fewer"
        )
    kept = tuple(f"{prefix}.{i}." for i in range(len(layers) - count, len(layers)))
    # Norms next to the list of layers. An embedding norm comes before it (BLOOM); LFM2's final norm is named like one.
    parent, _, own = prefix.rpartition(".")
    siblings = list(model.get_submodule(parent).named_children())
    place = [name for name, _ in siblings].index(own)
    final = {
        f"{parent}.{name}" if parent else name
        for i, (name, child) in enumerate(siblings)
        if "norm" in type(child).__name__.lower() and ("embed" not in name or i > place)
    }
    return [name for name in names if name.startswith(kept)] + [n for n in names if n.rpartition(".")[0] in final]


def target_names(model: nn.Module, peft_config: PeftConfig | None, saved: bool = False) -> list[str]:
    """Names, in ``model``, of the weights that an adapter changes: the one it carries, or the one of ``peft_config``.

    With ``saved`` also those of its ``modules_to_save``, which are trained in full.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    with adapted(model, peft_config, seed=0) as carrying:
        inside = [name for name, _ in carrying.named_parameters() if ".base_layer." in name and not _is_adapter(name)]
        acting = ".modules_to_save." if carrying is model else ".original_module."  # PEFT trains a copy
        whole = {id(p) for name, p in carrying.named_parameters(remove_duplicate=False) if acting in name}
    if carrying is not model:
        inside = [plain_name(name) for name in inside]
    return inside + ([name for key, name in own.items() if key in whole] if saved else [])


def plain_name(name: str) -> str:
    """A parameter's name in the model without its adapter; those of two weights of one layer (fused experts) are nested."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name.removeprefix("base_model.model."))


def _is_adapter(name: str) -> bool:
    return bool(re.search(r"(^|\.)((lora|ia3|hada|lokr|vera|oft|boft)_|modules_to_save(\.|$))", name))


@contextmanager
def _restored(model: nn.Module, moved: bool) -> Iterator[None]:
    """Restores each module's children, parameters, hooks and attributes, and each parameter's flag and storage.

    With ``moved`` the weights are copied first, since the adapter's initialisation writes into them.
    """
    modules = [
        (m, dict(vars(m)), {k: v.copy() for k, v in vars(m).items() if isinstance(v, dict)}) for m in model.modules()
    ]
    parameters = [(p, p.requires_grad, p.data, p.data.clone() if moved else None) for p in model.parameters()]
    try:
        yield
    finally:
        for module, attributes, inner in modules:
            for name, entries in inner.items():
                attributes[name].clear()
                attributes[name].update(entries)
            vars(module).clear()
            vars(module).update(attributes)
        for parameter, flag, data, copy in parameters:
            parameter.data = data if copy is None else data.copy_(copy)
            parameter.requires_grad_(flag)


@contextmanager
def adapted(model: nn.Module, peft_config: PeftConfig | None, seed: int) -> Iterator[nn.Module]:
    """The model with the adapter that training will add, initialised under ``seed``; removed at the end.

    A PeftModel is used unchanged, and so is any model if ``peft_config`` is None. Afterwards every module and parameter of the
    caller's model is the same object with the same bytes, and the configuration is unchanged.
    """
    if peft_config is None or hasattr(model, "peft_config"):
        yield model
        return
    from peft import get_peft_model

    # PiSSA, OLoRA and similar initialisations subtract the adapter from the weights.
    moved = getattr(peft_config, "init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "mica")
    with _restored(model, moved):
        gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=gpus):  # the caller's generators stay as they are
            torch.default_generator.manual_seed(seed)
            if gpus:
                torch.cuda.manual_seed_all(seed)
            wrapped = get_peft_model(model, deepcopy(peft_config))  # type: ignore[arg-type]
        yield wrapped
