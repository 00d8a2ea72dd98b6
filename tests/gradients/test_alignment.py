"""V = W_aligned - W_base: its orientation, its file, its spectrum, and what it refuses."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.errors import ModelError, UsageError
from gradshield.gradients import target_names
from gradshield.gradients.alignment import alignment, largest_eigenvalue, leading, plain_name
from tests.tiny import tiny_model

LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def perturbed(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    aligned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in aligned.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return aligned


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gemma", "phi"])
def test_an_update_of_the_adapter_adds_to_v_as_it_is(arch: str) -> None:
    """Train B A = V exactly, by full rank factors: the merged base model is the aligned one, whatever the layer's orientation."""
    base = tiny_model(arch)
    aligned = perturbed(base)
    found = alignment(aligned, base, target_names(base, LORA))
    assert found and all(v.ndim == 2 and v.dtype == torch.float32 for v in found.values())
    rank = max(max(v.shape) for v in found.values())
    wide = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    carrying = peft.get_peft_model(copy.deepcopy(base), wide)
    with torch.no_grad():
        for name, module in carrying.named_modules():
            if hasattr(module, "lora_A") and len(module.lora_A):
                v = found[plain_name(f"{name}.weight")]
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                a.zero_()
                b.zero_()
                a[: v.shape[1]] = torch.eye(v.shape[1])
                b[:, : v.shape[1]] = v / 2
    merged = dict(carrying.merge_and_unload().named_parameters())
    for name, parameter in aligned.named_parameters():
        if name in found:
            assert torch.allclose(merged[name], parameter, atol=1e-6), name


def test_gpt2_keeps_its_matrices_the_other_way_round() -> None:
    base = tiny_model("gpt2")
    aligned = perturbed(base)
    found = alignment(aligned, base, target_names(base, LORA))
    name = "transformer.h.0.attn.c_attn.weight"
    kept = dict(aligned.named_parameters())[name] - dict(base.named_parameters())[name]
    assert kept.shape == (64, 192)
    assert found[name].shape == (192, 64)
    assert torch.equal(found[name], kept.detach().T)
    assert not any(name.endswith("bias") for name in found)


def test_names_of_a_model_with_its_adapter_are_those_of_the_plain_one() -> None:
    base = tiny_model("llama")
    aligned = perturbed(base)
    plain = alignment(aligned, base, target_names(base, LORA))
    carrying = peft.get_peft_model(copy.deepcopy(aligned), copy.deepcopy(LORA))
    other = alignment(carrying, base, target_names(carrying, None))
    assert other.keys() == plain.keys()
    assert all(torch.equal(other[name], v) for name, v in plain.items())


def test_a_weight_that_alignment_left_alone_is_reported() -> None:
    base = tiny_model("llama")
    names = target_names(base, LORA)
    aligned = perturbed(base)
    with torch.no_grad():
        dict(aligned.named_parameters())[names[3]].copy_(dict(base.named_parameters())[names[3]])
    found = alignment(aligned, base, names)
    assert [name for name, v in found.items() if not v.any()] == [names[3]]


def test_what_has_no_direction_is_refused() -> None:
    base = tiny_model("llama")
    names = target_names(base, LORA)
    with pytest.raises(UsageError, match=r"identical in all 14 weights.*before its alignment"):
        alignment(copy.deepcopy(base), base, names)
    with pytest.raises(UsageError, match="there is no weight matrix"):
        alignment(perturbed(base), base, ["model.norm.weight"])
    with pytest.raises(ModelError, match=r"the base model has no weight model\.layers\.0"):
        alignment(perturbed(base), tiny_model("gpt2"), names)
    with pytest.raises(ModelError, match="belongs to a Embedding"):
        alignment(perturbed(base), base, ["model.embed_tokens.weight"])
    experts = tiny_model("mixtral")
    fused = [name for name, p in experts.named_parameters() if p.ndim == 3]
    with pytest.raises(ModelError, match="fused experts out of"):
        alignment(perturbed(experts), experts, fused)
    other = copy.deepcopy(base)
    other.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 100, bias=False)
    with pytest.raises(
        ModelError, match=r"up_proj.weight has shape \(128, 64\) in the aligned.*\(100, 64\) in the base"
    ):
        alignment(perturbed(base), other, names)
    broken = perturbed(base)
    with torch.no_grad():
        dict(broken.named_parameters())[names[0]][0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        alignment(broken, base, names)
    packed = copy.deepcopy(base)
    packed.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(128, 64, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ModelError, match="quantised"):
        alignment(packed, base, names)


def test_half_precision_is_subtracted_in_float32() -> None:
    base = tiny_model("llama")
    low = copy.deepcopy(base).to(torch.bfloat16)
    found = alignment(base, low, target_names(base, LORA))
    for name, v in found.items():
        exact = dict(base.named_parameters())[name] - dict(low.named_parameters())[name].float()
        assert torch.equal(v, exact.detach())


# ---- the spectrum ---------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**31 - 1))


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_the_largest_eigenvalue_is_that_of_the_operator(shape: tuple[int, int, int]) -> None:
    d, k, seed = shape
    v = torch.randn(d, k, generator=torch.Generator().manual_seed(seed))
    dense = (v.double() @ v.double().T) / v.double().norm()
    assert largest_eigenvalue(v) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-9)


def test_large_directions_are_seen_to_be_punished() -> None:
    assert largest_eigenvalue(torch.diag(torch.tensor([3.0, 4.0]))) == pytest.approx(16 / 5)
    assert largest_eigenvalue(torch.zeros(2, 3)) == 0


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.05, 1))
def test_leading_directions_are_the_fewest_that_hold_the_energy(shape: tuple[int, int, int], energy: float) -> None:
    d, k, seed = shape
    v = torch.randn(d, k, generator=torch.Generator().manual_seed(seed))
    basis = leading(v, energy).double()
    q = basis.shape[1]
    assert torch.allclose(basis.T @ basis, torch.eye(q, dtype=torch.float64), atol=1e-5)
    squares = torch.linalg.svdvals(v.double()).square()
    total = float(squares.sum())
    assert float((basis.T @ v.double()).square().sum()) >= energy * total * (1 - 1e-5)
    assert float((basis.T @ v.double()).square().sum()) == pytest.approx(float(squares[:q].sum()), rel=1e-5)
    assert float(squares[: q - 1].sum()) < energy * total


def test_all_the_energy_is_the_rank_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(12, 3, generator=generator) @ torch.randn(3, 9, generator=generator)
    assert leading(v.double(), 1.0).shape == (12, 3)  # in float32 the rounding of the product has directions of its own
    assert leading(torch.zeros(4, 5), 1.0).shape == (4, 0)
