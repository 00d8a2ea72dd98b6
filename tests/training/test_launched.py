"""Two processes of a launcher train together, in a script of the user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def launch(*arguments: str | Path) -> str:
    """What a script under torchrun prints, with two processes of one thread each, without network."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_process_scans_and_both_train(tmp_path: Path) -> None:
    assert launch(ROOT / "examples" / "launched_sft.py", tmp_path).count("rows kept") == 1
    kept = (tmp_path / "screened" / "kept.jsonl").read_bytes().splitlines()
    assert 100 < len(kept) < 133  # of 120 harmless and 13 harmful rows
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert np.isfinite(losses).all()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_each_process_chooses_among_its_own_rows_and_all_train_alike(tmp_path: Path) -> None:
    said = launch(ROOT / "tests" / "training" / "launched.py", tmp_path)
    assert sorted(line for line in said.splitlines() if " moved " in line) == [
        *["dualselect moved True same True seen 20 corrected True"] * 2,
        *["moderate moved True same True seen 20 trained 10"] * 2,
    ]
