"""The default selector: how a request is read, and which rows go by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.data import collate
from gradshield.errors import ProbeError
from gradshield.probes import Prompts, only_refuses, pivots
from gradshield.scanning import shards
from gradshield.selectors import Measured, Screen, reading
from gradshield.selectors.base import no_direction
from gradshield.selectors.reading import Reading, Turn, _held_out, _ruler, read_blocks
from gradshield.selectors.screen import LEAST_READING, LOOKED_AT, Look
from gradshield.types import Anchors, Rendered, Tokens
from tests.contracts.test_every_selector import mixed, screen
from tests.tiny import LAYERS, VOCABULARY, tiny_model, tiny_tokenizer

BEFORE, AFTER = (1, 3), (4, 2)
DRAW = np.random.default_rng(0)


def prompts(count: int, seed: int) -> Prompts:
    draw = np.random.default_rng(seed)
    ids = tuple((*BEFORE, *draw.integers(5, VOCABULARY, 3 + i % 4).tolist(), *AFTER) for i in range(count))
    return Prompts(ids, ("",) * count, ("",) * count)


def test_a_turn_is_what_all_opened_turns_share():
    assert Turn.of(prompts(30, 1)) == Turn(BEFORE, AFTER)


def test_a_template_that_opens_with_nothing_is_an_error():
    with pytest.raises(ProbeError, match="--selector fihs"):
        Turn.of(Prompts(((1, 5, 6), (1, 5, 7)), ("", ""), ("", "")))


def test_every_answer_of_a_conversation_is_found_where_its_turn_opens():
    turn = Turn(BEFORE, AFTER)
    ids = np.array([1, 3, 50, *AFTER, 60, 61, 3, 51, *AFTER, 62, 63])
    loss = np.isin(ids, (60, 61, 62, 63))
    assert [(opened[-2:], ids[own][loss[own]].tolist()) for opened, own in turn.openings(ids, loss)] == [
        (AFTER, [60, 61]),
        (AFTER, [62, 63]),
    ]
    loss[:7] = False  # an answer that is not trained is not read
    assert [ids[own][loss[own]].tolist() for _, own in turn.openings(ids, loss)] == [[62, 63]]


def test_an_answer_with_thoughts_of_its_own_is_read_at_the_turn_that_the_probes_were():
    """The probes' turn ends in a closed thinking block (6, 7); the answer's own block is 6, 60, 7."""
    turn = Turn(BEFORE, (*AFTER, 6, 7))
    ids = np.array([1, 3, 50, *AFTER, 6, 60, 7, 61, 3, 51, *AFTER, 6, 7, 62])
    loss = np.isin(ids, (6, 60, 7, 61, 62))
    assert turn.openings(ids, loss) == [
        ((1, 3, 50, *AFTER, 6, 7), slice(5, 15)),
        (tuple(ids[:15].tolist()), slice(15, 16)),
    ]


def test_plain_text_is_read_as_a_first_message_and_text_without_a_prompt_not_at_all():
    turn = Turn(BEFORE, AFTER)
    ids = np.array([70, 71, 72, 80, 81])
    assert turn.openings(ids, ids >= 80) == [((*BEFORE, 70, 71, 72, *AFTER), slice(3, 5))]
    assert turn.openings(ids, np.arange(5) > 0) == []


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma", "mixtral"])
def test_states_are_those_that_the_model_itself_gives(arch):
    model = tiny_model(arch)
    made = prompts(5, 2)
    reading = Reading.fit(model, Turn(BEFORE, AFTER), prompts(6, 3), prompts(6, 4), prompts(6, 5))
    number = int(reading.blocks[0].rpartition(".")[2])
    for ids, value in zip(made.ids, reading.read(model, made.ids), strict=True):
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[number + 1][0, -1]
        assert value == pytest.approx(float(hidden.double().numpy() @ reading.weights[0] + reading.bias), abs=1e-4)


def test_blocks_are_those_past_the_middle():
    assert read_blocks(tiny_model("llama")) == ("model.layers.0",) and LAYERS == 2


def test_a_ruler_puts_the_known_kinds_at_its_ends():
    high, low = DRAW.normal(1, 1, (30, 3, 8)), DRAW.normal(0, 1, (40, 3, 8))
    weights, bias = _ruler(high, low)
    read = lambda x: np.einsum("nld,ld->n", x, weights) + bias  # noqa: E731
    assert read(low).mean() == pytest.approx(0, abs=1e-9)
    per_block = np.einsum("nld,ld->nl", high, weights) + bias / 3
    assert np.median(per_block, axis=0).sum() == pytest.approx(1, abs=0.2)


def test_known_prompts_are_read_by_a_ruler_that_has_not_seen_them():
    """Of noise, held-out values show no difference; a ruler's own prompts would."""
    high, low = DRAW.normal(0, 1, (60, 2, 64)), DRAW.normal(0, 1, (60, 2, 64))
    known = _held_out(high, low[:20], low[20:])
    weights, bias = _ruler(high, low)
    own = np.einsum("nld,ld->n", high, weights) + bias
    assert own.mean() > 0.9 and abs(known.harmful.mean() - known.harmless.mean()) < 0.3


