"""The guard as a selector: which text of a row it reads, what counts, and rows that could not be judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from torch import nn

from gradshield.data import batches, collate
from gradshield.errors import EndpointError, UsageError
from gradshield.judges.client import Client
from gradshield.judges.guards import Llm, Moderations, Opinion
from gradshield.selectors import SELECTORS, GuardFilter, Measured
from gradshield.thresholds import parse as parse_threshold
from gradshield.types import Rendered, Tokens
from tests.endpoint import endpoint, moderation, status
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = nn.Linear(1, 1)  # what is trained plays no part


class Scripted:
    """A guard that says what the answer's first word says, and writes down what it was asked."""

    name = "scripted"

    def __init__(self, **opinions: Opinion) -> None:
        self.opinions_of, self.asked = opinions, list[tuple[str, str]]()

    def ready(self) -> None:
        pass

    def opinions(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Opinion]:
        self.asked += zip(prompts, answers, strict=True)
        return [self.opinions_of[answer.split()[0]] for answer in answers]

    def record(self) -> Mapping[str, Any]:
        return {"guard": "scripted"}


SAID = {
    "good": Opinion(0.1, "fine"),
    "fair": Opinion(0.5, "middling"),
    "bad": Opinion(0.9, "not fine"),
    "unclear": Opinion(None, "the guard wrote nonsense"),
}


def selector(guard: Any) -> GuardFilter:
    return GuardFilter(guard, lambda ids: str(TOKENIZER.decode(ids, skip_special_tokens=True)))


def sequence(*turns: tuple[str, bool], coefficient: float = 1.0) -> Tokens:
    """Texts with whether they count in the loss; special tokens around each."""
    ids, loss = [1], [False]
    for text, counts in turns:
        new = TOKENIZER(text + "</s>", add_special_tokens=False)["input_ids"]
        ids += new
        loss += [counts] * len(new)
    return Tokens(np.array(ids), np.array(loss), coefficient)


def row(number: int, *sequences: Tokens) -> Rendered:
    return Rendered(number, str(number), "messages", sequences)


def simple(number: int, prompt: str, answer: str) -> Rendered:
    return row(number, sequence((prompt, False), (answer, True)))


def scored(guard: Any, rows: Sequence[Rendered], budget: int = 10_000) -> Any:
    method = selector(guard)
    direction = method.prepare(MODEL)
    raw = Measured.joined([method.measure(MODEL, direction, batch) for batch in batches(rows, budget, budget)])
    return method.finish(raw, [r.id for r in rows], ["rows"] * len(rows))


def test_a_row_scores_what_the_guard_says_and_one_half_is_the_cut() -> None:
    guard = Scripted(**SAID)
    rows = [simple(i, f"ask {i}", f"{word} thing {i}") for i, word in enumerate(("good", "bad", "fair", "good"))]
    scores = scored(guard, rows)
    assert scores.values.tolist() == [0.1, 0.9, 0.5, 0.1]
    assert scores.rows.tolist() == [0, 1, 2, 3] and list(scores.ids) == ["0", "1", "2", "3"]
    assert scores.nll is None and scores.decoys is None and scores.tokens is None
    assert scores.lengths.tolist() == [int(r.sequences[0].loss.sum()) for r in rows]
    cut = parse_threshold(SELECTORS["guard"].rule).cut(scores.values, None)
    assert (scores.values > cut.value).tolist() == [False, True, False, False]
    assert sorted(guard.asked) == sorted(
        (f"ask {i}", f"{w} thing {i}") for i, w in enumerate(("good", "bad", "fair", "good"))
    )


def test_batches_do_not_matter() -> None:
    rows = [simple(i, "ask " * (i % 5), f"{('good', 'bad', 'fair')[i % 3]} " * (1 + i % 7)) for i in range(30)]
    whole, parts = scored(Scripted(**SAID), rows), scored(Scripted(**SAID), rows, 60)
    assert np.array_equal(whole.values, parts.values) and np.array_equal(whole.lengths, parts.lengths)


def test_every_answer_of_a_conversation_is_read_with_what_stands_before_it() -> None:
    guard = Scripted(**SAID)
    turns = (("first", False), ("bad one", True), ("second", False), ("good two", True), ("third", False))
    scores = scored(guard, [row(0, sequence(*turns))])
    assert guard.asked == [("first", "bad one"), ("firstbad onesecond", "good two")]
    assert scores.values.tolist() == [0.9]


