"""A base in 4 or 8 bits: the adapter's scores are the oracle's, the rest is refused, and no weight changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from peft import LoraConfig

import gradshield as gs
from gradshield.errors import UsageError
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.scanning.workers import Parcel
from tests.common import PROBING, chats, command, jsonl, scan_arguments, write, write_probes

pytest.importorskip("bitsandbytes", reason="needs gradshield[quantized]")

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def scanned(loaded: LoadedModel, engine: str, aggregate: str, subspace: str = "lora") -> gs.Selection:
    settings = gs.ScanSettings(
        threshold="ratio:50%", subspace=subspace, engine=engine, aggregate=aggregate, selector="fihs"
    )
    return gs.scan(chats(20), model=loaded, peft_config=LORA, probing=PROBING, settings=settings)


@pytest.mark.parametrize("engine", ["finite-difference", "perturbation", "forward"])
def test_in_4_bits_every_engine_is_the_oracle(folder: Path, engine: str) -> None:
    loaded = loading.load(folder, device="cpu", quantize="4bit")
    before = loading.parameters_digest(loaded.model)
    found = scanned(loaded, engine, "sum" if engine == "perturbation" else "push")
    agreed = found.manifest.results.agreement
    # Where a processor's 4-bit kernel rounds to half precision a finite step is rounded away, and the next engine takes over.
    allowed = {engine, "forward"} if engine == "finite-difference" else {engine}
    assert agreed.engine in allowed and found.manifest.settings.engine == agreed.engine
    assert agreed.spearman > 0.999
    assert agreed.relative_error < 1e-2
    assert loading.parameters_digest(loaded.model) == before


def test_in_8_bits_row_sums_are_the_oracle_s(folder: Path) -> None:
    loaded = loading.load(folder, device="cpu", quantize="8bit")
    before = loading.parameters_digest(loaded.model)
    found = scanned(loaded, "auto", "sum")
    agreed = found.manifest.results.agreement
    assert agreed.engine == "perturbation"
    assert agreed.relative_error < 1e-4
    assert loading.parameters_digest(loaded.model) == before


@pytest.mark.parametrize(
    ("engine", "aggregate"), [("auto", "push"), ("forward", "sum"), ("finite-difference", "sum")], ids=str
)
def test_in_8_bits_what_would_measure_rounding_is_refused(folder: Path, engine: str, aggregate: str) -> None:
    loaded = loading.load(folder, device="cpu", quantize="8bit")
    with pytest.raises(UsageError, match="8 bits"):
        scanned(loaded, engine, aggregate)


@pytest.mark.parametrize("subspace", ["all", "targets", "last:1"])
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_weights_without_a_gradient_are_no_subspace(folder: Path, quantize: str, subspace: str) -> None:
    loaded = loading.load(folder, device="cpu", quantize=quantize)
    with pytest.raises(UsageError, match="have no gradient"):
        scanned(loaded, "perturbation", "sum", subspace)


def test_the_command_takes_it(folder: Path, tmp_path: Path) -> None:
    probes = write_probes(tmp_path / "probes.jsonl")
    data, lora = tmp_path / "data.jsonl", tmp_path / "lora.json"
    lora.write_text('{"peft_type": "LORA", "r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}')
    write(data, jsonl(chats(20)))
    more = [
        "--threshold",
        "ratio:50%",
        "--quantize",
        "4bit",
        "--subspace",
        "lora",
        "--lora-config",
        lora,
        "--device",
        "cpu",
    ]
    done = command(*scan_arguments(data, folder, tmp_path / "out", probes, *more))
    assert done.code == 0, done.err
    assert "10 of 20 rows removed" in done.out


def test_its_workers_load_the_same(folder: Path) -> None:
    loaded = loading.load(folder, device="cpu", quantize="4bit")
    assert loaded.source is not None
    again = loaded.source.load("cpu")
    assert loading.parameters_digest(again.model) == loading.parameters_digest(loaded.model)
    with pytest.raises(UsageError, match="weights of the type Params4bit"):
        Parcel.of(replace(loaded, source=None), loaded.model, None, 0)
