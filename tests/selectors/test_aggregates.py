"""Aggregates: each against its definition written out, what all of them owe, and what `parse` refuses."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.errors import UsageError
from gradshield.selectors import AGGREGATES, parse_aggregate
from gradshield.selectors.fihs import largest, push

VALUES = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=60).map(np.array)
NAMED = ["sum", "mean", "push", "first:1", "first:3", "top:1", "top:5", "top:20%", "top:1%", "top:100%"]


def obvious(name: str, values: np.ndarray) -> float:
    """Every aggregate as one reads it, in plain loops."""
    if name == "sum":
        return math.fsum(values)
    if name == "mean":
        return math.fsum(values) / len(values)
    if name == "push":
        total = 0.0
        for v in values:
            if v > 0:
                total += v
        return total / (24 if len(values) < 24 else len(values))
    kind, _, number = name.partition(":")
    ranked = list(values) if kind == "first" else sorted(values, reverse=True)
    if number.endswith("%"):
        count = max(1, -(-len(values) * int(number[:-1]) // 100))  # rounded up, in whole numbers
        return math.fsum(ranked[:count]) / count
    return math.fsum(ranked[: int(number)])


def test_every_listed_aggregate_is_tested() -> None:
    assert {name.split(":")[0] for name in NAMED} == {name.split(":")[0] for name in AGGREGATES}


@pytest.mark.parametrize("name", NAMED)
@given(values=VALUES)
@settings(max_examples=60, deadline=None)
def test_aggregate_is_its_definition(name: str, values: np.ndarray) -> None:
    aggregate = parse_aggregate(name)
    assert aggregate.name == name
    before = values.copy()
    found = aggregate(values)
    assert isinstance(found, float)
    assert found == pytest.approx(obvious(name, values), rel=1e-9, abs=1e-6)
    assert np.array_equal(values, before)
    assert aggregate(4.0 * values) == pytest.approx(4.0 * found, rel=1e-9, abs=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMED if not n.startswith("first")])
@given(values=VALUES, seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_order_of_tokens_counts_only_for_first(name: str, values: np.ndarray, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(values)
    assert parse_aggregate(name)(shuffled) == pytest.approx(parse_aggregate(name)(values), rel=1e-9, abs=1e-6)


@given(values=VALUES, count=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_largest_is_a_sorted_head(values: np.ndarray, count: int) -> None:
    assert list(largest(values, count)) == sorted(values, reverse=True)[:count]


def test_push_by_hand() -> None:
    assert push(np.array([24.0])) == 1.0  # one token fills 24 places
    assert push(np.array([-5.0, -1.0])) == 0.0
    assert push(np.ones(24)) == push(np.ones(48)) == 1.0
    assert push(np.concatenate([np.full(25, 2.0), np.full(25, -9.0)])) == 1.0
    assert push(np.array([3.0, -3.0]), least=2) == 1.5


def test_whole_percentages_are_not_rounded_up_twice() -> None:
    """7 % of 100 tokens are 7, although 0.07 * 100 is a little more than 7 in floating point."""
    for share in range(1, 101):
        for n in (10, 50, 100, 200):
            values = np.arange(n, 0.0, -1)
            count = -(-n * share // 100)
            assert parse_aggregate(f"top:{share}%")(values) == pytest.approx(values[:count].mean()), (share, n)


def test_only_the_sum_does_without_tokens() -> None:
    assert [n for n in NAMED if not parse_aggregate(n).per_token] == ["sum"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sum",
        "sum ",
        "median",
        "first",
        "first:",
        "first:0",
        "first:-1",
        "first:20%",
        "first:1.5",
        "top",
        "top:0",
        "top:0%",
        "top:101%",
        "top:5%%",
        "top:k",
        "top:K",
        "push:3",
        "mean:2",
        "top:1e2",
        " top:1",
        "crest",
    ],
)
def test_what_is_no_aggregate_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_aggregate(text)
    message = str(caught.value)
    assert message.startswith(f"unknown aggregate {text!r}")
    assert all(name in message for name in AGGREGATES)
