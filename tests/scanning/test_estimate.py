"""What --dry-run tells is what the scan finds, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import gradshield as gs
from gradshield.cli.estimate import duration
from gradshield.errors import UsageError
from gradshield.scanning import shards
from gradshield.scanning.estimate import Estimate
from tests.common import HALF, PROBING, chats, command, jsonl, save_model, scan, write, write_probes
from tests.tiny import tiny_model, tiny_tokenizer

BAD = [{"messages": []}, {"messages": [{"role": "user", "content": "Alone?"}]}, {"unknown": 1}, {"unknown": 2}]


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
    assert found.engine == made.manifest.settings["engine"]
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
    assert (found.engine, found.passes, found.kinds) == ("", 0, 0)
    assert found.seconds.value > 0


def test_reasons_that_differ_in_their_numbers_are_one() -> None:
    found = estimate([*chats(10), *BAD])
    assert [count for _, _, count in found.unusable] == sorted((count for _, _, count in found.unusable), reverse=True)
    assert {line for _, line, _ in found.unusable} <= {11, 12, 13, 14}


def test_the_command_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, model = write(tmp_path / "data.jsonl", jsonl([*chats(20), *BAD])), save_model(tmp_path / "model")
    probes = write_probes(tmp_path / "probes.jsonl")
    before = sorted(tmp_path.rglob("*"))
    asked = ["--probes", str(probes), "--lookalikes", str(probes), "--uncertified"]
    done = command("scan", str(data), "--model", str(model), *asked, "--dry-run")
    assert done.code == 0, done.err
    assert "20 of 24 can be scored" in done.out
    assert "finite-difference" in done.out
    assert "the engine takes about 2:" in done.out
    assert "to measure" in done.out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "out"],
        ["--workers", "2"],
        ["--ray", "auto"],
        ["--fail-above", "1%"],
        ["--allow", "ids.txt"],
        ["--labels", "labels.json"],
    ],
    ids=lambda options: options[0],
)
def test_options_that_a_dry_run_does_not_use_are_refused(options: list[str], tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", jsonl(chats(3)))
    done = command("scan", str(data), "--model", "any/model", "--dry-run", *options)
    assert done.code == UsageError.exit_code
    assert "--dry-run" in done.sentence


def test_a_scan_without_a_folder_is_told_so(tmp_path: Path) -> None:
    done = command("scan", str(write(tmp_path / "data.jsonl", jsonl(chats(3)))), "--model", "any/model")
    assert done.code == UsageError.exit_code
    assert "--output" in done.sentence


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
def test_durations_are_told_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
