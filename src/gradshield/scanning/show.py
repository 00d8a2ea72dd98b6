"""One row as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gradshield import data as rows_in
from gradshield import lab
from gradshield.errors import DataError, UsageError
from gradshield.models import loading
from gradshield.scanning.options import render_config


@dataclass(frozen=True)
class Seen:
    """Pieces of text with whether they count in the loss, the row's shape, and how many tokens there are of each."""

    pieces: tuple[tuple[str, bool], ...]
    shape: str
    tokens: int
    counted: int


def seen(
    data: Any,
    row: int,
    model: str | None,
    format: str | None,
    training_args: Any,
    max_length: int | None,
    trust: bool = False,
) -> Seen:
    """Render one row. Raises UsageError for a position that is not there, and DataError when the row cannot be used."""
    read = rows_in.read(data, format=format)
    tokenizer = loading.load_tokenizer(model or lab.checkpoint("aligned"), trust)
    for bad in read.quarantined:
        if bad.row == row:
            raise DataError(f"row {row} (line {bad.line}) of {read.source.name} cannot be used, {bad.reason}: mend it")
    if not 0 <= row < read.source.rows:
        raise UsageError(
            f"there is no row {row} in {read.source.name}: give a position from 0 to {read.source.rows - 1}"
        )
    (example,) = read.examples.at(np.array([row]))
    rendered = rows_in.render(example, tokenizer, render_config(training_args, max_length, None, {}))
    if isinstance(rendered, str):
        raise DataError(f"row {row} (line {read.source.lines[row]}) of {read.source.name} cannot be scored, {rendered}")
    pieces: list[tuple[str, bool]] = []
    for number, tokens in enumerate(rendered.sequences):
        if number:
            pieces.append(("\n── rejected ──\n", False))
        pieces += [(text, index is not None) for text, index in rows_in.spans(tokens, tokenizer)]
    return Seen(
        tuple(pieces),
        example.shape,
        sum(len(t.ids) for t in rendered.sequences),
        sum(int(t.loss.sum()) for t in rendered.sequences),
    )
