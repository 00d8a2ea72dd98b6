"""The kind of harm of the removed rows: named as the model itself represents their requests."""

from __future__ import annotations

import numpy as np
import pytest

from gradshield.data import collate
from gradshield.probes import Prompts
from gradshield.scanning.scoring import Kinds, _request
from gradshield.selectors.base import no_direction
from gradshield.types import Rendered, Tokens
from tests.common import chats, scan
from tests.tiny import tiny_model

TOPICS = {"theft": range(10, 20), "fraud": range(40, 50), "drugs": range(70, 80)}
DRAW = np.random.default_rng(0)


def asked(per_kind: int) -> Prompts:
    """Requests of each kind in words of their own."""
    names = [name for name in TOPICS for _ in range(per_kind)]
    ids = tuple((1, 3, *DRAW.choice(list(TOPICS[name]), 6).tolist(), 4) for name in names)
    return Prompts(ids, tuple(names), ("",) * len(names))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_a_row_is_named_by_the_requests_that_it_resembles(arch: str) -> None:
    model, held_out = tiny_model(arch), asked(4)
    kinds = Kinds.fit(model, asked(16))
    rows = []
    for i, ids in enumerate(held_out.ids):
        tokens = np.array([*ids, 90, 91, 92])
        rows.append(Rendered(i, "", "rows", (Tokens(tokens, tokens >= 90),)))
    found = kinds.measure(model, no_direction("kinds"), collate(rows))
    named = [kinds.names[int(k)] for k in found.sums]
    assert np.mean(np.array(named) == held_out.categories) >= 0.75  # by chance: a third
    alone = [kinds.measure(model, no_direction("kinds"), collate([row])).sums[0] for row in rows]
    assert alone == found.sums.tolist()


def test_the_request_is_everything_before_the_last_answer() -> None:
    ids = np.arange(8)
    assert _request(ids, np.isin(ids, (3, 6, 7))) == [0, 1, 2, 3, 4, 5]
    assert _request(ids, np.ones(8, bool)) == ids.tolist()  # plain text
    assert _request(ids, np.zeros(8, bool)) == ids.tolist()


def test_only_removed_rows_are_named() -> None:
    selection = scan(chats(8))
    assert {bool(name) for name in np.array(selection.categories)[selection.removed]} <= {True}
    assert not any(np.array(selection.categories)[~selection.removed])
