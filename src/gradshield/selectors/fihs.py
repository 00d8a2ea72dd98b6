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
from gradshield.types import Batch, Direction, Floats, Scores

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
        device = next(model.parameters()).device
        prompts = self.requests

        def part(chunk: Prompts) -> Any:
            return lambda m: self.probe(m, chunk.batch(device)) * (len(chunk) / len(prompts))

        chunks = [prompts.take(range(i, min(i + _CHUNK, len(prompts)))) for i in range(0, len(prompts), _CHUNK)]
        parameters = parameter_names(model, self.subspace, self.targets)
        return gradient_direction(model, {"all": [part(chunk) for chunk in chunks]}, parameters)

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
        values, decoys = self.pushes(raw)
        return Scores(raw.rows, ids, values, shapes, decoys, raw.lengths, raw.nll, raw.tokens)

    def pushes(self, raw: Measured) -> tuple[Floats, Floats | None]:
        """FIHS of each row (N,), and of its decoy if the engine gives tokens. Raises ScoreError as `finish` does."""
        require_finite(raw)
        if raw.tokens is None:
            return raw.sums, None
        both = [(self.aggregate(tokens), self.aggregate(-tokens)) for tokens in raw.tokens]
        values, decoys = np.array(both, dtype=np.float64).reshape(-1, 2).T
        return values, decoys

    def settings(self) -> dict[str, Any]:
        return {"engine": self.engine.name, "relative_step": getattr(self.engine, "relative_step", None)}
