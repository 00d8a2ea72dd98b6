"""The AsFT penalty: thin factors against the formula as it is written, what it holds, and what it refuses."""

from __future__ import annotations

import copy
import json
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
from gradshield.training.asft import AsFT, penalty, penalty_full, published, top
from gradshield.training.inside import PENALTIES
from tests.tiny import tiny_model

LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def perturbed(model: nn.Module, seed: int = 1) -> nn.Module:
    aligned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in aligned.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return aligned


def adapted(arch: str = "llama", config: Any = LORA, away: bool = True) -> tuple[Any, Alignment]:
    """An aligned model with its adapter, away from B = 0, and the direction from a random base to it."""
    base = tiny_model(arch)
    aligned = perturbed(base)
    direction = alignment(aligned, base, target_names(base, config))
    model = peft.get_peft_model(aligned, copy.deepcopy(config))
    if away:
        moved(model)
    return model, direction


def moved(model: nn.Module, parts: tuple[str, ...] = ("lora_B",), seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in parts):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def dense_operator(v: Tensor, projector: str, energy: float) -> Tensor:
    """C (d, d) by its definition, in float64."""
    v = v.double()
    if projector == "published":
        return v @ v.T / v.norm()
    u, s, _ = torch.linalg.svd(v, full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum()
    q = len(s) if energy == 1 else int((share < energy).sum()) + 1
    return u[:, :q] @ u[:, :q].T


def dense(b: Tensor, a: Tensor, c: Tensor, scale: float) -> Tensor:
    return ((torch.eye(len(c), dtype=c.dtype) - c) @ (scale * b @ a)).square().sum()


def deltas(model: Any) -> dict[str, Tensor]:
    """PEFT's own change of every weight, as it would be merged."""
    return {
        name.removeprefix("base_model.model.") + ".weight": module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other).norm() / other.norm())


# ---- the formula ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 48), st.integers(1, 48), st.integers(1, 9)),
    seed=st.integers(0, 2**31 - 1),
    scale=st.floats(0.01, 16),
    size=st.floats(1e-3, 1),
    projector=st.sampled_from(["published", "top"]),
    energy=st.floats(0.05, 0.8),
)
def test_thin_factors_give_the_value_and_the_gradients_of_the_formula(
    shape: tuple[int, int, int], seed: int, scale: float, size: float, projector: str, energy: float
) -> None:
    d, k, r = shape
    generator = torch.Generator().manual_seed(seed)
    v = size * torch.randn(d, k, generator=generator)
    b = torch.randn(d, r, generator=generator).requires_grad_()
    a = torch.randn(r, k, generator=generator).requires_grad_()
    operator = published(v) if projector == "published" else top(v, energy)
    assert operator.matrix.numel() <= d * max(1, min(d, k))  # never more than V itself
    fast = penalty(b, a, operator, scale)
    got = torch.autograd.grad(fast, (b, a))
    wide = [x.detach().double().requires_grad_() for x in (b, a)]
    slow = dense(*wide, dense_operator(v, projector, energy), scale)
    expected = torch.autograd.grad(slow, wide)
    whole = float((scale * (wide[0] @ wide[1])).detach().square().sum())
    if float(slow.detach()) < 1e-3 * whole:  # all but along the direction: rounding is relative to the whole change
        assert float(fast.detach()) < 1.01e-3 * whole
        return
    assert relative(fast.detach(), slow.detach()) < 1e-5
    assert all(relative(one, other) < 1e-5 for one, other in zip(got, expected, strict=True))
    assert relative(penalty_full((scale * b @ a).detach(), operator), slow.detach()) < 1e-5


def test_the_largest_errors_stay_far_below_one_in_a_hundred_thousand() -> None:
    """At widths that models have, in the plain case: V small relative to W, as after alignment."""
    generator = torch.Generator().manual_seed(0)
    for d, k in ((256, 256), (700, 256), (256, 700)):
        v = 0.01 * torch.randn(d, k, generator=generator)
        for projector in ("published", "top"):
            operator = published(v) if projector == "published" else top(v, 0.5)
            b, a = (torch.randn(s, generator=generator).requires_grad_() for s in ((d, 8), (8, k)))
            wide = [x.detach().double().requires_grad_() for x in (b, a)]
            fast, slow = penalty(b, a, operator, 2.0), dense(*wide, dense_operator(v, projector, 0.5), 2.0)
            errors = [relative(fast, slow)]
            errors += [
                relative(x, y)
                for x, y in zip(torch.autograd.grad(fast, (b, a)), torch.autograd.grad(slow, wide), strict=True)
            ]
            assert max(errors) < 1e-5, (d, k, projector, errors)