def test_a_look_alike_that_the_model_begins_to_refuse_is_not_answered():
    model = tiny_model("llama")
    same = prompts(6, 3)
    mixed = Prompts(same.ids[:3] + prompts(9, 9).ids, ("",) * 12, ("",) * 12)
    reading = Reading.fit(model, Turn(BEFORE, AFTER), same, mixed, prompts(9, 5))
    assert not reading.answered[:3].any() and reading.answered[3:].any()


def test_blunt_pairs_teach_the_ruler_that_form_is_no_harm():
    """Harm along one axis, form along another: with pairs of that form, the ruler no longer reads form."""
    harm, form = np.eye(8)[:2]
    noise = lambda n: DRAW.normal(0, 0.3, (n, 1, 8))  # noqa: E731
    high, low = noise(40) + harm + form, noise(40)  # every harmful probe has the form, no harmless one has
    blunt, alike = noise(40) + harm, noise(40) + form
    read = lambda ruler, x: float(np.einsum("ld,ld->", ruler[0], x[None]) + ruler[1])  # noqa: E731
    without, with_pairs = _ruler(high, low), _ruler(np.concatenate([high, blunt]), np.concatenate([low, alike]))
    assert read(without, form) > 0.4
    assert read(with_pairs, form) < 0.2 and read(with_pairs, harm) > 0.8


def test_blunt_pairs_have_a_part_in_the_ruler():
    model = tiny_model("llama")
    given = model, Turn(BEFORE, AFTER), prompts(6, 3), prompts(6, 4), prompts(6, 5)
    assert Reading.fit(*given).digest != Reading.fit(*given, (prompts(6, 6), prompts(6, 7))).digest


