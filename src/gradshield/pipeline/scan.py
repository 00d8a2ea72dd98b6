"""From a fine-tuning set to a safe one: the one place that wires the stages. Read it from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradshield import data as rows_in
from gradshield import models
from gradshield.data import templates
from gradshield.errors import DataError, EmptyDataError, UsageError
from gradshield.models import LoadedModel
from gradshield.pipeline import outputs
from gradshield.pipeline.decide import decide
from gradshield.pipeline.options import check_positions, render_config, text_config
from gradshield.pipeline.scoring import Progress, Scored, carrying, categories, score, weights_changed
from gradshield.pipeline.settings import Probing, ScanSettings
from gradshield.probes import digest, requests
from gradshield.types import Example, Rendered, Selection

if TYPE_CHECKING:
    from peft import PeftConfig

TRL_SHAPES = ("messages", "prompt-completion", "text", "preference")


def scan(
    data: Any,
    *,
    model: Any,
    tokenizer: Any = None,
    peft_config: PeftConfig | None = None,
    training_args: Any = None,
    max_length: int | None = None,
    output: str | Path | None = None,
    settings: ScanSettings | None = None,
    probing: Probing | None = None,
    format: str | None = None,
    strict: bool = False,
    allow: Iterable[str] = (),
    labels: Sequence[int] | None = None,
    command: str = "gradshield.scan",
    progress: Progress = lambda stage, done, total: None,
) -> Selection:
    """Score every row by FIHS, find the cut, and part the rows that stay from those that go.

    Parameters
    ----------
    data
        A path (JSONL, JSON, CSV, Parquet), a hub name, a ``datasets.Dataset`` or a list of dicts.
    model, tokenizer
        A path or hub name, or the model itself with its tokenizer. The caller's model is bit-identical afterwards.
    peft_config
        The adapter that training will add, for the subspaces ``targets`` and ``lora``; checked against the model and noted
        in the manifest in any case. Full weights rank rows better even where an adapter is trained (docs/methods.md).
    training_args
        The ``SFTConfig`` of the training, so that what is scored is what is trained. Without it the loss covers response
        tokens only, and rows are cut at ``max_length`` tokens (1,024, or the model's own limit if that is less).
    output
        A folder for the rows, the scores, the report and the manifest; an interrupted scan into it goes on where it stopped.
    allow
        Ids of rows that a person has cleared: they stay, whatever they score.
    labels
        0 or 1 (harmful) per input row, for measuring only; they never touch the decision.

    Raises
    ------
    UsageError, DataError, ModelError
        As in `gradshield.errors`; nothing is written to ``output`` before the data and the model have been read.
    """
    began = time.monotonic()
    settings, probing = settings or ScanSettings(), probing or Probing()
    if output is not None:
        outputs.check(output)
    read = rows_in.read(
        data, format=format, strict=strict, text_field=getattr(training_args, "dataset_text_field", "text")
    )
    _check_labels(labels, read.source.rows)
    loaded = _with_template(_loaded(model, tokenizer))
    limit = getattr(text_config(loaded.model), "max_position_embeddings", None)
    config = render_config(training_args, max_length, limit, probing.template or {})
    result = _rendered(read, loaded, config, limit, strict)
    adapted_weights = weights_changed(loaded.model, peft_config)
    with carrying(loaded.model, peft_config if settings.subspace == "lora" else None, settings.seed) as scored_model:
        scored = score(
            scored_model,
            loaded.tokenizer,
            loaded.pad_token_id,
            result.rendered,
            settings,
            probing,
            adapted_weights,
            output,
            progress,
        )
        decision = decide(scored.scores, settings.make_threshold(), allow)
        removed = decision.removed
        gone = [row for row, out in zip(result.rendered, removed, strict=True) if out]
        kinds = categories(scored_model, scored, gone, removed, settings, progress)
    by_row = {example.row: example for example in read.examples}
    kept = [row for row, out in zip(result.rendered, removed, strict=True) if not out]
    selection = Selection(
        scores=scored.scores,
        removed=removed,
        categories=kinds,
        cuts=decision.cuts,
        quarantined=tuple(sorted((*read.quarantined, *result.quarantined), key=lambda q: q.row)),
        cleared=decision.cleared,
        kept=_trainable(by_row, kept, read.source),
        manifest=outputs.manifest(
            command=command,
            source=read.source,
            loaded=loaded,
            settings={
                **_recorded(settings, probing, scored, config),
                "peft": peft_config.to_dict() if peft_config is not None else None,
                "adapted_weights": len(adapted_weights),
                "format": format,
            },
            seconds=time.monotonic() - began,
        ),
        certified=not scored.validity.problem,
    )
    selection = outputs.with_results(selection, scored.agreement, scored.validity, read, labels, by_row)
    if output is not None:
        outputs.write(
            selection, Path(output), read, by_row, result.rendered, loaded.tokenizer, scored.agreement, labels
        )
    return selection


def _check_labels(labels: Sequence[int] | None, rows: int) -> None:
    if labels is not None and len(labels) != rows:
        raise UsageError(
            f"there are {len(labels)} labels for {rows} rows: give one label (0 or 1) for every row of the input"
        )
    if labels is not None and not set(labels) <= {0, 1}:
        raise UsageError("a label is neither 0 nor 1: give 1 for a harmful row and 0 for any other")


def _rendered(
    read: rows_in.ReadResult, loaded: LoadedModel, config: rows_in.RenderConfig, limit: int | None, strict: bool
) -> rows_in.RenderResult:
    """Every row as tokens. Raises EmptyDataError where none has a token to score."""
    result = rows_in.render_all(read.examples, loaded.tokenizer, config, read.source, strict)
    if not result.rendered:
        first = result.quarantined[0]
        raise EmptyDataError(
            f"no row of {read.source.name} can be scored within {config.max_length} tokens, line {first.line}: "
            f"{first.reason}; raise --max-length, or check the rows with `gradshield show`"
        )
    check_positions(loaded.model, result.rendered, limit)
    return result


def _recorded(settings: ScanSettings, probing: Probing, scored: Scored, config: rows_in.RenderConfig) -> dict[str, Any]:
    """Everything that changes a number, for the manifest: as given, and as found on this model."""
    return {
        **settings.as_dict(),
        "engine": scored.agreement.engine,
        "engine_step": getattr(scored.selector.engine, "relative_step", None),
        "render": {k: v for k, v in asdict(config).items() if k != "packing"},
        "probe_found": dict(scored.selector.probe.settings()),
        "probe_sha256": digest([dict(p) for p in probing.requests or requests()]),
        "direction_sha256": scored.direction.digest,
        "answer_prefix": probing.answer_prefix,
    }


def _loaded(model: Any, tokenizer: Any) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, str | Path):
        found = models.load(model)
        return found if tokenizer is None else replace(found, tokenizer=tokenizer)
    return models.wrap(model, tokenizer)


def _with_template(loaded: LoadedModel) -> LoadedModel:
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


def _trainable(by_row: Mapping[int, Example], kept: Sequence[Rendered], source: Any) -> Any:
    """The kept rows for a trainer: the caller's own Dataset where TRL knows its shape, else tokens and labels.

    Rows that no single trainer takes, such as preference pairs among other rows, are given as they came.
    """
    import datasets

    own = [by_row[row.row] for row in kept]
    known = all(e.shape in TRL_SHAPES and not _weighted(e) for e in own)
    if source.kind == "dataset" and known:
        return rows_in.take(own, source)
    try:
        return rows_in.to_trl(own, kept) if kept else datasets.Dataset.from_list([])
    except DataError:
        return rows_in.take(own, source)
