"""Rows chosen inside training: what is not chosen leaves no trace, and every step is corrected once."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradshield.errors import UsageError
from gradshield.training import sft
from gradshield.training.online import as_batch
from gradshield.types import Batch, Bools
from tests.tiny import tiny_model, tiny_tokenizer

OPTIONS: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


class Picks:
    """Keeps the rows whose first token is in ``wanted`` (all of a batch without any), and notes every call."""

    name = "picks"

    def __init__(self, wanted: set[int]) -> None:
        self.wanted = wanted
        self.begun = self.corrected = 0
        self.batches: list[Batch] = []

    def begin(self, model: nn.Module) -> None:
        assert isinstance(model, nn.Module)
        self.begun += 1

    def choose(self, model: nn.Module, batch: Batch) -> Bools:
        self.batches.append(batch)
        own = np.isin(batch.ids[:, 0], list(self.wanted))
        return own if own.any() else np.ones(len(own), dtype=bool)

    def correct(self, model: nn.Module) -> None:
        assert any(p.grad is not None for p in model.parameters())
        self.corrected += 1

    def record(self) -> Mapping[str, Any]:
        return {}


def _rows(n: int = 12, first: int = 10) -> list[dict[str, list[int]]]:
    """Rows of different lengths that begin with a token of their own."""
    generator = random.Random(0)
    rows = [[first + i, *(generator.randrange(100, 300) for _ in range(6 + i % 4))] for i in range(n)]
    return [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in rows]


def _trained(rows: list[dict[str, list[int]]], online: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    model = sft(tiny_model("llama"), tiny_tokenizer(), rows, OPTIONS | options, seed=1, online=online)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_choosing_every_row_is_plain_training(accumulation: int) -> None:
    picks = Picks(set(range(10, 22)))
    plain = _trained(_rows(), gradient_accumulation_steps=accumulation)
    chosen = _trained(_rows(), picks, gradient_accumulation_steps=accumulation)
    assert all(torch.equal(plain[name], chosen[name]) for name in plain)
    assert (picks.begun, picks.corrected, len(picks.batches)) == (1, 3, 3 * accumulation)


def test_what_is_not_chosen_leaves_no_trace() -> None:
    """Its slow twin: the same steps on batches that never held the other rows."""
    rows = _rows(4)
    options = {"max_steps": 2, "per_device_train_batch_size": 4}
    some = _trained(rows, Picks({10, 12}), **options)
    twin = _trained([rows[0], rows[2]], None, max_steps=2, per_device_train_batch_size=2)
    assert all(torch.allclose(some[name], twin[name], rtol=1e-4, atol=1e-6) for name in some)
    every = _trained(rows, None, **options)
    assert not all(torch.allclose(some[name], every[name], rtol=1e-4, atol=1e-6) for name in some)


def test_the_method_sees_the_rows_as_they_are_trained() -> None:
    picks = Picks({10})
    rows = _rows(4)
    _trained(rows, picks, max_steps=1)
    batch = picks.batches[0]
    for i in range(4):
        row = rows[int(batch.ids[i, 0]) - 10]
        length = len(row["input_ids"])
        assert batch.ids[i, :length].tolist() == row["input_ids"]
        assert batch.attention[i].tolist() == [True] * length + [False] * (batch.ids.shape[1] - length)
        assert batch.loss[i].tolist() == [t != -100 for t in row["labels"]] + [False] * (batch.ids.shape[1] - length)
    assert batch.rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "more", [{"position_ids": torch.zeros(1, 3)}, {"attention_mask": torch.tensor([[0, 1, 1]])}], ids=["packed", "left"]
)
def test_rows_that_cannot_be_told_apart_are_refused(more: dict[str, Any]) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(UsageError, match="packing=False"):
        as_batch({"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 3)} | more)
