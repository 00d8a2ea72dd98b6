"""Reading: every kind of file, every row shape, and each way in which a row or a file can be bad."""

from __future__ import annotations

import csv
import hashlib
import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradshield.data import SHAPES, Format, read, suffix, take, write_parts, write_quarantine
from gradshield.data import source as records_module
from gradshield.errors import (
    DataError,
    EmptyDataError,
    FormatError,
    UnknownNameError,
)

GOOD = b'{"text": "good"}\n'
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
ROWS: dict[str, dict[str, Any]] = {
    "tokens": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    "preference": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "kto": {"prompt": "a", "completion": "b", "label": False},
    "prompt-completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [USER, ASSISTANT]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "gemini": {"contents": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]},
    "alpaca": {"instruction": "a", "input": "x", "output": "b"},
    "text": {"text": "a"},
}


def _file(folder: Path, content: bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 700, text
    return text


def test_every_shape_is_detected_by_its_keys(tmp_path: Path) -> None:
    assert list(ROWS) == list(SHAPES)
    path = _file(tmp_path, b"".join(json.dumps(row).encode() + b"\n" for row in ROWS.values()))
    result = read(path)
    assert [example.shape for example in result.examples] == list(ROWS)
    assert [example.row for example in result.examples] == list(range(len(ROWS)))
    assert all(SHAPES.summary(name) for name in SHAPES)


BAD_LINES = {
    "broken JSON": (b'{"text": "a"\n', "not valid JSON"),
    "not an object": (b"[1, 2]\n", "not an object"),
    "null": (b"null\n", "not an object"),
    "wrong type": (b'{"text": 5}\n', "text must be a string, got a number"),
    "messages of the wrong type": (b'{"messages": "hi"}\n', "messages must be a list"),
    "a message of the wrong type": (b'{"messages": [1]}\n', "message 1 of messages must be an object"),
    "content of the wrong type": (b'{"messages": [{"role": "user", "content": 5}]}\n', "the content of message 1"),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n',
        "a part that is not text",
    ),
    "empty answer": (b'{"prompt": "a", "completion": "  "}\n', "completion is empty"),
    "empty turn": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n',
        "the answer in message 2 is empty",
    ),
    "no assistant": (b'{"messages": [{"role": "user", "content": "a"}]}\n', "no assistant turn"),
    "invalid role": (b'{"messages": [{"role": "robot", "content": "a"}]}\n', "has role 'robot', not one of"),
    "weight": (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}\n',
        "weight must be 0 or 1",
    ),
    "all weights 0": (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}\n',
        "every assistant turn has weight 0",
    ),
    "mixed prompt and completion": (b'{"prompt": "a", "completion": [{}]}\n', "two strings or two lists"),
    "same preference": (b'{"chosen": "same", "rejected": "same"}\n', "nothing beyond what both answers share"),
    "sharegpt role": (b'{"conversations": [{"from": "alien", "value": "a"}]}\n', "role 'alien'"),
    "unknown keys": (b'{"question": "a"}\n', "fit no known format"),
    "not UTF-8": (b'{"text": "\xff\xfe"}\n', "not UTF-8"),
    "NUL bytes": (b'{"text": "a\0b"}\n', "NUL bytes"),
    "escaped NUL": (b'{"text": "a\\u0000b"}\n', "NUL characters"),
    "lone surrogate": (b'{"text": "a\\ud83d"}\n', "surrogate"),
    "nesting": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deeply"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_set_aside_with_its_line_and_reason(case: str, tmp_path: Path) -> None:
    bad, reason = BAD_LINES[case]
    path = _file(tmp_path, GOOD + b"\n" + bad + GOOD)  # the blank line is no row but counts as a line
    result = read(path)
    (found,) = result.quarantined
    assert (found.row, found.line, found.source) == (1, 3, bad)
    assert reason in found.reason
    assert "\n" not in found.reason
    assert [(e.row, result.source.lines[e.row]) for e in result.examples] == [(0, 1), (2, 4)]
    with pytest.raises(DataError, match="line 3 of") as raised:
        read(path, Format(strict=True))
    assert reason in _sentence(raised.value)


