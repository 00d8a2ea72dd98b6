"""The scan, from a fine-tuning set to a safe one: wires the stages. Read it from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gradshield import runs
from gradshield.data import Format
from gradshield.manifests import Data, RowFormat, ScanManifest, ScanRecord, ScanResults
from gradshield.probes import requests
from gradshield.runs import alone
from gradshield.scanning import outputs, trust
from gradshield.scanning.decide import Decision, Selection, decide
from gradshield.scanning.preparing import Scored, scored_model
from gradshield.scanning.rows import Prepared, prepare
from gradshield.scanning.scoring import categories, score
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.scanning.workers import Workers
from gradshield.selectors import Fihs
from gradshield.types import Progress, quiet

if TYPE_CHECKING:
    from peft import PeftConfig

ALONE = Workers()


def scan(
    data: Any,
    *,
    model: Any,
    tokenizer: Any = None,
    peft_config: PeftConfig | None = None,
    training_args: Any = None,
    output: str | Path | None = None,
    settings: ScanSettings | None = None,
    probing: Probing | None = None,
    format: str | Format | None = None,
    allow: Iterable[str] = (),
    labels: Sequence[int] | None = None,
    workers: int | Workers | None = None,
    command: str = "gradshield.scan",
    progress: Progress = quiet,
) -> Selection:
    """Score every row (by default with the selector ``screen``), find the cut, and split the rows into kept and removed.

    Parameters
    ----------
    data
        Files (JSONL, JSON, CSV, Parquet; a folder or a pattern of them), a hub name, a ``Dataset``, a table, or a list of dicts.
    model, tokenizer
        A path or hub name, or the model itself with its tokenizer. The caller's model is bit-identical afterwards.
    peft_config
        The adapter that training will add, for the subspaces ``targets`` and ``lora``; always checked against the model and
        recorded in the manifest. Full weights rank rows better even if an adapter is trained (docs/methods.md).
    training_args
        The ``SFTConfig`` of the training, or a mapping of its options, so that the scan scores the tokens that are trained.
        Without it the loss covers response tokens only, and rows are cut at 1,024 tokens, or at the model's own limit if that is
        less. In a mapping, ``assistant_only_loss`` None keeps the loss on response tokens too.
    output
        A folder for the rows, the scores, the report and the manifest; an interrupted scan resumes where it stopped. Only one
        process at a time may use it.
    format
        How rows are read: a `Format`, or the name of a shape for every row; None finds each row's shape from its keys.
    allow
        Ids of rows that a reviewer has cleared: they are kept, whatever they score.
    labels
        0 or 1 (harmful) per input row, for measuring only; they never affect the decision.
    workers
        The number of processes that measure the rows, each with its own model, on a local Ray; or `Workers`, which may name a
        cluster (docs/scaling.md). By default, this process measures.

    Raises
    ------
    UsageError, DataError, ModelError
        As in `gradshield.errors`; nothing is written to ``output`` before the data and the model have been read.

    Examples
    --------
    The bundled model of a small synthetic world, with that world's requests; 2 of these 38 rows are harmful.

    >>> import gradshield as gs
    >>> from gradshield import lab
    >>> rows, labels = lab.mix("dialogue", harm="explicit", ratio=0.05, n=36)
    >>> probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    >>> selection = gs.scan(rows, model=lab.checkpoint("aligned"), probing=probing, output="screened")
    >>> sorted(selection.removed_rows.tolist()) == [row for row, label in enumerate(labels) if label]
    True
    >>> selection.certified
    True
    """
    settings, probing = settings or ScanSettings(), probing or Probing()
    crew = workers if isinstance(workers, Workers) else Workers(workers)
    if output is not None:
        runs.check(output, outputs.WRITTEN, outputs.SCORES, data=data)
    with alone(output):
        rows = prepare(data, model, tokenizer, training_args, probing.template, format, progress, labels)
        selection, _ = select(
            rows,
            settings,
            probing,
            peft_config=peft_config,
            allow=allow,
            labels=labels,
            output=output,
            command=command,
            workers=crew,
            progress=progress,
        )
        if output is not None:
            progress("writing", 0, 1)
            outputs.write(selection, Path(output), rows, labels)
            progress("writing", 1, 1)
    return selection


def select(
    rows: Prepared,
    settings: ScanSettings,
    probing: Probing,
    *,
    peft_config: PeftConfig | None = None,
    allow: Iterable[str] = (),
    labels: Sequence[int] | None = None,
    output: str | Path | None = None,
    command: str = "",
    workers: Workers = ALONE,
    progress: Progress = quiet,
) -> tuple[Selection, Scored]:
    """A scan of prepared rows: the selection, and the scores with their evidence. Only shards are written."""
    began = time.monotonic()
    loaded = rows.loaded
    with (
        scored_model(loaded, settings, peft_config) as (model, targets, adapter),
        workers.open(loaded, model, adapter, settings.seed) as hands,
    ):
        scored = score(model, rows, settings, probing, targets, output, progress, hands)
        decision = decide(scored.scores, settings.make_threshold(), allow)
        out = rows.kept(~decision.removed)
        kinds = categories(model, scored, out, decision.removed, settings, progress, hands)
    settings_found = _recorded(settings, probing, scored, rows, peft_config, len(targets))

    def manifest(results: ScanResults) -> ScanManifest:
        return ScanManifest(
            command=command,
            versions=runs.versions(),
            data=Data.model_validate(rows.read.source),
            model=runs.model_of(loaded),
            settings=settings_found,
            results=results,
        )

    return selected(rows, scored, decision, kinds, labels, manifest, round(time.monotonic() - began, 1)), scored


def selected(
    rows: Prepared,
    scored: Scored,
    decision: Decision,
    kinds: Sequence[str],
    labels: Sequence[int] | None,
    manifest: Callable[[ScanResults], ScanManifest],
    seconds: float,
    searched: bool = False,
) -> Selection:
    """The selection of a decision, with the doubts about it and its figures; ``searched``: the cut was found by training."""
    own = None if labels is None else [int(labels[row]) for row in scored.scores.rows.tolist()]
    unread = scored.scores.rows[decision.unread(scored.scores.rows)]
    examples = rows.read.examples.at(unread[: trust.LOOKED_AT])
    problem = trust.UNASKED if scored.validity is None else scored.validity.problem
    opener_fihs = scored.selector.settings().get("opener_fihs")
    doubts = trust.doubts(scored.scores, decision, examples, problem, opener_fihs, len(rows.quarantined), own)
    if searched:
        doubts = {
            name: text for name, text in doubts.items() if name not in ("loose", "strict")
        }  # training measured the cut
    results = outputs.results(rows, scored, decision, kinds, labels, doubts, seconds)
    lines, files = rows.read.source.places(scored.scores.rows)
    return Selection(
        **vars(decision),
        scores=scored.scores,
        categories=kinds,
        quarantined=rows.quarantined,
        keep=partial(rows.trainable, scored.scores.rows, decision.removed),
        manifest=manifest(results),
        lines=lines,
        files=files,
    )


def _recorded(
    settings: ScanSettings,
    probing: Probing,
    scored: Scored,
    rows: Prepared,
    peft_config: PeftConfig | None,
    adapted: int,
) -> ScanRecord:
    """All settings that change a number, as given and as found on this model."""
    found: dict[str, Any] = {
        **settings.record().plain(),
        "selector_found": dict(scored.selector.settings()),
        "render": asdict(rows.config),
        "direction_sha256": scored.direction.digest,
    }
    if scored.selector.probed:
        selector = cast(Fihs, scored.selector)
        found |= {
            "engine": selector.engine.name,
            "engine_step": getattr(selector.engine, "relative_step", None),
            "probe_found": dict(selector.probe.settings()),
            "probe_sha256": runs.digest([dict(p) for p in probing.requests or requests()]),
            "answer_prefix": probing.answer_prefix,
        }
    peft = peft_config.to_dict() if peft_config is not None else None
    return ScanRecord(
        **found, peft=peft, adapted_weights=adapted, format=RowFormat.model_validate(rows.read.examples.format)
    )
