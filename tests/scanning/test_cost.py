"""The arithmetic of what a scan costs, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.gradients import ENGINES
from gradshield.scanning.cost import PASSES, Shape, hours, ratio_estimate
from tests.tiny import tiny_model


def test_one_pass_over_two_rows() -> None:
    shape = Shape(body=1_000, head=500, layers=2, width=8)
    # 2 · 1000 · 10 + 2 · 500 · 3 + 4 · 2 · 8 · 100, and the same of 1 token without loss.
    np.testing.assert_array_equal(shape.forward(np.array([10, 1]), np.array([3, 0])), [29_400, 2_064])


def test_a_billion_parameters_over_a_million_rows() -> None:
    shape = Shape(body=10**9, head=0, layers=0, width=0)
    work = shape.forward(np.full(10**6, 500), np.zeros(10**6)).sum()
    assert work == pytest.approx(1e18)
    assert hours(work, kept=1e14, passes=2) == pytest.approx(2e4 / 3600)


def test_every_engine_but_the_oracle_has_its_passes() -> None:
    assert set(PASSES) == set(ENGINES) - {"loop"}


@pytest.mark.parametrize(
    ("shape", "operations", "million"),
    [
        (Shape(970 * 10**6, 263 * 10**6, 16, 2048), 1.16e12, 5.3),
        (Shape(6_980 * 10**6, 525 * 10**6, 32, 4096), 7.55e12, 34.6),
    ],
    ids=["1 B", "8 B"],
)
def test_the_table_of_the_documentation(shape: Shape, operations: float, million: float) -> None:
    """docs/scaling.md: rows of 512 tokens, half of them in the loss, the engine forward, 200 TFLOP/s."""
    row = float(shape.forward(np.array(512), np.array(256)))
    assert row == pytest.approx(operations, rel=0.005)
    assert hours(row * 10**6, 2e14, PASSES["forward"]) == pytest.approx(million, rel=0.01)


def test_the_size_of_a_model_leaves_out_what_is_looked_up() -> None:
    model = tiny_model("llama")
    shape, config = Shape.of(model), model.config
    own = {name: p.numel() for name, p in model.named_parameters()}
    assert shape.body == sum(n for name, n in own.items() if "embed_tokens" not in name and "lm_head" not in name)
    assert shape.head == config.vocab_size * config.hidden_size
    assert (shape.layers, shape.width) == (config.num_hidden_layers, config.hidden_size)


def test_of_a_mixture_the_experts_count_that_a_token_goes_through() -> None:
    model = tiny_model("mixtral")
    own = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(n for name, n in own.items() if ".experts." in name)
    others = sum(n for name, n in own.items() if "embed_tokens" not in name and "lm_head" not in name) - experts
    share = model.config.num_experts_per_tok / model.config.num_local_experts
    assert 0 < share < 1
    assert Shape.of(model).body == round(others + share * experts)


def test_the_ratio_estimate_by_hand() -> None:
    found = ratio_estimate(np.array([2.0, 5.0]), np.array([1.0, 2.0]), whole=30.0, count=10)
    assert found.value == pytest.approx(70)  # 7 seconds for 3, of 30
    # left over: 2 - 7/3 and 5 - 14/3; its variance 2/9 / 2 · (1 - 2/10), over a mean of 1.5, times 30
    error = 1.96 * np.sqrt(0.8 * (2 / 9) / 2) / 1.5 * 30
    assert (found.low, found.high) == (pytest.approx(70 - error), pytest.approx(70 + error))


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20))
def test_a_sample_that_is_everything_is_the_sum(seconds: list[float]) -> None:
    every = np.array(seconds)
    found = ratio_estimate(every, every**0.5, float((every**0.5).sum()), len(every))
    assert found.low == pytest.approx(found.value) == pytest.approx(found.high) == pytest.approx(every.sum())


def test_one_shard_of_several_bounds_nothing() -> None:
    found = ratio_estimate(np.array([2.0]), np.array([1.0]), 10.0, 5)
    assert (found.value, found.low, found.high) == (20.0, 0.0, float("inf"))
