"""One forward pass that computes logits only at chosen positions.

The language-model head dominates the work of a small model and the memory of a large vocabulary. A hook gathers the chosen
positions before the head, so that the model's own code after it (soft-capping, scaling, a bias) still runs on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradshield.errors import ModelError


def output_head(model: nn.Module) -> nn.Module:
    """The module that maps hidden states to logits. Raises ModelError if the model has none."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no language-model head, and only causal language models can be scored: "
            "load the model with AutoModelForCausalLM"
        )
    return head


@contextmanager
def _gather_before(head: nn.Module, where: Tensor) -> Iterator[None]:
    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # (B, T, D)
        return (hidden[where.to(hidden.device)].unsqueeze(0), *args[1:])  # (1, M, D)

    handle = head.register_forward_pre_hook(gather, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def logits_at(model: nn.Module, ids: Tensor, attention: Tensor, where: Tensor, **more: Any) -> Tensor:
    """Logits at chosen positions, in float32.

    ``ids`` and ``attention`` are (B, T), right-padded; ``where`` is (B, T) bool with M positions set. Returns (M, V) in
    row-major order of ``where``: logits at position t are the prediction of token t + 1. ``more`` are the model's own
    arguments.
    """
    with _gather_before(output_head(model), where):
        output = model(**{"input_ids": ids, "attention_mask": attention, "use_cache": False, **more})
    logits: Tensor = output.logits[0].float()
    return logits


def predicting(loss: Tensor) -> Tensor:
    """Positions whose logits predict a loss token: (B, T) bool, each one left of its token."""
    where = torch.zeros_like(loss)
    where[:, :-1] = loss[:, 1:]
    return where


def token_nll(model: nn.Module, ids: Tensor, attention: Tensor, loss: Tensor) -> Tensor:
    """Negative log-likelihood of each token that counts in the loss, in nats: (B, T) float32, zero elsewhere.

    Value t belongs to token t, which the model predicts at position t - 1; column 0 is always zero.
    """
    counted = loss[:, 1:]  # (B, T-1)
    logits = logits_at(model, ids, attention, predicting(loss))  # (M, V)
    targets = ids[:, 1:][counted]  # (M,)
    nll = logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    out = nll.new_zeros(loss.shape)
    return out.masked_scatter(loss & torch.cat([torch.zeros_like(loss[:, :1]), counted], 1), nll)
