"""How unlikely the model's own refusals have become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradshield.probes.base import PROBES, PromptBatch, Prompts, greedy
from gradshield.probes.continuations import continuation_nll


@PROBES.register("refusal_nll")
class RefusalNll:
    """Mean negative log-likelihood per token of the model's own refusals of the probes.

    Paper: none; asked for by the reviewers of arXiv 2605.14194.
    Departures: on a model that refuses with certainty the gradient nearly vanishes and the direction is noisy; use a
    probe on logits there (token_gap, token_set).
    """

    name = "refusal_nll"

    def __init__(self, tokens: int = 12) -> None:
        self.tokens = tokens
        self._refusals: dict[tuple[int, ...], list[int]] = {}

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:
        """Generate the refusals, greedily."""
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        answers = greedy(model, requests, self.tokens, pad)
        self._refusals = {p: a for p, a in zip(requests.ids, answers, strict=True) if a}

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        """Mean of S over the batch, a scalar, in nats per token."""
        keys = [tuple(row[: int(n) + 1].tolist()) for row, n in zip(batch.input_ids, batch.last, strict=True)]
        answers = [self._refusals[key] for key in keys]
        nll = continuation_nll(model, batch, answers)  # (B,)
        return (nll / nll.new_tensor([len(a) for a in answers])).mean()

    def settings(self) -> Mapping[str, Any]:
        return {"name": self.name, "tokens": self.tokens, "refusals": len(self._refusals)}
