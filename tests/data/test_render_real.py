"""On the templates people use, what is scored without training arguments is what TRL trains on, or a sentence says why not.

The templates are those in the installed TRL; MISTRAL is a short stand-in that behaves like Mistral's, which TRL does not have.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import trl
from trl import SFTConfig, SFTTrainer

from gradshield.data import RenderConfig, Renderer, read, render_all, to_trl
from gradshield.data.templates import marked_copy
from gradshield.types import Rendered
from tests.tiny import tiny_model, tiny_tokenizer

MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% set ns = namespace(n=0, system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}]{{ eos_token }}"
    "{% else %}{% if (m.role == 'user') != (ns.n % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{% if m.role == 'user' %}[INST] {{ ns.system + m.content }}[/INST]{% set ns.system = '' %}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"
)
UNMARKED = ("llama3_2", "mistral")  # of which TRL has no copy
QWEN = ("qwen2_5", "qwen3", "qwen3_5_think", "qwen3_5_nothink")
TEMPLATES = (*QWEN, "gemma", "gemma3", "llama3", "phi3", "deepseek_r1_distill", "glm4moe", "gptoss", *UNMARKED)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", **({} if text is None else {"content": text}), **more}


def call(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "123456789", "type": "function", "function": {"name": "add", "arguments": arguments}}]


RESULT = {"role": "tool", "name": "add", "content": "5"}
THOUGHT = "<think>\nthe plan\n</think>\n\nfive"
ROWS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [user("hi"), answer("five")]},
    "turns": {"messages": [user("hi"), answer("five"), user("again"), answer("six")]},
    "system": {"messages": [{"role": "system", "content": "brief"}, user("hi"), answer("five")]},
    "developer": {"messages": [{"role": "developer", "content": "brief"}, user("hi"), answer("five")]},
    "same role": {"messages": [user("hi"), user("you"), answer("five"), answer("six")]},
    "thinking inline": {"messages": [user("hi"), answer(THOUGHT), user("more"), answer(THOUGHT)]},
    "thinking as a field": {
        "messages": [
            user("hi"),
            answer("five", reasoning_content="the plan"),
            user("more"),
            answer("six", reasoning_content="the other"),
        ]
    },
    "tools": {
        "messages": [user("hi"), answer("", tool_calls=call({"a": "é2"})), RESULT, answer("five")],
        "tools": TOOLS,
    },
    "tools and thinking": {
        "messages": [user("hi"), answer("", reasoning_content="the plan", tool_calls=call({"a": "2"}))],
        "tools": TOOLS,
    },
    "tools and words": {
        "messages": [user("hi"), answer("wait", tool_calls=call({"a": "2"})), RESULT, answer("five")],
        "tools": TOOLS,
    },
}
REFUSED = "the chat template refuses it"
NO_CALL = "the chat template leaves out the tool call of message 2"
# What is set aside, with why. TRL trains on rows whose call or words are missing, and fails on those that the template refuses.
ASIDE: dict[tuple[str, str], str] = {
    **{(name, kind): NO_CALL for name in ("llama3", "phi3", "deepseek_r1_distill") for kind in ROWS if "tools" in kind},
    **{
        (name, kind): REFUSED
        for name in ("gemma", "gemma3")
        for kind in ("developer", "same role", "tools", "tools and words")
    },
    **{(name, "tools and thinking"): NO_CALL for name in ("gemma", "gemma3")},
    ("gemma", "system"): REFUSED,
    **{(name, "developer"): REFUSED for name in ("qwen3_5_think", "qwen3_5_nothink", "mistral")},
    ("mistral", "same role"): REFUSED,
    **{(name, "tools and words"): "leaves out the content of message 2" for name in ("llama3_2", "gptoss", "mistral")},
}


def template(name: str) -> str:
    return MISTRAL if name == "mistral" else (Path(trl.__file__).parent / f"chat_templates/{name}.jinja").read_text()


def tokenizer(name: str, own: str = "") -> Any:
    """The tiny tokenizer with the template and its special tokens; ``own`` makes it one that TRL does not know."""
    found = tiny_tokenizer()
    found.chat_template = template(name) + own
    found.add_tokens(
        sorted(set(re.findall(r"<[|｜][a-zA-Z_▁]+[|｜]>|<\w+_of_turn>", template(name)))), special_tokens=True
    )
    return found


def trained(rows: Any, name: str, folder: Any, **settings: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels that a real SFTTrainer prepares, the first label aside: nothing predicts the first token."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    args = SFTConfig(str(folder), report_to=[], use_cpu=True, bf16=False, max_length=None, **settings)
    if not isinstance(rows, datasets.Dataset):  # from_list would take the first row's columns alone
        rows = datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in {**rows[0], **rows[-1]}})
    trainer = SFTTrainer(tiny_model("llama"), args, train_dataset=rows, processing_class=tokenizer(name))
    return [(list(row["input_ids"]), list(row["labels"])[1:]) for row in trainer.train_dataset]


def scored(rendered: Any) -> list[tuple[list[int], list[int]]]:
    return [
        (tokens.ids.tolist(), np.where(tokens.loss, tokens.ids, -100).tolist()[1:])
        for row in rendered
        for tokens in row.sequences
    ]


def rendered(row: dict[str, Any], name: str, own: str = "", **config: Any) -> Any:
    (example,) = read([row]).examples
    return Renderer(tokenizer(name, own), RenderConfig(max_length=None, **config)).render(example)


def loss_text(row: dict[str, Any], name: str, own: str = "", **config: Any) -> str:
    found = rendered(row, name, own, **config)
    assert isinstance(found, Rendered), found
    (tokens,) = found.sequences
    return str(tokenizer(name).decode(tokens.ids[tokens.loss]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_what_trl_trains_on_or_a_sentence_says_why_not(name: str, tmp_path: Path) -> None:
    kept = [kind for kind in ROWS if (name, kind) not in ASIDE]
    result = render_all(read(list(ROWS.values())).examples, tokenizer(name), RenderConfig(max_length=None))
    reasons = {list(ROWS)[bad.row]: bad.reason for bad in result.quarantined}
    assert reasons.keys() == {kind for own, kind in ASIDE if own == name}
    assert all(ASIDE[name, kind] in reason for kind, reason in reasons.items())

    expected = trained([ROWS[kind] for kind in kept], name, tmp_path, assistant_only_loss=name not in UNMARKED)
    found = scored(result.rendered)
    if name in UNMARKED:  # TRL cannot leave the requests out: equal ids, and a sentence
        assert any("TRL has no copy" in note for note in result.notes)
        assert [ids for ids, _ in found] == [ids for ids, _ in expected]
        return
    assert not any("TRL" in note for note in result.notes)
    assert dict(zip(kept, found, strict=True)) == dict(zip(kept, expected, strict=True))


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama3_2", "glm4moe", "gptoss"])
def test_prompts_with_an_answer_are_what_trl_trains_on(name: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for kind, row in ROWS.items()
        if kind in ("chat", "turns", "thinking inline", "thinking as a field")
    ]
    result = render_all(read(rows).examples, tokenizer(name), RenderConfig(max_length=None))
    assert scored(result.rendered) == trained(rows, name, tmp_path)
    assert not any("TRL" in note for note in result.notes)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in UNMARKED])
def test_trls_copy_is_found_for_a_template_and_not_for_a_changed_one(name: str) -> None:
    copy = marked_copy(tokenizer(name), needed=False)
    assert copy == template(f"{name}_training")
    assert marked_copy(tokenizer(name, "{# mine #}"), needed=False) is None


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in (*UNMARKED, "deepseek_r1_distill", "glm4moe")])
def test_difference_finds_what_the_copy_marks(name: str) -> None:
    """On a template that TRL does not know; headers and thinking tags, which some copies mark, and white space aside."""

    def bare(text: str) -> str:
        return re.sub(r"<\|start\|>assistant|</?think>|</s>|\s", "", text)

    for kind in ("chat", "system", "tools", "tools and thinking", "tools and words"):
        if (name, kind) not in ASIDE:
            assert bare(loss_text(ROWS[kind], name, "{# mine #}")) == bare(loss_text(ROWS[kind], name)), kind


@pytest.mark.parametrize("own", ["", "{# mine #}"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_nothink", "qwen3_5_think"])
@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_in_a_field_counts_like_the_same_text_inline(field: str, name: str, own: str) -> None:
    """Also where the generation prompt ends in a closed thinking block."""
    closed = {"chat_template_kwargs": {"enable_thinking": False}}
    ways = [answer(THOUGHT), answer("five", **{field: "the plan"})]
    for row in ({"messages": [user("hi"), way]} for way in ways):
        text = loss_text(row, name, own, **closed)
        assert "the plan\n</think>\n\nfive<|im_end|>" in text
        assert text == loss_text({"messages": [user("hi"), ways[0]]}, name, own, **closed)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_list_of_text_parts_is_the_text(name: str) -> None:
    parts = [{"type": "text", "text": "fi"}, {"type": "text", "text": "ve"}]
    whole = loss_text({"messages": [user("hi"), answer("five")]}, name)
    assert "five" in whole
    assert loss_text({"messages": [user("hi"), {"role": "assistant", "content": parts}]}, name) == whole


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_5_think", "llama3_2", "glm4moe", "gptoss", "mistral"])
def test_arguments_as_json_text_are_the_arguments(name: str) -> None:
    def row(arguments: Any) -> dict[str, Any]:
        return {"messages": [user("hi"), answer("", tool_calls=call(arguments))], "tools": TOOLS}

    assert loss_text(row('{"a": "é2"}'), name) == loss_text(row({"a": "é2"}), name)
    assert '\\"' not in loss_text(row('{"a": "é2"}'), name)
    if name != "qwen3":  # which writes any text as it is
        assert "message 2 are not a JSON object" in rendered(row("a = 2"), name)


def test_arguments_are_written_as_json_where_a_template_takes_text() -> None:
    """DeepSeek-V3's joins them with strings, so that it fails on an object."""

    def row(arguments: Any) -> dict[str, Any]:
        return {"prompt": [user("hi")], "completion": [answer("", tool_calls=call(arguments))], "tools": TOOLS}

    named = "{% for m in messages %}{{ m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}{{ '<' + c.function.name + "
    taking_text = named + "' ' + c.function.arguments + '>' }}{% endfor %}{{ eos_token }}{% endfor %}"
    found = tiny_tokenizer()
    found.chat_template = taking_text
    for arguments in ({"a": "é2"}, '{"a": "é2"}'):
        (one,) = render_all(read([row(arguments)]).examples, found).rendered
        assert '<add {"a": "é2"}></s>' in found.decode(one.sequences[0].ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_of_weight_0_is_out_with_its_header(name: str) -> None:
    row = {"messages": [user("hi"), answer("five", weight=0), user("again"), answer("six")]}
    last = loss_text({"messages": [*row["messages"][:1], answer("five"), *row["messages"][2:]]}, name)
    found = loss_text(row, name)
    assert "five" not in found and "six" in found
    assert last.endswith(found) and last.count("six") == found.count("six") == 1
    assert len(last) >= 2 * len(found) - len("six")  # as much went as an answer has


def test_what_a_template_leaves_out_elsewhere_is_said() -> None:
    rows = [ROWS["developer"], {"messages": [user("hi"), answer("five", thinking="the plan")]}, ROWS["chat"]]
    result = render_all(read(rows).examples, tokenizer("qwen2_5"), RenderConfig(max_length=None))
    (note,) = result.notes
    assert (
        "neither scored nor trained on: content of developer turns in 1 rows; reasoning of assistant turns in 1 rows"
        in note
    )
    assert len(result.rendered) == 3


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_a_tools_turn_in_a_completion_is_not_scored_and_said(name: str) -> None:
    turns = ROWS["tools"]["messages"]
    row = {"prompt": turns[:1], "completion": turns[1:], "tools": TOOLS}
    result = render_all(read([row]).examples, tokenizer(name), RenderConfig(max_length=None))
    (note,) = result.notes
    assert "1 completions hold other turns" in note
    text = loss_text(row, name)
    assert "five" in text and "é2" in text and "5" not in text


def test_what_was_rewritten_is_said_and_trained_as_it_was_scored(tmp_path: Path) -> None:
    rows = [ROWS["chat"], {"messages": [user("hi"), answer("", tool_calls=call('{"a": "2"}'))]}]
    found = read(rows)
    result = render_all(found.examples, tokenizer("qwen2_5"), RenderConfig(max_length=None))
    assert result.fitted.tolist() == [1]
    assert any("1 rows hold lists of text parts, or arguments" in note for note in result.notes)
    assert trained(to_trl(found.examples, result.rendered), "qwen2_5", tmp_path) == scored(result.rendered)


def test_a_row_that_would_hide_a_call_is_not_scored_as_whole() -> None:
    two = {"messages": [user("hi"), answer("", tool_calls=[*call({"a": "1"}), *call({"a": "2"})])], "tools": TOOLS}
    assert "leaves out the tool call of message 2" in rendered(two, "gptoss")
    legacy = {"messages": [user("hi"), answer("", function_call={"name": "add", "arguments": json.dumps({"a": 1})})]}
    assert "leaves out the tool call of message 2" in rendered(legacy, "qwen2_5")