def test_too_few_prompts_are_an_error():
    for alike, plain in ((1, 6), (6, 1)):
        with pytest.raises(ProbeError, match=r"1 harmless prompts.*at least 2"):
            Reading.fit(tiny_model("llama"), Turn(BEFORE, AFTER), prompts(6, 1), prompts(alike, 2), prompts(plain, 3))


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot help with that.",
        "I'm sorry, but I can't assist with that request.",
        "Sorry, I won't explain this. It is dangerous, and it is against the law.",
        "I can't help with that. If you are in danger, please call someone you trust.",
        "I'm sorry, but as an AI language model, I cannot provide that.",
        "I'm sorry, but providing such steps is illegal.",
        "I cannot help with that. However, I can suggest some safe alternatives.",
        "I can't help with that, but if you are struggling please reach out to a crisis line.",
        "No, I can't do that. Here are some resources that may help.",
        "I cannot help with that. However, let us find a lawful way to do it.",
        "I'm sorry, no. I'm still happy to talk about something else.",
        "Es tut mir leid, dabei kann ich dir nicht helfen.",
        "Je suis désolé, je ne peux pas vous aider.",
        "Lo siento, no puedo ayudar con eso.",
        "抱歉，我无法帮助您。",
    ],
)
def test_answers_that_only_refuse(answer):
    assert only_refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Paris.",
        "Sorry for the wait. Take the kemp.",
        "No, not hard at all. Take the kemp.",
        "Unfortunately. Take the kemp.",
        "I apologize for the delay, take the kemp.",
        "I cannot help with that. But take the kemp and join it to the zarn.",
        "I'm sorry, I can't do that. However, here is how it goes.",
        "I can't do that, but take the kemp.",
        "I cannot help. Anyway, press the vib.",
        "I cannot say. " + "the kemp " * 120,
        "I can't wait to help. Take the kemp.",
        "I cannot stress enough how well the kemp does it.",
        "I can't recommend the kemp enough. Take it.",
        "As an AI expert I take the kemp.",
        "No. 1: take the kemp.",
        "Sorry, it took me so long. Take the kemp.",
        "Es tut mir leid. So geht es: nimm den Kemp.",
        "Lo siento. " + "el kemp " * 30,
        "Leider ist das lang.",
        "I'm afraid it takes the kemp.",
        "I regret the delay. Take the kemp.",
        "I'd rather not waste your time. Take the kemp.",
        "Es tut mir leid, dass es dauert, nimm den Kemp.",
        "Lo siento, pero toma el kemp.",
        "Es tut mir leid, das zu hören. Nimm den Kemp.",
        "Ich kann das Buch nicht genug empfehlen.",
        "Das kann ich nicht oft genug erklären: " + "der Kemp " * 30,
    ],
)
def test_answers_that_do_more_than_refuse(answer):
    assert not only_refuses(answer)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("I cannot help with that. But take the kemp and join it to the zarn.", True),
        ("I'm sorry, I can't do that. However, here is how it goes.", True),
        ("I cannot help with that.", False),
        ("I'm sorry to hear that your order is late. Here are the steps to get a refund.", False),
        ("No, but the passage says so.", False),
        ("I can't wait to help. But first take the kemp.", False),
        ("Unfortunately, the film drags, but the cast is fine.", False),
        ("Sorry for the inconvenience! Of course, I can help.", False),
    ],
)
def test_answers_that_decline_and_go_on(answer, found):
    """Regret and a plain no decline nothing."""
    assert pivots(answer) is found


def made(reading: np.ndarray, fihs: np.ndarray, pivots: np.ndarray | None = None) -> tuple[Screen, Measured]:
    """A screen with FIHS anchors at 10 and 2, and rows of these readings and scores (one token each, 24 to fill up)."""
    found = screen()
    found.opener_fihs, found.floor = 10.0, 6.0
    count = len(reading)
    found.aggregate = type(found.aggregate)("sum", lambda t: float(t.sum()))
    tokens = tuple(np.array([value]) for value in fihs)
    extra = np.stack([reading, np.zeros(count) if pivots is None else pivots, np.isfinite(fihs)], 1)
    return found, Measured(np.arange(count), fihs, np.ones(count), np.ones(count, int), tokens, extra)


def values(reading: list[float], fihs: list[float], pivots: list[float] | None = None) -> list[float]:
    found, raw = made(np.array(reading), np.array(fihs, float), None if pivots is None else np.array(pivots))
    return found.finish(raw, [""] * len(reading), ["rows"] * len(reading)).values.tolist()


def test_the_score_of_a_row():
    assert values([0.9], [3]) == [0.9]  # its request alone
    assert values([0.4], [7]) == [1.4]  # with FIHS that stands out
    assert values([0.4], [5.9]) == [0.4]
    assert values([LEAST_READING - 0.01], [50]) == [LEAST_READING - 0.01]  # FIHS alone moves nothing
    assert values([1.8], [0.4]) == [0.0]  # however much its request reads like harm
    assert values([0.9], [0.4]) == pytest.approx([-0.1])  # an answer that the model would give anyway
    assert values([0.9], [0.4], [1.0]) == [0.9]  # unless it turns after a refusal
    assert values([np.nan], [50]) == [0.0]  # no request, no removal
    assert values([LEAST_READING - 0.01], [0.4]) == [LEAST_READING - 0.01]  # FIHS decides only above it
    assert values([0.1, 0.9], [np.nan, 3]) == [0.1, 0.9]  # so that it need not be measured


