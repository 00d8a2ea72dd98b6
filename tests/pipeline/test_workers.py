"""Several processes find what one finds, whatever dies on the way, and none of them stays behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import gradshield as gs
from gradshield import models
from gradshield.data import RenderConfig, batches, read, render_all
from gradshield.errors import ModelError, ScoreError, UsageError
from gradshield.gradients import Loop
from gradshield.models import parameters_digest
from gradshield.pipeline import shards, workers
from gradshield.pipeline.parcel import Origin, bare
from gradshield.pipeline.scoring import asked_of
from gradshield.selectors import (
    SELECTORS,
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
from tests.pipeline.common import PROBING, chats, jsonl, scan, write
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ROWS = chats(120)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads as each of two workers has them, and many small shards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(shards, "MEAN_ROWS", 10)
    yield
    torch.set_num_threads(threads)


def children() -> list[int]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that has just been killed
            if "worker" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def same(one: gs.Selection, other: gs.Selection) -> None:
    np.testing.assert_array_equal(one.scores.values, other.scores.values)
    assert one.scores.ids == other.scores.ids
    np.testing.assert_array_equal(one.removed, other.removed)
    assert one.categories == other.categories
    assert one.manifest.settings["direction_sha256"] == other.manifest.settings["direction_sha256"]


# ---- the same selection -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("subspace", ["all", "lora"])
def test_workers_find_what_one_process_finds(subspace: str, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "model": folder,
        "settings": gs.ScanSettings(threshold="ratio:50%", subspace=subspace, selector="fihs"),
    }
    options["peft_config"] = LORA if subspace == "lora" else None
    alone = scan(ROWS, output=tmp_path / "one", **options)
    shared = scan(ROWS, output=tmp_path / "two", workers=2, **options)
    same(alone, shared)
    ones, twos = (sorted((tmp_path / name / ".gradshield/shards").iterdir()) for name in ("one", "two"))
    assert [path.name for path in ones] == [path.name for path in twos]
    assert [path.read_bytes() for path in ones] == [path.read_bytes() for path in twos]
    assert not children()


@pytest.mark.slow
def test_a_model_given_as_an_object_is_copied() -> None:
    model = get_peft_model(tiny_model("llama"), LORA)
    before = parameters_digest(model)
    options: dict[str, Any] = {"model": model, "tokenizer": tiny_tokenizer()}
    same(scan(ROWS, **options), scan(ROWS, workers=2, **options))
    assert parameters_digest(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_is_bit_identical(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(architecture).to(dtype)
    origin = Origin(models.wrap(model, tiny_tokenizer()), model, None, 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    with origin.pack(tmp_path).open("cpu") as found:
        assert parameters_digest(found) == parameters_digest(model)
        assert torch.equal(found(ids).logits, model.eval()(ids).logits)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_copy_has_its_adapters(wrapped: bool, tmp_path: Path) -> None:
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
    origin = Origin(models.wrap(model, tiny_tokenizer()), model, None, 0)
    ids = torch.tensor([[5, 6, 7, 8]])
    with origin.pack(tmp_path).open("cpu") as found:
        assert parameters_digest(found) == parameters_digest(model)
        assert torch.equal(found(ids).logits, model.eval()(ids).logits)


def test_a_model_that_cannot_be_built_again_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    loaded = models.wrap(model, tiny_tokenizer())
    with pytest.raises(UsageError, match="without a transformers config"):
        Origin(loaded, model, None, 0).pack(tmp_path)
    with pytest.raises(UsageError, match="which other machines do not have"):
        Origin(loaded, model, None, 0).pack(None)


class _Louder(LlamaForCausalLM):
    """A caller's own model: the same config and weights, and other numbers."""

    def forward(self, *arguments: Any, **more: Any) -> Any:
        found = super().forward(*arguments, **more)
        found.logits = 2 * found.logits
        return found


class _Linear(torch.nn.Linear):
    pass


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
    ("change", "told"),
    [
        (_hooked, r"a hook at 'model\.layers\.1'"),
        (_hooked_before, "a hook at 'lm_head'"),
        (_patched, "a forward that is not its class's at 'model'"),
        (_patched_under_accelerate, "a forward that is not its class's at 'model'"),
        (_hooked_by_accelerate, "a forward that is not its class's at 'lm_head'"),
        (_of_its_own_class, "_Louder at 'its top', where its config gives a .*LlamaForCausalLM"),
        (_with_a_layer_of_its_own, "_Linear at 'model.layers.0.mlp.up_proj'"),
    ],
)
def test_a_model_with_code_of_the_callers_own_is_refused(change: Any, told: str, tmp_path: Path) -> None:
    """Its config and weights are those of another model, which would be scored in its place."""
    model = tiny_model("llama")
    change(model)
    origin = Origin(models.wrap(model, tiny_tokenizer()), model, None, 0)
    with pytest.raises(UsageError, match=told), origin.pack(tmp_path).open("cpu"):
        pass


