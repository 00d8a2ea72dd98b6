"""Scores by any registered selector (FIHS-based ones with valid probes and an engine checked against the oracle), and the kind of
harm that each removed row asks for."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradshield import runs
from gradshield.columns import Coded
from gradshield.gradients import pick
from gradshield.models.modules import in_float64
from gradshield.options import Spec, build
from gradshield.probes import Prompts
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
    references,
    ruler,
)
from gradshield.scanning.rows import Prepared
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.scanning.shards import Hands, here
from gradshield.selectors import SELECTORS, Fihs, Measured, Selector, make, parse_aggregate
from gradshield.selectors.base import members, no_direction
from gradshield.selectors.reading import block_names, states
from gradshield.types import Batch, Bools, Direction, Floats, Ints, Progress, Rendered

DEPTH = 0.75  # share of the model's depth from which blocks are read: nearer to the output, topics lie further apart
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
        reported = partial(progress, "scoring rows")
        return shards.measure(
            selector, model, direction, rows.rendered, settings.token_budget, folder, reported, hands, seen
        )

    found = ready(model, rows, settings, probing, targets, progress, measure)
    selector, direction = found.selector, found.direction
    raw = measure(selector, direction, found.seen)
    scores = selector.finish(raw, *rows.named())
    if found.harmless is not None and scores.anchors is None:
        known = anchors(cast(Fihs, selector), model, direction, found.harmless, rows.loaded.tokenizer)
        scores = replace(scores, anchors=known)
    return Scored(**vars(found), scores=scores)


def categories(
    model: nn.Module,
    scored: Scored,
    rows: Sequence[Rendered],
    removed: Bools,
    settings: ScanSettings,
    progress: Progress,
    hands: Hands = here,
) -> Coded:
    """The kind of harm that each removed row asks for (`Kinds`), by the categories of the probe requests.

    ``rows`` are the removed rows, in the order of ``removed``.
    """
    if not scored.selector.probed:
        return Coded(np.zeros(len(removed), dtype=np.uint8), ("",))
    asked = cast(Fihs, scored.selector).requests
    names = sorted(set(asked.categories))
    if not rows or len(names) < 2:
        only = names[0] if len(names) == 1 else ""
        return Coded(removed.astype(np.uint8), ("", only))
    kinds = Kinds.fit(model, asked)
    found = shards.measure(
        cast(Selector, kinds),
        model,
        no_direction(kinds.name),
        rows,
        settings.token_budget,
        progress=lambda done, total: progress("naming the harm", done, total),
        hands=hands,
    )
    codes = np.zeros(len(removed), dtype=np.int64)
    codes[removed] = found.sums.astype(np.int64)
    return Coded(codes, kinds.names).only(removed)


@dataclass(frozen=True, eq=False)
class Kinds:
    """Names rows by the probe requests that their request resembles most, as the model itself represents them.

    Equation: the kind k with the highest sum over blocks l of cos((h_l - m_l) / s_l, (m_kl - m_l) / s_l), with h_l the mean
    state over the request's tokens, m_kl its mean over the probe requests of kind k, m_l over all of them, and s_l the standard
    deviation within kinds.

    Measured as a selector is, so that other processes can do it: ``sums`` (B,) are indices into ``names``.
    """

    names: tuple[str, ...]
    blocks: tuple[str, ...]
    centre: Floats  # (blocks, D)
    scale: Floats  # (blocks, D)
    means: Floats  # (K, blocks, D), of unit length in each block

    name: ClassVar[str] = "kinds"
    travels: ClassVar[bool] = True

    @classmethod
    def fit(cls, model: nn.Module, asked: Prompts) -> Kinds:
        blocks = block_names(model)
        blocks = blocks[min(int(DEPTH * len(blocks)), len(blocks) - 1) :]
        found = states(model, asked.ids, blocks, over_tokens)
        names = tuple(sorted(set(asked.categories)))
        own = np.array([names.index(name) for name in asked.categories])
        centre, means = found.mean(0), np.stack([found[own == k].mean(0) for k in range(len(names))])
        scale = (found - means[own]).std(0)
        scale = np.where(scale > 0, scale, 1.0)
        return cls(names, blocks, centre, scale, _unit((means - centre) / scale))

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        rows, sequences = members(batch)
        asked = [_request(batch.ids[i][batch.attention[i] > 0], batch.loss[i]) for i, *_ in sequences]
        found = _unit((states(model, asked, self.blocks, over_tokens) - self.centre) / self.scale)
        kinds = np.einsum("nld,kld->nk", found, self.means).argmax(1)
        return Measured(rows, kinds.astype(np.float64), np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64))

    def settings(self) -> Mapping[str, Any]:
        return {"sha256": hashlib.sha256(self.means.tobytes() + self.centre.tobytes()).hexdigest()}


def over_tokens(hidden: Tensor, last: Tensor) -> Tensor:
    """The mean state over each sequence's tokens."""
    own = torch.arange(hidden.shape[1], device=hidden.device) <= last.to(hidden.device)[:, None]
    summed = (in_float64(hidden) * own.unsqueeze(-1).to(hidden.device)).sum(1).cpu()
    return summed / (last.cpu()[:, None] + 1)


def _request(ids: Ints, loss: np.ndarray) -> list[int]:
    """The tokens before the last answer; all of them if nothing is before it."""
    counted = np.flatnonzero(loss[: len(ids)])
    runs = counted[np.diff(counted, prepend=-2) > 1]
    end = int(runs[-1]) if len(runs) else 0
    return list(ids[: end or len(ids)])


def _unit(values: Floats) -> Floats:
    """The last axis scaled to unit length."""
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1.0))