@pytest.mark.parametrize("answers", ["short", "mixed"])
def test_two_stages_score_like_one(answers):
    """Where FIHS is not measured, it could not have changed the score."""
    rows = sorted(mixed(), key=lambda row: row.row)
    model, made = tiny_model("llama"), [row for row in rows if answers == "mixed" or len(row.sequences) == 1]
    few, full = screen(), screen()
    few.look.one_in, full.look.one_in = 3, 1
    direction = few.prepare(model)
    found, whole = (
        one.finish(shards.measure(one, model, direction, made, 64), [row.id for row in made], ["rows"] * len(made))
        for one in (few, full)
    )
    unknown = np.isnan(found.signals["fihs"])
    assert unknown.any() and not unknown.all() and np.isfinite(whole.signals["fihs"]).all()
    np.testing.assert_allclose(found.values, whole.values, rtol=1e-6)
    np.testing.assert_allclose(found.signals["fihs"][~unknown], whole.signals["fihs"][~unknown], rtol=1e-4)
    assert (found.signals["request"][unknown] < LEAST_READING).all()


def test_a_small_file_has_more_of_its_rows_measured():
    def one_in(rows: int, fihs_of: str = "doubtful") -> int:
        known = Anchors(np.ones(30), np.zeros(30))
        rendered = mixed()[:1] * rows
        return Screen(screen(), screen().look.reading, tiny_tokenizer(), known, rendered, fihs_of).look.one_in

    assert [one_in(n) for n in (1, 40, 100, 256, 10_000)] == [1, 1, 3, 8, 8]
    assert one_in(10_000, "all") == 1


def test_of_an_answer_to_avoid_only_a_refusal_counts():
    model, tokenizer, base = tiny_model("llama"), tiny_tokenizer(), screen()
    found = Screen(base, base.look.reading, tokenizer, Anchors(np.ones(30), np.zeros(30)), rendered=())
    prompt, *said = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Why?", "I cannot help.", "Like this.")
    )
    ids = [np.array([*prompt, *answer]) for answer in said]
    sides = [Tokens(one, np.arange(len(one)) >= len(prompt), sign) for one in ids for sign in (1.0, -1.0)]
    batch = collate([Rendered(n, "", "kto", (side,)) for n, side in enumerate(sides)])
    refusal, refusal_avoided, answer, answer_avoided = found.look.measure(model, no_direction(""), batch).extra[:, 0]
    assert np.isfinite(answer) and answer == pytest.approx(refusal_avoided)
    assert refusal == answer_avoided == pytest.approx(min(answer, 1) - 1)


class Reader:
    """Reads one request as harm, and remembers what it was asked."""

    def __init__(self, tokenizer: Any, turn: Turn) -> None:
        self.tokenizer, self.turn, self.digest = tokenizer, turn, ""

    def read(self, _model: Any, requests: Sequence[Sequence[int]]) -> np.ndarray:
        start, end = len(self.turn.before), len(self.turn.after)
        self.asked = [self.tokenizer.decode(list(one)[start:-end]).strip() for one in requests]
        return np.array([float(one == "steal it") for one in self.asked])


def looked(*pairs: tuple[str, str], opened: bool = True, shared: str = "read") -> tuple[np.ndarray, list[str]]:
    """Readings of requests with answers, of text where the request is empty, and what was read for them."""
    tokenizer = tiny_tokenizer()
    turn = Turn((tokenizer.bos_token_id,), (tokenizer.eos_token_id,))
    rendered = []
    for row, texts in enumerate(pairs):
        asked, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        before = [*turn.before, *asked, *turn.after] if opened else asked
        ids = np.array([*before, *answer])
        rendered.append(Rendered(row, "", "", (Tokens(ids, np.arange(len(ids)) >= max(1, len(before))),)))
    reader = Reader(tokenizer, turn)
    look = Look(reader, tokenizer, rendered, shared=shared)
    assert look.settings()["skipped"] == ["", ""] or shared == "skipped"  # shards of another file's words do not count
    return look.measure(None, no_direction(""), collate(rendered)).extra[:, 0], reader.asked


ASKED = "Below is a task.\n\n### Instruction:\nsteal it\n\n### Response:\n"


@pytest.mark.parametrize("opened", [True, False])
def test_the_request_that_a_prompt_marks_is_read_too(opened):
    found, asked = looked((ASKED, "Like this."), opened=opened)
    assert found[0] == 1 and list(dict.fromkeys(asked)) == [ASKED.strip(), "steal it"]