@pytest.mark.parametrize(
    "row", [b'{"text": "a", "x": NaN}\n', b'{"text": "a", "text": "b"}\n', b'{"text": "\\\\u0000"}\n']
)
def test_odd_but_usable_lines_are_kept(row: bytes, tmp_path: Path) -> None:
    assert read(_file(tmp_path, row)).examples[0].source == row


def test_a_long_line_costs_bounded_memory_and_is_described(tmp_path: Path) -> None:
    import tracemalloc

    size = 50_000_000
    path = tmp_path / "data.jsonl"
    long = b'{"text": "' + b"a" * size + b'"}\n'
    path.write_bytes(GOOD + long + GOOD)
    expected = hashlib.sha256(long).hexdigest()
    length = len(long)
    del long
    tracemalloc.start()
    result = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000
    assert [e.row for e in result.examples] == [0, 2]
    write_quarantine(result.quarantined, tmp_path / "quarantine.jsonl")
    entry = json.loads((tmp_path / "quarantine.jsonl").read_text())
    assert (entry["row"], entry["line"], entry["bytes"], entry["sha256"]) == (1, 2, length, expected)
    assert len(entry["raw"]) == 1 << 20


@pytest.mark.parametrize(
    ("name", "before", "bad", "after"),
    [
        ("data.jsonl", GOOD, b'{"text": "' + b"a" * 100, b"\n"),
        ("data.jsonl", GOOD, b'{"text": "' + b"a" * 100 + b'\xff"}', b"\n"),
        ("data.jsonl", GOOD, b'{"text": 3, "more": "' + b"a" * 100 + b'"}', b"\n"),
        ("data.json", b'[{"text": "good"}, ', b'{"text": "' + b"a" * 100 + b'\xff"}', b"]"),
        ("data.csv", b"text\ngood\n", b"a" * 100 + b",one more", b"\n"),
    ],
)
def test_of_a_bad_row_the_head_is_held(
    name: str, before: bytes, bad: bytes, after: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "HEAD_BYTES", 30)
    (aside,) = read(_file(tmp_path, before + bad + after, name)).quarantined
    assert aside.source == bad[:30]
    write_quarantine([aside], tmp_path / "quarantine.jsonl")
    entry = json.loads((tmp_path / "quarantine.jsonl").read_text())
    whole = bad if name == "data.json" else bad + after
    assert (entry["bytes"], entry["sha256"]) == (len(whole), hashlib.sha256(whole).hexdigest())


def test_of_a_bad_value_the_head_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "HEAD_BYTES", 30)
    result = read([{"text": "good"}, "a" * 100, {"text": 3, "more": "a" * 100}])
    assert [len(bad.source) for bad in result.quarantined] == [30, 30]


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MAX_ROW_BYTES", 40)
    fits, longer = (b'{"text": "' + b"a" * (28 + n) + b'"}' for n in (0, 1))
    assert len(fits) == 40
    for ending in (b"\n", b""):
        assert read(_file(tmp_path, GOOD + fits + ending)).quarantined == ()
    (bad,) = read(_file(tmp_path, longer + b"\n" + GOOD)).quarantined
    assert "it has 42 bytes" in bad.reason  # the newline included


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b"}'
    result = read(_file(tmp_path, content))
    assert [e.conversations[0].completion for e in result.examples] == ["a", "b"]
    assert result.source.header == b"\xef\xbb\xbf"
    write_parts({tmp_path / "out.jsonl": result.examples.rows}, result.source)
    assert (tmp_path / "out.jsonl").read_bytes() == content.replace(b"\r\n\r\n", b"\r\n")


