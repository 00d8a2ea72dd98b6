"""What every registered selector owes: no state across batches, one finite score a row, and the caller's model as it was."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from gradshield.gradients import Forward
from gradshield.judges.guards import Opinion
from gradshield.probes import FunctionProbe, PromptBatch, Prompts, first_logits
from gradshield.scanning import shards
from gradshield.selectors import (
    SELECTORS,
    Anchoring,
    Fihs,
    GradNorm,
    GuardFilter,
    Larf,
    Loss,
    Measured,
    Moderate,
    Random,
    Screen,
    Selector,
    parse_aggregate,
)
from gradshield.selectors.reading import Reading, Turn
from gradshield.thresholds import parse
from gradshield.types import Anchors, References, Rendered, Scores, Tokens
from tests.contracts.common import differences, rows, state
from tests.tiny import VOCABULARY, tiny_model


def gap(model: nn.Module, batch: PromptBatch) -> torch.Tensor:
    logits = first_logits(model, batch)
    return (logits[:, 20] - logits[:, 30]).mean()


def some(count: int, seed: int) -> tuple[Rendered, ...]:
    draw = np.random.default_rng(seed)
    made = [Tokens(draw.integers(5, VOCABULARY, 10 + i), np.arange(10 + i) >= 6) for i in range(count)]
    return tuple(Rendered(i, f"r{i}", "rows", (tokens,)) for i, tokens in enumerate(made))


class Reader:
    """A guard that needs no model: the share of a response's text that is in the first half of the alphabet."""

    name = "reader"

    def ready(self) -> None:
        pass

    def opinions(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Opinion]:
        return [Opinion(sum(c < "n" for c in said) / max(len(said), 1), "") for said in responses]

    def record(self) -> dict[str, Any]:
        return {"kind": "reader"}


def spelled(ids: Sequence[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


PROMPTS = Prompts(tuple((1, 3, 40 + i, 4) for i in range(4)), ("a",) * 4, tuple("wxyz"))


class Speller:
    """A tokenizer that can only decode: no text that it makes has marks or words of a request."""

    all_special_ids: ClassVar = []
    bos_token_id = None

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return spelled(ids.tolist() if hasattr(ids, "tolist") else ids)


def screen() -> Screen:
    """With a ruler made of random prompts, whose turns open with 4: rows have none, and are read as plain text."""
    fihs = Fihs(FunctionProbe(gap), PROMPTS, Forward(), parse_aggregate("sum"), "last:1")
    draw = np.random.default_rng(2)
    sides = [
        Prompts(tuple((1, 3, *draw.integers(5, VOCABULARY, 4), 4) for _ in range(6)), ("",) * 6, ("",) * 6)
        for _ in "ab"
    ]
    reading = Reading.fit(tiny_model("llama"), Turn.of(sides[0]), *sides, sides[1])
    return Screen(fihs, reading, Speller(), Anchors(np.ones(20), np.zeros(20)), rendered=())


MAKERS: dict[str, Callable[[], Selector]] = {
    "fihs": lambda: Fihs(FunctionProbe(gap), PROMPTS, Forward(), parse_aggregate("sum"), "last:1"),
    "screen": screen,
    "moderate-rows": lambda: Moderate("all"),
    "gradnorm": lambda: GradNorm("last:1"),
    "loss": Loss,
    "random": lambda: Random(3),
    "larf": lambda: Larf(References(some(4, 1), some(4, 2), some(4, 3))),
    "anchors": lambda: Anchoring(References(some(4, 1), some(4, 2), some(4, 3))),
    "guard": lambda: GuardFilter(Reader(), spelled),
}


def mixed() -> list[Rendered]:
    """Rows of one sequence and of two, of many lengths, with gaps in their numbers."""
    draw = np.random.default_rng(8)
    made = [Rendered(3 * r.row + 1, r.id, r.shape, r.sequences) for r in rows()]
    for i, (chosen, rejected) in enumerate([(9, 6), (14, 20), (8, 8)]):
        sides = tuple(
            Tokens(draw.integers(5, VOCABULARY, n), np.arange(n) >= 3, sign)
            for n, sign in ((chosen, 1.0), (rejected, -1.0))
        )
        made.append(Rendered(3 * i, f"p{i}", "preference", sides))
    return made


def caller_model() -> nn.Module:
    """Half frozen, partly in training mode, one gradient already there."""
    model = tiny_model("llama")
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    first = next(model.parameters())
    first.grad = torch.full_like(first, 0.25)
    return model


def scored(selector: Selector, model: nn.Module, direction: Any, batches: list[list[Rendered]]) -> Scores:
    """Scores of all rows, measured in these batches."""
    raw = Measured.joined([shards.measure(selector, model, direction, batch, 100_000) for batch in batches])
    own = sorted((r for batch in batches for r in batch), key=lambda r: r.row)
    assert raw.rows.tolist() == [r.row for r in own]
    assert raw.lengths.tolist() == [sum(int(t.loss.sum()) for t in r.sequences) for r in own]
    return selector.finish(raw, [r.id for r in own], ["preference" if r.shape == "preference" else "rows" for r in own])


def test_every_selector_is_here() -> None:
    assert set(MAKERS) == set(SELECTORS)


@pytest.mark.parametrize("name", list(SELECTORS))
def test_selector(name: str) -> None:
    model, made = caller_model(), mixed()
    before = state(model)
    selector = MAKERS[name]()
    assert selector.name == name
    direction = selector.prepare(model)
    expected = scored(selector, model, direction, [made])
    assert differences(before, state(model)) == []

    assert expected.values.shape == (len(made),) and np.isfinite(expected.values).all()
    assert len(set(expected.values.tolist())) > len(made) // 2  # rows get different scores
    assert list(expected.ids) == [r.id for r in sorted(made, key=lambda r: r.row)]
    assert isinstance(parse(selector.rule).cut(expected.values, expected.decoys, expected.anchors).value, float)
    assert json.loads(json.dumps(selector.settings())) == dict(selector.settings())

    order = np.random.default_rng(1).permutation(len(made))
    shuffled = [made[i] for i in order]
    bounds = [0, 1, 2, 7, 12, len(made)]
    for batches in ([shuffled], [shuffled[a:b] for a, b in pairwise(bounds)], [[r] for r in made]):
        again = scored(MAKERS[name](), model, direction, batches)
        np.testing.assert_allclose(again.values, expected.values, rtol=2e-4, atol=2e-4 * np.abs(expected.values).max())
    assert MAKERS[name]().prepare(model).digest == direction.digest
    assert differences(before, state(model)) == []