def test_along_the_direction_the_exact_projector_asks_nothing_and_the_published_one_does() -> None:
    """An eigenvalue above 2 turns the published penalty against the direction itself."""
    generator = torch.Generator().manual_seed(0)
    u, w = torch.randn(20, 2, generator=generator), torch.randn(2, 15, generator=generator)
    v = u @ w
    along = penalty(u, w, top(v, 1.0))
    assert float(along) < 1e-9 * float(v.square().sum())
    other = penalty(torch.randn(20, 2, generator=generator), w, top(v, 1.0))
    assert float(other) > 0.1 * float(v.square().sum())
    assert float(penalty(u, w, published(v))) > float(v.square().sum())
    assert float(penalty(u, w, published(0.01 * v))) < float(v.square().sum())


def test_of_full_rank_the_exact_projector_with_all_the_energy_is_the_identity() -> None:
    generator = torch.Generator().manual_seed(0)
    v, b, a = (torch.randn(s, generator=generator) for s in ((16, 40), (16, 3), (3, 40)))
    assert float(penalty(b, a, top(v, 1.0))) < 1e-9 * float((b @ a).square().sum())
    assert float(penalty(b, a, top(v, 0.5))) > 0.05 * float((b @ a).square().sum())


def test_where_alignment_did_nothing_the_whole_change_is_off_its_direction() -> None:
    v, b, a = torch.zeros(6, 5), torch.randn(6, 2), torch.randn(2, 5)
    for operator in (published(v), top(v, 0.9)):
        assert float(penalty(b, a, operator, 3.0)) == pytest.approx(9 * float((b @ a).square().sum()), rel=1e-5)


# ---- on a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("projector", ["published", "top"])
@pytest.mark.parametrize("rslora", [False, True])
def test_on_a_model_it_is_the_formula_on_what_would_be_merged(arch: str, projector: str, rslora: bool) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=rslora)
    model, direction = adapted(arch, config, away=False)
    held = AsFT(direction, weight=0.5, projector=projector, energy=0.7)
    held.prepare(model)
    moved(model)
    changes = deltas(model)
    assert changes.keys() == direction.keys()
    slow = torch.zeros((), dtype=torch.float64)
    for name, v in direction.items():
        delta = changes[name].double()
        delta = delta.T if arch == "gpt2" else delta
        c = dense_operator(v, projector, 0.7)
        slow += (delta - c @ delta).square().sum()
    assert relative(held(model, {}), 0.5 * slow) < 1e-5
    record = held.record()
    assert json.loads(json.dumps(record)) == record
    assert record["layers"] == len(changes) and record["changed"] == "adapter"
    assert record["value"] == pytest.approx(0.5 * float(slow), rel=1e-5)
    largest = [float(torch.linalg.eigvalsh(dense_operator(v, "published", 1))[-1]) for v in direction.values()]
    assert record["largest_eigenvalue"]["max"] == pytest.approx(max(largest), rel=1e-6)
    assert record["layers_beyond_two"] == sum(x > 2 for x in largest)
    if projector == "top":
        counts = [round(float(dense_operator(v, "top", 0.7).trace())) for v in direction.values()]
        assert (record["directions"]["min"], record["directions"]["max"]) == (min(counts), max(counts))


