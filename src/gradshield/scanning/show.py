"""One row as the model sees it: its tokens, and which count in the loss."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import data as rows_in
from gradshield import lab
from gradshield.errors import DataError, UsageError
from gradshield.models import loading
from gradshield.models.loading import LoadedModel
from gradshield.scanning.page_rows import pieces
from gradshield.scanning.settings import render_config, trl_options


@dataclass(frozen=True)
class Seen:
    """Pieces of text, each with whether it counts in the loss; the row's shape; its tokens, and those that count."""

    pieces: tuple[tuple[str, bool], ...]
    shape: str
    tokens: int
    counted: int


def show(
    data: Any,
    row: int = 0,
    *,
    model: str | Path | LoadedModel | None = None,
    format: str | rows_in.Format | None = None,
    training_args: Any = None,
    trust_remote_code: bool = False,
) -> Seen:
    """Render one row as training with ``training_args`` and the tokenizer's own chat template will.

    Parameters
    ----------
    data
        A file, a ``datasets.Dataset`` or a list of rows.
    row
        Position in ``data``, from 0.
    training_args
        An ``SFTConfig``, or a mapping of its options.
    model
        A folder, a hub name (only the tokenizer is loaded) or a loaded model; None uses the bundled lab's.

    Raises
    ------
    UsageError
        ``data`` has no row at this position.
    DataError
        The row cannot be used.

    Examples
    --------
    >>> import gradshield as gs
    >>> seen = gs.show([{"prompt": "Name a colour.", "completion": "blue"}])
    >>> "".join(text for text, counts in seen.pieces if counts)
    'blue<|end|>'
    """
    training_args = trl_options(training_args)
    read = rows_in.read(data, rows_in.Format.of(format).trained(training_args))
    if isinstance(model, LoadedModel):
        tokenizer = model.tokenizer
    else:
        tokenizer = loading.load_tokenizer(model or lab.checkpoint("aligned"), trust_remote_code)
    for bad in read.quarantined:
        if bad.row == row:
            raise DataError(f"row {row} (line {bad.line}) of {read.source.name} cannot be used, {bad.reason}: fix it")
    if not 0 <= row < read.source.rows:
        raise UsageError(
            f"there is no row {row} in {read.source.name}: give a position from 0 to {read.source.rows - 1}"
        )
    (example,) = read.examples.at(np.array([row]))
    renderer = rows_in.Renderer(tokenizer, render_config(training_args, None, {}))
    rendered = renderer.render(example)
    if isinstance(rendered, str):
        raise DataError(f"row {row} (line {read.source.lines[row]}) of {read.source.name} cannot be scored, {rendered}")
    for note in renderer.notes():
        warnings.warn(note, stacklevel=2)
    return Seen(
        tuple((text, role == "response") for text, role, _ in pieces(rendered, tokenizer)),
        example.shape,
        sum(len(t.ids) for t in rendered.sequences),
        sum(int(t.loss.sum()) for t in rendered.sequences),
    )
