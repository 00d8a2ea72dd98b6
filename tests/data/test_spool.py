"""Rows come back from disk as they were put there, and what they say takes no memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.data.spool import Spool
from gradshield.errors import DataError
from gradshield.types import Rendered, Tokens

sequences = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=30), st.sampled_from([1.0, -1.0, 0.3])), max_size=3
)


def row(place: int, parts: list[tuple[list[int], float]]) -> Rendered:
    made = tuple(Tokens(np.array(ids, np.int64), np.array([i % 3 == 1 for i in ids], np.bool_), c) for ids, c in parts)
    return Rendered(place, f"{place:x}", ("text", "preference")[place % 2], made)


def same(one: Rendered, other: Rendered) -> bool:
    assert (one.row, one.id, one.shape) == (other.row, other.id, other.shape)
    for a, b in zip(one.sequences, other.sequences, strict=True):
        assert a.ids.dtype == b.ids.dtype == np.int64
        assert a.loss.dtype == b.loss.dtype == np.bool_
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.loss, b.loss)
        assert a.coefficient == b.coefficient
    return True


@settings(max_examples=60, deadline=None)
@given(st.lists(sequences, max_size=20), st.data())
def test_rows_come_back(parts: list[list[tuple[list[int], float]]], data: st.DataObject) -> None:
    rows, spool = [row(place, part) for place, part in enumerate(parts)], Spool()
    for place, one in enumerate(rows):
        spool.add(one)
        assert same(spool[place], one)  # read between writes
    assert len(spool) == len(rows)
    assert bool(spool) == bool(rows)
    assert all(map(same, spool, rows))
    assert all(map(same, reversed(spool), reversed(rows)))
    part = data.draw(st.slices(len(rows)))
    assert all(same(a, b) for a, b in zip(spool[part], rows[part], strict=True))


def test_there_is_nothing_past_the_end() -> None:
    spool = Spool()
    spool.add(row(0, [([1, 4], 1.0)]))
    assert same(spool[-1], spool[0])
    for place in (1, -2):
        with pytest.raises(IndexError):
            spool[place]


def test_what_is_read_may_be_changed_without_harm() -> None:
    spool = Spool()
    spool.add(row(0, [([1, 4], 1.0)]))
    spool[0].sequences[0].loss[:] = False
    assert spool[0].sequences[0].loss.all()


@pytest.mark.parametrize("length", [10, 1000])
def test_memory_does_not_grow_with_the_tokens(length: int) -> None:
    spool, used = Spool(), []
    tracemalloc.start()
    try:
        for place in range(4001):
            if place % 2000 == 0:
                used.append(tracemalloc.get_traced_memory()[0])
            spool.add(row(place, [([place % 7] * length, 1.0)]))
    finally:
        tracemalloc.stop()
    assert (used[2] - used[1]) / 2000 < 10  # a list of the rows takes 9 bytes a token and about 600 more


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: bytes) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    spool = Spool()
    monkeypatch.setattr(spool, "_file", Full())
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        spool.add(row(0, [([1, 4], 1.0)]))
