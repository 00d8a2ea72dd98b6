"""Requests that plain text marks in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradshield.selectors.marked import pairs

ALPACA = "Below is an instruction that describes a task.\n\n### Instruction:\n{}\n\n### Response:\n{}"
ONE = {
    "alpaca": ALPACA,
    "alpaca with input": "### Instruction:\n{}\n\n### Response:\n{}",
    "guanaco": "### Human: {}### Assistant: {}",
    "llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{} [/INST] {} </s>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n",
    "llama 3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    "gemma": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>\n",
    "zephyr": "<|user|>\n{}</s>\n<|assistant|>\n{}</s>\n",
    "vicuna": "A chat between a user and an assistant. USER: {} ASSISTANT: {}</s>",
    "hh": "\n\nHuman: {}\n\nAssistant: {}",
    "user": "User: {}\nAI: {}",
    "question": "Question: {}\nAnswer: {}",
    "q": "Q: {}\nA: {}",
    "input": "Input: {}\nOutput: {}",
}
WORDS = st.text("abc ,.?!'é\n", min_size=1).map(str.strip).filter(bool)


@pytest.mark.parametrize("form", ONE.values(), ids=list(ONE))
@given(request=WORDS, answer=WORDS)
def test_request_and_answer_of_every_marking(form, request, answer):
    assert pairs(form.format(request, answer)) == [(request, answer)]


def test_an_input_belongs_to_the_instruction():
    text = "### Instruction:\nName it.\n\n### Input:\na cat\n\n### Response:\nTom"
    assert pairs(text) == [("Name it.\n\na cat", "Tom")]


def test_every_turn_is_found_and_a_prompt_ends_with_no_answer():
    text = "### Human: one### Assistant: two### Human: three### Assistant:"
    assert pairs(text) == [("one", "two"), ("three", "")]


def test_the_outer_marks_count_where_a_request_has_marks_of_its_own():
    inner = "Q: one\nA: two\nQ: three\nA:"
    assert pairs(ALPACA.format(inner, "four")) == [(inner, "four")]


@pytest.mark.parametrize(
    "text", ["", "words", "An answer: yes.", "Question: who?", "A: one\nQ: two", "### Response:\nyes", "[/INST] yes"]
)
def test_text_without_a_marked_request_and_answer(text):
    assert pairs(text) == []
