"""Norms of all rows of a batch at once against one backward pass a sequence, on every tiny architecture and subspace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from gradshield.errors import UsageError
from gradshield.gradients import Loop, Norms, adapted, norms, parameter_names, row_norms
from gradshield.types import Batch
from tests.contracts.common import SUBSPACES, batch_of, differences, lora, rows, state
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_model

RELATIVE = 1e-5
CASES = [(arch, subspace) for arch in ARCHITECTURES for subspace in SUBSPACES]


@contextmanager
def model_of(arch: str, subspace: str) -> Iterator[nn.Module]:
    """The tiny model; its adapter as after some training, since at B = 0 the gradient of A is zero."""
    with adapted(tiny_model(arch), lora(arch) if subspace == "lora" else None, seed=1) as model:
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        yield model


def plain() -> Batch:
    """13 ragged rows of one sequence each."""
    return batch_of(rows())


def pairs() -> Batch:
    """Rows of one, two and three sequences that do not stand together, with coefficients of both signs."""
    made = batch_of(rows((9, 30, 14, 22, 6, 27, 12, 19)))
    signs = np.array([1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 0.5])
    return Batch(made.ids, made.attention, made.loss, np.array([7, 3, 3, 7, 5, 9, 9, 9]), signs)


def assert_equal(found: Norms, oracle: Norms) -> None:
    assert found.values.dtype == found.nll.dtype == torch.float64
    np.testing.assert_array_equal(found.rows, oracle.rows)
    np.testing.assert_allclose(found.values.numpy(), oracle.values.numpy(), rtol=RELATIVE)
    np.testing.assert_allclose(found.nll.numpy(), oracle.nll.numpy(), atol=1e-4)


@pytest.mark.parametrize(("arch", "subspace"), CASES, ids=["-".join(c) for c in CASES])
def test_all_rows_at_once_agree_with_one_at_a_time(arch: str, subspace: str) -> None:
    with model_of(arch, subspace) as model:
        names = parameter_names(model, subspace)
        for batch in (plain(), pairs()):
            oracle = Loop().norms(model, batch, names)
            assert (oracle.values > 0.1).all() and oracle.values.std() > 0.1  # else nothing is compared
            assert_equal(row_norms(model, batch, names), oracle)


@pytest.mark.parametrize("arch", ["llama", "gemma", "gpt2"])
def test_the_oracle_is_autograd_written_out(arch: str) -> None:
    """Through no mask, padding or hook, and with the whole vocabulary at every position."""
    model = tiny_model(arch)
    batch = pairs()
    expected = []
    for row in (7, 3, 5, 9):
        model.zero_grad(set_to_none=True)
        for i in np.flatnonzero(batch.rows == row):
            ids = torch.as_tensor(batch.ids[i][batch.attention[i]])
            wanted = torch.as_tensor(batch.loss[i][batch.attention[i]])[1:]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            each = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            (batch.coefficients[i] * each[wanted].sum()).backward()
        expected.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    found = Loop().norms(model, batch, [name for name, _ in model.named_parameters()])
    assert found.rows.tolist() == [7, 3, 5, 9]
    np.testing.assert_allclose(found.values.numpy(), np.sqrt(expected), rtol=RELATIVE)


def test_a_scaled_embedding_tied_to_the_head() -> None:
    """Gemma 3's table, whose rows are multiplied: its gradient, and its cross term with the head, carry the factor."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = parameter_names(model, "all")
    oracle = Loop().norms(model, pairs(), names)
    assert_equal(row_norms(model, pairs(), names), oracle)
    without = row_norms(model, pairs(), [name for name in names if "embed" not in name])
    assert (without.values < 0.95 * oracle.values).all()  # the shared table matters here


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_the_pad_token_inside_a_row_gives_its_table_entry_nothing(arch: str) -> None:
    model = tiny_model(arch)
    assert model.get_input_embeddings().padding_idx == 0
    made = plain()
    ids = made.ids.copy()
    ids[:, 2:4] = 0
    batch = Batch(ids, made.attention, made.loss, made.rows, made.coefficients)
    names = [name for name in parameter_names(model, "all") if "embed" in name]
    assert_equal(row_norms(model, batch, names), Loop().norms(model, batch, names))


class Positions(nn.Embedding):
    """A table of positions with a forward of its own, as some architectures have: a layer that has no formula here."""

    def forward(self, where: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(where + 2)


def test_a_layer_of_an_unknown_kind_that_all_rows_share() -> None:
    model = tiny_model("gpt2")
    torch.manual_seed(0)
    model.transformer.wpe = Positions(600, 64)
    names = [name for name in parameter_names(model, "all") if "wpe" in name]
    for batch in (plain(), pairs()):
        assert_equal(row_norms(model, batch, names), Loop().norms(model, batch, names))


@given(
    sizes=st.tuples(*[st.integers(1, 12)] * 4),
    seed=st.integers(0, 999),
    double=st.booleans(),
)
def test_both_ways_of_a_layer_are_the_product_itself(sizes: tuple[int, ...], seed: int, double: bool) -> None:
    count, positions, ins, outs = sizes
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    x = torch.randn(count, positions, ins, generator=draw, dtype=dtype)
    g = torch.randn(count, positions, outs, generator=draw, dtype=dtype)
    expected = [float((g[r].double().T @ x[r].double()).square().sum()) for r in range(count)]
    found = norms.outer_squares(x, g)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9 if double else 1e-4, atol=1e-9 if double else 1e-4)


