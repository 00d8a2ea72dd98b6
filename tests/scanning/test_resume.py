"""A scan that was killed goes on where it stopped, and gives what an undisturbed one gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradshield.scanning import shards
from gradshield.selectors import Fihs
from tests.common import chats, command, files, jsonl, scan, scan_arguments, table, write

ROWS = 640
RULE = ("-t", "ratio:5%")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = "and so on, for the answer to the question is what it is " * 3
    return write(tmp_path_factory.mktemp("data") / "data.jsonl", jsonl(chats(ROWS, words)))


def _finished(output: Path) -> dict[str, int]:
    """Shards by name, with the time they were written."""
    found = (output / ".gradshield" / "shards").glob("[!.]*.safetensors")
    return {path.name: path.stat().st_mtime_ns for path in found}


def _stopped(arguments: list[Any], output: Path, shards_before: int, number: int) -> tuple[int, str]:
    """Run a scan in another process, send it a signal once it has written another shard, and see how it ends."""
    script = "import torch; torch.set_num_threads(1); from gradshield.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until and len(_finished(output)) <= shards_before:
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.slow
def test_killed_interrupted_and_run_again(data: Path, folder: Path, probes: Path, tmp_path: Path) -> None:
    output = tmp_path / "disturbed"
    arguments = scan_arguments(data, folder, output, probes, *RULE)
    code, said = _stopped(arguments, output, 0, signal.SIGKILL)
    first = _finished(output)
    assert code == -signal.SIGKILL, said
    assert len(first) > 0
    assert not (output / "manifest.json").exists()

    code, said = _stopped(arguments, output, len(first), signal.SIGINT)
    second = _finished(output)
    assert code == 130, said
    assert said.splitlines()[-1] == "interrupted: finished work is kept; run the same command again to resume"
    assert len(first) < len(second)
    assert first.items() <= second.items()
    assert not (output / "manifest.json").exists()

    assert command(*arguments).code == 0
    assert second.items() <= _finished(output).items()
    whole = tmp_path / "undisturbed"
    assert command(*scan_arguments(data, folder, whole, probes, *RULE)).code == 0
    assert _finished(output).keys() == _finished(whole).keys()
    assert len(second) < len(_finished(whole))
    ours, theirs = table(output), table(whole)
    assert ours["id"].to_pylist() == theirs["id"].to_pylist()
    assert ours["removed"].to_pylist() == theirs["removed"].to_pylist()
    assert ours["category"].to_pylist() == theirs["category"].to_pylist()
    for name in ("score", "decoy", "loss"):
        a, b = ours[name].to_numpy(), theirs[name].to_numpy()
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    for name in ("kept.jsonl", "removed.jsonl"):
        assert files(output)[name] == files(whole)[name]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows each batch measured, of the whole set and with the chosen engine."""
    seen: list[int] = []
    measure = shards.Measurer.measure

    def noted(job: shards.Measurer, rows: Any) -> Any:
        if isinstance(job.selector, Fihs) and job.selector.engine.name == "finite-difference" and len(rows) > 16:
            seen.append(len(rows))
        return measure(job, rows)

    monkeypatch.setattr(shards.Measurer, "measure", noted)
    yield seen


def test_a_second_scan_measures_nothing(measured: list[int], tmp_path: Path) -> None:
    rows = chats(20)
    first = scan(rows, output=tmp_path)
    assert measured == [20]
    second = scan(rows, output=tmp_path)
    assert measured == [20]
    assert np.array_equal(first.scores.values, second.scores.values)
    assert [list(t) for t in first.scores.tokens or ()] == [list(t) for t in second.scores.tokens or ()]
    scan([{"text": 3}, *rows], output=tmp_path)  # other positions, the same tokens
    assert measured == [20]
    scan(list(reversed(rows)), output=tmp_path)
    assert measured == [20, 20]


@pytest.mark.parametrize("damage", ["truncated", "empty", "junk", "flipped", "lacking", "folder"])
def test_a_damaged_shard_is_measured_again(damage: str, measured: list[int], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    rows = chats(20)
    first = scan(rows, output=tmp_path)
    (path,) = (tmp_path / ".gradshield" / "shards").iterdir()
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "junk":
        path.write_bytes(b"\xff" * 100)
    elif damage == "flipped":
        path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 64]) + whole[-19:])
    elif damage == "lacking":
        arrays = load_file(path)
        save_file({name: arrays[name] for name in ("sums", "tokens")}, path)
    else:
        path.unlink()
        path.mkdir()
        with pytest.raises(Exception, match="cannot be written"):
            scan(rows, output=tmp_path)
        path.rmdir()
    second = scan(rows, output=tmp_path)
    assert len(measured) >= 2
    assert np.array_equal(first.scores.values, second.scores.values)
    assert path.read_bytes() == whole


def test_another_version_of_what_measures_measures_again(
    measured: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(20)
    asked: list[None] = []

    def installed() -> dict[str, str]:
        asked.append(None)
        return {"gradshield": "fixed"}

    scan(rows, output=tmp_path)
    monkeypatch.setattr("gradshield.runs._installed", installed)
    for _ in range(2):
        scan(rows, output=tmp_path)
    assert measured == [20, 20]
    asked.clear()
    monkeypatch.setattr(shards, "MOST_ROWS", 2)
    scan(rows, output=tmp_path)
    assert len(asked) < 10  # for each measurement and the manifest, and not once a shard


def test_what_changes_the_numbers_changes_the_shards(measured: list[int], tmp_path: Path) -> None:
    import gradshield as gs
    from tests.tiny import tiny_model, tiny_tokenizer

    rows = chats(20)
    for options in ({}, {"aggregate": "mean"}, {"threshold": "decoy"}):
        scan(rows, output=tmp_path, settings=gs.ScanSettings(**options, selector="fihs"))
    scan(rows, output=tmp_path, allow=scan(rows).scores.ids)
    assert measured == [20, 20]  # the one without a folder, too
    for options in ({"subspace": "last:1"}, {"token_budget": 512}, {"probe": "contrast"}):
        scan(rows, output=tmp_path, settings=gs.ScanSettings(**options, selector="fihs"))
    scan(rows, output=tmp_path, model=tiny_model("llama", seed=1), tokenizer=tiny_tokenizer())
    assert len(measured) == 6


def test_nothing_can_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(Exception, match="No space left") as raised:
        scan(chats(4), output=tmp_path)
    assert getattr(raised.value, "exit_code", None) == 3
    assert not (tmp_path / "manifest.json").exists()
    assert not list((tmp_path / ".gradshield" / "shards").iterdir())