def test_a_text_without_a_prompt_keeps_its_first_token() -> None:
    """The first token is predicted by nothing, so it is not in the loss; it is part of the text all the same."""
    guard = Scripted(**SAID)
    ids = np.array(TOKENIZER("good morning", add_special_tokens=False)["input_ids"])
    scored(guard, [row(0, Tokens(ids, np.arange(len(ids)) > 0))])
    assert guard.asked == [("", "good morning")]


@pytest.mark.parametrize(("chosen", "rejected", "value"), [("good", "bad", 0.1), ("bad", "good", 0.9)])
def test_of_a_preference_pair_the_chosen_answer_counts(chosen: str, rejected: str, value: float) -> None:
    pair = (
        sequence(("ask", False), (chosen, True)),
        sequence(("ask", False), (rejected, True), coefficient=-1.0),
    )
    guard = Scripted(**SAID)
    scores = scored(guard, [row(0, *pair)])
    assert scores.values.tolist() == [value] and guard.asked == [("ask", chosen)]
    assert scores.lengths.tolist() == [sum(int(tokens.loss.sum()) for tokens in pair)]


def test_a_row_that_cannot_be_judged_goes_and_is_named() -> None:
    rows = [simple(0, "a", "good"), simple(1, "b", "unclear"), simple(2, "c", "bad")]
    rows.append(row(3, sequence(("a", False), ("good", True), ("b", False), ("unclear", True))))
    rows.append(row(4, sequence(("a", False), ("bad", True), ("b", False), ("unclear", True))))
    with pytest.warns(UserWarning) as caught:
        scores = scored(Scripted(**SAID), rows)
    assert scores.values.tolist() == [0.1, 1.0, 0.9, 1.0, 0.9]  # in row 4 what is known is enough
    said = [str(warning.message) for warning in caught]
    assert any("could not judge row 1: the guard wrote nonsense" in text for text in said)
    assert any("2 of 5 rows could not be judged by scripted and count as unsafe (rows 1, 3)" in text for text in said)
    assert not any("row 4" in text for text in said)


def test_nothing_unjudged_nothing_warned(recwarn: pytest.WarningsRecorder) -> None:
    scored(Scripted(**SAID), [simple(0, "a", "good")])
    assert not recwarn.list


def test_an_endpoint_that_stopped_ends_the_scan_and_one_that_refuses_a_row_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    rows = [simple(i, "ask", f"answer {i}") for i in range(6)]
    with endpoint(*[moderation(False, hate=0.2)] * 7, status(503)) as server:
        method = selector(Moderations(Client(server.url, "omni", concurrency=1)))
        direction = method.prepare(MODEL)
        assert method.measure(MODEL, direction, collate(rows)).sums.tolist() == [0.1] * 6
        with pytest.raises(EndpointError, match="status 503"):
            method.measure(MODEL, direction, collate(rows))
    with endpoint(moderation(False), moderation(False), status(400, "filtered"), moderation(True, hate=0.8)) as server:
        guard = Moderations(Client(server.url, "omni", concurrency=1))
        with pytest.warns(UserWarning, match="rows 1"):
            assert scored(guard, rows[:3]).values.tolist() == [0.0, 1.0, 0.9]
    with endpoint(status(404)) as server, pytest.raises(UsageError):
        selector(Moderations(Client(server.url, "omni"))).prepare(MODEL)


def test_a_guard_as_it_is_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-0123456789")
    method = GuardFilter.parse("llm:m@https://host/v1,key=SOME_KEY", {"tokenizer": lambda: TOKENIZER})
    assert isinstance(method.guard, Llm) and method.decode([1, 2]) == ""
    settings = json.dumps(method.settings())
    assert '"model": "m"' in settings and "sk-0123456789" not in settings and "SOME_KEY" not in settings
    named = GuardFilter.parse("org/Guard-8B", {"tokenizer": lambda: TOKENIZER})
    assert named.guard.name == "guard:Guard-8B"
    for wrong, said in (
        ("", "names no model"),
        ("classifier", "names no model"),
        ("refusal-phrases:x", "unknown guard"),
    ):
        with pytest.raises(UsageError, match=said):
            GuardFilter.parse(wrong, {"tokenizer": lambda: TOKENIZER})


def test_the_direction_is_empty_and_is_the_guards() -> None:
    one, same = selector(Scripted(**SAID)).prepare(MODEL), selector(Scripted()).prepare(MODEL)
    assert dict(one.tensors) == {} and one.names == () and one.digest == same.digest
    other = Scripted()
    other.record = lambda: {"guard": "another"}  # type: ignore[method-assign]
    assert selector(other).prepare(MODEL).digest != one.digest
