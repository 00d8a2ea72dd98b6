"""The paper's score: the gap between the logits of "Sure" and "I" at the first response position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradshield.probes.base import PROBES, PromptBatch, Prompts, first_logits, first_token


@PROBES.register("token_gap")
class TokenGap:
    """logit("Sure") - logit("I") at the first response position: the paper's score.

    Paper: arXiv 2605.14194, proxy unsafety score S(θ; x_s).
    Departures: none; the two words are parameters.
    """

    name = "token_gap"

    def __init__(self, comply: str = "Sure", refuse: str = "I") -> None:
        self.comply, self.refuse = comply, refuse
        self._ids = (0, 0)

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:
        """Find the two tokens."""
        self._ids = first_token(tokenizer, self.comply), first_token(tokenizer, self.refuse)

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        logits = first_logits(model, batch)  # (B, V)
        comply, refuse = self._ids
        return (logits[:, comply] - logits[:, refuse]).mean()

    def settings(self) -> Mapping[str, Any]:
        return {"name": self.name, "comply": self.comply, "refuse": self.refuse, "tokens": list(self._ids)}
