"""Rows and model, made ready for each other: what every command does first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradshield import data as rows_in
from gradshield import models
from gradshield.data import templates
from gradshield.errors import DataError, EmptyDataError
from gradshield.models import LoadedModel
from gradshield.pipeline.options import check_positions, render_config, text_config
from gradshield.types import Bools, Example, Quarantined, Rendered

TRL_SHAPES = ("messages", "prompt-completion", "text", "preference")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model, and the rows of one dataset as it will see them. ``rendered`` are those that can be used."""

    loaded: LoadedModel
    read: rows_in.ReadResult
    config: rows_in.RenderConfig
    rendered: Sequence[Rendered]
    quarantined: tuple[Quarantined, ...]

    @property
    def by_row(self) -> Mapping[int, Example]:
        """Each row that could be read, by its position in the input."""
        return {example.row: example for example in self.read.examples}

    def kept(self, removed: Bools) -> list[Rendered]:
        """The rows that stay; ``removed`` is aligned with ``rendered``."""
        return [row for row, out in zip(self.rendered, removed, strict=True) if not out]

    def trainable(self, removed: Bools) -> Any:
        """The kept rows for a trainer: the caller's own Dataset where TRL knows its shape, else tokens and labels.

        Rows that no single trainer takes, such as preference pairs among other rows, are given as they came.
        """
        import datasets

        by_row, rows, source = self.by_row, self.kept(removed), self.read.source
        own = [by_row[row.row] for row in rows]
        known = all(e.shape in TRL_SHAPES and not _weighted(e) for e in own)
        if source.kind == "dataset" and known:
            return rows_in.take(own, source)
        try:
            return rows_in.to_trl(own, rows) if rows else datasets.Dataset.from_list([])
        except DataError:
            return rows_in.take(own, source)


def prepare(
    data: Any,
    model: Any,
    tokenizer: Any = None,
    training_args: Any = None,
    max_length: int | None = None,
    template: Mapping[str, Any] | None = None,
    format: str | None = None,
    strict: bool = False,
) -> Prepared:
    """Read the rows, load or wrap the model, and render every row as the training will.

    Raises DataError, ModelError and UsageError as `gradshield.errors` says, and EmptyDataError where no row has a token to score.
    """
    read = rows_in.read(
        data, format=format, strict=strict, text_field=getattr(training_args, "dataset_text_field", "text")
    )
    loaded = with_template(load(model, tokenizer))
    limit = getattr(text_config(loaded.model), "max_position_embeddings", None)
    config = render_config(training_args, max_length, limit, template or {})
    result = rows_in.render_all(read.examples, loaded.tokenizer, config, read.source, strict)
    if not result.rendered:
        first = result.quarantined[0]
        raise EmptyDataError(
            f"no row of {read.source.name} can be scored within {config.max_length} tokens, line {first.line}: "
            f"{first.reason}; raise --max-length, or check the rows with `gradshield show`"
        )
    check_positions(loaded.model, result.rendered, limit)
    quarantined = tuple(sorted((*read.quarantined, *result.quarantined), key=lambda q: q.row))
    return Prepared(loaded, read, config, result.rendered, quarantined)


def load(model: Any, tokenizer: Any = None) -> LoadedModel:
    """A path or hub name loaded, a model wrapped, and what is loaded already as it is."""
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        found = models.load(model)
        return found if tokenizer is None else replace(found, tokenizer=tokenizer)
    return models.wrap(model, tokenizer)


def with_template(loaded: LoadedModel) -> LoadedModel:
    """The model with a copy of its tokenizer that has the default chat template, where its own has none; warns then."""
    default = templates.override(loaded.tokenizer, None)
    if default is None:
        return loaded
    tokenizer = deepcopy(loaded.tokenizer)
    tokenizer.chat_template = default
    return replace(loaded, tokenizer=tokenizer)


def _weighted(example: Example) -> bool:
    """Whether some assistant turn has weight 0, which TRL does not know."""
    return any(
        message["role"] == "assistant" and not trained
        for conversation in example.conversations
        for message, trained in zip(conversation.messages or (), conversation.trained, strict=False)
    )
