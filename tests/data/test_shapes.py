"""The shapes of rows and files that people have: each is read, as what, and written back unchanged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.data import SHAPES, Format, Renderer, read, render_all, suffix, take, to_trl, write_parts
from gradshield.data.formats import may_be_hub_name
from gradshield.data.messages import ROLES, RowError, messages
from gradshield.errors import DataError, FormatError, UnknownNameError, UsageError
from gradshield.scanning.rows import prepare
from tests.tiny import tiny_model, tiny_tokenizer

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "No"}
CHAT = (USER, ASSISTANT)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


# A row, the shape it is read as with the names of its keys, and the messages (or prompt and completion) of each sequence.
ROWS: dict[str, tuple[dict[str, Any], str, list[tuple[Any, ...]]]] = {
    "tokens with labels, as axolotl and TRL prepare them": (
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        "tokens",
        [((5, 6, 7), (False, True, True))],
    ),
    "tokens beside the row that they were made of": (
        {"messages": [USER, ASSISTANT], "input_ids": [5, 6, 7]},
        "tokens, not messages",
        [((5, 6, 7), (True, True, True))],
    ),
    "tokens of which the answers count": (
        {"input_ids": [5, 6, 7], "assistant_masks": [0, 0, 1]},
        "tokens",
        [((5, 6, 7), (False, False, True))],
    ),
    "tokens with two masks": (
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [0, 0, 1]},
        "tokens",
        [((5, 6, 7), (False, False, True))],
    ),
    "tokens with padding": (
        {"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, 0], "attention_mask": [0, 1, 1, 0]},
        "tokens",
        [((5, 6), (True, True))],
    ),
    "question, answer": (
        {"question": "Hi", "answer": "Hello"},
        "alpaca (question as instruction, answer as output)",
        [CHAT],
    ),
    "input, output": ({"input": "Hi", "output": "Hello"}, "alpaca", [CHAT]),
    "instruction, response": ({"instruction": "Hi", "response": "Hello"}, "alpaca (response as output)", [CHAT]),
    "query, response": (
        {"query": "Hi", "response": "Hello"},
        "alpaca (query as instruction, response as output)",
        [CHAT],
    ),
    "dolly": (
        {"instruction": "Hi", "context": "there", "response": "Hello", "category": "x"},
        "alpaca (context as input, response as output)",
        [({"role": "user", "content": "Hi\n\nthere"}, ASSISTANT)],
    ),
    "alpaca as on the hub": (
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is … ### Response:\nHello"},
        "alpaca, not text",
        [CHAT],
    ),
    "alpaca with a prompt of its own": (
        {"instruction": "Hi", "input": "there", "output": "Hello", "prompt": "Below is … ### Response:"},
        "alpaca, without its prompt",
        [({"role": "user", "content": "Hi\n\nthere"}, ASSISTANT)],
    ),
    "UltraFeedback as on the hub": (
        {
            "prompt": "Hi",
            "prompt_id": "a1",
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, OTHER],
            "messages": [USER, ASSISTANT],
            "score_chosen": 8.0,
        },
        "preference, not messages",
        [CHAT, (USER, OTHER)],
    ),
    "OpenAI preference": (
        {"input": {"messages": [USER], "tools": []}, "preferred_output": [ASSISTANT], "non_preferred_output": [OTHER]},
        "preference (input as prompt, preferred_output as chosen, non_preferred_output as rejected)",
        [CHAT, (USER, OTHER)],
    ),
    "question beside a pair": (
        {"question": "Hi", "chosen": "Hello", "rejected": "No"},
        "preference (question as prompt)",
        [("Hi", "Hello"), ("Hi", "No")],
    ),
    "prompt beside a pair of answers": (
        {"prompt": "Hi", "chosen": [ASSISTANT], "rejected": [OTHER]},
        "preference",
        [CHAT, (USER, OTHER)],
    ),
    "KTO": (
        {"prompt": "Hi", "completion": " Hello", "label": True},
        "kto, not prompt-completion",
        [("Hi", " Hello")],
    ),
    "KTO of messages": (
        {"prompt": [USER], "completion": [ASSISTANT], "label": False},
        "kto, not prompt-completion",
        [CHAT],
    ),
    "a label that is a number": ({"prompt": "Hi", "completion": "a", "label": 0}, "prompt-completion", [("Hi", "a")]),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, "messages", [CHAT]),
    "role model": ({"messages": [USER, {"role": "model", "content": "Hello"}]}, "messages", [CHAT]),
    "roles in any case": (
        {"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT", "content": "Hello"}]},
        "messages",
        [CHAT],
    ),
    "Gemini": (
        {
            "systemInstruction": {"parts": [{"text": "Be kind."}]},
            "contents": [
                {"role": "user", "parts": [{"text": "H"}, {"text": "i"}]},
                {"role": "model", "parts": [{"functionCall": {"name": "add", "args": {"a": 1}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "add", "response": {"sum": 2}}}]},
                {"role": "model", "parts": [{"text": "Hello"}]},
            ],
        },
        "gemini",
        [
            (
                {"role": "system", "content": "Be kind."},
                USER,
                CALLED,
                {"role": "tool", "content": '{"sum": 2}', "name": "add"},
                ASSISTANT,
            )
        ],
    ),
    "ShareGPT with a call": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "Hello"},
            ]
        },
        "sharegpt",
        [(USER, CALLED, {"role": "tool", "content": "2"}, ASSISTANT)],
    ),
    "input_text and output_text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "Hello"}]},
            ]
        },
        "messages",
        [
            (
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
            )
        ],
    ),
    "tool_use and tool_result": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "One moment."},
                        {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]},
                        {"type": "text", "text": "And?"},
                    ],
                },
                ASSISTANT,
            ]
        },
        "messages",
        [
            (
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "One moment."}],
                    "tool_calls": [{"id": "t1", **CALL}],
                },
                {"role": "tool", "content": "2", "tool_call_id": "t1"},
                {"role": "user", "content": [{"type": "text", "text": "And?"}]},
                ASSISTANT,
            )
        ],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_read_as_what_it_is(case: str, tmp_path: Path) -> None:
    row, words, expected = ROWS[case]
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    (tmp_path / "data.jsonl").write_bytes(line)
    for data in (tmp_path / "data.jsonl", [row]):
        result = read(data)
        assert result.source.read_as == {words: 1} and not result.quarantined
        (example,) = result.examples
        given = [(c.ids, c.counted) if c.ids else c.messages or (c.prompt, c.completion) for c in example.conversations]
        assert given == expected
        write_parts({tmp_path / "kept.jsonl": [0]}, result.source)
        assert (tmp_path / "kept.jsonl").read_bytes() == line
        again = read([row], example.shape).examples[0]
        assert again.conversations == example.conversations


@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_trl_would_read_otherwise_is_not_handed_to_it(case: str) -> None:
    own = {"KTO", "KTO of messages", "a label that is a number", *(name for name in ROWS if name.startswith("tokens"))}
    own -= {"tokens with two masks", "tokens with padding"}
    assert read([ROWS[case][0]]).examples.as_trl.tolist() == [case in own]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "input_ids is empty"),
        ({"input_ids": [[5, 6]]}, r"input_ids must be a list of integers, got \[\[5, 6\]\]"),
        ({"input_ids": [5, True]}, "list of integers"),
        ({"input_ids": "Hi"}, "list of integers"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels has 1 values for 2 input_ids"),
        ({"input_ids": [5, 6], "labels": [6, 5]}, "labels must repeat the input_ids"),
        ({"input_ids": [5, 99_999]}, "ids outside the tokenizer's"),
        ({"input_ids": [-1, 5]}, "ids outside the tokenizer's"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no response token"),
        ({"input_ids": [5, 6], "completion_mask": [1, 0]}, "no response token"),
    ],
)
def test_tokens_that_cannot_be_scored_say_why(row: dict[str, Any], reason: str) -> None:
    found = read([row, {"input_ids": [5, 6]}])
    bad = [*found.quarantined, *render_all(found.examples, tiny_tokenizer(), None, found.source).quarantined]
    assert [one.row for one in bad] == [0] and re.search(reason, bad[0].reason)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ({"messages": [{"role": "user", "text": "q"}, ASSISTANT]}, "q"),
        ({"conversations": [{"role": "user", "value": "q"}, {"from": "gpt", "value": "a"}]}, "q"),
        ({"conversations": [{"from": "human", "text": "q"}, {"from": "gpt", "value": "a"}]}, "q"),
        ({"contents": [{"role": "user", "parts": "q"}, {"role": "model", "parts": ["a"]}]}, "q"),
        ({"contents": [{"role": "user", "parts": {"text": "q"}}, {"role": "model", "parts": ["a"]}]}, "q"),
        ({"messages": [{"role": "user", "content": None}, ASSISTANT]}, None),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, None),
        ({"contents": [{"role": "user", "part": "q"}, {"role": "model", "parts": ["a"]}]}, None),
        (
            {"prompt": '[{"role": "user", "content": "q"}]', "completion": '[{"role": "assistant", "content": "a"}]'},
            "q",
        ),
    ],
)
def test_a_request_is_found_or_its_row_set_aside(turns: dict[str, Any], said: str | None) -> None:
    found = read([turns, {"text": "a"}])
    if said is None:
        assert "has no content" in found.quarantined[0].reason
    else:
        assert (found.examples[0].conversations[0].messages or ())[0]["content"] == said
        assert not found.examples.as_trl[0]  # TRL would read it otherwise


def test_text_that_is_json_stays_text() -> None:
    (one,) = read([{"prompt": "a list", "completion": '[{"x": 1}]'}]).examples
    assert (one.conversations[0].messages, one.conversations[0].completion) == (None, '[{"x": 1}]')


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "query": "b", "answer": "c"},
        {"question": "a", "answer": "b", "response": "c"},
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
        {"question": "a"},
        {"answer": "a"},
    ],
)
def test_two_names_for_one_key_or_half_a_row_fit_nothing(row: dict[str, str]) -> None:
    result = read([row, {"text": "a"}])
    assert "fit no known format" in result.quarantined[0].reason
    with pytest.raises(FormatError, match="--columns KEY=COLUMN"):
        read([row])


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"instruction": "Answer.", "question": "Why?", "output": "So."}, "Answer.\n\nWhy?"),
        ({"instruction": "Answer.", "prompt": "Why?", "response": "So."}, "Answer.\n\nWhy?"),
        ({"instruction": "Answer.", "input": "Why?", "prompt": "Answer. Why?", "output": "So."}, "Answer.\n\nWhy?"),
    ],
)
def test_a_question_beside_an_instruction_is_not_lost(row: dict[str, str], asked: str) -> None:
    (one,) = read([row]).examples
    assert (one.conversations[0].messages or ())[0]["content"] == asked
    with pytest.raises(FormatError, match="--columns KEY=COLUMN"):
        read([{"instruction": "a", "question": "b", "query": "c", "output": "d"}])


@pytest.mark.parametrize("columns", [{"prompt": "question"}, {"completion": "response"}, {"instruction": "question"}])
def test_one_column_may_be_named_and_the_other_known(columns: dict[str, str]) -> None:
    (one,) = read([{"question": "Why?", "response": "So."}], Format(columns=columns)).examples
    assert [turn["content"] for turn in one.conversations[0].messages or ()] == ["Why?", "So."]


def test_a_column_that_no_row_has_is_an_error() -> None:
    rows = [{"question": "Why?", "answer": "So."}]
    assert not read([*rows, {"why": "a", "answer": "b"}], Format(columns={"prompt": "why"})).unseen
    wrong = Format(columns={"prompt": "question", "completion": "anwser"})
    with pytest.raises(UsageError, match="no row of the list has the column 'anwser'"):
        prepare(rows, tiny_model("llama"), tiny_tokenizer(), format=wrong)


def test_columns_name_the_keys() -> None:
    row = {"q": "Hi", "a": " Hello", "messages": [USER, OTHER]}
    named = Format(columns={"prompt": "q", "completion": "a"})
    result = read([row, {"messages": [USER, ASSISTANT]}], named)
    assert [e.shape for e in result.examples] == ["prompt-completion", "messages"]
    assert list(result.source.read_as) == ["prompt-completion (q as prompt, a as completion), not messages", "messages"]
    assert result.examples.as_trl.tolist() == [False, True]
    swapped = Format("prompt-completion", {"prompt": "completion", "completion": "prompt"})
    (one,) = read([{"prompt": "a", "completion": "b"}], swapped).examples
    assert (one.conversations[0].prompt, one.conversations[0].completion) == ("b", "a")
    judged = read([{"q": "Hi", "a": "No", "good": "False"}], Format(columns={**named.columns, "label": "good"}))
    assert judged.examples[0].conversations[0].coefficient == -1
    assert read([{"prompt": "a", "completion": "b", "label": 0}], "kto").examples[0].conversations[0].coefficient == -1
    with pytest.raises(UsageError, match="did you mean 'completion'"):
        Format(columns={"completions": "a"})
    with pytest.raises(UsageError, match="the column for 'prompt' is 3"):
        Format(columns={"prompt": 3})  # type: ignore[dict-item]
    with pytest.raises(UnknownNameError):
        Format("chat")


def test_a_call_is_read_alike_however_it_is_written() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"role": "function_call", "content": json.dumps(call)},
        {"role": "tool_call", "content": json.dumps([call])},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "add", "input": {"a": 1}}]},
    ]
    assert {json.dumps(messages([turn], "x")[0], sort_keys=True) for turn in turns} == {
        json.dumps(CALLED, sort_keys=True)
    }
    (plain,) = messages([{"role": "function_call", "content": "add(1)"}], "x")
    assert plain == {"role": "assistant", "content": "add(1)"}


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "input", "parts", "a"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)
KEYS = sorted({key for name in SHAPES for key in (*SHAPES[name].keys, *SHAPES[name].also, *SHAPES[name].names)})
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_text", "tool_use", "tool_result", "image", None])},
    optional={"text": JSONS, "name": JSONS, "input": JSONS, "content": JSONS, "id": JSONS},
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from([*ROLES, "Model", "robot", None]), "content": JSONS | st.lists(PART, max_size=3)}
)


@settings(max_examples=200, deadline=None)
@given(st.lists(TURN | JSONS, max_size=4))
def test_turns_of_any_kind_become_messages_or_a_reason(turns: list[Any]) -> None:
    before = json.dumps(turns)
    try:
        found = messages(turns, "messages")
    except RowError as error:
        assert "\n" not in str(error)
        return
    finally:
        assert json.dumps(turns) == before
    assert {turn["role"] for turn in found} <= {"system", "developer", "user", "assistant", "tool", "function"}
    assert messages(list(found), "messages") == found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), JSONS | st.lists(TURN, max_size=3), max_size=5)
    )
)
def test_rows_of_any_kind_are_read_or_set_aside(rows: list[dict[str, Any]]) -> None:
    result = read([*rows, {"text": "a"}])
    assert len(result.examples) + len(result.quarantined) == len(rows) + 1 == result.source.rows
    assert sum(result.source.read_as.values()) == len(result.examples)
    assert all(example.conversations for example in result.examples)


# Files

PAIRS = [{"prompt": f"Say {n}", "completion": f" {n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in PAIRS)


def _saved(folder: Path, data: Any) -> Path:
    data.save_to_disk(str(folder))
    return folder


def _text(name: str, text: str) -> Callable[[Path], Any]:
    def made(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return made


def _bytes(name: str, data: bytes) -> Callable[[Path], Any]:
    def made(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return made


def _cells(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(PAIRS)
    return out.getvalue()


def _shards(folder: Path) -> Path:
    inside = folder / "shards"
    inside.mkdir()
    for n, row in enumerate(PAIRS):
        (inside / f"part-{n}.jsonl").write_text(json.dumps(row))
    (inside / "README.md").write_text("# Not data")
    (inside / ".hidden.jsonl").write_text("junk")
    return inside


def _tables(folder: Path) -> str:
    for n, row in enumerate(PAIRS):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{n}.parquet")
    return str(folder / "*.parquet")


class _Stream:
    """A table that hands itself out through the stream of Arrow's C interface."""

    def __init__(self) -> None:
        self._table = pa.Table.from_pylist(PAIRS)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


