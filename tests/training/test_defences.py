"""Defences as they are typed: what each name does, and which joins are refused in one sentence."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.errors import UnknownNameError, UsageError
from gradshield.selectors import parse_aggregate
from gradshield.training.course import masked
from gradshield.training.defences import DEFENCES, parse
from gradshield.types import Rendered, Tokens

NAMES = [name for name in DEFENCES if name != "guard"]


@pytest.mark.parametrize("name", NAMES)
def test_every_defence_stands_alone_and_says_what_it_does(name: str) -> None:
    assert parse(name).spec == name
    assert DEFENCES.summary(name).endswith((".", ")."))


def test_parts_are_joined() -> None:
    found = parse("fihs:adaptive:alpha=5+asft:weight=0.5,projector=top+dualselect:top=4+safeinstruct:20%")
    assert (found.selector, found.threshold) == ("fihs", "adaptive:alpha=5")
    assert found.penalties == (("asft", {"weight": 0.5, "projector": "top", "energy": 0.9}),)
    assert found.online is not None
    assert found.online[0] == "dualselect"
    assert found.online[1]["top"] == 4
    assert found.safe_share == 0.2
    assert found.needs_base


def test_a_verified_threshold_carries_its_options() -> None:
    found = parse("fihs:verified:85%,rounds=3")
    assert found.verified is not None
    assert (found.verified.utility, found.verified.rounds, found.threshold) == (0.85, 3, None)


@pytest.mark.parametrize(
    "text",
    [
        "fihs+random",
        "clean+fihs",
        "fihs+clean",
        "moderate+dualselect",
        "asft+asft",
        "none+fihs",
        "none:1",
        "asft:wieght=1",
        "asft:weight=much",
        "asft:weight=-1",
        "asft:projector=foo",
        "moderate:2",
        "dualselect:temperature=0",
        "dualselect:warmup=inf",
        "dualselect:top=2.5",
        "safelora:threshold=2",
        "kl:-1",
        "guard",
        "guard:guard:m",
        "guard:clasifier:m",
        "safeinstruct:0",
        "fihs:ratio:150%",
        "random:as:nothing",
        "fihs:verified:rounds=0",
        "",
        "fihs+",
    ],
)
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("text", ["guard:org/Guard-8B,words=no+yes", "guard:classifier:m", "guard:llm:m@https://h/v1"])
def test_a_guard_has_one_name_as_selector_and_defence(text: str) -> None:
    assert parse(text).selector == text
    own = parse("larf:ratio:5%+moderate:0.5")
    assert (own.selector, own.threshold, own.online) == ("larf", "ratio:5%", ("moderate", {"ratio": 0.5}))


def test_an_unknown_defence_lists_the_live_ones() -> None:
    with pytest.raises(UnknownNameError, match="fihs") as caught:
        parse("fish")
    assert all(name in str(caught.value) for name in DEFENCES)


@given(st.text(max_size=40))
def test_wild_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse(text)


# ---- token masks ----------------------------------------------------------------------------------------------------


def _row(lengths: list[int]) -> Rendered:
    sequences = [Tokens(np.arange(n + 2), np.r_[False, False, np.ones(n, dtype=bool)]) for n in lengths]
    return Rendered(0, "a", "messages", tuple(sequences))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(lambda n: sum(n) > 0),
    st.integers(0, 2**32 - 1),
    st.floats(-1, 3),
    st.sampled_from(["push", "sum", "mean", "top:2"]),
)
def test_the_fewest_tokens_leave(lengths: list[int], seed: int, cut: float, name: str) -> None:
    """Against its slow twin: try 0, 1, 2… of the largest tokens, and stop at the first number that is enough."""
    values = np.random.default_rng(seed).normal(size=sum(lengths))
    aggregate = parse_aggregate(name)
    kept = np.concatenate([t.loss[2:] for t in masked(_row(lengths), values, cut, aggregate).sequences])
    order = np.argsort(-values, kind="stable")
    enough = [n for n in range(len(values)) if aggregate(np.delete(values, order[:n])) <= cut]
    expected = np.ones(len(values), dtype=bool)
    expected[order[: enough[0] if enough else len(values)]] = False
    assert (kept == expected).all()


def test_a_mask_leaves_ids_prompts_and_the_given_row_alone() -> None:
    row = _row([4])
    again = masked(row, np.array([9.0, 0.0, 8.0, 0.0]), 0.0, parse_aggregate("sum"))
    assert again.sequences[0].loss.tolist() == [False, False, False, True, False, True]
    assert row.sequences[0].loss.tolist() == [False, False, True, True, True, True]
    assert (again.sequences[0].ids == row.sequences[0].ids).all()
