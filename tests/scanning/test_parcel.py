"""What another process gets of a model and a selector is what this one has, bit for bit, or it is refused."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import gradshield as gs
from gradshield.data import RenderConfig, read, render_all
from gradshield.errors import ModelError, UsageError
from gradshield.gradients import Loop, adapted
from gradshield.models import loading
from gradshield.models.loading import LoadedModel, parameters_digest
from gradshield.scanning import shards
from gradshield.scanning.preparing import asked_of
from gradshield.scanning.workers import Parcel, bare, packed, unpacked
from gradshield.selectors import (
    SELECTORS,
    Anchoring,
    Fihs,
    GradNorm,
    GuardFilter,
    Larf,
    Loss,
    Moderate,
    Random,
    Screen,
    parse_aggregate,
)
from gradshield.selectors.reading import Reading, Turn
from gradshield.types import Anchors, References
from tests.common import PROBING, chats
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

pytest.importorskip("ray", reason="needs gradshield[ray]")

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
IDS = torch.tensor([[5, 6, 7, 8]])


def sent(loaded: LoadedModel, model: Any, adapter: LoraConfig | None = None, seed: int = 0) -> Parcel:
    """The parcel as another process gets it."""
    found: Parcel = unpacked(packed(Parcel.of(loaded, model, adapter, seed)), "cpu")
    return found


def given(model: Any) -> Parcel:
    """That of a model that a caller gave as an object."""
    return sent(loading.wrap(model, tiny_tokenizer()), model)


def arrived(model: Any) -> Any:
    """The model as another process has it."""
    with given(model).open("cpu") as found:
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_is_bit_identical(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype)
    found = arrived(model)
    assert found is not model
    assert parameters_digest(found) == parameters_digest(model)
    assert torch.equal(found(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_copy_has_its_adapters(wrapped: bool) -> None:
    model: Any = tiny_model("llama")
    if wrapped:
        model = get_peft_model(model, LORA, "first")
        model.add_adapter("second", LORA)
    else:
        model.add_adapter(LORA, "first")
        model.add_adapter(LORA, "second")
    model.set_adapter("second")
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                parameter.fill_(0.01 * number)
    found = arrived(model)
    assert parameters_digest(found) == parameters_digest(model)
    assert torch.equal(found(IDS).logits, model.eval()(IDS).logits)


class _Louder(LlamaForCausalLM):
    """A caller's own model: the same config and weights, and other numbers."""

    def forward(self, *arguments: Any, **more: Any) -> Any:
        found = super().forward(*arguments, **more)
        found.logits = 2 * found.logits
        return found


class _Linear(torch.nn.Linear):
    pass


def _moved(model: Any) -> None:
    next(model.parameters()).data.add_(0.5)


def _with_other_attention(model: Any) -> None:
    model.set_attn_implementation("eager")


def _hooked(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda module, given, found: found)


def _hooked_before(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, given: None)


def _patched(model: Any) -> None:
    own = model.model.forward
    model.model.forward = lambda *arguments, **more: own(*arguments, **more)


def _patched_under_accelerate(model: Any) -> None:
    _patched(model)
    add_hook_to_module(model.model, AlignDevicesHook("cpu"))


def _hooked_by_accelerate(model: Any) -> None:
    class Own(ModelHook):
        pass

    add_hook_to_module(model.lm_head, Own())


def _of_its_own_class(model: Any) -> None:
    model.__class__ = _Louder


def _with_a_layer_of_its_own(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = _Linear


@pytest.mark.parametrize(
    "change",
    [
        _moved,
        _with_other_attention,
        _hooked,
        _hooked_before,
        _patched,
        _patched_under_accelerate,
        _hooked_by_accelerate,
        _of_its_own_class,
        _with_a_layer_of_its_own,
    ],
)
def test_a_model_changed_after_it_was_loaded_is_not_taken_for_that_of_its_folder(change: Any, folder: Path) -> None:
    loaded = loading.load(folder)
    change(loaded.model)
    parcel = sent(loaded, loaded.model)
    with pytest.raises(ModelError, match="is not the scored one"), parcel.open("cpu"):
        pass


def test_hooks_of_the_libraries_are_no_code_of_the_callers_own(folder: Path) -> None:
    loaded = loading.load(folder)
    model = loaded.model
    model.enable_input_require_grads()
    model(IDS, output_hidden_states=True)  # transformers leaves the hooks that gathered them
    for module in (model.lm_head, model.model.norm):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    remove_hook_from_module(model.lm_head)
    with sent(loaded, model).open("cpu") as found:
        assert torch.equal(found(IDS).logits, model(IDS).logits)


def test_the_adapter_of_a_loaded_model_is_made_again(folder: Path) -> None:
    loaded = loading.load(folder)
    with adapted(loaded.model, LORA, 7) as model, sent(loaded, model, LORA, 7).open("cpu") as found:
        assert parameters_digest(found) == parameters_digest(model)


class _Quantized(torch.nn.Parameter):
    pass


def test_a_model_that_cannot_travel_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.weight = _Quantized(model.lm_head.weight.data)
    with pytest.raises(UsageError, match=r"weights of the type _Quantized.*give the path or hub name"):
        given(model)
    model = tiny_model("llama")
    lock = Lock()
    model.register_forward_hook(lambda *_: lock.release())
    with pytest.raises(UsageError, match="cannot be sent to another process"):
        given(model)
    model = tiny_model("llama")
    model.lm_head.to("meta")
    with pytest.raises(UsageError, match=r"spread over 2 devices \(cpu, meta\)"):
        sent(loading.wrap(tiny_model("llama"), tiny_tokenizer()), model)


def test_every_selector_travels() -> None:
    """What `bare` leaves is all that `measure` reads."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rows = render_all(read(chats(10)).examples, tokenizer, RenderConfig(max_length=64)).rendered
    probe = gs.ScanSettings(selector="fihs").make_probe()
    asked, harmless = asked_of(tokenizer, PROBING)
    probe.fit(model, tokenizer, asked, harmless)
    known = References(harmful=tuple(rows[:4]), refused=tuple(rows[4:8]), answered=tuple(rows[4:8]))
    fihs = Fihs(lambda *_: probe(*_), asked, Loop(), parse_aggregate("sum"), "all")
    reading = Reading.fit(model, Turn.of(harmless), asked, harmless, harmless)
    made: list[Any] = [
        fihs,
        Screen(fihs, reading, tokenizer, Anchors(np.ones(20), np.zeros(20)), rendered=()),
        Moderate(),
        GradNorm(),
        Loss(),
        Random(3),
        Larf(known),
        Anchoring(known),
    ]
    assert {selector.name for selector in made} | {"guard"} == set(SELECTORS)
    for selector in made:
        direction = selector.prepare(model)
        travelled = unpacked(packed(bare(selector)), "cpu")
        assert dict(travelled.settings()) == dict(selector.settings())
        one, other = (shards.measure(s, model, direction, list(rows), 10**6) for s in (selector, travelled))
        np.testing.assert_array_equal(one.sums, other.sums)
        if selector.name == "screen":
            assert one.extra is not None and np.isfinite(one.extra).all()
            np.testing.assert_array_equal(one.extra, other.extra)
    with pytest.raises(UsageError, match="leave out --workers"):
        bare(GuardFilter(None, lambda ids: ""))  # type: ignore[arg-type]
