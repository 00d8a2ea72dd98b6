"""Rendered rows to padded batches, bounded by positions and by positions with loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from gradshield.errors import UsageError
from gradshield.types import Batch, Rendered, Tokens

PAD = 0  # any id will do: nothing attends to it


def batches(rendered: Iterable[Rendered], token_budget: int, label_budget: int) -> Iterator[Batch]:
    """Group rows of similar length, longest first, so that a batch too large for memory fails at once.

    ``token_budget`` is the most positions in a batch, padding included: B * T. ``label_budget`` is the most loss positions in a
    batch; each costs a row of V logits. A row is never split; one that exceeds a budget alone gets its own batch. The order
    depends only on the rows. Raises UsageError for a budget below 1.
    """
    for name, budget in (("token_budget", token_budget), ("label_budget", label_budget)):
        if budget < 1:
            raise UsageError(f"{name} is {budget}: give at least 1")
    group: list[Rendered] = []
    width = labels = sequences = 0
    for row in sorted(rendered, key=lambda row: (-_width(row), row.row)):
        loss = sum(int(tokens.loss.sum()) for tokens in row.sequences)
        more = sequences + len(row.sequences)
        if group and (more * width > token_budget or labels + loss > label_budget):
            yield collate(group)
            group, labels, more = [], 0, len(row.sequences)
        if not group:
            width = _width(row)
        group.append(row)
        labels, sequences = labels + loss, more
    if group:
        yield collate(group)


def collate(rows: Iterable[Rendered]) -> Batch:
    """Pad the sequences of some rows, in their order, into one batch."""
    pairs: list[tuple[int, Tokens]] = [(row.row, tokens) for row in rows for tokens in row.sequences]
    size, width = len(pairs), max(len(tokens.ids) for _, tokens in pairs)
    ids = np.full((size, width), PAD, dtype=np.int64)
    attention = np.zeros((size, width), dtype=np.bool_)
    loss = np.zeros((size, width), dtype=np.bool_)
    for b, (_, tokens) in enumerate(pairs):
        length = len(tokens.ids)
        ids[b, :length] = tokens.ids
        attention[b, :length] = True
        loss[b, :length] = tokens.loss
    return Batch(
        ids=ids,
        attention=attention,
        loss=loss,
        rows=np.array([row for row, _ in pairs], dtype=np.int64),
        coefficients=np.array([tokens.coefficient for _, tokens in pairs], dtype=np.float64),
    )


def _width(row: Rendered) -> int:
    return max(len(tokens.ids) for tokens in row.sequences)
