"""Scores by any registered selector: FIHS with its probes and its oracle, every other method as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradshield.errors import UsageError
from gradshield.models import LoadedModel
from gradshield.pipeline import outputs, shards
from gradshield.pipeline.references import references
from gradshield.pipeline.scoring import Scored, asked_of, named, score_fihs
from gradshield.pipeline.settings import Probing, Progress, ScanSettings
from gradshield.pipeline.shards import Hands, here
from gradshield.selectors import SELECTORS, GradNorm, Guard, Loss, Moderate, Random, Representation, Selector
from gradshield.types import References, Rendered


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
    """Every row's score by ``settings.selector``. ``model`` is the loaded one, with its adapter where the subspace needs it."""
    tokenizer, pad = loaded.tokenizer, loaded.pad_token_id
    name, _, options = settings.selector.partition(":")
    if name == "fihs":
        return score_fihs(model, tokenizer, pad, rendered, settings, probing, targets, output, progress, hands)

    def known() -> References:
        return references(model, tokenizer, *asked_of(tokenizer, probing), pad)

    progress("preparing the method", 0, 1)
    selector = _made(name, options, settings, tokenizer, targets, known)
    direction = selector.prepare(model)
    progress("preparing the method", 1, 1)
    folder = None if output is None else outputs.prepare(output) / outputs.WORK / "shards"
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
    return Scored(selector, direction, scores)


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
