"""Rows and model, prepared for each other: the first step of every command."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import data as rows_in
from gradshield.columns import Coded, Ids
from gradshield.data import templates
from gradshield.errors import EmptyDataError, FormatError, UsageError
from gradshield.models import loading
from gradshield.models.loading import LoadedModel, ModelSource
from gradshield.models.modules import text_config
from gradshield.scanning.decide import group
from gradshield.scanning.settings import check_positions, check_trainer, render_config, trl_options
from gradshield.types import Bools, Ints, Progress, Quarantined, Rendered, quiet

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model, and the rows of one dataset as it will see them. ``rendered`` are the usable ones.

    ``fitted`` are the positions of rows whose messages were rewritten for the chat template.
    """

    loaded: LoadedModel
    read: rows_in.ReadResult
    config: rows_in.RenderConfig
    rendered: rows_in.Spool
    quarantined: tuple[Quarantined, ...]
    fitted: Ints

    def named(self) -> tuple[Ids, Coded]:
        """The ids and the groups of the rendered rows."""
        examples, aside = self.read.examples, [row.row for row in self.quarantined]
        own = ~np.isin(examples.rows, aside)
        shapes = examples.shapes.take(own)
        return examples.ids.take(own), shapes.renamed([group(name) for name in shapes.names])

    def kept(self, removed: Bools) -> Sequence[Rendered]:
        """The kept rows, read on access; ``removed`` is aligned with ``rendered``."""
        return rows_in.Picked(self.rendered, np.flatnonzero(~removed))

    def trainable(self, rows: Ints, removed: Bools) -> Any:
        """The kept rows for a trainer: the caller's own Dataset if TRL trains on it as it was scored, else tokens and labels.

        ``rows`` are the input positions of the rendered rows, and ``removed`` is aligned with them. Rows that no single
        trainer takes, such as preference pairs among other rows, are returned unchanged.
        """
        import datasets

        examples, source, stay = self.read.examples, self.read.source, rows[~removed]
        as_scored = examples.as_trl[np.searchsorted(examples.rows, stay)].all() and not np.isin(stay, self.fitted).any()
        if source.kind == "dataset" and as_scored:
            return rows_in.take(stay, source)
        try:
            kept, renderer = self.kept(removed), rows_in.Renderer(self.loaded.tokenizer, self.config)
            fitted = map(renderer.fit, examples.at(stay))
            return rows_in.to_trl(fitted, kept) if len(stay) else datasets.Dataset.from_list([])
        except FormatError:
            return rows_in.take(stay, source)


def prepare(
    data: Any,
    model: Any,
    tokenizer: Any = None,
    training_args: Any = None,
    template: Mapping[str, Any] | None = None,
    format: str | rows_in.Format | None = None,
    progress: Progress = quiet,
    labels: Sequence[int] | None = None,
    check: Callable[[rows_in.ReadResult], object] = lambda read: None,
) -> Prepared:
    """Read the rows, load or wrap the model, and render every row as the training will.

    What is wrong with the rows is said before the model is loaded: ``labels`` are only checked, and ``check`` may raise.
    Raises DataError, ModelError and UsageError (see `gradshield.errors`), and EmptyDataError if no row has a token to score.
    """
    training_args = trl_options(training_args)
    read = read_rows(data, training_args, format)
    _check_labels(labels, read.source.rows)
    check(read)
    render_config(training_args, None, template or {})  # its options are checked before the model loads
    loaded = with_template(load(model, tokenizer, progress))
    limit = getattr(text_config(loaded.model), "max_position_embeddings", None)
    config = render_config(training_args, limit, template or {})
    silent = training_args is not None and not hasattr(training_args, "assistant_only_loss")
    if silent and read.examples.shapes.counts().get("messages"):
        logger.warning(
            "the training config does not set assistant_only_loss, so every token of a chat row counts in the loss, requests "
            "included, as in TRL: set it to true to count only the answers, or to false to confirm this"
        )
    of_trl = hasattr(training_args, "output_dir")
    if of_trl and getattr(training_args, "assistant_only_loss", None):
        tokens = read.source.kind != "dataset" or not read.examples.as_trl.all()  # as `Prepared.trainable` has it
        if tokens or next(iter(read.examples)).conversations[0].messages is None:
            logger.warning(
                "TRL refuses assistant_only_loss for all rows but a Dataset of messages: leave it out, and the trainer counts "
                "the tokens of the kept rows that the scan counts"
            )
    count = len(read.examples)
    progress("rendering rows", 0, count)
    result = rows_in.render_all(
        read.examples,
        loaded.tokenizer,
        config,
        read.source,
        read.examples.format.strict,
        lambda done: progress("rendering rows", done, count),
    )
    progress("rendering rows", count, count)
    if not result.rendered:
        first = result.quarantined[0]
        raise EmptyDataError(
            f"no row of {read.source.name} can be scored within {config.max_length} tokens, line {first.line}: "
            f"{first.reason}; raise --max-length, or check the rows with `gradshield show`"
        )
    for note in result.notes:
        warnings.warn(note, stacklevel=2)
    check_positions(loaded.model, result.rendered.longest, limit)
    quarantined = tuple(sorted((*read.quarantined, *result.quarantined), key=lambda q: q.row))
    return Prepared(loaded, read, config, result.rendered, quarantined, result.fitted)


def read_rows(data: Any, training_args: Any, format: str | rows_in.Format | None) -> rows_in.ReadResult:
    """The rows as the training of these `trl_options` reads them. Raises DataError and UsageError; needs no model."""
    read = rows_in.read(data, rows_in.Format.of(format).trained(training_args))
    check_trainer(training_args, read.examples.shapes.counts())
    if read.unseen:
        raise UsageError(
            f"no row of {read.source.name} has the column {min(read.unseen)!r}: name one that is there with --columns"
        )
    if hasattr(training_args, "assistant_only_loss") and read.examples.shapes.counts().get("kto"):
        raise UsageError(
            f"{read.source.name} has answers with a label, false for those to avoid, and the training config is for SFTTrainer, "
            "which would train toward them: give a KTOConfig, or --format prompt-completion if the label means something else"
        )
    return read


def _check_labels(labels: Sequence[int] | None, rows: int) -> None:
    """Raises UsageError unless there is one label, 0 or 1, for every row of the input."""
    if labels is not None and len(labels) != rows:
        raise UsageError(
            f"there are {len(labels)} labels for {rows} rows: give one label (0 or 1) for every row of the input"
        )
    if labels is not None and not set(labels) <= {0, 1}:
        raise UsageError("a label is neither 0 nor 1: give 1 for a harmful row and 0 for any other")


def load(model: Any, tokenizer: Any = None, progress: Progress = quiet) -> LoadedModel:
    """Load a path, a hub name or a `ModelSource`, or wrap a model; a LoadedModel is returned unchanged."""
    if isinstance(model, LoadedModel):
        return model
    if not isinstance(model, str | Path | ModelSource):
        return loading.wrap(model, tokenizer)
    progress("loading the model", 0, 1)
    found = model.load() if isinstance(model, ModelSource) else loading.load(model)
    progress("loading the model", 1, 1)
    return found if tokenizer is None else replace(found, tokenizer=tokenizer)


def with_template(loaded: LoadedModel) -> LoadedModel:
    """If its tokenizer has no chat template: the model with a copy that has the default one, with a warning."""
    default = templates.missing(loaded.tokenizer)
    if default is None:
        return loaded
    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.chat_template = default
    return replace(loaded, tokenizer=tokenizer)