def test_hooks_of_the_libraries_are_no_code_of_the_callers_own(tmp_path: Path) -> None:
    model: Any = get_peft_model(tiny_model("llama"), LORA)
    model.enable_input_require_grads()
    ids = torch.tensor([[5, 6, 7, 8]])
    model.eval()(ids, output_hidden_states=True)  # transformers leaves the hooks that gathered them
    for module in (model.base_model.model.lm_head, model.base_model.model.model.norm):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    remove_hook_from_module(model.base_model.model.lm_head)
    origin = Origin(models.wrap(model, tiny_tokenizer()), model, None, 0)
    with origin.pack(tmp_path).open("cpu") as found:
        assert torch.equal(found(ids).logits, model(ids).logits)


def test_every_selector_travels() -> None:
    """What `bare` leaves is all that `measure` reads."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    rendered = render_all(read(chats(10)).examples, tokenizer, RenderConfig(max_length=64)).rendered
    probe = gs.ScanSettings(selector="fihs").make_probe()
    asked, harmless = asked_of(tokenizer, PROBING)
    probe.fit(model, tokenizer, asked, harmless)
    known = References(harmful=tuple(rendered[:4]), refused=tuple(rendered[4:8]), answered=tuple(rendered[4:8]))
    fihs = Fihs(lambda *_: probe(*_), asked, Loop(), parse_aggregate("sum"), "all")
    reading = Reading.fit(model, Turn.of(harmless), asked, harmless)
    made: list[Any] = [
        fihs,
        Screen(fihs, reading, tokenizer, Anchors(np.ones(20), np.zeros(20))),
        Moderate(),
        GradNorm(),
        Loss(),
        Random(3),
        Larf(known),
    ]
    assert {selector.name for selector in made} | {"guard"} == set(SELECTORS)
    (batch,) = batches(rendered, 10**6, 10**6)
    for selector in made:
        direction = selector.prepare(model)
        travelled = pickle.loads(pickle.dumps(bare(selector)))
        assert dict(travelled.settings()) == dict(selector.settings())
        one, other = selector.measure(model, direction, batch), travelled.measure(model, direction, batch)
        np.testing.assert_array_equal(one.sums, other.sums)
        if selector.name == "screen":
            assert one.extra is not None and np.isfinite(one.extra).all()
            np.testing.assert_array_equal(one.extra, other.extra)
    with pytest.raises(UsageError, match="leave out --workers"):
        bare(GuardFilter(None, lambda ids: ""))  # type: ignore[arg-type]


def test_devices() -> None:
    gpu = torch.device("cuda")
    assert workers.devices(gpu, 5, 2, fixed=False) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert workers.devices(torch.device("cuda", 1), 2, 2, fixed=True) == ["cuda:1", "cuda:1"]
    assert workers.devices(torch.device("cpu"), 2, 8, fixed=False) == ["cpu", "cpu"]


def test_the_number_of_workers_is_checked() -> None:
    with pytest.raises(UsageError, match="there are 0 workers: give at least 1"):
        scan(ROWS, workers=0)


# ---- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shard_of_a_killed_worker_is_measured_by_another(folder: Path) -> None:
    killed: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "scoring rows" and len(killed) < 2:
            killed.append(max(set(children()) - set(killed)))
            os.kill(killed[-1], signal.SIGKILL)

    same(scan(ROWS, model=folder), scan(ROWS, model=folder, workers=2, progress=progress))
    assert len(killed) == 2
    assert not children()


def test_a_shard_that_kills_every_worker_ends_the_scan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('no room')"))
    with pytest.raises(
        ScoreError, match=r"^3 workers died, one after the other, on rows \d+ to \d+ \(exit code 1: no room"
    ):
        scan(ROWS, model=folder, workers=2)
    assert not children()


@pytest.mark.slow
def test_an_error_of_a_worker_is_the_scans(folder: Path) -> None:
    """Here: the weights in memory are no longer those of the folder."""
    loaded = models.load(folder)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(0.5)
    with pytest.raises(ModelError, match="is not the one that is scored"):
        scan(ROWS, model=loaded, workers=2)


@pytest.mark.slow
def test_an_interrupted_scan_stops_its_workers_and_goes_on(folder: Path, tmp_path: Path) -> None:
    def interrupted(stage: str, done: int, total: int) -> None:
        if stage == "scoring rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(ROWS, model=folder, output=tmp_path / "out", workers=2, progress=interrupted)
    assert not children()
    same(scan(ROWS, model=folder, output=tmp_path / "out"), scan(ROWS, model=folder))


@pytest.mark.slow
def test_no_worker_outlives_a_scan_that_is_killed(folder: Path, tmp_path: Path, probes: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl(chats(3000)))
    arguments = ["scan", str(data), "--model", str(folder), "--output", str(tmp_path / "out"), "--workers", "2"]
    arguments += ["--probes", str(probes), "--lookalikes", str(probes), "--uncertified"]
    code = f"from gradshield.cli import main; main({arguments!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        begun = _until(lambda: [c for c in psutil.Process(parent.pid).children() if c.cmdline()], 120)
        _until(lambda: any((tmp_path / "out" / ".gradshield" / "shards").glob("*.safetensors")), 120)
        assert len(psutil.Process(parent.pid).children()) == 2
    finally:
        parent.kill()
        parent.wait()
    gone, alive = psutil.wait_procs(begun, timeout=20)
    assert not alive
    assert len(gone) >= 1


def _until(met: Any, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := met():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not met in {seconds} seconds")
