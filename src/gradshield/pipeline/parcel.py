"""The scored model on its way to another process: where it can be loaded from, or a copy of its weights in safetensors.

No pickle is written. What arrives is compared with what was sent, bit for bit, before anything is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from gradshield.errors import ModelError, UsageError
from gradshield.files import replacing
from gradshield.gradients import adapted
from gradshield.models import LoadedModel, ModelSource, first_line, parameters_digest
from gradshield.selectors import Selector

if TYPE_CHECKING:
    from peft import PeftConfig

LIBRARIES = ("accelerate", "peft", "transformers")  # their hooks on a model change none of its numbers
CONFIG, WEIGHTS = "config.json", "weights.safetensors"


@dataclass(frozen=True)
class Parcel:
    """How another process comes to the model that is scored: from ``source``, or from the files of the folder ``copy``.

    ``adapter`` is the PEFT config of the adapter that a scan puts on a loaded model, initialised under ``seed``.
    ``digest`` is the SHA-256 of all its parameters.
    """

    source: ModelSource | None
    copy: str | None
    adapter: PeftConfig | None
    seed: int
    digest: str

    @contextmanager
    def open(self, device: str) -> Iterator[nn.Module]:
        """The model on a device. Raises ModelError where it is not, bit for bit, what was sent."""
        if self.source is None:
            assert self.copy is not None
            given = _rebuilt(Path(self.copy), device)
        else:
            given = self.source.load(device).model
        with adapted(given, self.adapter, self.seed) as model:
            if parameters_digest(model) != self.digest:
                raise ModelError(
                    f"the model that another process built from {self.source.name if self.source else 'its copy'} is not "
                    "the one that is scored: leave its files alone while a scan runs, or scan in one process (--workers 1)"
                )
            yield model


@dataclass(frozen=True, eq=False)
class Origin:
    """The model that is scored, and how it came to be: all that `pack` needs."""

    loaded: LoadedModel
    model: nn.Module
    adapter: PeftConfig | None
    seed: int

    def pack(self, folder: Path | None) -> Parcel:
        """The model for other processes; one that the caller gave as an object is copied into ``folder``.

        Raises UsageError where it would have to be copied and there is no folder, or where it cannot be built again.
        """
        _check_plain(self.model)
        digest = parameters_digest(self.model)
        if self.loaded.source is not None:
            return Parcel(self.loaded.source, None, self.adapter, self.seed, digest)
        if folder is None:
            raise UsageError(
                "the model was given as an object, which other machines do not have: save it with save_pretrained where all "
                "of them can read it, and give its path or hub name"
            )
        _copy(self.model, folder)
        return Parcel(None, str(folder), None, self.seed, digest)


def bare(selector: Selector) -> Selector:
    """The selector with what `measure` needs and no more, so that it can travel: a probe may be a caller's own function.

    Raises UsageError for one that asks a model of its own.
    """
    if not selector.travels:
        raise UsageError(
            f"the selector {selector.name} asks something else than the model that is scored, and gains nothing from other "
            "processes: leave out --workers and --ray"
        )
    found = copy(selector)
    for name in ("probe", "requests", "aggregate", "references"):  # what prepare and finish read
        if hasattr(found, name):
            setattr(found, name, None)
    return found


def _check_plain(model: nn.Module) -> None:
    """Raises UsageError where code of the caller's own changes what a module does: no config and no weight tells of it."""
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if not all(_of_a_library(hook) for some in hooks for hook in some.values()):
            what = "a hook"
        elif not _runs_its_class(module):
            what = "a forward that is not its class's"
        else:
            continue
        raise UsageError(
            f"the model has {what} at {name or 'its top'!r}, which other processes cannot be given: take it off, or leave out "
            "--workers and --ray"
        )


def _of_a_library(hook: Any) -> bool:
    made = getattr(hook, "func", hook)  # of a partial
    return str(getattr(made, "__module__", "")).partition(".")[0] in LIBRARIES


def _runs_its_class(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, apart from accelerate's, which moves what goes in and out between devices."""
    own = vars(module)
    given, around = own.get("forward"), own.get("_hf_hook")
    if around is not None and all(_of_a_library(type(hook)) for hook in getattr(around, "hooks", (around,))):
        given = own.get("_old_forward")
    return given is None or getattr(given, "__func__", None) is type(module).forward


def _classes(model: nn.Module) -> dict[str, str]:
    return {name: f"{type(m).__module__}.{type(m).__qualname__}" for name, m in model.named_modules()}


def _copy(model: Any, folder: Path) -> None:
    """Config, adapters and every tensor, by name."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_file"):
        raise UsageError(
            f"the model is a {type(model).__name__} without a transformers config, which other processes cannot build: leave "
            "out --workers, or give a causal LM of transformers"
        )
    config.to_json_file(folder / CONFIG, use_diff=False)
    adapters = getattr(model, "peft_config", {})
    for number, adapter in enumerate(adapters.values()):
        (folder / str(number)).mkdir()
        adapter.save_pretrained(folder / str(number))
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in found.items()}
    meta = {
        "attention": str(getattr(config, "_attn_implementation", None) or "eager"),
        "adapters": json.dumps(list(adapters)),
        "active": json.dumps(list(_active(model)) if adapters else []),
        "wrapped": "yes" if _is_peft_model(model) else "",
        "classes": json.dumps(_classes(model)),
    }
    with replacing(folder / WEIGHTS) as part:
        save_file(whole, part, meta)


def _rebuilt(folder: Path, device: str) -> nn.Module:
    """The model of `_copy`: built from its config, then given every tensor.

    Raises UsageError where the tensors' names or the modules' classes differ.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        meta, names = file.metadata(), set(file.keys())
        try:
            config = AutoConfig.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=meta["attention"])
            model = _with_adapters(model, folder, meta)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise UsageError(
                f"the model cannot be built in another process ({first_line(error)}): save it with save_pretrained, and give "
                "its path"
            ) from error
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        if set(own) != names:
            raise UsageError(
                f"the model cannot be built again from its config ({len(set(own) ^ names)} names of tensors differ): save it "
                "with save_pretrained, and give its path"
            )
        built = _classes(model)
        for name, given in json.loads(meta["classes"]).items():
            if built.get(name) != given:
                raise UsageError(
                    f"the model has a {given} at {name or 'its top'!r}, where its config gives a {built.get(name)}, which "
                    "other processes cannot be given: leave out --workers, or give a model of transformers as it is"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                # Memory of its own: a mapped file is aligned otherwise, and kernels round by alignment.
                tensor.data = file.get_tensor(name).clone()
    return model.to(device).eval()  # type: ignore[no-any-return]


def _with_adapters(model: Any, folder: Path, meta: dict[str, str]) -> Any:
    from peft import PeftConfig, get_peft_model

    for number, name in enumerate(json.loads(meta["adapters"])):
        config = PeftConfig.from_pretrained(str(folder / str(number)))
        if not meta["wrapped"]:
            model.add_adapter(config, name)
        elif hasattr(model, "peft_config"):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, name)
    if active := json.loads(meta["active"]):
        model.set_adapter(active if len(active) > 1 else active[0])
    return model


def _is_peft_model(model: nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _active(model: Any) -> list[str]:
    active = model.active_adapters
    return list(active() if callable(active) else active)
