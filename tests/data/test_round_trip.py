"""Rows come out as they went in, each exactly once: of JSONL the bytes, of CSV and JSON values, order and columns."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.data import ReadResult, read, suffix, write_parts

TEXT = st.text(max_size=20)
ROW = st.one_of(
    TEXT.map(lambda text: {"text": text}),
    st.tuples(TEXT, TEXT).map(lambda pair: {"prompt": pair[0], "completion": pair[1]}),
    st.dictionaries(TEXT, st.one_of(st.integers(), TEXT, st.none()), max_size=3),
)
JSON_LINE = st.tuples(ROW, st.booleans()).map(
    lambda case: json.dumps(case[0], ensure_ascii=case[1]).encode(errors="replace")
)
JUNK = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
LINES = st.lists(st.tuples(st.one_of(JSON_LINE, JUNK), st.sampled_from([b"\n", b"\r\n"])), max_size=12)
GOOD = b'{"text": "one good row, so that there is something to read"}'


@contextmanager
def _read(content: bytes, name: str = "data.jsonl") -> Iterator[ReadResult]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        if codec:
            with pa.CompressedOutputStream(str(path), codec) as out:
                out.write(content)
        else:
            path.write_bytes(content)
        yield read(path)


def _written(result: ReadResult, rows: set[int]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out{suffix(result.source.kind)}"
        write_parts({path: sorted(rows)}, result.source)
        return path.read_bytes()


@settings(max_examples=80, deadline=None)
@given(LINES, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_kept_removed_and_quarantined_are_the_file(lines, mark, ended, random) -> None:  # type: ignore[no-untyped-def]
    body = GOOD + b"\n" + b"".join(line + end for line, end in lines)
    body += GOOD + (b"\n" if ended else b"")
    with _read((b"\xef\xbb\xbf" if mark else b"") + body) as result:
        parts = {e.row: e.source for e in result.examples} | {q.row: q.source for q in result.quarantined}
        assert sorted(parts) == list(range(result.source.rows))
        expected = body.split(b"\n")
        expected = [line + b"\n" for line in expected[:-1]] + ([expected[-1]] if expected[-1] else [])
        assert [parts[row] for row in sorted(parts)] == [line for line in expected if line.strip()]

        removed = {e.row for e in result.examples if random.random() < 0.5}
        kept = {e.row for e in result.examples} - removed
        header = result.source.header
        for rows in (kept, removed):
            sources = [parts[row] for row in sorted(rows)]
            whole = header + b"".join(
                s if s.endswith(b"\n") or n == len(sources) else s + b"\n" for n, s in enumerate(sources, 1)
            )
            assert _written(result, rows) == whole


PACKED = pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
CLEAN = TEXT.map(lambda text: text.replace("\0", "0"))
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | CLEAN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CLEAN, inner, max_size=3),
    max_leaves=6,
)
# Of a lone carriage return csv.writer makes what csv.reader refuses (fixed in Python 3.13).
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12) | st.sampled_from(
    ["", "007", "1.0", "two\nlines", "two\r\nlines", '"quoted"', "a,b\tc", "null", " spaced "]
)


def _halves(result: ReadResult, random) -> list[list[int]]:  # type: ignore[no-untyped-def]
    rows = [e.row for e in result.examples]
    removed = {row for row in rows if random.random() < 0.5}
    return [[row for row in rows if (row in removed) == flag] for flag in (False, True)]


@PACKED
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.dictionaries(CLEAN, VALUE, max_size=3), min_size=1, max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_json_array_keeps_values_order_and_keys(packed, rows, indent, ascii, wrapped, random) -> None:  # type: ignore[no-untyped-def]
    rows = [{"more": row, "text": "words"} for row in rows]
    whole = {"[{": ["{", {"data": ']"'}], "data": rows, "rest": []} if wrapped else rows
    content = json.dumps(whole, indent=indent, ensure_ascii=ascii).encode()
    with _read(content, f"data.json{packed}") as result:
        assert result.source.kind == "json" and result.source.rows == len(rows)
        assert len(result.examples) == len(rows)
        for own in _halves(result, random):
            written = json.loads(_written(result, set(own)))
            assert [json.dumps(row) for row in written] == [json.dumps(rows[row]) for row in own]


@PACKED
@pytest.mark.parametrize("kind", ["csv", "tsv"])
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_csv_keeps_cells_order_and_columns(packed, kind, rows, end, quoting, mark, random) -> None:  # type: ignore[no-untyped-def]
    made, delimiter = io.StringIO(), {"csv": ",", "tsv": "\t"}[kind]
    writer = csv.writer(made, lineterminator=end, quoting=quoting, delimiter=delimiter)
    writer.writerows([["b", "text", "a"], *([b, f"{text}.", a] for b, text, a in rows)])
    content = made.getvalue().encode("utf-8-sig" if mark else "utf-8")
    with _read(content, f"data.{kind}{packed}") as result:
        assert len(result.examples) == len(rows) and not result.quarantined
        for own in _halves(result, random):
            text = _written(result, set(own)).decode("utf-8-sig" if mark else "utf-8")
            header, *written = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            assert header == ["b", "text", "a"]
            assert written == [[rows[row][0], f"{rows[row][1]}.", rows[row][2]] for row in own]


@PACKED
def test_what_is_packed_is_read_as_what_is_in_it(packed: str) -> None:
    lines = b'{"text": "a"}\r\n\n{"text": 3}\n{"text" : "b"}'
    with _read(b"\xef\xbb\xbf" + lines, f"data.jsonl{packed}") as result:
        assert [(q.row, q.line) for q in result.quarantined] == [(1, 3)]
        assert _written(result, {0, 2}) == b'\xef\xbb\xbf{"text": "a"}\r\n{"text" : "b"}'
        assert result.source.kind == "jsonl"


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_ids_are_stable_under_order_spacing_and_other_rows(texts, random) -> None:  # type: ignore[no-untyped-def]
    rows = [{"text": text.replace("\0", "0"), "n": 1} for text in texts]
    ids = [e.id for e in read(rows).examples]
    assert len(set(ids)) == len(ids)
    order = list(range(len(rows)))
    random.shuffle(order)
    content = b"".join(json.dumps({"n": 1, "text": rows[n]["text"]}, indent=None).encode() + b"\n" for n in order)
    with _read(content) as result:
        again = [e.id for e in result.examples]
    assert sorted(again) == sorted(ids)
    assert {i.split("-")[0]: t["text"] for i, t in zip(ids, rows, strict=True)} == {
        i.split("-")[0]: rows[n]["text"] for i, n in zip(again, order, strict=True)
    }
