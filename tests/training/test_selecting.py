"""Rows chosen inside training: what is not chosen leaves no trace, and every step is corrected once."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from gradshield.errors import UsageError
from gradshield.selectors import DualSelect
from gradshield.selectors.moderate import OnlineModerate
from gradshield.training import fit
from gradshield.training.inside import as_batch
from gradshield.types import Batch, Bools, Rendered, Tokens
from tests.tiny import tiny_model, tiny_tokenizer

LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
KINDS = pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
OPTIONS: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}


class Picks:
    """Keeps the rows whose first token is in ``wanted`` (all of a batch without any), and notes every call."""

    name = "picks"
    least = 3

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


def _trained(
    rows: list[dict[str, list[int]]], online: Any = None, adapter: Any = None, **options: Any
) -> dict[str, torch.Tensor]:
    model = fit(tiny_model("llama"), tiny_tokenizer(), rows, OPTIONS | options, adapter, seed=1, online=online)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_choosing_every_row_is_plain_training(accumulation: int) -> None:
    picks = Picks(set(range(10, 22)))
    plain = _trained(_rows(), gradient_accumulation_steps=accumulation)
    chosen = _trained(_rows(), picks, gradient_accumulation_steps=accumulation)
    assert all(torch.equal(plain[name], chosen[name]) for name in plain)
    assert (picks.begun, picks.corrected, len(picks.batches)) == (1, 3, 3 * accumulation)


MIXED: dict[str, Any] = {"bf16": True, "use_cpu": True}


@KINDS
def test_under_mixed_precision_choosing_every_row_is_plain_training(adapter: Any) -> None:
    plain = _trained(_rows(), adapter=adapter, **MIXED)
    chosen = _trained(_rows(), Picks(set(range(10, 22))), adapter, **MIXED)
    assert all(torch.equal(plain[name], chosen[name]) for name in plain)
    single = _trained(_rows(), adapter=adapter)
    assert not all(torch.equal(plain[name], single[name]) for name in plain)  # else nothing was mixed


class Looks(Picks):
    """Compares what the model says to it with a model of the same weights that no trainer has touched."""

    def __init__(self, adapter: Any) -> None:
        super().__init__(set(range(10, 22)))
        self.adapter, self.same = adapter, []

    def begin(self, model: nn.Module) -> None:
        super().begin(model)
        self._look(model, torch.arange(10, 20)[None])

    def choose(self, model: nn.Module, batch: Batch) -> Bools:
        self._look(model, torch.as_tensor(batch.ids))
        return super().choose(model, batch)

    def _look(self, model: nn.Module, ids: torch.Tensor) -> None:
        twin: Any = tiny_model("llama")
        if self.adapter is not None:
            twin = peft.get_peft_model(twin, copy.deepcopy(self.adapter))
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            self.same.append(torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits))


@KINDS
def test_under_mixed_precision_a_method_measures_in_the_precision_of_the_weights(adapter: Any) -> None:
    looks = Looks(adapter)
    _trained(_rows(), looks, adapter, **MIXED)
    assert looks.same == [True] * 4


@KINDS
@pytest.mark.parametrize("method", ["moderate", "dualselect"])
def test_the_methods_train_under_mixed_precision(method: str, adapter: Any) -> None:
    ids = np.arange(20, 30)
    pool = [Rendered(-1, "", "probe", (Tokens(ids, np.arange(10) >= 4),))]
    online: Any = OnlineModerate(0.5) if method == "moderate" else DualSelect(pool, warmup=1, refresh=1)
    chosen = _trained(_rows(), online, adapter, **MIXED)
    plain = _trained(_rows(), adapter=adapter, **MIXED)
    assert not all(torch.equal(plain[name], chosen[name]) for name in plain)
    record = online.record()
    assert record["batches"] == 3 and all(bool(tensor.isfinite().all()) for tensor in chosen.values())


class Placed(Picks):
    position = -1

    def choose(self, model: nn.Module, batch: Batch) -> Bools:
        self.seen = [*getattr(self, "seen", []), self.position]
        self.position += 1
        return super().choose(model, batch)


def test_a_method_gets_the_position_at_which_training_resumes(tmp_path: Path) -> None:
    options = OPTIONS | {"gradient_accumulation_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}

    def train(steps: int, resume: bool) -> list[int]:
        placed, out = Placed(set(range(10, 22))), str(tmp_path / "out")
        more = {"max_steps": steps, "lr_scheduler_type": "constant"}
        fit(
            tiny_model("llama"), tiny_tokenizer(), _rows(), options | more, output_dir=out, online=placed, resume=resume
        )
        return placed.seen

    assert train(2, False) == [0, 1, 2, 3]
    assert train(4, True) == [4, 5, 6, 7]


@pytest.mark.parametrize(("rows", "warned"), [(2, True), (3, False)])
def test_a_batch_too_small_to_select_from_is_reported(
    rows: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _trained(_rows(), Picks({10}), max_steps=1, per_device_train_batch_size=rows)
    assert ("give at least 3" in caplog.text) == warned


@pytest.mark.parametrize("method", [OnlineModerate(), OnlineModerate(1.0), OnlineModerate(0.29), OnlineModerate(1e-3)])
def test_the_least_batch_is_the_first_that_a_row_is_the_share_of(method: OnlineModerate) -> None:
    assert int(method.ratio * method.least + 1e-9) == 1
    assert int(method.ratio * (method.least - 1) + 1e-9) == 0


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
def test_indistinguishable_rows_are_rejected(more: dict[str, Any]) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(UsageError, match="packing=False"):
        as_batch({"input_ids": ids, "labels": ids, "attention_mask": torch.ones(1, 3)} | more)
