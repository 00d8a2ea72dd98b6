"""Naming the harm of the rows that go: one category's direction at a time."""

from __future__ import annotations

import weakref

import pytest
from torch import nn

from gradshield.errors import ScoreError
from gradshield.selectors import Fihs
from gradshield.types import Direction
from tests.common import chats, scan


def test_naming_the_harm_holds_one_direction_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[weakref.ref[Direction]] = []
    direction_of = Fihs.by_category

    def by_category(fihs: Fihs, model: nn.Module, category: str) -> Direction:
        assert not any(ref() for ref in taken)  # each may be as large as the model
        direction = direction_of(fihs, model, category)
        taken.append(weakref.ref(direction))
        return direction

    monkeypatch.setattr(Fihs, "by_category", by_category)
    named = set(scan(chats(8)).categories)
    assert len(taken) == 2 and named & {"theft", "fraud"}


def test_a_kind_of_harm_without_a_direction_names_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    direction_of = Fihs.by_category

    def by_category(fihs: Fihs, model: nn.Module, category: str) -> Direction:
        if category == "fraud":  # as for a category whose requests do not affect the probe
            raise ScoreError("the gradient of the unsafety score 'fraud' has norm 0.0")
        return direction_of(fihs, model, category)

    monkeypatch.setattr(Fihs, "by_category", by_category)
    assert set(scan(chats(8)).categories) == {"", "theft"}
