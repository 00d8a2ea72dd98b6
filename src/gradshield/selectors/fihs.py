"""FIHS: how far one training step on a row would push the model toward unsafe answers, and its aggregates over tokens.

``sum``, ``mean``; ``first:k`` and ``top:k`` sum k tokens; ``top:20%`` averages the top fifth; ``push`` averages the positive
values (see `push`). An aggregate takes (n,) values, n >= 1, and returns a float.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from gradshield.errors import UsageError
from gradshield.gradients import Engine, gradient_direction, parameter_names
from gradshield.probes import Probe, Prompts
from gradshield.selectors.base import SELECTORS, Measured, Selector, by_row, members, require_finite
from gradshield.types import Batch, Direction, Floats, Scores

_CHUNK = 16  # probe prompts in one autograd graph


@SELECTORS.register("fihs")
class Fihs(Selector):
    """Minus the dot product of the row's gradient with the gradient of the unsafety score, aggregated over its tokens.

    Paper: arXiv 2605.14194. Equation: FIHS(x) = -<∇L(x; θ0), ∇S(θ0)>.
    Departures: the paper does not say whether L sums or averages over tokens; here that is an option (``aggregate``). At
    θ0 = reference the gradient of the DPO loss of a preference row is β/2 times FIHS_sum(chosen) - FIHS_sum(rejected); the
    constant factor is dropped, because preference rows are cut among themselves. That of the KTO loss is λβ/4 times ±FIHS_sum,
    with minus where the label is false; there too the factor is dropped, and such a row is cut with all others.
    """

    name = "fihs"
    rule = "competition"
    probed = True
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


# ---- aggregates ------------------------------------------------------------------------------------------------------

AGGREGATES = {
    "sum": "the sum over all tokens",
    "mean": "the average over all tokens",
    "first:K": "the sum of the first K tokens",
    "top:K": "the sum of the K largest values",
    "top:P%": "the average of the largest P per cent",
    "push": "the positive values averaged over all tokens, a short row padded with zeros to 24 (the default)",
}


@dataclass(frozen=True)
class Aggregate:
    """A named aggregate. ``per_token``: it needs the value of every token."""

    name: str
    function: Callable[[Floats], float]
    per_token: bool = True

    def __call__(self, tokens: Floats) -> float:
        return self.function(tokens)


def push(tokens: Floats, least: int = 24) -> float:
    """Mean push toward harm: Σ max(v, 0) / max(n, ``least``), a row shorter than ``least`` tokens padded with zeros.

    A few tokens carry a row's harm, and a mean of signed values drowns them. Positive parts do not cancel; the padding keeps
    one large token of a one-word answer from outweighing a whole harmful answer.
    """
    return float(np.maximum(tokens, 0.0).sum()) / max(len(tokens), least)


def parse_aggregate(text: str) -> Aggregate:
    """An aggregate by its name. Raises UsageError, which lists the names."""
    plain: dict[str, Callable[[Floats], float]] = {
        "sum": lambda t: float(t.sum()),
        "mean": lambda t: float(t.mean()),
        "push": push,
    }
    if text in plain:
        return Aggregate(text, plain[text], per_token=text != "sum")
    found = re.fullmatch(r"(first|top):(\d+)(%?)", text)
    if found is None or int(found[2]) == 0 or (found[3] and (found[1] == "first" or int(found[2]) > 100)):
        raise UsageError(
            f"unknown aggregate {text!r}: choose one of {', '.join(AGGREGATES)} (K a whole number, P from 1 to 100)"
        )
    number = int(found[2])
    if found[1] == "first":
        return Aggregate(text, lambda t: float(t[:number].sum()))
    if not found[3]:
        return Aggregate(text, lambda t: float(largest(t, number).sum()))
    # The count is rounded up in integers: 0.07 · 100 exceeds 7 in floats.
    return Aggregate(text, lambda t: float(largest(t, -(-number * len(t) // 100)).mean()))


def largest(tokens: Floats, count: int) -> Floats:
    return np.sort(tokens)[::-1][:count]
