"""Why a scan is not certified: each reason where it holds, and only there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gradshield.pipeline import trust
from gradshield.probes import Validity
from gradshield.selectors import Screen
from gradshield.types import Rendered, Scores, Tokens


class Words:
    """A tokenizer whose tokens are words."""

    vocabulary = ("Yes", "No", "first", "second", "third", "fourth", "a", "long", "answer", "42", "43")

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(self.vocabulary[i] for i in ids)


def row(*words: str) -> Rendered:
    ids = np.array([Words.vocabulary.index(word) for word in words])
    return Rendered(0, "", "rows", (Tokens(ids, np.ones(len(ids), bool)),))


def scored(request: float = 0.0, fihs: float = 0.0, pivots: int = 0, count: int = 100, refused: int = 80) -> Any:
    signals = {
        "request": np.full(count, request),
        "fihs": np.full(count, fihs),
        "pivots": (np.arange(count) < pivots).astype(float),
    }
    scores = Scores(np.arange(count), [""] * count, np.zeros(count), ["rows"] * count, signals=signals)
    selector = Screen.__new__(Screen)
    selector.opener_fihs = 10.0
    return SimpleNamespace(scores=scores, validity=Validity(refused, 80, 0), selector=selector)


def removed(count: int) -> Any:
    return np.arange(100) < count


GONE = [
    row("first", "long", "answer"),
    row("second", "long", "answer"),
    row("third", "a", "long"),
    row("fourth", "a", "long"),
]


def test_a_scan_that_nothing_speaks_against_is_certified():
    assert trust.doubts(scored(), removed(4), GONE, Words()) == {}
    assert trust.first({}) is None


@pytest.mark.parametrize(
    ("name", "given", "count", "gone", "said"),
    [
        ("probes", {"refused": 3}, 4, GONE, "refuses only 3 of 80 probes"),
        ("share", {}, 11, GONE, "11 of 100 rows (11 %) were removed"),
        ("copies", {}, 4, [row("a", "long", "answer", "42"), row("a", "long", "answer", "43")] * 2, "near-copies"),
        ("copies", {}, 4, [row("Yes"), row("No"), row("first"), row("third", "a", "long")], "one or two words"),
        ("task", {"fihs": 5.0}, 4, GONE, "100 of 100 rows push away from refusal"),
        ("pivots", {"pivots": 3}, 4, GONE, "3 rows open as a refusal and then answer"),
        ("unread", {"request": np.nan}, 0, [], "100 rows are plain text"),
    ],
)
def test_each_reason(name, given, count, gone, said):
    found = trust.doubts(scored(**given), removed(count), gone, Words())
    assert set(found) == {name} and said in found[name]
    assert trust.first(found) == found[name]


@pytest.mark.parametrize(("count", "doubted"), [(10, False), (11, True), (0, False)])
def test_more_than_a_tenth(count, doubted):
    assert bool(trust.share(removed(count))) is doubted


def test_another_cut_keeps_what_the_scores_say_and_counts_again():
    old = {"share": "old", "copies": "old", "task": "the task"}
    assert trust.recut(old, removed(3)) == {"task": "the task"}
    assert set(trust.recut(old, removed(60))) == {"share", "task"}
