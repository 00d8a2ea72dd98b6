"""FIHS: how far one training step on a row would push the model toward unsafe answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from torch import nn

from gradshield.gradients import Engine, gradient_direction, parameter_names
from gradshield.probes import Probe, Prompts
from gradshield.selectors.aggregates import Aggregate
from gradshield.selectors.base import SELECTORS, Measured, by_row, members, require_finite
from gradshield.types import Batch, Direction, Scores

_CHUNK = 16  # probe prompts in one autograd graph


@SELECTORS.register("fihs")
class Fihs:
    """Minus the dot product of the row's gradient with the gradient of the unsafety score, aggregated over its tokens.

    Paper: arXiv 2605.14194. Equation: FIHS(x) = -<∇L(x; θ0), ∇S(θ0)>.
    Departures: the paper does not say whether L sums or averages over tokens; here that is an option (``aggregate``). At
    θ0 = reference the gradient of the DPO loss of a preference row is β/2 times FIHS_sum(chosen) - FIHS_sum(rejected); the
    constant factor is dropped, because preference rows are cut among themselves. That of the KTO loss is λβ/4 times ±FIHS_sum,
    with minus where the label is false; there too the factor is dropped, and such a row is cut with all others.
    """

    name = "fihs"
    rule = "competition"
    travels, probed = True, True
    decoys: ClassVar[bool] = True  # False: its scores have anchors instead

    def __init__(
        self,
        probe: Probe,
        requests: Prompts,
        engine: Engine,
        aggregate: Aggregate,
        subspace: str,
        targets: Sequence[str] = (),
    ) -> None:
        self.probe, self.requests, self.engine = probe, requests, engine
        self.aggregate, self.subspace, self.targets = aggregate, subspace, targets

    def prepare(self, model: nn.Module) -> Direction:
        """v = ∇S over all requests, as the one direction ``all``."""
        return self._direction(model, "all", self.requests)

    def by_category(self, model: nn.Module, category: str) -> Direction:
        """The one direction of a harm category, from its requests alone."""
        return self._direction(model, category, self.requests.where(category))

    def _direction(self, model: nn.Module, name: str, prompts: Prompts) -> Direction:
        device = next(model.parameters()).device

        def part(chunk: Prompts, total: int) -> Any:
            return lambda m: self.probe(m, chunk.batch(device)) * (len(chunk) / total)

        parts = [
            part(prompts.take(range(i, min(i + _CHUNK, len(prompts)))), len(prompts))
            for i in range(0, len(prompts), _CHUNK)
        ]
        parameters = parameter_names(model, self.subspace, self.targets)
        return gradient_direction(model, {name: parts}, parameters, self.subspace)

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """Each row's FIHS along the first direction, per token where the engine gives it."""
        found = self.engine.directional(model, batch, direction)
        values = found.values[0].numpy()  # (B,) or (B, T)
        nll = found.nll.numpy()  # (B, T)
        rows, means, lengths = by_row(batch, nll)
        sequences = members(batch)[1]
        if values.ndim == 1:
            sums = [float((batch.coefficients[own] * values[own]).sum()) for own in sequences]
            return Measured(rows, np.array(sums), means, lengths)
        tokens = tuple(
            np.concatenate([batch.coefficients[i] * values[i][batch.loss[i]] for i in own]) for own in sequences
        )
        return Measured(rows, np.array([float(t.sum()) for t in tokens]), means, lengths, tokens)

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score per row, and its decoy's. Raises ScoreError naming the rows whose value or loss is not finite."""
        require_finite(raw)
        values, decoys = raw.sums, None
        if raw.tokens is not None:
            values, decoys = np.empty(len(raw.rows)), np.empty(len(raw.rows))
            for i, tokens in enumerate(raw.tokens):
                values[i], decoys[i] = self.aggregate(tokens), self.aggregate(-tokens)
        return Scores(raw.rows, ids, values, shapes, decoys, raw.lengths, raw.nll, raw.tokens)

    def settings(self) -> dict[str, Any]:
        return {"engine": self.engine.name, "relative_step": getattr(self.engine, "relative_step", None)}
