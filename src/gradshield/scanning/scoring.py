"""Scores by any registered selector; FIHS-based ones with valid probes and an engine checked against the oracle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from gradshield import runs
from gradshield.gradients import pick
from gradshield.options import Spec, build
from gradshield.scanning import shards
from gradshield.scanning.preparing import (
    Known,
    Ready,
    Scored,
    anchors,
    ask,
    asked_of,
    given_by,
    ready_fihs,
    ruler,
)
from gradshield.scanning.references import references
from gradshield.scanning.rows import Prepared
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.scanning.shards import Hands, here
from gradshield.selectors import SELECTORS, Fihs, Measured, Selector, make, parse_aggregate
from gradshield.selectors.base import no_direction
from gradshield.types import Direction, Progress

logger = logging.getLogger(__name__)


def ready(
    model: nn.Module,
    rows: Prepared,
    settings: ScanSettings,
    probing: Probing,
    targets: Sequence[str],
    progress: Progress,
    look: Callable[[Selector, Direction], Measured] | None = None,
) -> Ready:
    """``settings.selector`` prepared on the model: everything before rows are measured.

    ``model`` is the loaded one, with its adapter if the subspace needs it. ``look`` measures the look of a selector of
    two stages, which needs less than the selector, so that most rows have their score before there is a direction.
    """
    loaded, rendered = rows.loaded, rows.rendered
    tokenizer, pad = loaded.tokenizer, loaded.pad_token_id
    given: dict[str, Callable[[], Any]] = {
        "subspace": lambda: settings.subspace,
        "targets": lambda: targets,
        "seed": lambda: settings.seed,
        "rendered": lambda: rendered,
        "tokenizer": lambda: tokenizer,
        "references": lambda: references(model, tokenizer, *asked_of(tokenizer, probing), pad),
    }
    spec = Spec.split(settings.selector)
    made = SELECTORS[spec.name]
    engine = pick(settings.engine, model, parse_aggregate(settings.aggregate).per_token) if made.probed else None
    logger.info(
        "%sbatches of at most %s tokens", f"engine {engine.name}, " if engine else "", f"{settings.token_budget:,}"
    )
    if engine is not None:
        known = Known(model, loaded)
        asked = ask(known, engine, settings, probing, progress)
        read = once(lambda: ruler(known, asked.validity, probing, progress))
        given["reading"] = lambda: read().reading
        seen = None
        if look is not None and hasattr(made, "looks"):
            first = build("selector", spec, made.looks, given)
            seen = look(first, replace(no_direction(first.name), digest=known.key(first.name)))
        found = ready_fihs(known, asked, rendered, settings, targets, progress)
        given |= given_by(known, found, read, progress)
        return replace(found, selector=make(settings.selector, given), seen=seen)
    progress("preparing the method", 0, 1)
    selector = make(settings.selector, given)
    direction = selector.prepare(model)
    progress("preparing the method", 1, 1)
    return Ready(selector, direction)


def score(
    model: nn.Module,
    rows: Prepared,
    settings: ScanSettings,
    probing: Probing,
    targets: Sequence[str],
    output: str | Path | None,
    progress: Progress,
    hands: Hands = here,
) -> Scored:
    """Every row's score by ``settings.selector``; finished shards are stored in ``output``."""

    def measure(selector: Selector, direction: Direction, seen: Measured | None = None) -> Measured:
        # The first write: a scan that fails before leaves no folder.
        folder = None if output is None else runs.prepare(output) / runs.WORK / "shards"
        told = partial(progress, "scoring rows")
        return shards.measure(
            selector, model, direction, rows.rendered, settings.token_budget, folder, told, hands, seen
        )

    found = ready(model, rows, settings, probing, targets, progress, measure)
    selector, direction = found.selector, found.direction
    raw = measure(selector, direction, found.seen)
    scores = selector.finish(raw, *rows.named())
    if found.harmless is not None and scores.anchors is None:
        known = anchors(cast(Fihs, selector), model, direction, found.harmless, rows.loaded.tokenizer)
        scores = replace(scores, anchors=known)
    return Scored(**vars(found), scores=scores)
