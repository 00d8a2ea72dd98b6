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

_CHUNK = 16  # probe prompts whose graph is alive at once


@SELECTORS.register("fihs")
class Fihs:
    """Minus the dot product of the row's gradient with the gradient of the unsafety score, counted over its tokens.

    Paper: arXiv 2605.14194. Equation: FIHS(x) = -<∇L(x; θ0), ∇S(θ0)>.
    Departures: the paper does not say whether L sums or averages over tokens; here the count over tokens is a named
    choice (``aggregate``). At θ0 = reference the gradient of the DPO loss of a preference row is β/2 times FIHS_sum(chosen) -
    FIHS_sum(rejected); the constant factor is left out, because preference rows are cut among themselves.
    """

    name = "fihs"
    rule = "competition"
    travels, probed = True, True
    decoys: ClassVar[bool] = True  # whether its scores have them; those of known kinds stand in their place

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
        _, sequences = members(batch)
        per_token = values.ndim == 2
        tokens = [
            np.concatenate([batch.coefficients[i] * values[i][batch.loss[i]] for i in own]) if per_token else None
            for own in sequences
        ]
        sums = [
            float(t.sum()) if t is not None else float((batch.coefficients[own] * values[own]).sum())
            for t, own in zip(tokens, sequences, strict=True)
        ]
        rows, means, lengths = by_row(batch, nll)
        return Measured(
            rows,
            np.array(sums),
            means,
            lengths,
            tuple(t for t in tokens if t is not None) if per_token else None,
        )

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score a row, and its decoy's. Raises ScoreError that names the rows whose value or loss is not finite."""
        require_finite(raw)
        values, decoys = raw.sums, None
        if raw.tokens is not None:
            values, decoys = np.empty(len(raw.rows)), np.empty(len(raw.rows))
            for i, tokens in enumerate(raw.tokens):
                values[i], decoys[i] = self.aggregate(tokens), self.aggregate(-tokens)
        return Scores(raw.rows, ids, values, shapes, decoys, raw.lengths, raw.nll, raw.tokens)

    def settings(self) -> dict[str, Any]:
        """The engine and its step; what else matters is in the direction."""
        return {"engine": self.engine.name, "relative_step": getattr(self.engine, "relative_step", None)}
