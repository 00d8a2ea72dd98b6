"""Rows of moderate gradient: loss within a band around the mean, and gradient norm nearest to the median."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from torch import nn

from gradshield.columns import Coded
from gradshield.errors import ScoreError
from gradshield.options import Option, check
from gradshield.selectors.base import ONLINE, SELECTORS, Measured, require_finite, trainable
from gradshield.selectors.gradnorm import GradNorm, mean_norms
from gradshield.types import Batch, Bools, Floats, Scores

Share = Annotated[float, Option(above=0, most=1)]
RATIO = 0.2  # the paper's share of the candidates that train


def in_band(losses: Floats) -> Bools:
    """Which of the (N,) losses are within the mean ± one population standard deviation, ends included; at least one is."""
    # Two losses are exactly on the ends, and rounding must not exclude both.
    return np.asarray(_deviations(losses) <= 1 + 1e-9)


def _deviations(losses: Floats) -> Floats:
    """Distance of each of the (N,) losses from their mean, in standard deviations; 0 within rounding."""
    scaled = losses / (np.abs(losses).max() or 1.0)  # squares of tiny or huge losses under- or overflow
    apart = np.abs(scaled - scaled.mean())
    apart[apart <= 8 * np.finfo(np.float64).eps] = 0.0
    far: Floats = apart / (scaled.std() or 1.0)
    return far


def moderate(losses: Floats, norms: Floats, ratio: float = RATIO) -> Bools:
    """Which candidates train: (N,) mean losses and gradient norms give (N,), True for at least one row.

    The ⌊ratio · N⌋ rows (at least one) of the loss band whose norm is nearest to the band's median, fewer if the band is
    smaller; ties go to the earlier row. Rows with a loss or norm that is not finite are excluded. Raises ScoreError if no
    row is left, and UsageError for a ratio outside (0, 1].
    """
    check(OnlineModerate, ratio=ratio)
    usable = np.isfinite(losses) & np.isfinite(norms)
    if not usable.any():
        raise ScoreError(
            f"not one of the {len(losses)} candidate rows has a finite loss and gradient norm: the weights have overflowed; "
            "lower the learning rate, or train in float32"
        )
    band = np.flatnonzero(usable)[in_band(losses[usable])]
    distances = np.abs(norms[band] - np.median(norms[band]))
    chosen = np.zeros(len(losses), dtype=np.bool_)
    chosen[band[np.argsort(distances, kind="stable")[: _count(len(losses), ratio)]]] = True
    return chosen


def _count(rows: int, ratio: float) -> int:
    return max(1, int(ratio * rows + 1e-9))  # 0.29 · 100 is below 29 in floats


@SELECTORS.register("moderate-rows")
class Moderate(GradNorm):
    """Keeps rows with a loss near the mean and a gradient norm nearest to the median; measured once, before training.

    Paper: arXiv 2604.17215. Equation: C = {i: |L_i - mean| <= std}; keep the ⌊ρN⌋ rows of C with the least |G_i - median G|,
    G_i = ‖∇_θ L_i‖₂, L_i the mean over loss tokens.
    Departures: the paper selects during training, from each candidate batch (``OnlineModerate``); here the dataset is one
    batch at θ0. Scores are |G_i - median| minus that of the last row kept, so that the cut is at zero and rows tied with it
    are kept; rows outside the band score above all others, the farthest highest. The standard deviation is the population's.
    A preference pair's loss is the mean over both answers; its gradient is that of GradNorm.
    """

    name = "moderate-rows"
    rule = "fixed:0"

    def __init__(self, subspace: str = "all", targets: Sequence[str] = (), ratio: Share = RATIO) -> None:
        """``ratio`` ρ is the share of the rows to keep. Raises UsageError for one outside (0, 1], or an unknown subspace."""
        super().__init__(subspace, targets)
        check(Moderate, ratio=ratio)
        self.ratio = ratio

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score per row, within each shape. At most 0 for the rows that the method keeps.

        Raises ScoreError naming the rows whose loss or norm is not finite.
        """
        require_finite(raw)
        values = np.zeros(len(raw.rows))
        groups = Coded.of(shapes)
        for shape in groups.counts():
            own = groups.where(shape)
            values[own] = self._scores(raw.nll[own], raw.sums[own])
        return Scores(raw.rows, ids, values, shapes, lengths=raw.lengths, nll=raw.nll)

    def _scores(self, losses: Floats, norms: Floats) -> Floats:
        band = in_band(losses)
        distances = np.abs(norms - np.median(norms[band]))
        inside = np.sort(distances[band])
        edge = inside[: _count(len(losses), self.ratio)][-1]
        scores: Floats = np.where(band, distances - edge, 2 * inside[-1] - edge + _deviations(losses))
        return scores

    def settings(self) -> Mapping[str, Any]:
        return {**super().settings(), "ratio": self.ratio}


@ONLINE.register("moderate")
class OnlineModerate:
    """Trains on the rows of each batch with a loss near the mean and a gradient norm nearest to the median.

    Paper: arXiv 2604.17215. Equation: as in the selector ``moderate-rows``, at the current θ, for each batch of candidates.
    Departures: candidates are measured in evaluation mode, without dropout; the norm covers the trainable parameters only
    (an adapter's factors under LoRA); the standard deviation is the population's; a batch whose band holds fewer than ⌊ρB⌋
    rows trains on those.
    """

    name = "moderate"

    def __init__(self, ratio: Share = RATIO) -> None:
        """``ratio`` ρ is the share of each batch that trains. Raises UsageError for one outside (0, 1]."""
        check(OnlineModerate, ratio=ratio)
        self.ratio = ratio
        self._parameters: list[str] = []
        self._counts = {"batches": 0, "rows_seen": 0, "rows_trained": 0, "rows_outside_band": 0}

    @property
    def least(self) -> int:
        """The smallest batch of which the share ρ is one row."""
        return math.ceil(1 / self.ratio - 1e-9)

    def begin(self, model: nn.Module) -> None:
        """Record the trainable parameters. Raises UsageError if there are none."""
        self._parameters = trainable(model)

    def choose(self, model: nn.Module, batch: Batch) -> Bools:
        """Which rows of the batch train (B,). Raises ScoreError if no row has a finite loss and norm."""
        found = mean_norms(model, batch, self._parameters)
        order = np.argsort(found.rows)
        losses, norms = found.nll[order], found.sums[order]
        chosen = moderate(losses, norms, self.ratio)
        usable = np.isfinite(losses) & np.isfinite(norms)
        self._counts["batches"] += 1
        self._counts["rows_seen"] += len(chosen)
        self._counts["rows_trained"] += int(chosen.sum())
        self._counts["rows_outside_band"] += len(chosen) - int(in_band(losses[usable]).sum())
        return chosen

    def correct(self, model: nn.Module) -> None:
        """Does nothing: the gradient of the chosen rows is used unchanged."""

    def record(self) -> Mapping[str, Any]:
        """The share, and how many batches and rows were seen, trained on, and outside the band of losses."""
        return {"ratio": self.ratio, **self._counts}
