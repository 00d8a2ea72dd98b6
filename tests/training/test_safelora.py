"""SafeLoRA: the cosine from thin factors, and what the merged weights are afterwards."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradshield.errors import UsageError
from gradshield.gradients import target_names
from gradshield.gradients.alignment import Alignment, alignment
from gradshield.training.asft import published
from gradshield.training.safelora import cosine, cosine_full, project
from tests.tiny import tiny_model

LORA = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")


def noisy(model: nn.Module, size: float, seed: int, only: str = "") -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def trained(arch: str = "llama", config: Any = LORA) -> tuple[nn.Module, Any, Alignment]:
    """The aligned model, the same after training with an adapter, and the direction."""
    base = tiny_model(arch)
    aligned = noisy(copy.deepcopy(base), 0.05, 1)
    direction = alignment(aligned, base, target_names(base, config))
    model = noisy(peft.get_peft_model(copy.deepcopy(aligned), copy.deepcopy(config)), 0.1, 2, "lora_B")
    return aligned, model, direction


def dense(v: Tensor, delta: Tensor) -> tuple[Tensor, float]:
    """C ΔW and its cosine with ΔW, by their definitions in float64."""
    v, delta = v.double(), delta.double()
    moved = (v @ v.T / v.norm()) @ delta
    return moved, float(torch.cosine_similarity(moved.flatten(), delta.flatten(), dim=0))


def merged(model: Any) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in copy.deepcopy(model).merge_and_unload().named_parameters()}


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**31 - 1), st.floats(1e-3, 10))
def test_the_cosine_from_thin_factors_is_the_dense_one(d: int, k: int, r: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    v, b, a = (torch.randn(s, generator=generator) for s in ((d, k), (d, r), (r, k)))
    _, slow = dense(size * v, b @ a)
    operator = published(size * v)
    assert cosine(b, a, operator) == pytest.approx(slow, abs=1e-5)
    assert cosine_full(b @ a, operator) == pytest.approx(slow, abs=1e-5)


def test_nothing_has_no_cosine() -> None:
    assert cosine(torch.zeros(4, 2), torch.ones(2, 3), published(torch.ones(4, 3))) is None
    assert cosine(torch.ones(4, 2), torch.ones(2, 3), published(torch.zeros(4, 3))) is None
    assert cosine_full(torch.ones(4, 3), published(torch.zeros(4, 3))) is None


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_the_merged_weights_are_those_of_the_formula(arch: str) -> None:
    aligned, model, direction = trained(arch)
    before, after_training = dict(aligned.named_parameters()), merged(model)
    expected, cosines = {}, {}
    for name, v in direction.items():
        delta = (after_training[name] - before[name]).detach()
        moved, cosines[name] = dense(v, delta.T if arch == "gpt2" else delta)
        expected[name] = before[name].detach().double() + (moved.T if arch == "gpt2" else moved)
    ordered = sorted(cosines, key=lambda name: cosines[name])
    count = len(ordered) // 2
    threshold = (cosines[ordered[count - 1]] + cosines[ordered[count]]) / 2
    record = project(model, direction, threshold)
    assert set(record.projected) == set(ordered[:count])
    assert record.cosines == pytest.approx(cosines, abs=1e-5)
    for name, weight in merged(model).items():
        if name in record.projected:
            assert torch.allclose(weight.double(), expected[name], atol=1e-5), name
            assert not torch.allclose(weight, after_training[name], atol=1e-3)
        else:
            assert torch.equal(weight, after_training[name]), name
    assert json.loads(json.dumps(asdict(record)))["cosines"] == record.cosines


def test_the_rank_stays() -> None:
    _, model, direction = trained()
    ranks = {n: p.shape for n, p in model.named_parameters()}
    project(model, direction, threshold=1.0)
    assert {n: p.shape for n, p in model.named_parameters()} == ranks


def test_two_adapters_are_projected_together() -> None:
    _, model, direction = trained()
    model.add_adapter("second", copy.deepcopy(LORA))
    noisy(model, 0.1, 5, "lora_B.second")
    model.base_model.set_adapter(["default", "second"])

    def change(layer: Any) -> Tensor:
        return sum(layer.get_delta_weight(n).detach().double() for n in ("default", "second"))

    layers = {
        n.removeprefix("base_model.model.") + ".weight": m
        for n, m in model.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    wanted = {name: dense(v, change(layers[name])) for name, v in direction.items()}
    record = project(model, direction, threshold=1.0)
    for name, (moved, value) in wanted.items():
        assert record.cosines[name] == pytest.approx(value, abs=1e-5)
        assert torch.allclose(change(layers[name]), moved, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_without_an_adapter_the_start_says_what_changed(arch: str) -> None:
    start, _, direction = trained(arch)
    model = noisy(copy.deepcopy(start), 0.02, 7)
    before, after_training = (
        dict(start.named_parameters()),
        {n: p.detach().clone() for n, p in model.named_parameters()},
    )
    threshold = sorted(project(copy.deepcopy(model), direction, -1.0, start).cosines.values())[3]
    record = project(model, direction, threshold, start)
    assert len(record.projected) == 3
    for name, p in model.named_parameters():
        if name not in record.projected:
            assert torch.equal(p, after_training[name])
            continue
        delta = (after_training[name] - before[name]).detach()
        moved, value = dense(direction[name], delta.T if arch == "gpt2" else delta)
        assert torch.allclose(p.double(), before[name].double() + (moved.T if arch == "gpt2" else moved), atol=1e-5)
        assert record.cosines[name] == pytest.approx(value, abs=1e-5)


def test_a_layer_that_did_not_move_or_has_no_direction_is_left_alone() -> None:
    _, model, direction = trained()
    first, second = list(direction)[:2]
    tensors = {**direction, first: torch.zeros_like(direction[first])}
    with torch.no_grad():
        model.get_submodule("base_model.model." + second.removesuffix(".weight")).lora_B["default"].weight.zero_()
    kept = merged(model)
    record = project(model, tensors, threshold=1.0)
    assert record.cosines[first] is None and record.cosines[second] is None
    assert set(record.projected) == set(tensors) - {first, second}
    assert torch.equal(merged(model)[first], kept[first])


def test_settings_and_models_are_checked() -> None:
    aligned, model, direction = trained()
    with pytest.raises(UsageError, match=r"start=\)"):
        project(aligned, direction, 0.5)
    with pytest.raises(UsageError, match="no such weight"):
        project(aligned, direction, 0.5, start=tiny_model("gpt2"))
    model.merge_adapter()
    with pytest.raises(UsageError, match="before merging"):
        project(model, direction, 0.5)
