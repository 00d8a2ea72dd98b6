"""Which parameters a subspace holds, which engine is picked, and what engines refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AriaTextConfig,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    DbrxConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.siglip import SiglipVisionConfig

from gradshield.errors import ModelError, UnknownNameError, UsageError
from gradshield.gradients import (
    ENGINES,
    SUBSPACES,
    FiniteDifference,
    Loop,
    adapted,
    agreement,
    calibrated,
    check_subspace,
    parameter_names,
    pick,
)
from gradshield.gradients.direction import target_names
from gradshield.gradients.finite_difference import RELATIVE_STEPS, experts
from gradshield.types import Direction
from tests.contracts.common import batch_of, lora, rows, two_directions
from tests.tiny import ARCHITECTURES, LAYERS, VOCABULARY, tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_subspaces_hold_what_they_say(arch: str) -> None:
    model = tiny_model(arch)
    everything = [name for name, _ in model.named_parameters()]
    assert parameter_names(model, "all") == everything
    last, both = parameter_names(model, "last:1"), parameter_names(model, "last:2")
    assert parameter_names(model, "last:50%") == parameter_names(model, "last:1%") == last
    assert parameter_names(model, "last:100%") == both
    assert len(set(last)) == len(last) and set(last) < set(both) < set(everything)
    layers = "h" if arch == "gpt2" else "layers"
    rest = [name for name in last if f".{layers}.{LAYERS - 1}." not in name]
    assert rest and all("norm" in name or "ln_f" in name for name in rest)  # the final norm
    embedded = [n for n in last if n != "model.embedding_norm.weight"]  # LFM2's final norm
    assert not any("embed" in n or "wte" in n or "lm_head" in n or f".{layers}.0." in n for n in embedded)
    assert {n for n in everything if f".{layers}.{LAYERS - 1}." in n} == set(last) - set(rest)
    with adapted(model, lora(arch), seed=0) as wrapped:
        names = parameter_names(wrapped, "lora")
        assert names and all("lora_A" in name or "lora_B" in name for name in names)
        assert len(names) == (2 if arch == "gpt2" else 4) * (1 if arch == "lfm2" else LAYERS)  # LFM2: one has attention


@pytest.mark.parametrize(
    "text", ["", "last", "last:", "last:0", "last:0%", "last:101%", "last:-1", "last:1.5", "ALL", "lora:8", "last:2 "]
)
def test_a_subspace_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_subspace(text)
    message = str(caught.value)
    assert repr(text) in message
    assert all(name.split(":")[0] in message for name in SUBSPACES)


def multimodal() -> nn.Module:
    """A Gemma 3 that also sees: what it says of its layers stands in a config inside its config."""
    text = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.1,
        pad_token_id=0,
    )
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("name", ["finite-difference", "forward"])  # perturbation does not follow norms of single heads
def test_the_layers_of_a_model_that_also_sees_are_found(name: str) -> None:
    model = multimodal()
    last = parameter_names(model, "last:1")
    places = (f".language_model.layers.{LAYERS - 1}.", ".language_model.norm.")
    assert last and all(any(place in n for place in places) for n in last)
    direction, batch = two_directions(model, "last:1"), batch_of(rows())
    found = ENGINES[name]().directional(model, batch, direction).values
    sums = found.sum(-1) if found.dim() == 3 else found
    oracle = Loop().directional(model, batch, direction).values
    assert agreement(name, sums.numpy().ravel(), oracle.numpy().ravel()).relative_error <= 1e-2


def test_a_subspace_that_the_model_does_not_have_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match=r"last:3 asks for 3 layers, but the model has 2"):
        parameter_names(model, "last:3")
    with pytest.raises(ModelError, match=r"lora got a model without an adapter.*peft_config"):
        parameter_names(model, "lora")
    with pytest.raises(ModelError, match=r"decoder layers of Linear could not be found.*all or lora"):
        parameter_names(nn.Linear(2, 2), "last:1")


def test_auto_picks_by_precision_and_need() -> None:
    float32, half = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    assert [pick("auto", float32, per_token).name for per_token in (True, False)] == ["finite-difference"] * 2
    assert pick("auto", tiny_model("llama", dtype=torch.float64), True).name == "finite-difference"
    assert pick("auto", half, True).name == "forward"
    assert pick("auto", half, False).name == "perturbation"
    half.lm_head.float()  # one layer in full precision is not enough for a finite step
    assert pick("auto", half, True).name == "forward"


@pytest.mark.parametrize("name", list(ENGINES))
def test_an_engine_by_its_name(name: str) -> None:
    model = tiny_model("llama")
    assert pick(name, model, per_token=False).name == name
    if ENGINES[name].per_token:
        assert pick(name, model, per_token=True).name == name
    else:
        with pytest.raises(UsageError) as caught:
            pick(name, model, per_token=True)
        assert repr(name) in str(caught.value)
        assert all(n in str(caught.value) for n in ENGINES if ENGINES[n].per_token)


def test_unknown_engine_lists_the_live_names() -> None:
    with pytest.raises(UnknownNameError) as caught:
        pick("jacobian", tiny_model("llama"), per_token=False)
    assert "'jacobian'" in str(caught.value) and all(name in str(caught.value) for name in ENGINES)


def test_finite_difference_refuses_half_precision() -> None:
    full, half = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"in bfloat16, where its step is rounded away.*float32"):
        FiniteDifference().directional(half, batch_of(rows((5, 8))), two_directions(full, "last:1"))


@pytest.mark.parametrize("name", [n for n in ENGINES if n not in ("loop", "finite-difference")])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_exact_engines_stay_near_the_oracle_in_bfloat16(name: str, arch: str) -> None:
    model = tiny_model(arch, dtype=torch.bfloat16)
    direction, batch = two_directions(model, "last:1"), batch_of(rows())
    oracle = Loop().directional(model, batch, direction).values[0].numpy()
    engine = ENGINES[name]()
    found = engine.directional(model, batch, direction).values[0]
    measured = agreement(name, (found.sum(-1) if engine.per_token else found).numpy(), oracle)
    assert measured.relative_error <= 0.2 and measured.spearman >= 0.9


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("default", [1e-5, 1e-4, 3e-3])
def test_calibration_takes_the_step_of_least_error(arch: str, default: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it begins it finds the one that trying them all finds, for fewer tries."""
    model = tiny_model(arch)
    direction, batch = two_directions(model, "all"), batch_of(rows((10, 17, 25)))
    oracle = Loop().directional(model, batch, direction).values.numpy().ravel()
    every = {}
    for step in RELATIVE_STEPS:
        fast = FiniteDifference(step).directional(model, batch, direction).values.sum(-1).numpy().ravel()
        every[f"{step:g}"] = agreement("", fast, oracle).relative_error
    monkeypatch.setattr(FiniteDifference.__init__, "__defaults__", (default,))
    engine, errors = calibrated(model, batch, direction)
    assert errors[f"{engine.relative_step:g}"] == pytest.approx(min(every.values()))
    assert errors == pytest.approx({step: every[step] for step in errors})
    assert f"{default:g}" in errors and (len(errors) < len(RELATIVE_STEPS) or default == 3e-3)


