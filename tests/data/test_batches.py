"""Batches hold every row once, whole, within the budgets, in an order that the rows alone decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.data import batches
from gradshield.errors import UsageError
from gradshield.models.decoding import left_padded
from gradshield.types import Batch, Rendered, Tokens


def _row(row: int, lengths: list[int]) -> Rendered:
    sequences = []
    for n, length in enumerate(lengths):
        ids = np.arange(1, length + 1, dtype=np.int64) + 100 * row
        loss = np.arange(length) >= max(1, length // 2)
        sequences.append(Tokens(ids, loss, 1.0 if n == 0 else -1.0))
    return Rendered(row, f"id{row}", "text", tuple(sequences))


ROWS = st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=2), max_size=20).map(
    lambda all_lengths: [_row(n, lengths) for n, lengths in enumerate(all_lengths)]
)


def _sequences(batch: Batch) -> list[tuple[int, list[int], list[bool], float]]:
    found = []
    for b, row in enumerate(batch.rows):
        length = int(batch.attention[b].sum())
        assert batch.attention[b, :length].all()
        assert not batch.ids[b, length:].any()
        assert not batch.loss[b, length:].any()
        found.append((int(row), batch.ids[b, :length].tolist(), batch.loss[b, :length].tolist(), batch.coefficients[b]))
    return found


@given(ROWS, st.integers(1, 200), st.integers(1, 60), st.randoms(use_true_random=False))
def test_every_row_once_whole_and_within_budget(rows, tokens, labels, random) -> None:  # type: ignore[no-untyped-def]
    made = list(batches(rows, tokens, labels))
    seen = [_sequences(batch) for batch in made]
    expected = [(r.row, t.ids.tolist(), t.loss.tolist(), t.coefficient) for r in rows for t in r.sequences]
    assert sorted(s for batch in seen for s in batch) == sorted(expected)
    homes = [{s[0] for s in batch} for batch in seen]
    assert sum(map(len, homes)) == len(set().union(*homes)) if homes else not rows
    for batch, home in zip(made, homes, strict=True):
        within = batch.ids.size <= tokens and int(batch.loss.sum()) <= labels
        assert within or len(home) == 1
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert [_sequences(batch) for batch in batches(shuffled, tokens, labels)] == seen


def test_rows_of_like_length_share_a_batch() -> None:
    rows = [_row(n, [length]) for n, length in enumerate([30, 4, 30, 4, 4, 30])]
    made = list(batches(rows, 90, 1000))
    assert [batch.rows.tolist() for batch in made] == [[0, 2, 5], [1, 3, 4]]
    assert made[1].ids.shape == (3, 4)


def test_padded_on_the_left_all_rows_end_together() -> None:
    ids, attention = left_padded([[5, 6, 7], [8]], pad=2)
    assert ids.tolist() == [[5, 6, 7], [2, 2, 8]] and attention.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == attention.dtype == np.int64


@pytest.mark.parametrize("budgets", [(0, 1), (1, 0)])
def test_a_budget_below_one_is_refused(budgets: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        list(batches([_row(0, [3])], *budgets))
