"""The parameter subspace to score in: all of the model, the adapter that will be trained, or the last layers.

``all``      every parameter.
``targets``  the weights that the training's adapter will change, without the adapter. A LoRA factor A is initialised at random;
             the score in the subspace ``lora``, averaged over initialisations, is proportional to this one, without the noise.
``lora``     the LoRA (or other PEFT) adapter that the training will add, at its seeded initialisation, with the modules that it
             trains in full (``modules_to_save``).
``last:k``   the last k decoder layers and the final norm; ``last:25%`` takes that share of the layers, at least one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradshield.errors import ModelError, UsageError
from gradshield.models.loading import text_config
from gradshield.models.modules import modules_by_name

if TYPE_CHECKING:
    from peft import PeftConfig

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
    lists = [
        (name, m) for name, m in modules_by_name(model).items() if isinstance(m, nn.ModuleList) and len(m) == wanted
    ]
    if not lists:
        raise ModelError(
            f"the decoder layers of {type(model).__name__} could not be found, and the subspace last:k and methods that read "
            "hidden states need them: use the subspace all or lora, or the selector fihs"
        )
    return min(lists, key=lambda item: item[0].count("."))


def parameter_names(model: nn.Module, subspace: str, targets: Sequence[str] = ()) -> list[str]:
    """Names of the subspace's parameters; ``model`` must already hold its adapter when the subspace is ``lora``.

    ``targets`` are the names from `target_names`, for the subspace of that name.

    Raises UsageError for an unknown subspace, and for one with weights that have no gradient (4 or 8 bits); ModelError if
    the model has no such parameters.
    """
    check_subspace(subspace)
    found = dict(model.named_parameters())
    names = _named(model, list(found), subspace, targets)
    if whole := [name for name in names if not found[name].is_floating_point()]:
        raise UsageError(
            f"the subspace {subspace} has {len(whole)} weights in {found[whole[0]].dtype} ({whole[0]}, …), which have no "
            "gradient: score the adapter that will be trained on them (--subspace lora --lora-config FILE)"
        )
    return names


def _named(model: nn.Module, names: list[str], subspace: str, targets: Sequence[str]) -> list[str]:
    if subspace == "all":
        return names
    if subspace == "targets":
        if not targets:
            raise UsageError(
                "the subspace targets needs the peft_config that says which weights training will change: give it "
                "(--lora-config FILE), or use the subspace all"
            )
        return [name for name in names if name in set(targets)]
    if subspace == "lora":
        chosen = [name for name in names if _is_adapter(name)]
        if not chosen:
            raise ModelError(
                "the subspace lora got a model without an adapter: give the peft_config that training will use "
                "(--lora-config FILE), or use the subspace all"
            )
        return chosen
    prefix, layers = decoder_layers(model)
    found = _LAST.fullmatch(subspace)
    assert found is not None  # check_subspace
    count = max(1, round(len(layers) * int(found[1]) / 100)) if found[2] else int(found[1])
    if count > len(layers):
        raise UsageError(
            f"the subspace {subspace} asks for {count} layers, but the model has {len(layers)}: ask for fewer"
        )
    kept = {f"{prefix}.{i}." for i in range(len(layers) - count, len(layers))}
    final = _final_norms(model, prefix)
    norms = [name for name in names if name.rpartition(".")[0] in final]
    return [name for name in names if any(name.startswith(k) for k in kept)] + norms


def _final_norms(model: nn.Module, layers: str) -> set[str]:
    """Names of the norms next to the list of layers, which the last layer's output goes through.

    An embedding norm comes before the list (BLOOM); LFM2's final norm is named like one, but comes after it.
    """
    parent, _, own = layers.rpartition(".")
    siblings = list(model.get_submodule(parent).named_children())
    place = [name for name, _ in siblings].index(own)
    return {
        f"{parent}.{name}" if parent else name
        for i, (name, child) in enumerate(siblings)
        if "norm" in type(child).__name__.lower() and ("embed" not in name or i > place)
    }


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
    """A parameter's name in the model without its adapter."""
    # Adapters of two weights of one layer (fused experts) are nested.
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name.removeprefix("base_model.model."))


def _is_adapter(name: str) -> bool:
    return any(
        part.startswith(("lora_", "ia3_", "hada_", "lokr_", "vera_", "oft_", "boft_")) or part == "modules_to_save"
        for part in name.split(".")
    )


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
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; the caller's generators, on the CPU and every GPU in use, are restored."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(gpus)):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def adapted(model: nn.Module, peft_config: PeftConfig | None, seed: int) -> Iterator[nn.Module]:
    """The model with the adapter that training will add, initialised under ``seed``; removed at the end.

    A model that already has an adapter (a PeftModel) is used unchanged, and so is any model if ``peft_config`` is None.
    Afterwards every module and parameter of the caller's model is the same object with the same bytes, and the
    configuration is unchanged.
    """
    if peft_config is None or hasattr(model, "peft_config"):
        yield model
        return
    from peft import get_peft_model

    # PiSSA, OLoRA and similar initialisations subtract the adapter from the weights.
    moved = getattr(peft_config, "init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "mica")
    with _restored(model, moved):
        with _seeded(seed):
            wrapped = get_peft_model(model, deepcopy(peft_config))  # type: ignore[arg-type]
        yield wrapped