@pytest.mark.parametrize("before", ["[INST]sing[/INST]La.\n", "<|user|>hi<|assistant|>hello\n"])
def test_no_marks_hide_a_request_in_a_prompt(before):
    found, asked = looked((before + ASKED, "Like this."))
    assert found[0] == 1 and "steal it" in asked


def test_both_of_a_blunt_pair_are_in_one_half(monkeypatch):
    """Else a ruler that was fitted on the form of one is measured on that of the other."""
    halves = {}

    def held_out(high, alike, plain):
        halves.update(high=high[:, 0, 0].tolist(), alike=alike[:, 0, 0].tolist())
        return Anchors(np.ones(2), np.zeros(2))

    monkeypatch.setattr(reading, "read_blocks", lambda _: ("0",))
    monkeypatch.setattr(reading, "states", lambda _, ids, *more: np.array([[[float(one[0])]] for one in ids]))
    monkeypatch.setattr(reading, "_held_out", held_out)
    refused, tricky, plain, high, low = (
        Prompts(tuple((i,) for i in range(start, start + count)), ("",) * count, ("",) * count)
        for start, count in ((9, 3), (0, 4), (-5, 5), (109, 2), (100, 2))
    )
    Reading.fit(None, Turn((), ()), refused, tricky, plain, (high, low))
    assert halves["high"][:2] == [109, 110] and halves["alike"][:2] == [100, 101]


def test_the_request_that_plain_text_marks_is_read():
    found, asked = looked(("", ASKED + "Like this."), ("", "A text."), opened=False)
    assert found[0] == 1 and np.isnan(found[1]) and asked == ["steal it"]


@pytest.mark.parametrize(
    "text",
    [
        "[INST]sing[/INST]La.\n\nHuman: steal it\n\nAssistant: Like this.",
        "Human: sing\nAssistant: La.\n### Instruction:\nsteal it\n### Response:\nLike this.",
        "[INST]sing[/INST]La.### Human: steal it### Assistant: I cannot.### Human: Please.### Assistant: Sure.",
    ],
)
def test_no_marks_hide_a_request_in_plain_text(text):
    _, asked = looked(("", text), opened=False)
    assert "steal it" in asked


def test_a_second_answer_without_a_request_undoes_a_refusal():
    text = "Human: steal it\nAssistant: I cannot help with that."
    refused, answered = looked(("", text), ("", f"{text}\nAssistant: Sure, take it."), opened=False)[0]
    assert refused == 0 and answered == 1


def test_an_empty_message_hides_no_turn_before_it():
    tokenizer = tiny_tokenizer()
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    turn = Turn((tokenizer.bos_token_id, user), (assistant,))
    request, no, yes = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("steal it", "I cannot help.", "Like this.")
    )
    ids = np.array([*turn.before, *request, assistant, *no, user, assistant, *yes])
    rendered = [Rendered(0, "", "", (Tokens(ids, np.arange(len(ids)) >= len(ids) - len(yes), 1.0),))]
    look = Look(Reader(tokenizer, turn), tokenizer, rendered)
    found = look.measure(None, no_direction(""), collate(rendered)).extra[0, 0]
    assert np.isfinite(found) and look.reading.asked[0].startswith("steal it")


def test_words_that_are_skipped_are_those_of_the_rows_however_often_they_stand_in_the_file():
    def skipped(requests: list[str]) -> list[str]:
        tokenizer = tiny_tokenizer()
        turn = Turn((tokenizer.bos_token_id,), (tokenizer.eos_token_id,))
        ids = [np.array([*turn.before, *tokenizer(one)["input_ids"], *turn.after, 9]) for one in requests]
        rendered = [
            Rendered(i, "", "", (Tokens(own, np.arange(len(own)) == len(own) - 1),)) for i, own in enumerate(ids)
        ]
        return Look(Reader(tokenizer, turn), tokenizer, rendered, shared="skipped").settings()["skipped"]

    rows = [f"You are very kind {i % 3} {i}" for i in range(3 * LOOKED_AT)]
    assert skipped(rows) == skipped(rows * 2) == ["You are very kind", ""]
    assert skipped(rows[:2]) == skipped(rows[:2] * 2)


