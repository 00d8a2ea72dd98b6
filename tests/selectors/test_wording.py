"""What of a text is a request."""

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.selectors.screen import Shared, asked, bare, every

ALPACA = "Below is an instruction that describes a task.\n\n### Instruction:\n{}\n\n### Response:\n{}"
ONE = {
    "alpaca": ALPACA,
    "alpaca with input": "### Instruction:\n{}\n\n### Response:\n{}",
    "guanaco": "### Human: {}### Assistant: {}",
    "llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{} [/INST] {} </s>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n",
    "llama 3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    "gemma": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>\n",
    "zephyr": "<|user|>\n{}</s>\n<|assistant|>\n{}</s>\n",
    "vicuna": "A chat between a user and an assistant. USER: {} ASSISTANT: {}</s>",
    "hh": "\n\nHuman: {}\n\nAssistant: {}",
    "user": "User: {}\nAI: {}",
    "question": "Question: {}\nAnswer: {}",
    "q": "Q: {}\nA: {}",
    "input": "Input: {}\nOutput: {}",
}
LONG = 100_000
MINUTES = (
    30  # seconds of processor time: what goes as the square takes minutes, the rest a second even on a busy machine
)
HOSTILE = {
    "one long mark": "#" * LONG,
    "systems that never end": "[INST]a[/INST]b" + "<<SYS>>" * (LONG // 7),
    "marks without words": "[INST][/INST]" * (LONG // 13),
    "answers without requests": "[INST]a[/INST]" + "[/INST]b" * (LONG // 8),
    "turns": "Q: a\nA: b\n" * (LONG // 10),
    "spaces": "### Input" + " " * LONG + "<|im_start|>" + " " * LONG + "user" + "\n" * LONG,
}
WORDS = st.text("abc ,.?!'é\n", min_size=1).map(str.strip).filter(bool)


def least_seconds(work: Callable[[], object]) -> float:
    """Processor time of the quickest of three runs: on a busy machine a single one may take any time."""
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def said(text: str) -> list[tuple[str, str]]:
    return [(one.request, one.answer) for one in every(text)]


@pytest.mark.parametrize("form", ONE.values(), ids=list(ONE))
@given(request=WORDS, answer=WORDS)
def test_request_and_answer_of_every_marking(form, request, answer):
    assert said(form.format(request, answer)) == [(request, answer)]


def test_an_input_belongs_to_the_instruction():
    text = "### Instruction:\nName it.\n\n### Input:\na cat\n\n### Response:\nTom"
    assert said(text) == [("Name it.\n\na cat", "Tom")]


def test_every_turn_is_found_and_a_prompt_ends_with_no_answer():
    text = "### Human: one### Assistant: two### Human: three### Assistant:"
    assert said(text) == [("one", "two"), ("three", "")]


def test_the_outer_marks_are_found_where_a_request_has_marks_of_its_own():
    inner = "Q: one\nA: two\nQ: three\nA:"
    assert said(ALPACA.format(inner, "four"))[0] == (inner, "four")


@pytest.mark.parametrize(
    "text", ["", "words", "An answer: yes.", "Question: who?", "A: one\nQ: two", "### Response:\nyes", "[/INST] yes"]
)
def test_text_without_a_marked_request_and_answer(text):
    assert asked(text) == every(text) == []


def test_marks_of_every_kind_are_found():
    text = "[INST]one[/INST]two\n\nHuman: three\n\nAssistant: four"
    assert [one.request for one in every(text)] == ["one", "three"]


@pytest.mark.parametrize("before", ["", "[INST]one[/INST]two\n", "<|user|>one<|assistant|>two\n", "Q: one\nA:\n"])
def test_no_marks_hide_what_is_asked_last(before):
    assert "three" in asked(before + "### Instruction:\nthree\n\n### Response:\n")
    assert "three" not in asked(before + "### Instruction:\nthree\n\n### Response:\nfour\n")


def test_a_request_stands_with_the_turns_before_it():
    text = "A system.[INST]<<SYS>>A system.<</SYS>>one[/INST]two</s>[INST]three[/INST]four"
    assert [one.requests(text) for one in every(text)] == [["one"], ["three", "one[/INST]two[INST]three"]]
    many = "".join(f"Q: {i}\nA: {i}\n" for i in range(9))
    assert every(many)[-1].requests(many) == ["8", many[many.index("4") : -len("A: 8\n")].strip()]


@pytest.mark.parametrize("between", ["", "Human:\n"])
def test_an_answer_goes_on_until_something_is_asked(between):
    assert said(f"Human: one\nAssistant: two\n{between}Assistant: three") == [("one", "two\n\nthree")]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_no_text_takes_long(text):
    assert least_seconds(lambda: [bare(text), asked(text), *(one.requests(text) for one in every(text))]) < 2


def test_long_requests_that_are_alike_take_no_longer():
    request = "a " * 10_000
    assert len(Shared.of([request] * 20).begin) == 10_000
    assert least_seconds(lambda: Shared.of([request] * 20)) < 2


BEGIN = "You are a helpful assistant.\n\nName the colour of"
SAME = [f"{BEGIN} {thing} and say why." for thing in ("grass", "the  sky", "snow")]


def test_words_that_most_requests_share_are_left_out():
    shared = Shared.of([*SAME, "Hello!"])
    assert (shared.begin, shared.end) == (tuple(BEGIN.split()), ("and", "say", "why."))
    assert [shared.rest(one) for one in (*SAME, "Hello!", f"{BEGIN} and say why.")] == [
        "grass",
        "the  sky",
        "snow",
        "",
        "",
    ]


@pytest.mark.parametrize(
    "requests",
    [[], ["one of a kind, by itself"], ["a b c", "d e f", "g h i"], ["tell me x", "tell me y"], [*SAME[:1], "a", "b"]],
)
def test_nothing_is_shared(requests):
    shared = Shared.of(requests)
    assert shared == Shared((), ()) and not any(map(shared.rest, requests))


@given(st.lists(WORDS, max_size=8))
def test_a_rest_stands_between_the_shared_words(requests):
    shared = Shared.of(requests)
    for one in requests:
        if rest := shared.rest(one):
            assert (*shared.begin, *rest.split(), *shared.end) == tuple(one.split())


@pytest.mark.parametrize("text", ["'a' and 'b'", "a", "*", "", "``````", '"a" or "b"'])
def test_marks_within_a_text_are_no_marks_around_it(text):
    assert bare(text) == text.strip()
