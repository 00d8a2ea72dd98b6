"""Log-likelihood of given answers after given prompts, for the multi-token probes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradshield.models.logits import token_nll
from gradshield.probes.base import PromptBatch, padded


def continuation_nll(model: nn.Module, batch: PromptBatch, answers: Sequence[Sequence[int]]) -> Tensor:
    """Summed negative log-likelihood of ``answers[i]`` after prompt i, in nats: (B,)."""
    prompts = [row[: int(n) + 1].tolist() for row, n in zip(batch.input_ids, batch.last, strict=True)]
    whole = padded([p + list(a) for p, a in zip(prompts, answers, strict=True)], batch.input_ids.device)
    loss = torch.zeros_like(whole.attention_mask, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        loss[i, len(prompt) : len(prompt) + len(answer)] = True
    return token_nll(model, whole.input_ids, whole.attention_mask, loss).sum(-1)
