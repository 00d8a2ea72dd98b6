"""The KL penalty: response positions alone against the dense computation, and where the reference comes from."""

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
from gradshield.training.inside import PENALTIES
from gradshield.training.kl import FrozenReferenceKL, divergence
from tests.tiny import VOCABULARY, tiny_model

LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def inputs(seed: int = 0, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Ragged rows with a prompt, padded on the right; the last row has no answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, VOCABULARY, (rows, length), generator=generator)
    attention = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :4] = -100
    for row in range(rows):
        end = length - 2 * row
        ids[row, end:], attention[row, end:], labels[row, end:] = 0, 0, -100
    labels[-1] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def moved(model: nn.Module, only: str = "", size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if only in name:
                p.add_(size * torch.randn(p.shape, generator=generator))


def dense(start: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Every logit of both models, position by position."""
    one = start(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach().double()
    two = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    found = []
    for row, labels in enumerate(batch["labels"]):
        for t in range(len(labels) - 1):
            if labels[t + 1] != -100:
                p, q = one[row, t].softmax(-1), two[row, t].softmax(-1)
                found.append((p * (p.log() - q.log())).sum())
    return torch.stack(found).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 30), st.integers(0, 2**31 - 1), st.floats(0.1, 20))
def test_divergence_is_its_definition(m: int, v: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, two = (size * torch.randn(m, v, generator=generator) for _ in range(2))
    p, q = one.double().log_softmax(-1), two.double().log_softmax(-1)
    slow = float((p.exp() * (p - q)).sum(-1).mean())
    assert float(divergence(one, two)) == pytest.approx(slow, rel=1e-4, abs=1e-6)
    assert float(divergence(one, one)) == 0


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma"])
def test_with_an_adapter_the_reference_is_the_model_without_it(arch: str) -> None:
    start = tiny_model(arch)
    model = peft.get_peft_model(copy.deepcopy(start), copy.deepcopy(LORA)).eval()
    leash, batch = FrozenReferenceKL(weight=0.3), inputs()
    leash.prepare(model)
    assert float(leash(model, batch).detach()) == pytest.approx(0, abs=1e-6)
    moved(model, "lora_B")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    slow = 0.3 * dense(start, model, batch)
    slow.backward()
    expected = gradients(model)
    model.zero_grad()
    value = leash(model, batch)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(slow.detach()), rel=1e-5) and float(value.detach()) > 1e-4
    found = gradients(model)
    assert found.keys() == expected.keys() == {n for n, flag in flags.items() if flag}
    for name, g in found.items():
        assert torch.allclose(g, expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].abs().max() + 1)), name
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    record = leash.record()
    assert json.loads(json.dumps(record)) == record
    assert record["reference"] == "adapter switched off" and record["value"] == pytest.approx(float(value.detach()))


def test_a_part_of_the_adapter_that_was_frozen_stays_so_and_modes_come_back() -> None:
    model = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(LORA))
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    model.train()
    model.base_model.model.model.norm.eval()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    leash = FrozenReferenceKL()
    leash.prepare(model)
    assert leash.record()["reference"] == "adapter switched off"
    moved(model, "lora_B")
    leash(model, inputs()).backward()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all("lora_B" in n for n in gradients(model))


def test_the_task_loss_keeps_its_gradient_when_the_penalty_comes_after_it() -> None:
    """The reference switches flags while the graph of the loss is waiting for its backward pass."""
    model = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(LORA)).eval()
    batch, leash = inputs(), FrozenReferenceKL(weight=2.0)
    leash.prepare(model)
    moved(model, "lora_B")
    model(**batch).loss.backward()
    task = gradients(model)
    model.zero_grad()
    leash(model, batch).backward()
    pull = gradients(model)
    model.zero_grad()
    loss = model(**batch).loss
    (loss + leash(model, batch)).backward()
    for name, g in gradients(model).items():
        assert torch.allclose(g, task[name] + pull[name], atol=1e-6), name


def test_without_an_adapter_the_reference_is_a_frozen_copy() -> None:
    model = tiny_model("llama")
    start, leash, batch = copy.deepcopy(model), FrozenReferenceKL(weight=1.0), inputs()
    leash.prepare(model)
    moved(model)
    slow = dense(start, model, batch)
    assert float(slow.detach()) > 1e-3
    assert float(leash(model, batch).detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
    assert leash.record()["reference"] == "frozen copy"


def test_a_forward_bound_to_the_model_does_not_answer_for_the_copy() -> None:
    """TRL and accelerate put a forward on the object; in a plain deep copy it would still read the live weights."""
    model = tiny_model("llama")
    start, batch = copy.deepcopy(model), inputs()
    original = model.forward
    model.forward = lambda *args, **more: original(*args, **more)  # type: ignore[method-assign]
    leash = FrozenReferenceKL(weight=1.0)
    leash.prepare(model)
    moved(model)
    slow = dense(start, model, batch)
    assert float(leash(model, batch).detach()) == pytest.approx(float(slow.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {}], ids=str
)
def test_the_reference_is_the_start_however_the_adapter_begins(options: dict[str, Any]) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    start = tiny_model("qwen2")
    model = peft.get_peft_model(copy.deepcopy(start), config).eval()
    leash, batch = FrozenReferenceKL(weight=1.0), inputs()
    leash.prepare(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    slow = dense(start, model, batch)
    assert float(leash(model, batch).detach()) == pytest.approx(float(slow.detach()), rel=1e-3)
    copied = leash.record()["reference"] == "frozen copy"
    assert copied == bool(options)


SMALL: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    ("config", "part", "copied"),
    [
        (LORA, "", False),
        (LORA, "lora_A", False),  # nothing changes while B is zero
        (LORA, "lora_B", True),
        (peft.LoraConfig(**SMALL, init_lora_weights=False), "", True),
        (peft.LoraConfig(**SMALL, lora_bias=True), "", False),
        (peft.LoraConfig(**SMALL, lora_bias=True), "lora_B.default.bias", True),
        (peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"), "", False),
        (peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"), "lora_embedding_A", True),
        (peft.LoraConfig(**SMALL, modules_to_save=["lm_head"]), "", True),
        (peft.LoraConfig(**SMALL, modules_to_save=["lm_head"]), "modules_to_save", True),
        (peft.LoraConfig(**SMALL, trainable_token_indices=[8, 9]), "", True),
        (peft.LoraConfig(**SMALL, trainable_token_indices=[8, 9]), "trainable_tokens_delta", True),
        (peft.IA3Config(task_type="CAUSAL_LM"), "", True),
    ],
    ids=[
        *("new", "A moved", "B moved", "random B", "bias", "bias moved", "embedding", "embedding moved"),
        *("module", "module moved", "tokens", "tokens moved", "not LoRA"),
    ],
)
def test_an_adapter_that_was_trained_before_is_a_part_of_the_start(config: Any, part: str, copied: bool) -> None:
    model: Any = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(config)).eval()
    if part:
        assert any(part in name for name, _ in model.named_parameters())
        moved(model, part)
    start, leash, batch = copy.deepcopy(model), FrozenReferenceKL(weight=1.0), inputs()
    batch["input_ids"][:, 1] = 8
    leash.prepare(model)
    assert float(leash(model, batch).detach()) == pytest.approx(0, abs=1e-6)
    assert leash.record()["reference"] == ("frozen copy" if copied else "adapter switched off")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    slow = float(dense(start, model, batch).detach())
    assert slow > 1e-5 and float(leash(model, batch).detach()) == pytest.approx(slow, rel=1e-3)


def test_only_the_adapters_in_use_count() -> None:
    model = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(LORA)).eval()
    model.add_adapter("other", copy.deepcopy(LORA))
    moved(model, "lora_B.other")
    leash = FrozenReferenceKL()
    leash.prepare(model)
    assert leash.record()["reference"] == "adapter switched off"
    model.set_adapter("other")
    leash.prepare(model)
    assert leash.record()["reference"] == "frozen copy"
    assert float(leash(model, inputs()).detach()) == pytest.approx(0, abs=1e-6)


def test_the_reference_has_no_dropout() -> None:
    model = peft.get_peft_model(tiny_model("gpt2"), copy.deepcopy(LORA)).train()  # 0.1 of dropout in its blocks
    leash = FrozenReferenceKL(weight=1.0)
    leash.prepare(model)
    batch = inputs()
    with torch.no_grad(), leash._reference(model) as start:
        one, two = (start(input_ids=batch["input_ids"]).logits for _ in range(2))
    assert torch.equal(one, two)
    assert float(leash(model, batch).detach()) > 0


def test_a_batch_without_an_answer_asks_nothing() -> None:
    model = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(LORA))
    leash, batch = FrozenReferenceKL(), inputs()
    leash.prepare(model)
    batch["labels"][:] = -100
    value = leash(model, batch)
    value.backward()
    assert float(value.detach()) == 0
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_what_it_cannot_compare_is_refused() -> None:
    assert PENALTIES["kl"] is FrozenReferenceKL
    for weight in (-1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError, match="a number of at least 0"):
            FrozenReferenceKL(weight)
    model = peft.get_peft_model(tiny_model("llama"), copy.deepcopy(LORA))
    leash, batch = FrozenReferenceKL(), inputs()
    leash.prepare(model)
    for bad in (
        {k: v for k, v in batch.items() if k != "attention_mask"},
        {k: v for k, v in batch.items() if k != "labels"},
        {**batch, "position_ids": batch["input_ids"]},
    ):
        with pytest.raises(UsageError, match="packing=False"):
            leash(model, bad)
    soft = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    with pytest.raises(UsageError, match="soft prompt"):
        FrozenReferenceKL().prepare(soft)
