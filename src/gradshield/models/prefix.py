"""The tokens that sequences begin with in common, run once: passes over the rests read their keys and values.

Only where that is exact: every layer keeps the keys and values of all tokens and nothing else (no sliding window, no state of a
convolution or recurrence), and the states of one sequence are the same with them as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gradshield.models.modules import outputs_of, run_until

LEAST = 8  # tokens of a prefix, and sequences that share it: for fewer it does not pay


class Prefix:
    """The keys and values of P tokens in every layer up to a block."""

    def __init__(self, length: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._length, self._layers = length, layers

    def inputs(self, attention: Tensor) -> dict[str, Any]:
        """The arguments of a pass over B rests, beside their ids: ``attention`` is theirs, (B, T)."""
        size = len(attention)
        past = DynamicCache([(k.expand(size, -1, -1, -1), v.expand(size, -1, -1, -1)) for k, v in self._layers])
        whole = torch.cat([attention.new_ones(size, self._length), attention], 1)
        return {"attention_mask": whole, "past_key_values": past, "use_cache": True}


def common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with, at most all but the last of the shortest; 0 if that does not pay."""
    if len(sequences) < LEAST:
        return 0
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))  # of sorted ones, these differ first
    most = min(map(len, sequences)) - 1
    count = next((i for i in range(most) if first[i] != last[i]), most)
    return count if count >= LEAST else 0


def prefix_of(model: nn.Module, block: str, sequence: Sequence[int], count: int, until: str | None) -> Prefix | None:
    """The first ``count`` tokens of a sequence, in the layers up to the block ``until`` (None: in all).

    None if the model cannot read them from a cache exactly, by its layers or by the states of ``block`` on this sequence.
    """
    ids = torch.tensor([sequence], device=next(model.parameters()).device)
    with suppress(TypeError, ValueError, AttributeError, KeyError, IndexError):  # no such cache, or not as it says
        cache: Any = DynamicCache(config=cast(Any, model.config))  # its layers are those the architecture needs
        past: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        _run(model, until, input_ids=ids[:, :count], attention_mask=torch.ones_like(ids[:, :count]), **past)
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            return None
        filled = [layer for layer in cache.layers if layer.is_initialized]
        if not filled or any(layer.keys.shape[-2] != count for layer in filled):
            return None
        found = Prefix(count, [(layer.keys, layer.values) for layer in filled])
        rest = found.inputs(torch.ones_like(ids[:, count:]))
        states = []
        for given in (
            {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            {"input_ids": ids[:, count:], **rest},
        ):
            with outputs_of(model, [block], lambda hidden: hidden[0, -1].float()) as seen:
                run_until(model, block, **given)
            states.append(seen[block])
        most = torch.finfo(next(model.parameters()).dtype).eps ** 0.5  # 3e-4 in float32
        return found if bool((states[1] - states[0]).norm() <= most * states[0].norm()) else None
    return None


def _run(model: nn.Module, until: str | None, **inputs: Any) -> None:
    if until is None:
        model(**inputs)
    else:
        run_until(model, until, **inputs)