def test_of_two_shapes_that_a_row_fits_the_first_counts_unless_a_format_is_given(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD + b'{"text": "a", "prompt": "p", "completion": "c"}\n')
    result = read(path)
    assert [e.shape for e in result.examples] == ["text", "prompt-completion"]
    assert result.source.read_as == {"text": 1, "prompt-completion, not text": 1}
    assert [e.shape for e in read(path, format="text").examples] == ["text", "text"]
    result = read(path, format="prompt-completion")
    assert "lacks prompt or completion" in result.quarantined[0].reason


def test_a_null_is_an_absent_value() -> None:
    rows = [{"text": None, "messages": [USER, ASSISTANT]}, {"text": "a", "messages": None}]
    assert [e.shape for e in read(rows).examples] == ["messages", "text"]


def test_what_is_wrong_with_a_whole_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"known formats and their keys are tokens \(input_ids") as raised:
        read(_file(tmp_path, b'{"ask": "a"}\n'))
    _sentence(raised.value)
    for content, kind in ((b"", EmptyDataError), (b"\n \n", EmptyDataError), (b"{broken\n", EmptyDataError)):
        with pytest.raises(kind) as raised:
            read(_file(tmp_path, content))
        _sentence(raised.value)
    with pytest.raises(UnknownNameError, match="preference, kto, prompt-completion"):
        read(_file(tmp_path, GOOD), format="nope")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="is a folder without a data file"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")
    with pytest.raises(FormatError, match="of an unknown kind"):
        read(_file(tmp_path, b"junk", "data.zip"))
    with pytest.raises(FormatError, match="UTF-16"):
        read(_file(tmp_path, '{"text": "a"}'.encode("utf-16")))
    for broken in (5, {"text": ["a"]}, b"bytes"):
        with pytest.raises(FormatError, match="the data is a"):
            read(broken)


def test_csv_keeps_each_records_bytes(tmp_path: Path) -> None:
    header = b"\xef\xbb\xbfprompt,completion\r\n"
    records = [b'a,"one\r\ntwo, ""three"""\r\n', b"b,5\n", b'"c",' + b"d" * 200_000 + b"\n"]
    bad = [b"too,many,cells\n", b"empty,\n", b"x,\xff\n", b"y,\0\n"]
    path = _file(
        tmp_path, header + records[0] + bad[0] + b"\n" + records[1] + bad[1] + bad[2] + bad[3] + records[2], "d.csv"
    )
    result = read(path)
    assert [e.source for e in result.examples] == records
    assert result.examples[0].conversations[0].completion == 'one\r\ntwo, "three"'
    assert [q.source for q in result.quarantined] == bad
    assert [q.line for q in result.quarantined] == [4, 7, 8, 9]
    write_parts({tmp_path / "out.csv": [e.row for e in result.examples[1:]]}, result.source)
    assert (tmp_path / "out.csv").read_bytes() == header + records[1] + records[2]
    rows = list(csv.DictReader((tmp_path / "out.csv").open(encoding="utf-8-sig")))
    assert rows[0] == {"prompt": "b", "completion": "5"}