def test_at_the_start_it_is_zero_and_so_is_its_pull() -> None:
    model, direction = adapted(away=False)
    held = AsFT(direction)
    held.prepare(model)
    value = held(model, {})
    value.backward()
    assert float(value.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_two_adapters_at_once_are_one_change() -> None:
    model, direction = adapted(away=False)
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    held = AsFT(direction)
    held.prepare(model)
    moved(model)
    slow = 0.0
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = (module.get_delta_weight("default") + module.get_delta_weight("second")).detach().double()
            c = dense_operator(direction[name.removeprefix("base_model.model.") + ".weight"], "published", 1)
            slow += float((delta - c @ delta).square().sum())
    assert float(held(model, {}).detach()) == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_of_an_adapter_that_was_trained_before_only_the_change_since_then_is_held(arch: str, second: bool) -> None:
    model, direction = adapted(arch)
    if second:
        more = peft.LoraConfig(r=3, lora_alpha=9, target_modules="all-linear", task_type="CAUSAL_LM")
        model.add_adapter("second", more)
        model.base_model.set_adapter(["default", "second"])
        moved(model, ("lora_B.second",), seed=3)
    names = ["default", "second"] if second else ["default"]

    def change() -> dict[str, Tensor]:
        found = {}
        for name, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = sum(module.get_delta_weight(a) for a in names).double()
                plain = name.removeprefix("base_model.model.") + ".weight"
                found[plain] = delta.T if arch == "gpt2" else delta
        return found

    held = AsFT(direction)
    held.prepare(model)
    before = {name: delta.detach() for name, delta in change().items()}
    at_start = held(model, {})
    at_start.backward()
    assert float(at_start.detach()) == 0
    assert not any(p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    model.zero_grad()
    moved(model, ("lora_A", "lora_B"), seed=4)
    slow = torch.zeros((), dtype=torch.float64)
    for name, delta in change().items():
        since = delta - before[name]
        slow = slow + (since - dense_operator(direction[name], "published", 1) @ since).square().sum()
    slow.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    value = held(model, {})
    value.backward()
    assert relative(value.detach(), slow.detach()) < 1e-5
    assert expected and all(relative(p.grad, expected[n]) < 1e-4 for n, p in model.named_parameters() if n in expected)


def test_autocast_does_not_round_it() -> None:
    model, direction = adapted(away=False)
    held = AsFT(direction)
    held.prepare(model)
    moved(model)
    plain = float(held(model, {}).detach())
    assert plain > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert float(held(model, {}).detach()) == plain


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_without_an_adapter_the_change_since_the_start_is_held(arch: str) -> None:
    base = tiny_model(arch)
    model = perturbed(base)
    direction = alignment(model, base, target_names(base, LORA))
    frozen = next(iter(direction))
    dict(model.named_parameters())[frozen].requires_grad_(False)
    held = AsFT(direction)
    held.prepare(model)
    assert float(held(model, {}).detach()) == 0
    before = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    slow = torch.zeros((), dtype=torch.float64)
    old, new = dict(before.named_parameters()), dict(model.named_parameters())
    for name, v in direction.items():
        delta = (new[name] - old[name]).detach().double()
        delta = delta.T if arch == "gpt2" else delta
        slow += (delta - dense_operator(v, "published", 1) @ delta).square().sum()
    value = held(model, {})
    assert relative(value, slow) < 1e-5
    value.backward()
    assert new[frozen].grad is None
    assert all(new[name].grad.any() for name in direction if name != frozen)
    assert held.record()["changed"] == "weights" and held.record()["layers"] == len(direction) - 1


def test_training_under_it_stays_nearer_to_the_direction() -> None:
    """Two steps with the same data: the gradient is the sum of the two, and the change off the direction gets smaller."""

    def train(weight: float) -> tuple[list[dict[str, Tensor]], float]:
        model, direction = adapted(away=False)
        held, probe = (
            AsFT(direction, weight=weight, projector="top", energy=0.3),
            AsFT(direction, projector="top", energy=0.3),
        )
        held.prepare(model)
        probe.prepare(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        ids = torch.arange(10, 42).reshape(2, 16)
        gradients = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            alone = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
            (loss + held(model, {})).backward()
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            gradients.append({n: p.grad - g for (n, p), g in zip(named, alone, strict=True)})
            optimizer.step()
            optimizer.zero_grad()
        return gradients, float(probe(model, {}).detach())

    gradients, near = train(5.0)
    nothing, far = train(0.0)
    assert all(not g.any() for g in gradients[0].values())  # B = 0
    assert all(g.abs().max() > 0 for name, g in gradients[1].items() if "lora_B" in name)
    assert all(g.abs().max() < 1e-6 for step in nothing for g in step.values())
    assert near < 0.8 * far


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_it_is_registered_and_says_whose_it_is() -> None:
    assert PENALTIES["asft"] is AsFT
    assert "alignment direction" in PENALTIES.summary("asft")


@pytest.mark.parametrize(
    "options", [{"projector": "bottom"}, {"weight": -1.0}, {"weight": float("nan")}, {"energy": 0.0}, {"energy": 1.1}]
)
def test_settings_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        AsFT({}, **options)


def test_what_it_cannot_hold_is_refused() -> None:
    model, direction = adapted()
    with pytest.raises(UsageError, match="has no LoRA adapter in use"):
        AsFT(direction).prepare(tiny_model("llama").requires_grad_(False))
    ia3 = peft.get_peft_model(tiny_model("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(UsageError, match="has no LoRA adapter in use"):
        AsFT(direction).prepare(ia3)
    with pytest.raises(UsageError, match=r"names model\.layers\.0.*no such weight"):
        AsFT(direction).prepare(tiny_model("gpt2"))
    few = dict(list(direction.items())[1:])
    with pytest.raises(UsageError, match="no such weight: compute it with the peft_config"):
        AsFT(few).prepare(model)
    bent = {name: v[:, :-1] for name, v in direction.items()}
    with pytest.raises(UsageError, match=r"has shape \(64, 63\)"):
        AsFT(bent).prepare(model)
    model.merge_adapter()
    with pytest.raises(UsageError, match="already merged into its weight"):
        AsFT(direction).prepare(model)


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("llama", {"target_modules": "all-linear", "use_dora": True}, "DoRA"),
        ("llama", {"target_modules": ["embed_tokens"]}, "embedding"),
        (
            "llama",
            {"target_modules": "all-linear", "init_lora_weights": "pissa"},
            "initialised with part of the weight",
        ),
        ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, "fused experts"),
    ],
)
def test_other_adapters_are_refused(arch: str, options: dict[str, Any], words: str) -> None:
    _, direction = adapted()
    model = peft.get_peft_model(tiny_model(arch), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with pytest.raises(UsageError, match=words):
        AsFT(direction).prepare(model)