def test_agreement_by_hand() -> None:
    found = agreement("x", np.array([3.0, 4.0, 0.0, 0.0]), np.array([0.0, 0.0, 3.0, 4.0]))
    assert (found.engine, found.n) == ("x", 4)
    assert found.relative_error == pytest.approx(2**0.5)
    assert found.spearman == pytest.approx(-0.8888888888)  # ranks 3 4 1.5 1.5 against 1.5 1.5 3 4
    assert agreement("x", np.array([1.0, 2.0, 9.0]), np.array([2.0, 3.0, 4.0])).spearman == pytest.approx(1.0)
    assert np.isnan(agreement("x", np.ones(2), np.arange(2.0)).spearman)  # two rows have no ranking
    assert np.isnan(agreement("x", np.arange(3.0), np.ones(3)).spearman)
    assert agreement("x", np.array([0.0, 2.0]), np.zeros(2)).relative_error == 2.0  # nothing to be relative to


def test_an_experts_choice_is_held_fixed_under_a_large_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that flips routes: with the choice at θ0 replayed the difference is a slope, without it a jump."""
    model = tiny_model("mixtral")
    direction, batch = two_directions(model, "all"), batch_of(rows())
    oracle = Loop().directional(model, batch, direction).values.numpy().ravel()
    found = FiniteDifference(1e-2).directional(model, batch, direction).values.sum(-1).numpy().ravel()
    held = agreement("", found, oracle).relative_error
    monkeypatch.setattr("gradshield.gradients.finite_difference.experts", lambda config: 0)
    found = FiniteDifference(1e-2).directional(model, batch, direction).values.sum(-1).numpy().ravel()
    assert held < agreement("", found, oracle).relative_error / 2


@pytest.mark.parametrize(("config", "count"), [(DbrxConfig(), 4), (AriaTextConfig(), 8), (Gemma3TextConfig(), 0)])
def test_experts_are_counted_by_whatever_name(config: Any, count: int) -> None:
    assert experts(config) == count


class _Backward(torch.autograd.Function):
    """The identity, with a derivative in reverse mode alone, as fused kernels have it."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g