class _Polars(_Stream):
    """A table that gives an Arrow table too, as a polars frame does."""

    def to_arrow(self) -> pa.Table:
        return self._table


DATASET = datasets.Dataset.from_list(PAIRS)
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lines": (_text("d.jsonl", LINES), "jsonl"),
    "gzip": (_bytes("d.jsonl.gz", gzip.compress(LINES.encode())), "jsonl"),
    "zstd": (_bytes("d.jsonl.zst", pa.Codec("zstd").compress(LINES.encode(), asbytes=True)), "jsonl"),
    "lines in .json": (_text("d.json", LINES), "jsonl"),
    "pretty array in .json": (_text("d.json", json.dumps(PAIRS, indent=2)), "json"),
    "pretty array in .jsonl": (_text("d.jsonl", json.dumps(PAIRS, indent=2)), "json"),
    "array in .jsonl": (_text("d.jsonl", json.dumps(PAIRS) + "\n"), "json"),
    "pretty objects in .json": (_text("d.json", "\n".join(json.dumps(row, indent=4) for row in PAIRS)), "json"),
    "pretty objects in .jsonl": (_text("d.jsonl", "\n\n".join(json.dumps(row, indent=0) for row in PAIRS)), "json"),
    "pretty objects, packed": (
        _bytes("d.jsonl.gz", gzip.compress("\n".join(json.dumps(row, indent=4) for row in PAIRS).encode())),
        "json",
    ),
    "rows under train": (_text("d.json", json.dumps({"version": 1, "train": PAIRS, "test": [{}]}, indent=1)), "json"),
    "comma": (_text("d.csv", _cells(",")), "csv"),
    "semicolon": (_text("d.csv", _cells(";")), "csv"),
    "tab in .csv": (_text("d.csv", _cells("\t")), "csv"),
    "tab in .tsv": (_text("d.tsv", _cells("\t")), "tsv"),
    "folder of shards": (_shards, "jsonl"),
    "pattern": (lambda folder: f"{_shards(folder)}/part-*", "jsonl"),
    "pattern of tables": (_tables, "parquet"),
    "saved dataset": (lambda folder: _saved(folder / "saved", DATASET), "dataset"),
    "saved splits": (
        lambda folder: str(_saved(folder / "saved", datasets.DatasetDict({"test": DATASET.take(1), "train": DATASET}))),
        "dataset",
    ),
    "splits": (lambda folder: datasets.DatasetDict({"test": DATASET.take(1), "train": DATASET}), "dataset"),
    "one split": (lambda folder: datasets.DatasetDict({"all": DATASET}), "dataset"),
    "pandas": (lambda folder: pd.DataFrame(PAIRS).iloc[[0, 1, 2]], "dataset"),
    "stream": (lambda folder: _Stream(), "dataset"),
    "polars": (lambda folder: _Polars(), "dataset"),
    "Arrow": (lambda folder: pa.Table.from_pylist(PAIRS), "dataset"),
}


