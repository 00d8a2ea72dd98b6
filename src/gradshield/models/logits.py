"""Forward passes that leave out what nobody asks for: logits at other positions, and beginnings that have been run.

The language-model head dominates the work of a small model and the memory of a large vocabulary. A hook gathers the chosen
positions before the head, so that the model's own code after it (soft-capping, scaling, a bias) still runs on them.

The tokens that sequences begin with in common (`Prefix`) are run once, and passes over the rests read their keys and values. Only
where that is exact: every layer keeps the keys and values of all tokens and nothing else (no sliding window, no state of a
convolution or recurrence), and what comes of one sequence is the same with them as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gradshield.errors import ModelError
from gradshield.models.modules import modules_by_name, outputs_of, run_until
from gradshield.types import shared_length


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


def logits_at(model: nn.Module, ids: Tensor, attention: Tensor, where: Tensor, **more: Any) -> Tensor:
    """Logits at chosen positions, in float32.

    ``ids`` and ``attention`` are (B, T), right-padded; ``where`` is (B, T) bool with M positions set. Returns (M, V) in
    row-major order of ``where``: logits at position t are the prediction of token t + 1. ``more`` are the model's own
    arguments.
    """

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]  # (B, T, D)
        return (hidden[where.to(hidden.device)].unsqueeze(0), *args[1:])  # (1, M, D)

    with output_head(model).register_forward_pre_hook(gather, prepend=True):
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


# ---- a beginning in common -------------------------------------------------------------------------------------------

LEAST = 8  # tokens of a prefix, and sequences that share it: for fewer it does not pay

_EXACT: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


class Prefix:
    """The keys and values of P tokens in every layer up to a block."""

    def __init__(self, length: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._length, self._layers = length, layers

    def inputs(self, attention: Tensor) -> dict[str, Any]:
        """The arguments of a pass over B rests, except their ids: ``attention`` is theirs, (B, T)."""
        size = len(attention)
        past = DynamicCache([(k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in self._layers])
        whole = torch.cat([attention.new_ones(size, self._length), attention], 1)
        return {"attention_mask": whole, "past_key_values": past, "use_cache": True}


def common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with, at most all but the last of the shortest; 0 if that does not pay."""
    if len(sequences) < LEAST:
        return 0
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))  # of sorted ones, these differ first
    count = min(shared_length(first, last), min(map(len, sequences)) - 1)
    return count if count >= LEAST else 0


def groups(sequences: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """The sequences' indices in groups that begin alike, each with the number of tokens that it shares.

    In sorted order a long common beginning, such as a task's instruction, is a run: where neighbours share less than half of
    what most do, a run ends. Runs too short for a prefix of their own are one group.
    """
    if not sequences:
        return []
    given = [tuple(map(int, sequence)) for sequence in sequences]
    order = sorted(range(len(given)), key=given.__getitem__)
    near = [shared_length(given[a], given[b]) for a, b in pairwise(order)]
    least = float(np.median(near)) / 2 if near else 0.0
    ends = [n + 1 for n, shared in enumerate(near) if shared < least]
    runs = [order[a:b] for a, b in pairwise([0, *ends, len(order)])]
    rest = [i for run in runs if len(run) < LEAST for i in run]
    found = [run for run in runs if len(run) >= LEAST] + ([rest] if rest else [])
    return [(group, common([given[i] for i in group])) for group in found]


def prefix_of(model: nn.Module, sequence: Sequence[int], count: int, until: str | None = None) -> Prefix | None:
    """The first ``count`` tokens of a sequence, in the layers up to the block ``until`` (None: in all); None if not `allowed`."""
    return _cached(model, _ids(model, sequence[:count]), until) if allowed(model, sequence, count, until) else None


def allowed(model: nn.Module, sequence: Sequence[int], count: int, until: str | None = None) -> bool:
    """Whether the model reads ``count`` tokens from a cache exactly: by its layers, and by what comes of this sequence.

    Looked at once for each model and class of lengths (powers of two): neither weights nor tokens change the layers and the
    positions that a cache has to get right. A hook on the model makes it another.
    """
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules_by_name(model).values())
    key = (until, hooks, count.bit_length(), (len(sequence) - 1).bit_length())
    known = _EXACT.setdefault(model, {})
    if key not in known:
        known[key] = False
        with suppress(TypeError, ValueError, AttributeError, KeyError, IndexError):  # no such cache, or not as it says
            known[key] = _is_exact(model, _ids(model, sequence), count, until)
    return known[key]


@torch.no_grad()
def _is_exact(model: nn.Module, ids: Tensor, count: int, until: str | None) -> bool:
    prefix, rest = _cached(model, ids[:, :count], until), ids[:, count:]
    if prefix is None:
        return False
    whole = _end(model, ids, until, {"attention_mask": torch.ones_like(ids)})
    read = _end(model, rest, until, prefix.inputs(torch.ones_like(rest)))
    most = torch.finfo(next(model.parameters()).dtype).eps ** 0.5  # 3e-4 in float32
    return bool((read - whole).norm() <= most * whole.norm())


def _ids(model: nn.Module, sequence: Sequence[int]) -> Tensor:
    return torch.tensor([sequence], device=next(model.parameters()).device)


def _cached(model: nn.Module, ids: Tensor, until: str | None) -> Prefix | None:
    """The keys and values of (1, P) tokens; None if a layer keeps anything else."""
    cache: Any = DynamicCache(config=cast(Any, model.config))  # its layers are those the architecture needs
    given = {"attention_mask": torch.ones_like(ids), "past_key_values": cache, "use_cache": True}
    if until is None:
        _end(model, ids, None, given)
    else:
        run_until(model, until, input_ids=ids, **given)
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    filled = [layer for layer in cache.layers if layer.is_initialized]
    if not filled or any(layer.keys.shape[-2] != ids.shape[1] for layer in filled):
        return None
    return Prefix(ids.shape[1], [(layer.keys, layer.values) for layer in filled])


def _end(model: nn.Module, ids: Tensor, until: str | None, given: dict[str, Any]) -> Tensor:
    """Of the last token of (1, T): the logits, or the state of the block ``until``."""
    if until is None:
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[0, -1] = True
        return logits_at(model, ids, where=last, attention=given["attention_mask"], **given)
    with outputs_of(model, [until], lambda hidden: hidden[0, -1].float()) as seen:
        run_until(model, until, input_ids=ids, **given)
    return seen[until]
