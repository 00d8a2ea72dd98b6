"""Greedy decoding in batches, whatever a model's own ``generation_config`` says (sampling, penalties)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from gradshield.models.modules import evaluating, modules_by_name

if TYPE_CHECKING:
    from gradshield.types import Ints


def stop_tokens(model: Any, *more: int | None) -> list[int]:
    """Every token that ends an answer: those of the model's ``generation_config``, and ``more``."""
    configured = model.generation_config.eos_token_id
    stops = {*(configured if isinstance(configured, list) else [configured]), *more}
    return sorted(stop for stop in stops if stop is not None)


def until(row: list[int], stops: Sequence[int]) -> list[int]:
    """The tokens before the first stop token; rows that end early are padded."""
    return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]


def continued(
    model: Any, rows: Sequence[Sequence[int]], tokens: int, pad: int, stops: Sequence[int], **more: Any
) -> tuple[list[list[int]], Any]:
    """Up to ``tokens`` new ids of each row, padded after a stop token, and what the model's ``generate`` returned.

    ``more`` are its further arguments. Runs without dropout. The model's modes and config are restored, also after an exception.
    """
    import torch

    ids, attention = map(torch.from_numpy, left_padded(rows, pad))
    device = next(model.parameters()).device
    with _greedy(model, max_new_tokens=tokens, pad_token_id=pad, eos_token_id=list(stops) or None), torch.no_grad():
        found = model.generate(input_ids=ids.to(device), attention_mask=attention.to(device), **more)
    sequences = getattr(found, "sequences", found)
    return sequences[:, ids.shape[1] :].tolist(), found


@contextmanager
def _greedy(model: Any, **settings: Any) -> Iterator[None]:
    """The model in evaluation mode with a plain greedy ``generation_config``; both are restored on exit.

    The config is replaced, not passed to ``generate``: transformers fills the gaps of a passed config from the model's own, for
    example with its repetition penalty. It is replaced where it lives: PEFT copies a wrapper's own into the model inside.
    """
    from transformers import GenerationConfig

    modules = modules_by_name(model).values()
    owner: Any = next((m for m in modules if vars(m).get("generation_config") is not None), model)
    config = owner.generation_config
    owner.generation_config = GenerationConfig(do_sample=False, use_cache=True, **settings)
    try:
        with evaluating(model):
            yield
    finally:
        owner.generation_config = config


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Ints, Ints]:
    """Ids and attention mask, (B, T) each, padded on the left, so that every row ends in the last column."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    attention = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        attention[i, width - len(row) :] = 1
    return ids, attention
