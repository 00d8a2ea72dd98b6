"""Whatever a JSONL file holds, its rows come out as the bytes that went in, each exactly once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield.data import ReadResult, read, write

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
def _read(content: bytes) -> Iterator[ReadResult]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        path.write_bytes(content)
        yield read(path)


def _written(result: ReadResult, rows: set[int]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.jsonl"
        write(sorted(rows), result.source, path)
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
