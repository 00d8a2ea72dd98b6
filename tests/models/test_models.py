"""Loading: what comes in safely, and one clear sentence for what does not."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gradshield.errors import HubError, ModelError, UsageError
from gradshield.models.loading import check_placed, choose_dtype, load, parameters_digest, wrap
from gradshield.models.modules import in_float64
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def _adapter(base: Path, target: Path) -> Any:
    model = tiny_model("llama")
    model.name_or_path = str(base)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(target)
    return tuned.eval()


def _sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 600, text
    return text


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 12).unsqueeze(0)).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_comes_back_as_it_was_saved(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch, seed=3)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert torch.equal(_logits(loaded.model), _logits(model))
    assert (loaded.device.type, loaded.dtype, loaded.is_peft) == ("cpu", torch.float32, False)
    assert not loaded.model.training
    assert loaded.tokenizer("Hi")["input_ids"] == tiny_tokenizer()("Hi")["input_ids"]


def test_dtype_and_device_are_chosen_once(folder: Path) -> None:
    loaded = load(str(folder), device="cpu", dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {loaded.dtype} == {torch.bfloat16}
    assert choose_dtype(torch.float16, torch.device("cpu")) == torch.float16
    with pytest.raises(UsageError, match="auto, float32, bfloat16, float16"):
        load(folder, dtype="int3")
    with pytest.raises(UsageError, match="choose one of auto, cpu"):
        load(folder, device="abacus")


def test_an_adapter_is_found_as_model_or_given_apart(folder: Path, tmp_path: Path) -> None:
    expected = _logits(_adapter(folder, tmp_path))
    alone, apart = load(tmp_path, device="cpu"), load(folder, adapter=tmp_path, device="cpu")
    for loaded in (alone, apart):
        assert torch.allclose(_logits(loaded.model), expected, atol=1e-5)
        assert loaded.is_peft
        assert loaded.adapter == str(tmp_path)
    plain = load(folder, device="cpu")
    assert not torch.allclose(_logits(plain.model), expected, atol=1e-3)
    assert alone.digest == apart.digest != plain.digest
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load(folder, adapter=folder)


def test_the_digest_follows_the_weights(folder: Path, copy: Path) -> None:
    assert load(copy).digest == load(folder).digest
    tiny_model("llama", seed=1).save_pretrained(copy)
    assert load(copy).digest != load(folder).digest
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = parameters_digest(model)
    assert before == parameters_digest(tiny_model("llama", dtype=torch.bfloat16))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert parameters_digest(model) != before


def test_pickles_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load(copy)
    (copy / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match="convert them") as raised:
        load(copy)
    _sentence(raised.value)


def test_code_runs_only_when_asked_for(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    code = "raise RuntimeError('the code that came with the model was run')\n"
    (copy / "custom.py").write_text(code)
    auto_map = {"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.M"}
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "homemade", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="--trust-remote-code") as raised:
        load(copy)
    _sentence(raised.value)
    with pytest.raises(ModelError, match="was run"):
        load(copy, trust_remote_code=True)
    # An architecture that transformers has itself is loaded from there, and the code next to it is not read.
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    assert type(load(copy).model).__module__.startswith("transformers.")


def test_folders_that_are_not_a_model(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    cases = {
        "no folder": str(empty / "missing" / "model"),
        "is a file": copy / "config.json",
        "no config.json": empty,
    }
    for words, given in cases.items():
        with pytest.raises(ModelError, match=words) as raised:
            load(given)
        _sentence(raised.value)
    (copy / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy)


def test_broken_or_missing_weights_are_never_filled_in(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights of a .* \(model.layers.1.mlp.up_proj.weight\)") as raised:
        load(copy)
    _sentence(raised.value)
    (copy / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be loaded") as raised:
        load(copy)
    _sentence(raised.value)


def test_a_missing_tokenizer_is_said(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="the tokenizer of") as raised:
        load(copy)
    _sentence(raised.value)


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for given in ({"name": "owner/name"}, {"name": "gpt-none"}):
        with pytest.raises(HubError, match="the hub cannot be reached") as raised:
            load(**given)
        _sentence(raised.value)


def test_wrapping_changes_nothing() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    model.train()
    next(model.parameters()).requires_grad_(False)
    tokenizer.pad_token = None
    flags = [p.requires_grad for p in model.parameters()]
    before = parameters_digest(model)
    wrapped = wrap(model, tokenizer)
    assert wrapped.model is model
    assert wrapped.digest == before == parameters_digest(model)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert tokenizer.pad_token is None
    assert wrapped.pad_token_id == tokenizer.eos_token_id
    assert (wrapped.dtype, wrapped.device.type) == (torch.float32, "cpu")


def test_a_model_on_the_cpu_of_a_machine_with_a_gpu_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    for kind, here in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: False)
            patched.setattr(here, "is_available", lambda: True)
            with pytest.warns(UserWarning, match=rf"move it with model\.to\('{kind}'\) first"):
                assert wrap(model, tiny_tokenizer()).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(model, tiny_tokenizer())


def test_what_cannot_be_wrapped() -> None:
    with pytest.raises(UsageError, match="the model is a str"):
        wrap("model", tiny_tokenizer())
    with pytest.raises(UsageError, match="needs its tokenizer"):
        wrap(tiny_model("gpt2"), None)
    with pytest.raises(ModelError, match="no weights in memory"):
        wrap(tiny_model("gpt2").to("meta"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("quantize", "2bit", "4bit, 8bit"), ("device_map", "everywhere", "auto, balanced")],
    ids=["quantize", "device_map"],
)
def test_unknown_placements_list_what_there_is(option: str, value: str, allowed: str) -> None:
    with pytest.raises(UsageError, match=allowed):
        load("any/model", **{option: value})


class _OnApple:
    """A tensor on a device without float64."""

    device = torch.device("mps")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def cpu(self) -> torch.Tensor:
        return self.tensor

    def double(self) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")


def test_float64_is_on_the_cpu_where_the_device_has_none() -> None:
    tensor = torch.tensor([1.0, 1e-8])
    there: Any = _OnApple(tensor)
    for found in (in_float64(tensor), in_float64(there)):
        assert found.dtype == torch.float64 and torch.equal(found, tensor.double())
    assert in_float64(torch.zeros(2, device="meta")).device.type == "meta"  # any other device keeps its numbers


def test_a_device_and_a_map_of_devices_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="leave out one"):
        load("any/model", device="cpu", device_map="auto")


def test_a_map_of_devices_on_one_device_is_the_model(folder: Path) -> None:
    spread, whole = load(folder, device_map="auto"), load(folder)
    assert parameters_digest(spread.model) == parameters_digest(whole.model)
    assert spread.device == whole.device
    assert spread.source is not None
    assert parameters_digest(spread.source.load("cpu").model) == parameters_digest(whole.model)


@pytest.mark.parametrize("left", ["cpu", "disk"])
def test_layers_left_off_the_devices_are_refused(left: str) -> None:
    with pytest.raises(UsageError, match=f"are on the {left}"):
        check_placed(SimpleNamespace(hf_device_map={"model": 0, "lm_head": left}), "auto")
    check_placed(SimpleNamespace(hf_device_map={"model": 0, "lm_head": 1}), "auto")
    check_placed(SimpleNamespace(hf_device_map={"": "cpu"}), "auto")


def test_quantisation_without_its_library_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape("gradshield[quantized]")):
        load("any/model", quantize="4bit")
