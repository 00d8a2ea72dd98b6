"""Contrast of several whole openers on each side, so that no single token decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradshield.probes.base import PROBES, PromptBatch, Prompts, continuation_nll

COMPLY = ("Sure, here is", "Here is how", "Of course", "Absolutely", "To do this", "First,")
REFUSE = ("I cannot", "I can't", "I'm sorry", "Sorry, I", "I am unable", "I won't")


@PROBES.register("contrast")
class Contrast:
    """logsumexp of the log-likelihoods of compliant openers minus that of refusing openers, several tokens each.

    Paper: none; answers the objection that single tokens are ad hoc ("I definitely can help" begins with "I").
    Departures: log-likelihoods are per token, so that long openers are not penalised.
    """

    name = "contrast"

    def __init__(self, comply: Sequence[str] = COMPLY, refuse: Sequence[str] = REFUSE) -> None:
        self.comply, self.refuse = tuple(comply), tuple(refuse)
        self._ids: tuple[list[list[int]], list[list[int]]] = ([], [])

    def fit(self, model: nn.Module, tokenizer: Any, requests: Prompts, lookalikes: Prompts) -> None:

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        self._ids = [encode(text) for text in self.comply], [encode(text) for text in self.refuse]

    def __call__(self, model: nn.Module, batch: PromptBatch) -> Tensor:
        comply, refuse = (self._side(model, batch, openers) for openers in self._ids)
        return (comply - refuse).mean()

    @staticmethod
    def _side(model: nn.Module, batch: PromptBatch, openers: list[list[int]]) -> Tensor:
        count = batch.input_ids.shape[0]
        each = [-continuation_nll(model, batch, [opener] * count) / len(opener) for opener in openers]
        return torch.stack(each).logsumexp(0)  # (B,)

    def settings(self) -> Mapping[str, Any]:
        return {"name": self.name, "comply": list(self.comply), "refuse": list(self.refuse)}
