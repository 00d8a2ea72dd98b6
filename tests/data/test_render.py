"""The response mask without training arguments: by markers, by difference, and where neither can be had."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase
from trl import chat_template_utils

from gradshield.data import RenderConfig, Renderer, read, render_all, spans
from gradshield.data.shapes import RENDERING
from gradshield.errors import DataError, ModelError, UsageError
from gradshield.types import Rendered
from tests.tiny import tiny_tokenizer

USER = {"role": "user", "content": "What is the capital of France?"}
FIRST = {"role": "assistant", "content": "The capital is Paris."}
AGAIN = {"role": "user", "content": "And what is five?"}
SECOND = {"role": "assistant", "content": "The answer is five."}
CHAT = [USER, FIRST, AGAIN, SECOND]

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Like reasoning models: a thinking block before the last answer only, and old thoughts are dropped.
REWRITING = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}<think>{{ m.get('reasoning', '') }}</think>{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
)


def _answers(row: dict[str, Any], template: str | None, config: RenderConfig | None = None) -> list[str]:
    """The runs of text in the loss."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    result = Renderer(tokenizer, config).render(read([row]).examples[0])
    assert isinstance(result, Rendered), result
    (tokens,) = result.sequences
    text, runs = spans(tokens, tokenizer), [""]
    for piece, index in text:
        if index is None:
            runs.append("")
        else:
            runs[-1] += piece
    return [run for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected", "completion"),
    [
        (tiny_tokenizer().chat_template, ["The capital is Paris.</s>", "The answer is five.</s>"], "{}"),
        (tiny_tokenizer(False).chat_template, ["The capital is Paris.</s>", "The answer is five.</s>"], "{}"),
        (CHATML, ["The capital is Paris.</s>", "The answer is five.</s>"], "{}\n"),
        (LLAMA2, ["The capital is Paris. </s>", "The answer is five. </s>"], " {}"),
        (REWRITING, ["The capital is Paris.</s>", "<think></think>The answer is five.</s>"], "{}\n"),
        (ALTERNATING, ["The capital is Paris.</s>", "The answer is five.</s>"], "<|assistant|>{}"),
    ],
    ids=["markers", "no markers", "chatml", "llama 2", "rewriting", "alternating"],
)
def test_the_answers_and_nothing_else(template: str, expected: list[str], completion: str) -> None:
    """After a prompt, all that follows it: as in TRL, a header where the template has no generation prompt, and white space."""
    assert _answers({"messages": CHAT}, template) == expected
    silent = [USER, {**FIRST, "weight": 0}, AGAIN, SECOND]
    assert _answers({"messages": silent}, template) == expected[1:]
    assert _answers({"prompt": CHAT[:3], "completion": CHAT[3:]}, template) == [completion.format(expected[1])]


def test_weight_0_stays_out_when_every_other_token_counts() -> None:
    silent = [USER, {**FIRST, "weight": 0}, AGAIN, SECOND]
    (before, after) = _answers({"messages": silent}, CHATML, RenderConfig(assistant_only_loss=False))
    assert before.endswith("<|assistant|>\n")
    assert after.startswith("\n<|user|>")


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3"])
def test_difference_finds_what_trls_marked_copy_of_a_real_template_marks(name: str) -> None:
    plain = getattr(chat_template_utils, f"{name}_chat_template")
    marked = getattr(chat_template_utils, f"{name}_training_chat_template")
    row = {"messages": CHAT}
    ours, theirs = _answers(row, plain), _answers(row, marked)
    assert len(ours) == len(theirs) == 2
    for mine, other, answer in zip(ours, theirs, (FIRST, SECOND), strict=True):
        # Newlines at the edges may differ: TRL marks some, and the end of a turn is no special token here.
        assert answer["content"] in mine
        assert mine.strip("\n") == other.strip("\n")


def test_a_tool_call_is_an_answer() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    row = {
        "messages": [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "5"}, SECOND],
        "tools": json.dumps([{"type": "function", "function": {"name": "add", "parameters": {}}}]),
    }
    answers = _answers(row, chat_template_utils.qwen3_chat_template)
    assert len(answers) == 2
    assert '"add"' in answers[0]
    assert "five" in answers[1]
    with pytest.warns(UserWarning, match="no chat template"):
        answers = _answers(row, None)
    assert '"name": "add"' in answers[0]
    assert answers[1] == "The answer is five.</s>"


def test_a_tokenizer_without_template_gets_the_default_and_a_warning() -> None:
    with pytest.warns(UserWarning, match="no chat template") as warned:
        assert _answers({"messages": CHAT}, None) == ["The capital is Paris.</s>", "The answer is five.</s>"]
    assert len(warned) == 1
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.warns(UserWarning, match="no chat template"):
        render_all(read([{"messages": CHAT}]).examples, tokenizer)
    assert tokenizer.chat_template is None


