"""LoRA layers by their mathematics, against the factors as PEFT runs them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gradshield.gradients import ENGINES, Loop, adapted, agreement
from gradshield.gradients.perturbation import lora_of
from tests.contracts.common import batch_of, case, differences, lora, rows, state, two_directions
from tests.tiny import tiny_model

BATCH = batch_of(rows())
ERROR = {"finite-difference": 1e-2, "perturbation": 1e-4, "forward": 1e-4}


def as_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradshield.gradients.perturbation.lora_of", lambda layer: None)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2_moe"])
def test_a_layer_without_its_adapter_is_its_factors(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with case(arch, "lora", "all-linear") as known:
        engine = ENGINES["perturbation"]()
        before = state(known.model)
        found = engine.directional(known.model, known.batch, known.direction)
        assert differences(before, state(known.model)) == []
        as_factors(monkeypatch)
        slow = engine.directional(known.model, known.batch, known.direction)
        gap = (found.values - slow.values).norm() / slow.values.norm()
        assert 0 < gap <= 1e-5  # the same numbers by another way
        torch.testing.assert_close(found.nll, slow.nll, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", list(ERROR))
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_adapter_that_was_trained_moves_in_both_factors(name: str, arch: str) -> None:
    with adapted(tiny_model(arch), lora(arch, use_rslora=True), seed=1) as model:
        with torch.no_grad(), torch.random.fork_rng():
            for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
                parameter.normal_(std=0.1)
        direction = two_directions(model, "lora")
        assert any("lora_A" in n for n in direction.tensors) and any("lora_B" in n for n in direction.tensors)
        before = state(model)
        found = ENGINES[name]().directional(model, BATCH, direction)
        assert differences(before, state(model)) == []
        sums = found.values.sum(-1) if ENGINES[name].per_token else found.values
        oracle = Loop().directional(model, BATCH, direction).values
        assert agreement(name, sums.numpy().ravel(), oracle.numpy().ravel()).relative_error <= ERROR[name]


def _layers(config: LoraConfig) -> list[nn.Module]:
    model = get_peft_model(tiny_model("llama"), config)
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def test_only_a_plain_adapter_is_taken_apart() -> None:
    plain = _layers(lora("llama"))
    assert plain and all(lora_of(layer) is not None for layer in plain)
    assert lora_of(plain[0]).scale == plain[0].scaling["default"]  # type: ignore[union-attr]
    for more in ({"use_dora": True}, {"lora_bias": True}):
        assert all(lora_of(layer) is None for layer in _layers(lora("llama", **more)))
    layer: Any = plain[0]
    layer.enable_adapters(False)
    assert lora_of(layer) is None
    assert lora_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize(("name", "at"), [("finite-difference", 1), ("finite-difference", 2), ("perturbation", 1)])
def test_an_error_inside_an_adapters_layer_leaves_nothing_behind(name: str, at: int) -> None:
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt

    with case("llama", "lora") as known:
        layer = known.model.base_model.model.model.layers[1].self_attn.q_proj
        layer.base_layer.register_forward_hook(interrupt)
        engine, before = ENGINES[name](), state(known.model)
        with pytest.raises(KeyboardInterrupt):
            engine.directional(known.model, known.batch, known.direction)
        assert differences(before, state(known.model)) == []
