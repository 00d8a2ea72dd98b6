"""The rows determine where a shard ends, so that an edit affects its own shard and at most one next to it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.scanning import shards
from gradshield.types import Rendered, Tokens
from tests.common import chats, scan


def row(content: int, place: int = 0) -> Rendered:
    """A row whose tokens depend on a number; its position is not part of its content."""
    ids = np.array([1, content // 1000, content % 1000, 7], dtype=np.int64)
    return Rendered(place, f"{content}-{place}", "text", (Tokens(ids, np.array([False, True, True, True])),))


def rows(contents: Sequence[int]) -> list[Rendered]:
    return [row(content, place) for place, content in enumerate(contents)]


def keys(contents: Sequence[int]) -> list[bytes]:
    return [b"".join(hashes) for _, hashes in shards.cut(rows(contents))]


contents = st.integers(0, 10**6).flatmap(
    lambda seed: st.integers(1, 1000).map(lambda count: np.random.default_rng(seed).permutation(10**5)[:count].tolist())
)


@settings(max_examples=150, deadline=None)
@given(contents, st.data())
def test_an_edit_makes_at_most_two_new_shards(before: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(before) - 1))
    new = data.draw(st.integers(10**5, 10**6))
    known = set(keys(before))
    for after in (
        [*before[:place], new, *before[place:]],
        [*before[:place], *before[place + 1 :]],
        [*before[:place], new, *before[place + 1 :]],
    ):
        assert len(set(keys(after)) - known) <= 2


@settings(max_examples=50, deadline=None)
@given(contents)
def test_shards_are_the_rows_in_their_order(before: list[int]) -> None:
    cut = list(shards.cut(rows(before)))
    assert [r.row for part, _ in cut for r in part] == list(range(len(before)))
    assert all(0 < len(part) <= shards.MOST_ROWS for part, _ in cut)
    assert len(set(keys(before))) == len(cut)  # of distinct rows


def test_an_edit_of_an_end_joins_two_shards_or_parts_one() -> None:
    """Both sides of the bound are reached, so that the property above is not one of a single shard."""
    before = list(range(3000))
    first = len(next(shards.cut(rows(before)))[0]) - 1
    without = keys([*before[:first], *before[first + 1 :]])
    assert len(without) == len(keys(before)) - 1
    assert len(set(without) - set(keys(before))) == 1
    ends = [part[-1].row for part, _ in shards.cut(rows(before))]
    inside = [*before[:first], ends[1], *before[first:]]
    assert len(set(keys(inside)) - set(keys(before))) == 2


def test_shards_have_the_size_they_should() -> None:
    sizes = [len(part) for part, _ in shards.cut(rows(range(60_000)))]
    assert 0.8 * shards.MEAN_ROWS < np.mean(sizes) < 1.2 * shards.MEAN_ROWS
    assert max(sizes) <= shards.MOST_ROWS


@pytest.mark.parametrize("content", range(5))
def test_rows_that_are_all_alike_are_cut_all_the_same(content: int) -> None:
    cut = list(shards.cut(rows([content] * 2500)))
    assert all(len(part) <= shards.MOST_ROWS for part, _ in cut)
    assert len({tuple(key) for _, key in cut}) <= 2  # what is alike has one key, so that it is measured once


@pytest.mark.parametrize("change", ["ids", "loss", "coefficient", "length"])
def test_whatever_a_number_depends_on_is_content(change: str) -> None:
    tokens = row(5).sequences[0]
    ids, loss, coefficient = tokens.ids.copy(), tokens.loss.copy(), tokens.coefficient
    if change == "ids":
        ids[2] += 1
    elif change == "loss":
        loss[1] = False
    elif change == "coefficient":
        coefficient = -1.0
    else:
        ids, loss = ids[:-1], loss[:-1]
    other = Rendered(0, "5-0", "text", (Tokens(ids, loss, coefficient),))
    ((_, (key,)),) = shards.cut([other])
    assert key != keys([5])[0]
    assert keys([5]) == [k for _, (k,) in shards.cut([copy.copy(row(5, 9))])]


@pytest.mark.parametrize("change", ["edited", "put in", "taken out", "moved to the end"])
def test_an_edited_file_scores_what_changed(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole scan, where shards are small: few rows are measured anew, and the numbers are those of a fresh scan."""
    monkeypatch.setattr(shards, "MEAN_ROWS", 8)
    data: list[Any] = chats(120)
    scan(data, output=tmp_path / "a")
    new = chats(130)[-1]
    data = {
        "edited": [*data[:60], new, *data[61:]],
        "put in": [*data[:60], new, *data[60:]],
        "taken out": [*data[:60], *data[61:]],
        "moved to the end": [*data[:60], *data[61:], data[60]],
    }[change]
    folder = tmp_path / "a" / ".gradshield" / "shards"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) > 5
    again = scan(data, output=tmp_path / "a")
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before.items() <= after.items()  # nothing was measured twice
    assert 0 < len(after) - len(before) <= (4 if change.startswith("moved") else 2)
    fresh = scan(data, output=tmp_path / "b")
    assert np.abs(again.scores.values - fresh.scores.values).max() <= 1e-5 * np.abs(fresh.scores.values).max()
    assert again.scores.ids == fresh.scores.ids
    assert np.array_equal(again.removed, fresh.removed)
