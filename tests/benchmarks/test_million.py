"""The benchmark of a million rows: its rows are what it says, and what it prints follows from what a scan leaves."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks import million


def test_rows_are_distinct_and_the_same_every_time() -> None:
    few, more = list(million.rows(300)), list(million.rows(6000))
    assert [json.dumps(row) for row, _ in few] == [json.dumps(row) for row, _ in islice(more, 300)]
    assert len({json.dumps(row) for row, _ in more}) == len(more) == 6000
    assert sum(label for _, label in more) == pytest.approx(million.SHARE * 6000, rel=0.3)


@pytest.mark.slow
def test_a_short_run_gives_every_figure(tmp_path: Path) -> None:
    tokens = million.write(300, tmp_path)
    found = million.figures(tmp_path, tokens, *million.scan(tmp_path))
    assert found["rows"] == 300 and found["tokens"] == tokens.sum()
    counts = million._shards(tmp_path / "out" / ".gradshield" / "shards", tokens)[2]
    assert found["shards"] == len(counts) and counts.sum() == 300
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["resident_mb"]["peak"] >= found["resident_mb"]["all read"] > 0
    assert found["bytes_a_row"] < 2**26 / 300  # of so few rows the libraries' own ups and downs are all there is
    assert np.isfinite(found["last_to_first"]) and found["labels"]["lost"]["n"] > 250
    assert "bytes a row of growth" in million.table(found)
