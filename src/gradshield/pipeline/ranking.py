"""Scores by any registered selector: FIHS with its probes and its oracle, every other method as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gradshield import runs
from gradshield.errors import UsageError
from gradshield.gradients import direction as directions
from gradshield.models import LoadedModel
from gradshield.pipeline import shards
from gradshield.pipeline.references import references
from gradshield.pipeline.scoring import Ready, Scored, anchors, asked_of, named, ready_fihs, ready_screen
from gradshield.pipeline.settings import Probing, Progress, ScanSettings
from gradshield.pipeline.shards import Hands, here
from gradshield.selectors import SELECTORS, Fihs, GradNorm, Guard, Loss, Moderate, Random, Representation, Selector
from gradshield.types import References, Rendered

DIRECTION = "direction.safetensors"  # in the working folder


def ready(
    model: nn.Module,
    loaded: LoadedModel,
    rendered: Sequence[Rendered],
    settings: ScanSettings,
    probing: Probing,
    targets: Sequence[str],
    progress: Progress,
) -> Ready:
    """``settings.selector`` prepared on the model: all that comes before the first row is measured.

    ``model`` is the loaded one, with its adapter where the subspace needs it.
    """
    tokenizer, pad = loaded.tokenizer, loaded.pad_token_id
    name, _, options = settings.selector.partition(":")
    if name in ("fihs", "screen"):
        progress("probing the model", 0, 1)
        found = ready_fihs(model, tokenizer, pad, rendered, settings, probing, targets)
        if name == "screen":
            found = ready_screen(model, tokenizer, found, probing)
        progress("probing the model", 1, 1)
        return found

    def known() -> References:
        return references(model, tokenizer, *asked_of(tokenizer, probing), pad)

    progress("preparing the method", 0, 1)
    selector = _made(name, options, settings, tokenizer, targets, known)
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
    """Every row's score by ``settings.selector``; finished shards are kept in ``output``."""
    found = ready(model, loaded, rendered, settings, probing, targets, progress)
    selector, direction = found.selector, found.direction
    folder = None
    if output is not None:  # nothing was written so far: a scan that cannot begin leaves no folder behind
        work = runs.prepare(output) / runs.WORK
        if direction.tensors:
            directions.save(direction, work / DIRECTION)
        folder = work / "shards"
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
    if isinstance(selector, Fihs) and found.harmless is not None and scores.anchors is None:
        known = anchors(selector, model, direction, found.harmless, loaded.tokenizer, loaded.pad_token_id)
        scores = replace(scores, anchors=known)
    return Scored(**vars(found), scores=scores)


def _made(
    name: str,
    options: str,
    settings: ScanSettings,
    tokenizer: Any,
    targets: Sequence[str],
    known: Callable[[], References],
) -> Selector:
    """The selector of that name on this model. Raises UsageError for options that it does not take."""
    makers: dict[str, Callable[[], Selector]] = {
        "moderate": lambda: Moderate(settings.subspace, targets),
        "gradnorm": lambda: GradNorm(settings.subspace, targets),
        "loss": Loss,
        "random": lambda: Random(settings.seed),
        "representation": lambda: _representation(known(), options),
        "guard": lambda: Guard.parse(options, tokenizer),
    }
    SELECTORS[name]  # an unknown name lists what there is
    if options and name not in ("representation", "guard"):
        raise UsageError(f"the selector {name!r} got the option {options!r}, and it takes none: write {name}")
    return makers[name]()


def _representation(known: References, options: str) -> Representation:
    """``larf`` or ``anchors``, and after another colon the feature of a row."""
    form, _, feature = options.partition(":")
    return Representation(known, form or "larf", feature or "last")