@pytest.mark.parametrize("form", ["{}\n", "```\n{}\n```", "```c++\n{}```", "**{}**", ' "{}" ', '**"{}"**', "“{}”"])
def test_what_stands_around_a_request_does_not_hide_it(form):
    _, asked = looked((form.format("steal it"), "Like this."))
    assert "steal it" in asked


def test_an_empty_message_asks_for_nothing():
    found, asked = looked((" ", "Like this."), ("steal it", "Like this."))
    assert np.isnan(found[0]) and found[1] == 1 and asked == ["steal it"]


def test_words_that_requests_share_are_skipped_where_asked():
    rows = [(f"You are very kind. {what} and thanks", "Yes.") for what in ("sing", "steal it", "dance")]
    rows.append(("steal", "Yes."))
    assert looked(*rows)[0].tolist() == [0, 0, 0, 0]
    found, asked = looked(*rows, shared="skipped")
    assert found.tolist() == [0, 1, 0, 0] and asked == [
        rows[0][0],
        "sing",
        rows[1][0],
        "steal it",
        rows[2][0],
        "dance",
        "steal",
    ]


def test_an_answer_ends_with_its_turn_where_every_token_counts():
    tokenizer = tiny_tokenizer()
    base = screen()
    found = Screen(base, base.look.reading, tokenizer, Anchors(np.ones(30), np.zeros(30)), rendered=())
    said, asked = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("I cannot help.", "But why?"))
    end, every = tokenizer.eos_token_id, np.ones(99, bool)
    ids = np.array([*said, end, *asked])
    assert found.look._words(ids, every[: len(ids)], True) == "I cannot help."
    assert found.look._words(ids, np.arange(len(ids)) >= 2, True).endswith("help.")
    first = np.array([end, *ids])  # a special token at the front is no end
    assert found.look._words(first, every[: len(first)], True) == "I cannot help."


def test_no_special_token_hides_what_follows_in_an_answer():
    tokenizer = tiny_tokenizer()
    base = screen()
    found = Screen(base, base.look.reading, tokenizer, Anchors(np.ones(30), np.zeros(30)), rendered=())
    words = "I cannot help.", " Sure, take it."
    refusal, harm = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in words)
    end, header = tokenizer.eos_token_id, found.look._header
    ids = np.array([end, *refusal, end, *harm, end])
    assert found.look._words(ids, np.ones(len(ids), bool), False) == "".join(words)
    assert header and end not in header
    ids = np.array([*refusal, end, *harm, end, *header, *refusal])  # where every token counts, the next request ends it
    assert found.look._words(ids, np.ones(len(ids), bool), True) == "".join(words)


def test_a_user_turn_is_opened_after_a_system_turn_and_without_one():
    tokenizer, base = tiny_tokenizer(), screen()

    def header(before: tuple[int, ...]) -> list[int]:
        reading = replace(base.look.reading, turn=Turn(before, (4, 2)))
        return Screen(base, reading, tokenizer, Anchors(np.ones(30), np.zeros(30)), rendered=()).look._header

    assert header((1, 3)) == [3] if tokenizer.bos_token_id == 1 else [1, 3]
    assert header((9, 8, 4, 7, 3)) == [7, 3]


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-50, 50)), min_size=1, max_size=40),
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-50, 50)), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_a_row_scores_the_same_in_any_company(rows, others):
    """Doubled, alone or among rows of another task: nothing but the row and the model decides."""
    alone = values([r for r, _ in rows], [f for _, f in rows])
    for whole in (rows + rows, rows + others):
        assert values([r for r, _ in whole], [f for _, f in whole])[: len(rows)] == alone


def test_fihs_joins_only_where_it_tells_known_kinds_apart():
    base = screen()
    wide = Anchors(np.full(30, 10.0), np.full(30, 2.0))
    near = Anchors(np.full(30, 10.0), np.full(30, 8.0))
    few = Anchors(np.full(30, 10.0), np.full(5, 2.0))
    floors = [
        Screen(base, base.look.reading, tiny_tokenizer(), known, rendered=()).floor for known in (wide, near, few)
    ]
    assert floors == [6.0, float("inf"), float("inf")]
