"""Openers discovered per model: its first tokens when it refuses, against those when it complies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradshield.models.modules import evaluating
from gradshield.probes.base import PROBES, PromptBatch, Prompts, first_logits, first_token


@PROBES.register("token_set")
class TokenSet:
    """logsumexp of the model's own compliance openers minus logsumexp of its refusal openers.

    Paper: arXiv 2605.14194 uses two fixed tokens; its reviewers asked for sets.
    Departures: the sets are discovered. Refusal openers are the greedy first tokens of at least 2 % of the requests;
    compliance openers those of the harmless look-alikes that begin no answer to a request, at most ``size``, by frequency.
    """

    name = "token_set"

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self.comply: list[int] = []
        self.refuse: list[int] = []
        self._words: dict[str, list[str]] = {}

    @torch.no_grad()
    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:
        """Discover both sets. An empty compliance set falls back to "Sure", from the paper's pair."""
        refusing, helping = self._firsts(model, requests), self._firsts(model, lookalikes)
        least = max(1, round(0.02 * len(requests)))
        self.refuse = [token for token, count in refusing.most_common(self.size) if count >= least]
        self.comply = [token for token, _ in helping.most_common() if token not in refusing][: self.size]
        if not self.comply:
            self.comply = [first_token(tokenizer, "Sure")]
        self._words = {
            "comply": [tokenizer.decode([t]) for t in self.comply],
            "refuse": [tokenizer.decode([t]) for t in self.refuse],
        }

    @staticmethod
    def _firsts(model: nn.Module, prompts: Prompts, chunk: int = 32) -> Counter[int]:
        device = next(model.parameters()).device
        found: Counter[int] = Counter()
        for start in range(0, len(prompts), chunk):
            batch = prompts.take(range(start, min(start + chunk, len(prompts)))).batch(device)
            with evaluating(model):
                found.update(first_logits(model, batch).argmax(-1).tolist())
        return found

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        logits = first_logits(model, batch)  # (B, V)
        return (logits[:, self.comply].logsumexp(-1) - logits[:, self.refuse].logsumexp(-1)).mean()

    def settings(self) -> Mapping[str, Any]:
        return {"name": self.name, "size": self.size, **self._words}
