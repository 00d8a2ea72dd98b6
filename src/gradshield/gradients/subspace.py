"""Which parameters count: all of them, the adapter that will be trained, or the last layers.

``all``      every parameter.
``lora``     the LoRA (or other PEFT) adapter that the training will add, at its seeded initialisation.
``last:k``   the last k decoder layers and the final norm; ``last:25%`` takes that share of the layers, at least one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from gradshield.errors import ModelError, UsageError

if TYPE_CHECKING:
    from peft import PeftConfig

SUBSPACES = {
    "all": "every parameter of the model",
    "lora": "the adapter that will be trained, at its seeded initialisation",
    "last:k": "the last k decoder layers (last:2) or a share of them (last:25%), and the final norm",
}
_LAST = re.compile(r"last:(\d+)(%?)")


def check_subspace(subspace: str) -> None:
    """Raises UsageError when the name is none of SUBSPACES."""
    if subspace in ("all", "lora"):
        return
    found = _LAST.fullmatch(subspace)
    if not found or int(found[1]) == 0 or (found[2] and int(found[1]) > 100):
        raise UsageError(
            f"unknown subspace {subspace!r}: use all, lora, last:K with K layers (last:2), or last:P% with a share of the "
            "layers from 1 to 100 (last:25%)"
        )


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's blocks. Raises ModelError when they cannot be told."""
    wanted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not lists:
        raise ModelError(
            f"the decoder layers of {type(model).__name__} could not be found, and the subspace last:k needs them: "
            "use the subspace all or lora"
        )
    return min(lists, key=lambda item: item[0].count("."))


def parameter_names(model: nn.Module, subspace: str) -> list[str]:
    """Names of the subspace's parameters; ``model`` must already hold its adapter when the subspace is ``lora``.

    Raises UsageError for an unknown subspace and ModelError when the model has no such parameters.
    """
    check_subspace(subspace)
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    if subspace == "all":
        return names
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
    parent = prefix.rpartition(".")[0]
    norms = [name for name in names if name.rpartition(".")[0] in _final_norms(model, parent)]
    return [name for name in names if any(name.startswith(k) for k in kept)] + norms


def _final_norms(model: nn.Module, parent: str) -> set[str]:
    """Names of the norms that stand beside the list of layers: what the last layer's output goes through."""
    holder = model.get_submodule(parent)
    return {
        f"{parent}.{name}" if parent else name
        for name, child in holder.named_children()
        if "norm" in type(child).__name__.lower() and "embed" not in name
    }


def _is_adapter(name: str) -> bool:
    return any(
        part.startswith(("lora_", "ia3_", "hada_", "lokr_", "vera_", "oft_", "boft_")) for part in name.split(".")
    )


@contextmanager
def adapted(model: nn.Module, peft_config: PeftConfig | None, seed: int) -> Iterator[nn.Module]:
    """The model with the adapter that training will add, initialised under ``seed``; taken out again at the end.

    A model that already carries an adapter (a PeftModel) is used as it is, and so is any model when ``peft_config`` is
    None. Afterwards every module and parameter of the caller's model is the object it was before.
    """
    if peft_config is None or hasattr(model, "peft_config"):
        yield model
        return
    from peft import get_peft_model

    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped = None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        yield wrapped
    finally:
        if wrapped is not None:
            wrapped.unload()  # type: ignore[operator]
            if hasattr(model, "peft_config"):
                del model.peft_config
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
