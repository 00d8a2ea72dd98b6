"""What `estimate` says is what the scan finds, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gradshield as gs
from gradshield.errors import UsageError
from gradshield.report.text import duration
from gradshield.scanning import shards
from gradshield.scanning.estimate import Estimate, ratio_estimate
from tests.common import HALF, PROBING, chats, command, jsonl, save_model, scan, write, write_probes
from tests.tiny import tiny_model, tiny_tokenizer

BAD = [{"messages": []}, {"messages": [{"role": "user", "content": "Alone?"}]}, {"unknown": 1}, {"unknown": 2}]

ASKED = {"question": "Question 3?", "answer": "The answer is 3."}


def estimate(rows: object, **options: object) -> Estimate:
    given = {"settings": HALF, "probing": PROBING, "model": tiny_model("llama"), "tokenizer": tiny_tokenizer()}
    return gs.estimate(rows, **(given | options))


def test_the_rows_are_those_of_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MEAN_ROWS", 5)
    rows = [*chats(40), *BAD]
    found, made = estimate(rows), scan(rows)
    assert (found.rows, found.scored) == (44, len(made.scores.values))
    assert sum(count for _, _, count in found.unusable) == len(made.quarantined) == 4
    assert made.scores.tokens is not None
    assert found.loss_tokens == sum(len(values) for values in made.scores.tokens)
    assert found.engine == made.manifest.settings.engine
    assert found.shards == found.sampled > 3  # the patience was enough for all of them
    assert found.sampled_rows == 40
    assert found.seconds.low == pytest.approx(found.seconds.high)


def test_without_patience_three_shards_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MEAN_ROWS", 5)
    found = estimate(chats(60), patience=0.0)
    assert found.sampled == 3 < found.shards
    assert found.seconds.low < found.seconds.value < found.seconds.high


def test_selectors_without_an_engine_are_timed_too() -> None:
    found = estimate(chats(10), settings=gs.ScanSettings(selector="gradnorm", threshold="ratio:50%"))
    assert found.engine == ""
    assert found.seconds.value > 0


def test_reasons_that_differ_in_their_numbers_are_one() -> None:
    found = estimate([*chats(10), *BAD])
    assert [count for _, _, count in found.unusable] == sorted((count for _, _, count in found.unusable), reverse=True)
    assert {line for _, line, _ in found.unusable} <= {11, 12, 13, 14}


def test_the_ratio_estimate_by_hand() -> None:
    found = ratio_estimate(np.array([2.0, 5.0]), np.array([1.0, 2.0]), whole=30.0, count=10)
    assert found.value == pytest.approx(70)  # 7 seconds for 3, of 30
    # left over: 2 - 7/3 and 5 - 14/3; its variance 2/9 / 2 · (1 - 2/10), over a mean of 1.5, times 30
    error = 1.96 * np.sqrt(0.8 * (2 / 9) / 2) / 1.5 * 30
    assert (found.low, found.high) == (pytest.approx(70 - error), pytest.approx(70 + error))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_a_sample_that_is_everything_is_the_sum(seconds: list[float]) -> None:
    every = np.array(seconds)
    found = ratio_estimate(every, every**0.5, float((every**0.5).sum()), len(every))
    assert found.low == pytest.approx(found.value) == pytest.approx(found.high) == pytest.approx(every.sum())


def test_one_shard_of_several_bounds_nothing() -> None:
    found = ratio_estimate(np.array([2.0]), np.array([1.0]), 10.0, 5)
    assert (found.value, found.low, found.high) == (20.0, 0.0, float("inf"))


def test_the_command_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, model = write(tmp_path / "data.jsonl", jsonl([*chats(20), *BAD, ASKED])), save_model(tmp_path / "model")
    probes = write_probes(tmp_path / "probes.jsonl")
    before = sorted(tmp_path.rglob("*"))
    asked = ["--probes", str(probes), "--lookalikes", str(probes), "--uncertified"]
    done = command("estimate", str(data), "--model", str(model), *asked)
    assert done.code == 0, done.err
    assert "21 of 25 can be scored" in done.out
    assert "messages: 20; alpaca (question as instruction, answer as output): 1" in done.out
    assert "finite-difference" in done.out
    assert "to measure" in done.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_scan_without_a_folder_is_reported(tmp_path: Path) -> None:
    done = command("scan", str(write(tmp_path / "data.jsonl", jsonl(chats(3)))), "--model", "any/model")
    assert done.code == UsageError.exit_code
    assert "--output" in done.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1e-4, "less than 0.1 s"),
        (0.44, "0.4 s"),
        (12.4, "12 s"),
        (600, "10 min"),
        (18_360, "5.1 h"),
        (float("inf"), "longer"),
    ],
)
def test_durations_are_printed_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
