"""What stays in memory of a row is a few numbers, whatever the row says and however many there are."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import gradshield as gs
from gradshield.scanning import shards
from gradshield.selectors import Measured
from tests.common import chat, jsonl, scan, write

HELD, AT_PEAK = 110, 250  # bytes a row; an `Example` with its words took 1,660, and its tokens and values 800 more
FEW, MANY = 1500, 4500
WORDS = "and so on and on and on"


@pytest.mark.slow
def test_a_scan_holds_a_hundred_bytes_a_row(tmp_path: Path) -> None:
    """Rows are read, rendered, measured and cut; `random` asks no model, so that this takes seconds.

    Nothing is written: the page takes more than the rows do, as much for few of them as for many.
    """
    held, peak = [], []
    for count in (FEW // 4, FEW, MANY):  # the first pays for what is loaded once
        data = write(tmp_path / f"{count}.jsonl", jsonl([chat(n, f"{WORDS} {n}") for n in range(count)]))
        gc.collect()
        tracemalloc.start()
        selection = scan(data, settings=gs.ScanSettings(selector="random", threshold="ratio:2%"))
        gc.collect()
        now, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        held.append(now)
        peak.append(most)
        assert len(selection.scores.ids) == count
    assert (held[2] - held[1]) / (MANY - FEW) < HELD
    assert (peak[2] - peak[1]) / (MANY - FEW) < AT_PEAK


def _part(start: int, sizes: list[int]) -> Measured:
    tokens = tuple(np.arange(size, dtype=np.float64) + row for row, size in enumerate(sizes, start))
    sums = np.array([t.sum() for t in tokens])
    return Measured(np.arange(start, start + len(sizes)), sums, sums / 2, np.array(sizes), tokens)


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_gathered_is_what_is_joined(turned: bool) -> None:
    """The slow twin keeps every part; rows of any order come out in the order of the input."""
    parts = [_part(0, [3, 1, 2]), _part(3, [5]), _part(4, [2, 2])]
    parts = parts[::-1] if turned else parts
    gathered = shards._Gathered()
    for part in parts:
        gathered.add(part)
    found, twin = gathered.measured(), Measured.joined(parts)
    for name in ("rows", "sums", "nll", "lengths"):
        assert np.array_equal(getattr(found, name), getattr(twin, name))
        assert getattr(found, name).dtype == getattr(twin, name).dtype
    assert [t.tolist() for t in found.tokens or ()] == [t.tolist() for t in twin.tokens or ()]


def test_there_are_no_values_where_a_shard_has_none() -> None:
    gathered = shards._Gathered()
    for part in (_part(0, [2]), Measured(np.array([1]), np.ones(1), np.ones(1), np.ones(1)), _part(2, [2])):
        gathered.add(part)
    found = gathered.measured()
    assert found.tokens is None and found.rows.tolist() == [0, 1, 2]


def test_values_of_tokens_take_no_memory() -> None:
    gathered, used = shards._Gathered(), []
    tracemalloc.start()
    try:
        for start in range(0, 30_001, 100):
            if start % 15_000 == 0:
                used.append(tracemalloc.get_traced_memory()[0])
            gathered.add(_part(start, [40] * 100))
    finally:
        tracemalloc.stop()
    assert (used[2] - used[1]) / 15_000 < 45  # four numbers of eight bytes and a size of four; the values take 320
