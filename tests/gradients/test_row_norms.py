"""Norms of rows against autograd written out, on every tiny architecture and through every kind of adapter."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gradshield.gradients import adapted, parameter_names, row_norms
from gradshield.types import Batch
from tests.contracts.common import batch_of, differences, lora, rows, state
from tests.tiny import ARCHITECTURES, tiny_model

RELATIVE = 1e-5


def plain() -> Batch:
    """13 ragged rows of one sequence each."""
    return batch_of(rows())


def pairs() -> Batch:
    """Rows of one, two and three sequences that do not stand together, with coefficients of both signs."""
    made = batch_of(rows((9, 30, 14, 22, 6, 27, 12, 19)))
    signs = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 0.5])
    return Batch(made.ids, made.attention, made.loss, np.array([7, 3, 3, 7, 5, 9, 9, 9]), signs)


def written_out(model: nn.Module, batch: Batch) -> list[float]:
    """By autograd through no mask, padding or hook, and with the whole vocabulary at every position."""
    found = []
    for row in dict.fromkeys(batch.rows.tolist()):
        model.zero_grad(set_to_none=True)
        for i in np.flatnonzero(batch.rows == row):
            ids = torch.as_tensor(batch.ids[i][batch.attention[i]])
            wanted = torch.as_tensor(batch.loss[i][batch.attention[i]])[1:]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            each = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            (batch.coefficients[i] * each[wanted].sum()).backward()
        found.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_norms_are_autograd_written_out(arch: str) -> None:
    model = tiny_model(arch)
    expected = np.sqrt(written_out(model, pairs()))
    found = row_norms(model, pairs(), [name for name, _ in model.named_parameters()])
    assert expected.std() > 0.1
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=RELATIVE)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_any_adapter_has_norms(more: dict[str, Any]) -> None:
    """Also one whose parameters act outside their own layer; its factors as after some training."""
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **more})
    model = get_peft_model(tiny_model("llama"), config).eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = np.sqrt(written_out(model, pairs()))
    np.testing.assert_allclose(row_norms(model, pairs(), names).values.numpy(), expected, rtol=RELATIVE)


def test_half_precision_is_near_single() -> None:
    exact = row_norms(tiny_model("llama"), plain(), parameter_names(tiny_model("llama"), "all"))
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = row_norms(model, plain(), parameter_names(model, "all"))
    np.testing.assert_allclose(found.values.numpy(), exact.values.numpy(), rtol=0.05)


def test_training_mode_changes_nothing() -> None:
    """An adapter's dropout would: candidates are measured without it."""
    with adapted(tiny_model("llama"), lora("llama"), seed=1) as model:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert names == parameter_names(model, "lora")
        still = row_norms(model, plain(), names)
        model.train()
        assert torch.equal(row_norms(model, plain(), names).values, still.values)
        assert all(m.training for m in model.modules())


def test_rows_without_loss_have_norm_zero() -> None:
    model = tiny_model("gemma")
    made = plain()
    loss = made.loss.copy()
    loss[3] = False
    names = parameter_names(model, "all")
    some = row_norms(model, Batch(made.ids, made.attention, loss, made.rows, made.coefficients), names)
    full = row_norms(model, made, names)
    assert some.values[3] == 0 and (some.values[:3] > 0).all()
    others = [i for i in range(13) if i != 3]
    np.testing.assert_allclose(some.values[others].numpy(), full.values[others].numpy(), rtol=RELATIVE)
    none = row_norms(model, Batch(made.ids, made.attention, np.zeros_like(loss), made.rows, made.coefficients), names)
    assert not none.values.any() and not none.nll.any()


# ---- the caller's model ---------------------------------------------------------------------------------------------


def caller_model(arch: str) -> nn.Module:
    """Half frozen, partly in training mode, one gradient already there."""
    model = tiny_model(arch)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    first = next(model.parameters())
    first.grad = torch.full_like(first, 0.25)
    return model


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma", "mixtral", "qwen2_moe"])
def test_the_model_is_bit_identical_afterwards(arch: str) -> None:
    model = caller_model(arch)
    names = parameter_names(model, "all")
    before = state(model)
    expected = row_norms(model, plain(), names)
    assert differences(before, state(model)) == []

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    last = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[-1]
    with last.register_forward_hook(stop):
        hooked = state(model)
        with pytest.raises(KeyboardInterrupt):
            row_norms(model, plain(), names)
        assert differences(hooked, state(model)) == []
    assert differences(before, state(model)) == []
    assert torch.equal(row_norms(model, plain(), names).values, expected.values)