@pytest.mark.parametrize("keys", [("train", "test"), ("test", "train"), ("dev_set", "data")])
def test_held_out_rows_beside_those_that_are_read_are_named(keys: tuple[str, str], tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps({key: PAIRS if key in ("train", "data") else [{}] for key in keys}))
    (held,) = {*keys} - {"train", "data"}
    with pytest.warns(UserWarning, match=rf"data\.json also has rows under {held}, which are not read"):
        assert read(data).source.rows == len(PAIRS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FILES)
def test_a_file_is_read_and_written_in_its_kind(case: str, tmp_path: Path) -> None:
    made, kind = FILES[case]
    result = read(made(tmp_path))
    assert result.source.kind == kind and not result.quarantined
    twin = read(PAIRS).examples
    assert [e.conversations for e in result.examples] == [e.conversations for e in twin]
    assert list(result.examples.ids) == list(twin.ids)
    assert list(take(range(3), result.source)) == PAIRS
    kept = tmp_path / "out" / f"kept{suffix(kind)}"
    kept.parent.mkdir()
    write_parts({kept: [0, 2]}, result.source)
    again = read(kept)
    assert list(again.examples.ids) == [twin.ids[0], twin.ids[2]]
    assert read(kept).source.kind == (kind if kind != "dataset" else "jsonl")