def fused_attention(*args: Any, **kwargs: Any) -> Any:
    output, weights = sdpa_attention_forward(*args, **kwargs)
    return _Backward.apply(output), weights


def test_forward_mode_takes_attention_that_has_one_and_puts_the_models_own_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "fused", fused_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "fused", sdpa_mask)
    model = tiny_model("llama")
    model.config._attn_implementation = "fused"
    direction, batch = two_directions(model, "last:1"), batch_of(rows())
    found = ENGINES["forward"]().directional(model, batch, direction).values.sum(-1)
    oracle = Loop().directional(model, batch, direction).values
    assert agreement("forward", found.numpy().ravel(), oracle.numpy().ravel()).relative_error <= 1e-4
    assert model.config._attn_implementation == "fused"
    used = []
    model.lm_head.register_forward_hook(lambda *_: used.append(model.config._attn_implementation) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ENGINES["forward"]().directional(model, batch, direction)
    assert used == ["sdpa"] and model.config._attn_implementation == "fused"


def test_a_kernel_without_a_forward_mode_is_reported() -> None:
    model = tiny_model("llama")
    direction, batch = two_directions(model, "all"), batch_of(rows())
    model.model.norm.register_forward_hook(lambda module, args, output: _Backward.apply(output))
    with pytest.raises(UsageError, match="without a forward-mode derivative"):
        ENGINES["forward"]().directional(model, batch, direction)
    Loop().directional(model, batch, direction)


@pytest.mark.parametrize(
    ("arch", "target"), [("llama", None), ("gpt2", None), ("llama", "all-linear"), ("mixtral", "all-linear")]
)
def test_targets_are_the_models_own_names_of_what_an_adapter_changes(arch: str, target: str | None) -> None:
    model = tiny_model(arch)
    found = target_names(model, lora(arch, target))
    own = dict(model.named_parameters())
    assert found and set(found) <= set(own) and len(set(found)) == len(found)
    assert parameter_names(model, "targets", found) == [name for name in own if name in found]
    kinds = {name.split(".")[-2] for name in found}
    if target is None:
        assert kinds == ({"c_attn"} if arch == "gpt2" else {"q_proj", "v_proj"})
    else:
        assert kinds >= {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert ("experts" in kinds) == (arch == "mixtral") and "lm_head" not in kinds
    with pytest.raises(UsageError, match=r"targets needs the peft_config .*--lora-config"):
        parameter_names(model, "targets")


def test_targets_have_the_modules_that_an_adapter_trains_whole() -> None:
    for arch, saved in (("llama", "lm_head"), ("gemma", "model.embed_tokens")):  # a tied one goes by its first name
        model, config = tiny_model(arch), lora(arch, modules_to_save=["lm_head"])
        factored = target_names(model, config)
        assert target_names(model, config, saved=True) == [*factored, f"{saved}.weight"]
    with adapted(model, config, seed=0) as carrying:
        found = target_names(carrying, None, saved=True)
        assert found[-1] == "base_model.model.lm_head.modules_to_save.default.weight"
        assert set(found) < {name for name, _ in carrying.named_parameters()}


def test_a_layer_that_has_no_part_in_the_loss_need_not_run() -> None:
    model, batch = tiny_model("llama"), batch_of(rows())
    model.model.layers[1].unused = nn.Linear(3, 3)
    unused = "model.layers.1.unused.weight"
    nowhere = Direction({unused: torch.ones(1, 3, 3)}, ("x",), (1.0,), "")
    assert not ENGINES["perturbation"]().directional(model, batch, nowhere).values.any()
