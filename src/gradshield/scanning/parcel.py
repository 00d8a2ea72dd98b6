"""Transfer of the scored model to another process: loaded again from its source, or sent as an object.

The receiver compares the model with the one that was sent before it measures anything. Nothing is written to a file, and only
the model files of `models.loading.load` are read.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradshield.errors import ModelError, UsageError, first_line
from gradshield.gradients import adapted
from gradshield.models.loading import LoadedModel, ModelSource, parameters_digest
from gradshield.selectors import Selector

if TYPE_CHECKING:
    from peft import PeftConfig

LIBRARIES = ("accelerate.", "peft.", "transformers.")  # their hooks do not change a model's numbers


@dataclass(frozen=True, eq=False)
class Parcel:
    """The scored model for another process: from ``source``, or as ``model``.

    ``adapter`` is the PEFT config of the adapter that a scan adds to a loaded model, initialised under ``seed``.
    ``identity`` is that of the model with its adapter.
    """

    source: ModelSource | None
    model: nn.Module | None
    adapter: PeftConfig | None
    seed: int
    identity: str

    @contextmanager
    def open(self, device: str) -> Iterator[nn.Module]:
        """The model on a device. Raises ModelError if it is not bit-identical to the scored one."""
        given = self.model if self.source is None else self.source.load(device).model
        assert given is not None
        with adapted(given, self.adapter, self.seed) as model:
            if identity(model) != self.identity:
                origin = self.source.name if self.source else "a copy"
                raise ModelError(
                    f"the model that another process loaded from {origin} is not the scored one (its weights, attention, classes "
                    "or hooks differ): do not change its files while a scan runs, give a changed model as an object "
                    "(model=loaded.model, tokenizer=...), or leave out --workers and --ray"
                )
            yield model


@dataclass(frozen=True, eq=False)
class Origin:
    """The scored model and its origin: the inputs of `pack`."""

    loaded: LoadedModel
    model: nn.Module
    adapter: PeftConfig | None
    seed: int

    def pack(self) -> np.ndarray:
        """The `Parcel`, packed. Raises UsageError for a model that cannot be sent to another process."""
        devices = {str(parameter.device) for parameter in self.model.parameters()}
        if len(devices) > 1:
            raise UsageError(
                f"the model is spread over {len(devices)} devices ({', '.join(sorted(devices))}), and every worker needs its own "
                "device: leave out --workers and --ray, or --device-map"
            )
        source = self.loaded.source
        if source is not None:
            return packed(Parcel(source, None, self.adapter, self.seed, identity(self.model)))
        odd = sorted({type(parameter).__name__ for parameter in self.model.parameters()} - {"Parameter"})
        if odd:
            raise UsageError(
                f"the model in memory has weights of the type {odd[0]}, which cannot be sent to another process: give the "
                "path or hub name of the model (with --quantize if it is quantized), or leave out --workers and --ray"
            )
        return packed(Parcel(None, self.model, None, self.seed, identity(self.model)))


def packed(thing: Any) -> np.ndarray:
    """An object as bytes (N,), including tensors and the caller's own functions and classes.

    Raises UsageError if it cannot be pickled.
    """
    from ray import cloudpickle

    buffer = io.BytesIO()
    try:
        torch.save(thing, buffer, pickle_module=cloudpickle)
    except (TypeError, AttributeError, pickle.PicklingError, RuntimeError) as error:
        raise UsageError(
            f"the model or the selector cannot be sent to another process ({first_line(error)}): save the model with "
            "save_pretrained and give its path, or leave out --workers and --ray"
        ) from error
    return np.frombuffer(buffer.getbuffer(), np.uint8)


def unpacked(data: np.ndarray, device: str) -> Any:
    """The inverse of `packed`, tensors on a device. Raises UsageError if code that it needs is not installed here."""
    try:
        return torch.load(io.BytesIO(data.data), device, weights_only=False)  # never from a file
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the model or the selector needs code that another process does not have ({first_line(error)}): install it on "
            "every node, or leave out --workers and --ray"
        ) from error


def identity(model: nn.Module) -> str:
    """SHA-256 of everything that determines a model's numbers: its parameters, its attention, and the code of each module.

    Hooks of accelerate, PEFT and transformers do not change numbers and are ignored.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    sha = hashlib.sha256(f"{parameters_digest(model)} {attention}\n".encode())
    for name, module in model.named_modules():
        sha.update(f"{name} {_named(type(module))} {_added(module)}\n".encode())
    return sha.hexdigest()


def _added(module: nn.Module) -> list[str]:
    """The names of code that runs in a module in addition to its class: the caller's hooks, and a replaced forward."""
    own = vars(module)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    found = [hook for some in hooks for hook in some.values()]
    forward, around = own.get("forward"), own.get("_hf_hook")
    if around is not None:  # accelerate's, which moves inputs and outputs between devices
        forward = own.get("_old_forward")
        found += map(type, getattr(around, "hooks", (around,)))
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        found.append(forward)
    return [name for name in map(_named, found) if not name.startswith(LIBRARIES)]


def _named(thing: Any) -> str:
    made = getattr(thing, "func", thing)  # of a partial
    made = made if hasattr(made, "__qualname__") else type(made)
    return f"{made.__module__}.{made.__qualname__}"


def bare(selector: Selector) -> Selector:
    """The selector with only what `measure` needs: a probe may hold a model.

    Raises UsageError for one that uses another model.
    """
    if not selector.travels:
        raise UsageError(
            f"the selector {selector.name} does not measure with the scored model, so more processes do not help: leave out "
            "--workers and --ray"
        )
    found = copy(selector)
    for name in ("probe", "requests", "aggregate", "references"):  # what prepare and finish read
        if hasattr(found, name):
            setattr(found, name, None)
    return found
