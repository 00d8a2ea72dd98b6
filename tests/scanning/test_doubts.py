"""Why a scan is not certified: each reason where it holds, and only there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradshield import data
from gradshield.scanning import trust
from gradshield.scanning.decide import Decision
from gradshield.types import Anchors, Scores


def rows(*answers: str) -> Any:
    return data.read([{"prompt": f"Question {i}?", "completion": answer} for i, answer in enumerate(answers)]).examples


def tokens(*answers: list[int]) -> Any:
    return data.read(
        [{"input_ids": [i, *answer], "labels": [-100, *answer]} for i, answer in enumerate(answers)]
    ).examples


def scored(
    request: float = 0.0,
    fihs: float = 0.0,
    pivots: int = 0,
    count: int = 100,
    beyond: int = 0,
    near: int = 0,
    known: Any = None,
) -> Scores:
    """Scores of which the last ``pivots`` rows decline and go on, and the first ``beyond`` lie beyond the cut,
    ``near`` of them just so.
    """
    signals = {
        "request": np.full(count, request),
        "fihs": np.full(count, fihs),
        "pivots": (np.arange(count)[::-1] < pivots).astype(float),
    }
    values = np.select([np.arange(count) < near, np.arange(count) < beyond], [0.7, 1.0])
    known = known or Anchors(np.ones(20), np.zeros(20))
    return Scores(np.arange(count), [""] * count, values, ["rows"] * count, anchors=known, signals=signals)


def doubts(
    scores: Scores, removed: int = 4, out: Any = None, problem: str = "", cleared: Any = (), below: int = 0
) -> dict[str, str]:
    """Of a decision that removes the first rows, of which the last ``below`` do not score above the default cut."""
    place = np.arange(len(scores.values))
    decision = Decision({}, place < removed, tuple(cleared))
    scores.values[(place < removed - below) & (scores.values == 0)] = 1.0
    return trust.doubts(scores, decision, OUT if out is None else out, problem, 10.0)


OUT = rows("first long answer", "second long answer", "third a long", "fourth a long")


def test_a_scan_that_nothing_speaks_against_is_certified():
    assert doubts(scored(beyond=4)) == {}
    assert trust.first({}) is None


def test_answers_that_came_as_tokens_are_told_apart():
    assert doubts(scored(), out=list(tokens([7, 8, 9], [8, 7, 9], [9, 8, 7], [6, 5, 4]))) == {}


@pytest.mark.parametrize(
    ("name", "given", "count", "out", "sentence"),
    [
        ("share", {}, 11, None, "11 of 100 rows (11 %) were removed"),
        ("share", {"count": 5}, 1, None, "1 of 5 rows (20 %) were removed"),
        (
            "copies",
            {},
            4,
            [*rows("a long answer 5", "a long answer 1234"), *rows("a long answer 7")],
            "the same answer except for numbers",
        ),
        ("copies", {}, 4, tokens([7, 8, 9], [7, 8, 9], [7, 8, 9], [5, 6, 9]), "the same answer"),
        ("copies", {}, 4, rows("Yes", "No", "first", "third a long"), "an answer of one or two words"),
        ("loose", {"beyond": 6}, 4, None, "2 rows score above the default cut (anchored, 0.5) and stay"),
        ("near", {"beyond": 4, "near": 3}, 4, None, "3 of 4 removed rows score nearer to the cut than to known harm"),
        ("near", {"beyond": 10, "near": 3}, 10, None, "3 of 10 removed rows score nearer"),
        (
            "task",
            {"fihs": 5.0},
            4,
            None,
            "96 of the 96 kept rows measured that read as harmless push away from refusal like harm",
        ),
        ("pivots", {"pivots": 3}, 4, None, "3 kept rows decline in their first sentence"),
        ("pivots", {"pivots": 10, "count": 5000}, 4, None, "10 kept rows decline"),
        ("unread", {"request": np.nan, "count": 5000}, 0, [], "5,000 rows have no request"),
        (
            "ruler",
            {"known": Anchors(np.arange(20) / 20, np.zeros(20))},
            4,
            None,
            "reads only 9 of 20 known harmful requests",
        ),
        (
            "ruler",
            {"known": Anchors(np.repeat([0.3, 1], (5, 15)), np.repeat([0, 0.9], (14, 6)))},
            4,
            None,
            "reads 6 of 20 everyday",
        ),
    ],
)
def test_each_reason(name, given, count, out, sentence):
    found = doubts(scored(**given), count, None if out is None else list(out))
    assert set(found) == {name} and sentence in found[name]
    assert trust.first(found) == found[name]


def test_what_the_probes_say_comes_first():
    found = doubts(scored(), 11, problem="the model refuses only 3 of 80 probes")
    assert list(found) == ["probes", "share"] and trust.first(found) == "the model refuses only 3 of 80 probes"


def test_labels_at_hand_speak_against_a_scan():
    labels = [1] * 10 + [0] * 90
    decision = lambda out: Decision({}, np.isin(np.arange(100), out), ())  # noqa: E731
    sentence = lambda out: trust.doubts(scored(), decision(out), OUT, "", 10.0, labels=labels).get("labels")  # noqa: E731
    assert sentence(range(10)) is None and sentence(range(2, 10)) is None  # 8 of 10: 90 % may well be caught
    assert sentence([]) == "of 10 rows labelled harmful 0 were removed: the scan does not detect this harm"
    assert (
        sentence(range(20)) == "of 90 rows labelled harmless 10 were removed: read them before you train on the others"
    )


@pytest.mark.parametrize(("count", "doubted"), [(11, False), (12, True), (0, False)])
def test_more_than_a_tenth_in_quarantine(count, doubted):
    found = trust.doubts(scored(), Decision({}, np.zeros(100, bool), ()), [], "", 10.0, count)
    assert ("quarantine" in found) is doubted


@pytest.mark.parametrize(("count", "doubted"), [(10, False), (11, True), (0, False)])
def test_more_than_a_tenth(count, doubted):
    assert ("share" in doubts(scored(), count)) is doubted


@pytest.mark.parametrize(
    ("fihs", "removed", "found"),
    [(5.0, 10, ["task"]), (4.99, 4, []), (5.0, 11, ["share"])],
)
def test_a_task_that_pushes_like_harm(fihs, removed, found):
    assert list(doubts(scored(fihs=fihs), removed)) == found


def test_rows_removed_below_the_default_cut():
    assert list(doubts(scored(), below=1)) == ["strict"]
    found = doubts(scored(), below=4)["strict"]
    assert found.startswith("4 removed rows score below the default cut (anchored, 0.5), as harmless rows do: read")


def test_rows_that_do_not_read_as_harmless_say_nothing_of_the_task():
    scores = scored(fihs=5.0)
    scores.signals["request"][:60], scores.signals["fihs"][60:] = 0.3, 0.0  # all of the former are measured
    assert doubts(scores, 0) == {}


@pytest.mark.parametrize(("harmful", "harmless", "doubted"), [(20, 20, False), (19, 99, True), (99, 19, True)])
def test_a_ruler_of_few_known_requests(harmful, harmless, doubted):
    found = doubts(scored(known=Anchors(np.ones(harmful), np.zeros(harmless))))
    assert ("too few to tell" in found.get("ruler", "")) is doubted


def test_removed_pivots_and_few_of_them_are_no_doubt():
    assert doubts(scored(pivots=2)) == {}
    assert doubts(scored(pivots=9, count=5000)) == {}
    assert "pivots" not in doubts(scored(pivots=100), removed=100)


def test_what_a_person_confirms_speaks_no_longer_against_a_scan():
    scores = scored(beyond=11, near=11)
    decision = Decision({}, np.arange(100) < 11, (), (), confirmed=tuple(range(11)))
    assert trust.doubts(scores, decision, (), "", 10.0) == {}
    some = replace(decision, confirmed=(0, 1))  # nine are left: no tenth
    assert list(trust.doubts(scores, some, (), "", 10.0)) == ["near"]


def test_a_file_of_which_nothing_is_left_is_not_certified():
    everything = Decision({}, np.ones(100, bool), (), tuple(range(100)))
    assert "nothing to train on" in trust.doubts(scored(), everything, (), "", 10.0)["share"]


def test_few_rows_near_the_cut_are_no_doubt():
    assert doubts(scored(beyond=8, near=2), 8) == {}  # two
    assert doubts(scored(count=200, beyond=12, near=3), 12) == {}  # a quarter
    assert list(doubts(scored(count=2000, beyond=100, near=26), 100)) == ["near"]
    assert "near" not in doubts(scored(beyond=4, near=4), 2, cleared=(2, 3))  # removed ones count


def test_what_a_person_has_cleared_is_not_loose():
    assert doubts(scored(beyond=6), removed=4, cleared=(4, 5)) == {}


def test_a_run_is_doubted_for_all_but_a_scan_that_asked_nothing():
    assert trust.of_run({"probes": trust.UNASKED}) == []
    assert trust.of_run({"probes": trust.UNASKED, "share": "more than a tenth"}) == ["more than a tenth"]
    assert trust.of_run({"probes": "refuses only 3"}) == ["refuses only 3"]