def test_a_row_that_the_template_refuses_is_set_aside() -> None:
    rows = [{"messages": CHAT}, {"messages": [USER, USER, FIRST]}]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ALTERNATING
    examples = read(rows).examples
    result = render_all(examples, tokenizer)
    assert [r.row for r in result.rendered] == [0]
    (bad,) = result.quarantined
    assert (bad.row, bad.line) == (1, 2)
    assert "roles must alternate" in bad.reason
    with pytest.raises(DataError, match="line 2 cannot be scored"):
        render_all(examples, tokenizer, strict=True)


@pytest.mark.parametrize(
    "given",
    [
        {"padding": "max_length", "max_length": 2_000_000_000},
        {"truncation": True},
        {"chat_template": "x"},
        {"tools": []},
    ],
)
def test_a_row_does_not_say_how_much_of_it_is_rendered(given: dict[str, Any]) -> None:
    result = read([{"messages": CHAT, "chat_template_kwargs": given}, {"messages": CHAT}])
    assert [example.row for example in result.examples] == [1]
    assert f"chat_template_kwargs has {min(given)}" in result.quarantined[0].reason
    every = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert every - set(RENDERING) == {"self", "documents", "kwargs"}


@pytest.mark.slow
@pytest.mark.parametrize("template", [CHATML, REWRITING], ids=["chatml", "rewriting"])
def test_a_row_of_very_many_answers_ends_soon(template: str) -> None:
    answer = {"role": "assistant", "content": "b"}
    some, many = ({"messages": [{"role": "user", "content": "a"}, answer] * n} for n in (300, 100_000))
    assert _answers(some, template, RenderConfig(max_length=None))[:299] == ["b</s>"] * 299
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    reason = Renderer(tokenizer).render(read([many]).examples[0])
    assert isinstance(reason, str) and "100000 answers" in reason


def test_of_a_row_that_cannot_be_scored_the_head_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradshield.data.source.HEAD_BYTES", 30)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ALTERNATING
    (bad,) = render_all(read([{"messages": CHAT}, {"messages": [USER, USER, FIRST]}]).examples, tokenizer).quarantined
    assert len(bad.source) == 30


def test_a_template_that_hides_the_answer_is_said() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    result = Renderer(tokenizer).render(read([{"messages": CHAT}]).examples[0])
    assert isinstance(result, str)
    assert "message 2" in result


def test_truncation_never_leaves_a_row_silently_unscored() -> None:
    row = {"messages": CHAT[:2]}
    tokenizer = tiny_tokenizer()
    (example,) = read([row]).examples
    whole = Renderer(tokenizer, RenderConfig(max_length=None)).render(example)
    assert isinstance(whole, Rendered)
    start = int(np.flatnonzero(whole.sequences[0].loss)[0])
    reason = Renderer(tokenizer, RenderConfig(max_length=start)).render(example)
    assert isinstance(reason, str)
    assert f"within max_length {start}" in reason
    one = Renderer(tokenizer, RenderConfig(max_length=start + 1)).render(example)
    assert isinstance(one, Rendered)
    assert one.sequences[0].loss.sum() == 1
    end = Renderer(tokenizer, RenderConfig(max_length=4, truncation_mode="keep_end")).render(example)
    assert isinstance(end, Rendered)
    assert end.sequences[0].loss.tolist() == [False, True, True, True]


def test_what_is_not_allowed() -> None:
    with pytest.raises(UsageError, match="keep_start, keep_end"):
        RenderConfig(truncation_mode="middle")
    with pytest.raises(UsageError, match="at least 2"):
        RenderConfig(max_length=1)
    tokenizer = tiny_tokenizer(generation_markers=False)
    with pytest.raises(ModelError, match="generation"):
        Renderer(tokenizer, RenderConfig(assistant_only_loss=True)).render(read([{"messages": CHAT}]).examples[0])


TEXTS = ["plain words", "é", "日本語 and 😀😀", "  two  spaces\n\n", "naïve 👩‍👩‍👧 family", "�"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_put_together_are_the_text_and_no_character_is_split(text: str) -> None:
    tokenizer = tiny_tokenizer()
    result = Renderer(tokenizer).render(read([{"text": f"{text}."}]).examples[0])
    assert isinstance(result, Rendered)
    (tokens,) = result.sequences
    pieces = spans(tokens, tokenizer)
    assert "".join(piece for piece, _ in pieces) == f"{text}.</s>"
    if "�" not in text:
        assert not any("�" in piece for piece, _ in pieces)
    assert pieces[-1] == ("</s>", len(tokens.ids) - 1)
    indices = [index for _, index in pieces if index is not None]
    assert indices == sorted(set(indices))
    assert all(tokens.loss[index] for index in indices)


def test_pieces_of_a_sequence_cut_inside_a_character() -> None:
    tokenizer = tiny_tokenizer()
    result = Renderer(tokenizer, RenderConfig(max_length=4)).render(read([{"text": "日本"}]).examples[0])
    assert isinstance(result, Rendered)
    pieces = spans(result.sequences[0], tokenizer)
    assert "".join(piece for piece, _ in pieces) == tokenizer.decode(result.sequences[0].ids)
