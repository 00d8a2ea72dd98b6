"""What is found on a model is kept for the next scan of it: the same numbers, for less work, and never another model's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradshield as gs
from gradshield import cache
from gradshield.probes import base
from gradshield.scanning import preparing
from gradshield.selectors import Fihs
from tests.common import PROBING, chats, command, jsonl, scan_arguments, write
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = chats(12)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


def scanned(model: nn.Module, **more: Any) -> gs.Selection:
    return gs.scan(ROWS, model=model, tokenizer=tiny_tokenizer(), probing=PROBING, **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.iterdir())


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What had to be computed."""
    seen: list[str] = []
    for owner, name in ((preparing, "openings"), (Fihs, "prepare"), (preparing, "_fihs_of"), (preparing, "_step")):
        real = getattr(owner, name)

        def noted(*given: Any, real: Any = real, name: str = name, **more: Any) -> Any:
            seen.append(name)
            return real(*given, **more)

        monkeypatch.setattr(owner, name, noted)
    return seen


def test_the_second_scan_finds_what_the_first_found(kept: Path, worked: list[str]) -> None:
    model = tiny_model("llama")
    first = scanned(model)
    assert set(worked) == {"openings", "prepare", "_fihs_of", "_step"}
    assert names(kept) == ["direction", "known", "openings", "ruler", "step"]
    worked.clear()
    second = scanned(model)
    assert worked == []
    assert np.array_equal(first.scores.values, second.scores.values)
    assert np.array_equal(first.scores.signals["fihs"], second.scores.signals["fihs"], equal_nan=True)
    assert first.manifest.settings.direction_sha256 == second.manifest.settings.direction_sha256


@pytest.mark.parametrize("change", ["weights", "probes", "subspace", "another model"])
def test_what_changes_the_model_or_its_probes_is_found_anew(change: str, kept: Path, worked: list[str]) -> None:
    model, more = tiny_model("llama"), {}
    scanned(model)
    worked.clear()
    if change == "weights":
        with torch.no_grad():
            list(model.parameters())[-1].mul_(1.01)
    elif change == "probes":
        more = {"probing": gs.Probing(requests=PROBING.requests[1:], lookalikes=PROBING.lookalikes, uncertified=True)}
    elif change == "subspace":
        more = {"settings": gs.ScanSettings(subspace="last:1")}
    else:
        model = tiny_model("gpt2")
    gs.scan(ROWS, **{"model": model, "tokenizer": tiny_tokenizer(), "probing": PROBING, **more})
    assert "prepare" in worked and ("openings" in worked) == (change != "subspace")


def test_a_probe_of_ones_own_is_not_kept(kept: Path) -> None:
    def gap(model: nn.Module, batch: gs.PromptBatch) -> torch.Tensor:
        logits = base.first_logits(model, batch)
        return (logits[:, 20] - logits[:, 30]).mean()

    scanned(tiny_model("llama"), settings=gs.ScanSettings(probe=gap, selector="fihs", threshold="ratio:50%"))
    assert names(kept) == ["openings", "step"]


@pytest.mark.parametrize("damage", ["", "{", "flipped"])
def test_a_damaged_entry_is_found_anew(damage: str, kept: Path, worked: list[str]) -> None:
    model = tiny_model("llama")
    first = scanned(model)
    for path in kept.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + b"7" + whole[-8:] if damage == "flipped" else damage.encode())
    worked.clear()
    assert np.array_equal(scanned(model).scores.values, first.scores.values)
    assert set(worked) == {"openings", "prepare", "_fihs_of", "_step"}
    worked.clear()
    scanned(model)
    assert worked == []


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(write(tmp_path / "file", "not a folder")))
    assert len(scanned(tiny_model("llama")).scores.values) == len(ROWS)


def test_the_entries_used_longest_ago_make_room(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST", 400)

    def value(name: str) -> str:
        return cache.remembered(name, lambda: name[5] * 100, cache.save_json, cache.load_json)

    a, b, c = (f"step-{letter * 40}.json" for letter in "abc")
    for age, name in enumerate((c, b)):  # each of 169 bytes
        value(name)
        os.utime(kept / name, (1000 - age, 1000 - age))
    assert value(b) == "b" * 100  # used now, and c the longest ago
    value(a)
    assert {path.name for path in kept.iterdir()} == {a, b}
    assert cache.remembered("large", lambda: 1, cache.save_json, cache.load_json, size=10**6) == 1
    assert not (kept / "large").exists()


def test_the_command_lists_and_clears(kept: Path, folder: Path, probes: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl(ROWS))
    assert command(*scan_arguments(data, folder, tmp_path / "one", probes), "--no-cache").code == 0
    assert not kept.exists()
    os.environ[cache.VARIABLE] = str(kept)  # --no-cache is for its own process
    assert command(*scan_arguments(data, folder, tmp_path / "two", probes)).code == 0
    listed = command("cache").out
    assert "3 entries" in listed and "direction" in listed and str(kept) in listed.replace("\n", "")
    assert "3 entries deleted" in command("cache", "--clear").out and names(kept) == []


def test_a_folder_of_other_files_loses_none_of_them(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.mkdir()
    others = [
        kept / name for name in ("thesis.txt", "model.safetensors", "answers-1.json", ".download.part", ".a.b.part")
    ]
    for path in others:
        path.write_text("mine")
        os.utime(path, (0, 0))
    (kept / f".answers-{'0' * 40}.json.{'a' * 12}.part").mkdir()
    monkeypatch.setattr(cache, "MOST", 1)
    scanned(tiny_model("llama"))
    assert cache.clear() >= 1
    assert sorted(kept.iterdir()) == sorted(others)


def test_an_entry_that_may_only_be_read_is_used(kept: Path, worked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    scanned(model)
    worked.clear()

    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(cache.os, "utime", refused)
    scanned(model)
    assert worked == []


def test_a_variable_that_names_no_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, "~nobody-of-this-name/cache")
    done = command("cache")
    assert done.code == 2 and cache.VARIABLE in done.sentence
