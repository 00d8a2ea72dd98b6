"""Two processes of a launcher find what one finds, and train together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradshield import launcher
from gradshield.distributed import Launched
from gradshield.errors import UsageError
from gradshield.pipeline.parcel import Origin
from tests.pipeline.common import chats, command, files, jsonl, save_model, scan_arguments, table, write, write_probes

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}


def launch(*arguments: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """A module or a script under torchrun, one thread each, without network."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENV,
    )


def alone(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The same without a launcher."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=ENV)


@pytest.fixture
def asked(tmp_path: Path) -> list[Any]:
    """A scan of many small rows by a tiny model, without its last argument, the folder."""
    data, model = write(tmp_path / "data.jsonl", jsonl(chats(600))), save_model(tmp_path / "model")
    probes = write_probes(tmp_path / "probes.jsonl")
    return scan_arguments(data, model, tmp_path / "unused", probes, "--threshold", "ratio:50%", "--output")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(asked: list[Any], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = alone("-m", "gradshield", *asked, one)
    assert done.returncode == 0, done.stderr
    done = launch("-m", "gradshield", *asked, two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows removed") == 1  # the first process speaks, the other does not
    assert table(two).equals(table(one))
    for name in ("kept.jsonl", "removed.jsonl"):
        assert files(two)[name] == files(one)[name]
    shards = {path.name: path.read_bytes() for path in one.rglob("shards/*")}
    assert len(shards) > 3
    assert shards == {path.name: path.read_bytes() for path in two.rglob("shards/*")}


@pytest.mark.slow
def test_an_error_ends_all_of_them_with_one_sentence(asked: list[str], tmp_path: Path) -> None:
    done = launch("-m", "gradshield", "scan", tmp_path / "none.jsonl", *asked[2:], tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("error: there is no file") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_script_scans_and_trains_on_both(tmp_path: Path) -> None:
    done = launch(ROOT / "examples" / "launched_sft.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows kept") == 1
    kept = (tmp_path / "screened" / "kept.jsonl").read_bytes().splitlines()
    assert 100 < len(kept) < 133  # of 120 harmless and 13 harmful rows
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert np.isfinite(losses).all()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "counted"), [("moderate", "seen 20 trained 10"), ("dualselect", "seen 20 corrected True")]
)
def test_each_process_chooses_among_its_own_rows_and_all_train_alike(method: str, counted: str, tmp_path: Path) -> None:
    done = launch(ROOT / "tests" / "distributed" / "selecting.py", tmp_path / "run", method)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("moved")]
    assert said == [f"moved True same True {counted}"] * 2


def test_the_marks_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launcher.processes(), launcher.first()) == (1, True)
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert (launcher.processes(), launcher.first()) == (2, False)
    monkeypatch.setenv("RANK", "0")
    assert launcher.first()
    monkeypatch.delenv("MASTER_ADDR")  # a job scheduler's own variables are no launcher
    assert launcher.processes() == 1


@pytest.mark.parametrize("name", ["train", "eval", "compare", "cut", "show", "methods", "demo"])
def test_what_is_one_process_s_work_is_refused_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for mark, value in TWO.items():
        monkeypatch.setenv(mark, value)
    other = command(name)
    assert (other.code, other.out, other.err) == (UsageError.exit_code, "", "")
    monkeypatch.setenv("RANK", "0")
    first = command(name)
    assert first.code == UsageError.exit_code
    assert f"gradshield {name}" in first.sentence


@pytest.mark.parametrize("option", [["--workers", "2"], ["--ray", "local"]], ids=lambda option: option[0])
def test_two_ways_to_share_are_refused(option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TWO | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    done = command(
        "scan", str(tmp_path / "d.jsonl"), "--model", "any/model", "--output", str(tmp_path / "out"), *option
    )
    assert done.code == UsageError.exit_code
    assert "--workers and --ray" in done.sentence


def test_only_the_first_process_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="serve"), Launched().open(Origin(None, None, None, 0)):  # type: ignore[arg-type]
        pass
