"""Scores by any registered selector; FIHS-based ones with valid probes and an engine checked against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from gradshield import runs
from gradshield.models.loading import LoadedModel
from gradshield.options import Spec
from gradshield.scanning import shards
from gradshield.scanning.preparing import Known, Ready, Scored, anchors, asked_of, given_by, named, ready_fihs
from gradshield.scanning.references import references
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.scanning.shards import Hands, here
from gradshield.selectors import SELECTORS, Fihs, make
from gradshield.types import Progress, Rendered


def ready(
    model: nn.Module,
    loaded: LoadedModel,
    rendered: Sequence[Rendered],
    settings: ScanSettings,
    probing: Probing,
    targets: Sequence[str],
    progress: Progress,
) -> Ready:
    """``settings.selector`` prepared on the model: everything before the first row is measured.

    ``model`` is the loaded one, with its adapter if the subspace needs it.
    """
    tokenizer, pad = loaded.tokenizer, loaded.pad_token_id
    given: dict[str, Callable[[], Any]] = {
        "subspace": lambda: settings.subspace,
        "targets": lambda: targets,
        "seed": lambda: settings.seed,
        "rows": lambda: len(rendered),
        "tokenizer": lambda: tokenizer,
        "references": lambda: references(model, tokenizer, *asked_of(tokenizer, probing), pad),
    }
    if SELECTORS[Spec.split(settings.selector).name].probed:
        known = Known(model, loaded)
        found = ready_fihs(known, rendered, settings, probing, targets, progress)
        given |= given_by(known, found, probing, progress)
        return replace(found, selector=make(settings.selector, given))
    progress("preparing the method", 0, 1)
    selector = make(settings.selector, given)
    direction = selector.prepare(model)
    progress("preparing the method", 1, 1)
    return Ready(selector, direction)


def score(
    model: nn.Module,
    loaded: LoadedModel,
    rendered: Sequence[Rendered],
    settings: ScanSettings,
    probing: Probing,
    targets: Sequence[str],
    output: str | Path | None,
    progress: Progress,
    hands: Hands = here,
) -> Scored:
    """Every row's score by ``settings.selector``; finished shards are stored in ``output``."""
    found = ready(model, loaded, rendered, settings, probing, targets, progress)
    selector, direction = found.selector, found.direction
    folder = None
    if output is not None:  # the first write: a scan that fails before leaves no folder
        folder = runs.prepare(output) / runs.WORK / "shards"
    raw = shards.measure(
        selector,
        model,
        direction,
        rendered,
        settings.token_budget,
        folder,
        lambda done, total: progress("scoring rows", done, total),
        hands,
    )
    scores = selector.finish(raw, *named(rendered))
    if found.harmless is not None and scores.anchors is None:
        known = anchors(cast(Fihs, selector), model, direction, found.harmless, loaded.tokenizer)
        scores = replace(scores, anchors=known)
    return Scored(**vars(found), scores=scores)