def test_a_bad_row_of_a_shard_names_its_file(tmp_path: Path) -> None:
    folder = _shards(tmp_path)
    (folder / "part-1.jsonl").write_text('\n{"text": 5}\n')
    result = read(folder)
    assert result.source.name == f"{folder} (3 files)" and result.source.rows == 3
    (bad,) = result.quarantined
    assert (bad.row, bad.line) == (1, 2) and bad.reason.endswith("(in part-1.jsonl)")
    (folder / "part-2.jsonl").write_text(json.dumps(PAIRS, indent=1))
    with pytest.raises(FormatError, match=r"part-2\.jsonl is not of one kind"):
        read(folder)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda d: _saved(d / "x", datasets.DatasetDict({"a": DATASET, "b": DATASET})), "the splits a, b, and none is 'train'"),
        (lambda d: DATASET.to_iterable_dataset(), "load the dataset without streaming=True"),
        (lambda d: str(d / "*.jsonl"), "matches no file"),
        (lambda d: _bytes("a.csv", b"text\nx\n")(_bytes("b.jsonl", b"{}")(d).parent).parent, "files of several kinds"),
        (lambda d: _bytes("scores.parquet", b"")(d).parent, "the folder of a finished scan"),
        (lambda d: _bytes("a.csv", b"text\nx\n")(_bytes("b.csv", b"text,n\nx,1\n")(d).parent).parent, "with the same columns"),
        (lambda d: _bytes("a.csv", b"text,n\nx,1\n")(_bytes("b.csv", b"text;n\n")(d).parent).parent, "with the same columns"),
        (lambda d: _bytes("state.json", b"{}")(d).parent, "cannot be read as a saved dataset"),
        (lambda d: _text("d.json", '[{"text": "a"}]\n[{"text": "b"}]')(d), "more behind the end of its rows"),
        (lambda d: _text("d.json", '{"data": [{"text": "a"}]} {"data": [{"text": "b"}]}')(d), "more behind the end of its rows"),
        (lambda d: _text("d.json", '{"data": [{"text": "a"}], "more": [')(d), "has no end"),
        (lambda d: _text("d.json", '{"train": [{"text": "a"}], "data": [{"text": "b"}]}')(d), "rows under two keys"),
        (lambda d: pd.DataFrame({"text": ["a", 5]}), "not a table of one type per column"),
        (lambda d: ({"text": "a"} for _ in range(2)), "the data is a generator"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_what_to_do(made: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as raised:
        read(made(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "maybe"),
    [
        ("owner/set:main:train", True),
        ("set::test", True),
        ("owner/set:main", True),
        ("owner/set:a:b:c", False),
        ("data.jsonl:main", False),
        ("C:\\data", False),
        ("a/b/c:main", False),
    ],
)
def test_hub_names_may_have_a_config_and_a_split(name: str, maybe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_be_hub_name(name) == maybe
    if maybe:
        asked: list[Any] = []
        monkeypatch.setattr("gradshield.data.formats.reachable", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: asked.append((*given, more)) or DATASET)
        assert len(read(name).examples) == 3
        base, config, split = (*name.split(":"), "", "")[:3]
        assert asked == [(base, config or None, {"split": split or "train"})]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.sampled_from([0, 1, 4, "\t"]), st.booleans())
def test_lines_and_indents_change_no_row(pairs: list[tuple[str, str]], indent: Any, mark: bool) -> None:
    import tempfile

    rows = [{"prompt": p, "completion": f"x{c}", "more": {"a": [{}, [1]]}} for p, c in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        text = "\n".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in rows)
        path.write_text("\ufeff" * mark + text, encoding="utf-8", newline="\n")
        result = read(path)
        assert list(take(result.examples.rows, result.source)) == rows and not result.quarantined
        assert all(example.source.decode() in text for example in result.examples)


# KTO


def test_a_judged_answer_is_pushed_away_from_where_its_label_is_false() -> None:
    row = {"prompt": "Name a colour.", "completion": " blue", "label": True}
    rows = [row, {**row, "label": False}]
    result = read(rows)
    true, false = (Renderer(tiny_tokenizer()).render(example).sequences[0] for example in result.examples)  # type: ignore[union-attr]
    assert (true.coefficient, false.coefficient) == (1.0, -1.0)
    assert np.array_equal(true.ids, false.ids) and np.array_equal(true.loss, false.loss)
    rendered = render_all(result.examples, tiny_tokenizer()).rendered
    assert to_trl(result.examples, rendered)[:] == datasets.Dataset.from_list(rows)[:]
    mixed = read([*rows, {"text": "a"}])
    with pytest.raises(FormatError, match="no single trainer takes"):
        to_trl(mixed.examples, render_all(mixed.examples, tiny_tokenizer()).rendered)
    with pytest.raises(DataError, match="label must be true or false"):
        read([{**row, "label": 7}], Format("kto", strict=True))