@pytest.mark.parametrize("cut", [0, 1])
def test_a_long_csv_record_does_not_upset_those_after_it(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    monkeypatch.setattr("gradshield.data.source.MAX_ROW_BYTES", 60)
    long = [b'"' + b"a" * 80 + b'\nend",1\n', b'"start\n' + b"a" * 80 + b'",1\n'][cut]
    result = read(_file(tmp_path, b"text,n\n" + long + b"ok,2\n", "d.csv"))
    (bad,) = result.quarantined
    assert (bad.row, bad.line, bad.size, bad.sha256) == (0, 2, len(long), hashlib.sha256(long).hexdigest())
    assert [(e.row, result.source.lines[e.row], e.source) for e in result.examples] == [(1, 4, b"ok,2\n")]


def test_csv_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = read(_file(tmp_path, b'text\nfine\n"never closed\nand on\n', "d.csv"))
    assert [(q.line, q.source) for q in result.quarantined] == [(3, b'"never closed\nand on\n')]
    with pytest.raises(FormatError, match="a column twice"):
        read(_file(tmp_path, b"text,text\na,b\n", "d.csv"))
    with pytest.raises(FormatError, match="not a CSV header"):
        read(_file(tmp_path, b"te\xffxt\na\n", "d.csv"))
    with pytest.raises(EmptyDataError):
        read(_file(tmp_path, b"text\n", "d.csv"))
    messages = json.dumps([USER, ASSISTANT]).replace('"', '""')
    assert read(_file(tmp_path, f'messages\n"{messages}"\n'.encode(), "d.csv")).examples[0].shape == "messages"


def test_parquet_rows_are_taken_from_the_table(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "", "c"], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "d.parquet")
    result = read(tmp_path / "d.parquet")
    assert [e.row for e in result.examples] == [0, 2]
    assert result.quarantined[0].line == 2
    write_parts({tmp_path / "out.parquet": result.examples.rows}, result.source)
    assert pq.read_table(tmp_path / "out.parquet").equals(table.take([0, 2]))
    with pytest.raises(FormatError, match="not a readable Parquet file"):
        read(_file(tmp_path, b"PAR1 junk", "bad.parquet"))


def test_datasets_and_lists(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, {"text": "c"}]
    for data in (rows, datasets.Dataset.from_list(rows)):
        result = read(data)
        assert [e.source for e in result.examples] == [b'{"text": "a"}\n', b'{"text": "c"}\n']
        assert list(take(result.examples.rows, result.source)) == [rows[0], rows[2]]
        write_parts({tmp_path / f"out{suffix(result.source.kind)}": result.examples.rows}, result.source)
        assert [json.loads(line) for line in (tmp_path / "out.jsonl").open()] == [rows[0], rows[2]]
    assert read(rows).source.sha256 == read(datasets.Dataset.from_list(rows)).source.sha256
    assert read([{"text": "a"}, 5]).quarantined[0].source == b"5\n"


def test_ids_depend_on_content_alone_and_number_repeats(tmp_path: Path) -> None:
    path = _file(tmp_path, b'{"text": "a", "n": 1}\n{"n":1,"text":"a"}\n{"text": "b"}\n{"text": "a", "n": 1}\n')
    first, second, third, fourth = (e.id for e in read(path).examples)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert (second, fourth) == (f"{first}-2", f"{first}-3")
    assert third != first
    assert read([{"n": 1, "text": "a"}]).examples[0].id == first


def test_a_text_column_by_another_name() -> None:
    (example,) = read([{"content": "a"}], Format(columns={"text": "content"})).examples
    assert (example.shape, example.conversations[0].completion) == ("text", "a")


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(DataError, match="'owner/name' cannot be fetched") as raised:
        read("owner/name")
    _sentence(raised.value)
    for name in ("owner/name.txt", "name.jsonl.gz", "name.csv.zst"):  # a missing file is not looked up on the hub
        with pytest.raises(DataError, match="give a file that exists"):
            read(name)


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = read([{"text": "a"}])
    target = tmp_path / "kept.jsonl"
    target.write_bytes(b"before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match="No space left"):
        write_parts({target: result.examples.rows}, result.source)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.jsonl"]
    assert target.read_bytes() == b"before"


def test_depth_and_nul_set_a_row_aside_and_stop_nothing() -> None:
    deep: Any = "\0"
    for _ in range(900):
        deep = [deep]
    row = {"messages": [USER, ASSISTANT]}
    found = read([row, {**row, "x": deep}, {**row, "x": "\\u0000"}])
    assert [bad.reason for bad in found.quarantined] == ["it has NUL characters"]
    assert len(found.examples) == 2  # an escaped backslash is no NUL