def test_a_layer_too_large_for_the_whole_batch_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen2")
    names = parameter_names(model, "all")
    whole = row_norms(model, plain(), names)
    monkeypatch.setattr(norms, "_TEMPORARY", 1000)
    assert_equal(row_norms(model, plain(), names), whole)


def test_one_forward_pass_and_no_gradient_of_a_weight() -> None:
    model = tiny_model("llama")
    calls = []
    with model.model.register_forward_hook(lambda *_: calls.append([p.requires_grad for p in model.parameters()])):
        row_norms(model, plain(), parameter_names(model, "all"))
    assert len(calls) == 1 and not any(calls[0])


def test_half_precision_is_near_single() -> None:
    exact = row_norms(tiny_model("llama"), plain(), parameter_names(tiny_model("llama"), "all"))
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = row_norms(model, plain(), parameter_names(model, "all"))
    np.testing.assert_allclose(found.values.numpy(), exact.values.numpy(), rtol=0.05)


def test_the_squares_of_half_precision_do_not_overflow() -> None:
    x, g = torch.full((1, 2, 200), 20.0), torch.full((1, 2, 300), 30.0)
    for shape in (slice(0, 300), slice(0, 1)):  # the product itself, and by Gram matrices
        found = norms.outer_squares(x.half(), g[:, :, shape].half())
        assert float(found) == pytest.approx(float((g[0, :, shape].T @ x[0]).double().square().sum()), rel=1e-5)


def test_training_mode_changes_nothing() -> None:
    """An adapter's dropout would: candidates are measured without it."""
    with model_of("llama", "lora") as model:
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


def test_outputs_that_the_model_changes_in_place() -> None:
    model = tiny_model("llama")
    with model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: output.mul_(0.5)):
        names = parameter_names(model, "all")
        assert_equal(row_norms(model, plain(), names), Loop().norms(model, plain(), names))


# ---- what cannot be followed ----------------------------------------------------------------------------------------


def shared_layers() -> tuple[nn.Module, str]:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model, "up_proj"


def repeated_layer() -> tuple[nn.Module, str]:
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    return model, "mlp"


def dora() -> tuple[nn.Module, str]:
    return get_peft_model(tiny_model("llama"), lora("llama", use_dora=True)), "lora"


def embedding_adapter() -> tuple[nn.Module, str]:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    return get_peft_model(tiny_model("llama"), config), "lora"


@pytest.mark.parametrize("make", [shared_layers, repeated_layer, dora, embedding_adapter])
def test_what_hooks_cannot_follow_is_an_error_that_names_the_loop(make: Any) -> None:
    model, part = make()
    names = [name for name, _ in model.named_parameters() if part in name]
    before = state(model)
    with pytest.raises(UsageError, match="engine loop"):
        row_norms(model, plain(), names)
    assert differences(before, state(model)) == []
    assert (Loop().norms(model, plain(), names).values > 0).all()


def test_an_input_that_is_changed_after_its_use_is_an_error() -> None:
    with model_of("llama", "lora") as model:
        names = [name for name in parameter_names(model, "lora") if "q_proj" in name]

        def double(_module: nn.Module, args: Any, _output: Any) -> None:
            args[0].mul_(2.0)

        query = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        with (
            query.register_forward_hook(double),
            pytest.raises(UsageError, match="changed in place"),
        ):
            row_norms(model, plain(), names)


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"no parameter 'lm_head\.weight'"):
        row_norms(tiny_model("gemma"), plain(), ["model.norm.weight", "lm_head.weight"])


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
def test_the_model_is_bit_identical_afterwards(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = caller_model(arch)
    names = parameter_names(model, "all")
    before = state(model)
    expected = row_norms(model, plain(), names)
    assert differences(before, state(model)) == []
    Loop().norms(model, plain(), names)
    assert differences(before, state(model)) == []

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    last = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[-1]
    with last.register_forward_hook(stop):
        hooked = state(model)
        with pytest.raises(KeyboardInterrupt):
            row_norms(model, plain(), names)
        assert differences(hooked, state(model)) == []
    with monkeypatch.context() as broken:
        broken.setattr(norms, "outer_squares", stop)  # in the backward pass
        with pytest.raises(KeyboardInterrupt):
            row_norms(model, plain(), names)
    assert differences(before, state(model)) == []
    assert torch.equal(row_norms(model, plain(), names).values, expected.values)
