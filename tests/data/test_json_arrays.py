"""JSON arrays, whose rows are found without reading the whole, and compressed files."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from gradshield.data import read, source, write_parts
from gradshield.errors import DataError, FormatError

GOOD = b'{"text": "good"}\n'


def _file(folder: Path, content: bytes, name: str = "data.json") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _sentence(error: BaseException) -> None:
    assert "\n" not in str(error) and len(str(error)) < 700


def test_json_arrays_keep_each_elements_text(tmp_path: Path) -> None:
    first, second = b'{ "text":\n  "a" }', b'{"text": "b\\u00e9"}'
    for content in (
        b"[" + first + b" ,\n" + second + b"]",
        b'{"version": 1, "data": [' + first + b"," + second + b'], "more": {}}',
    ):
        result = read(_file(tmp_path, content))
        assert [e.source for e in result.examples] == [first, second]
        assert result.source.kind == "json"
    write_parts({tmp_path / "out.json": result.examples.rows}, result.source)
    assert (tmp_path / "out.json").read_bytes() == b"[\n" + first + b",\n" + second + b"\n]\n"
    write_parts({tmp_path / "out.json": []}, result.source)
    assert json.loads((tmp_path / "out.json").read_text()) == []


def test_json_files_that_hold_lines_bad_rows_or_junk(tmp_path: Path) -> None:
    assert read(_file(tmp_path, GOOD * 2)).source.kind == "jsonl"
    result = read(_file(tmp_path, b'[{"text": "a"},\n\n"x",\n{"text": "\xff"}, {"text": "\0"}]'))
    assert [(bad.row, bad.line) for bad in result.quarantined] == [(1, 3), (2, 4), (3, 4)]
    assert [bad.source for bad in result.quarantined] == [b'"x"', b'{"text": "\xff"}', b'{"text": "\0"}']
    stray = b'{\n"text": "a"}\n}\n' + b'{\n"text": "b"}\n' * 2
    result = read(_file(tmp_path, stray))  # no row after a bracket too many is lost without a word
    assert len(result.examples) == 1 and result.quarantined[-1].line == 7
    for content in (b'[{"text": "a"}, {]', b'[{"text": "a"}', b"[" * 100_000, b"5", b'{"data": 5', b""):
        with pytest.raises(DataError) as raised:
            read(_file(tmp_path, content))
        _sentence(raised.value)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 20])
def test_a_broken_element_of_a_json_array_is_set_aside_alone(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradshield.data.raw_files.BLOCK", size)
    content = (
        b'{"note": {"data": [1]}, "data":\n[{"text": "a]"},\n {"text": }, {"text": "\\\\\\""}, ,\n{"text": "b"},]}'
    )
    result = read(_file(tmp_path, content))
    assert [e.source for e in result.examples] == [b'{"text": "a]"}', b'{"text": "\\\\\\""}', b'{"text": "b"}']
    assert [(bad.row, bad.line, bad.source) for bad in result.quarantined] == [
        (1, 3, b'{"text": }'),
        (3, 3, b""),
        (5, 4, b""),
    ]
    assert "not valid JSON (Expecting value at character 10)" in result.quarantined[0].reason
    with pytest.raises(FormatError, match="the row that begins on line 2 has no end"):
        read(_file(tmp_path, b'[{"text": "a"},\n{"text": "b}, {"text": "c"}]'))


@pytest.mark.slow
@pytest.mark.parametrize("size", [997, 1 << 20])
def test_a_json_array_is_read_in_bounded_memory(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = b'{"text": "' + rb"\n\"," * 1_000_000 + b'"}'
    path = _file(tmp_path, b"[" + (GOOD + b", ") * 20_000 + long + b"\n, " + GOOD + b"]")
    monkeypatch.setattr("gradshield.data.raw_files.BLOCK", size)
    monkeypatch.setattr(source, "MAX_ROW_BYTES", 100_000)
    monkeypatch.setattr(source, "HEAD_BYTES", 1000)
    tracemalloc.start()
    result = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000 + 4 * size
    assert [e.row for e in result.examples] == [*range(20_000), 20_001]
    (bad,) = result.quarantined
    assert (bad.row, bad.line, bad.size, len(bad.source)) == (20_000, 20_001, len(long) + 1, 1000)
    assert bad.sha256 == hashlib.sha256(long + b"\n").hexdigest()


@pytest.mark.parametrize(("ending", "codec"), [(".gz", "gzip"), (".zst", "zstd")])
def test_what_is_packed_badly_is_an_error(ending: str, codec: str, tmp_path: Path) -> None:
    whole = pa.Codec(codec).compress(GOOD * 1000, asbytes=True)
    assert len(read(_file(tmp_path, whole, f"data{ending}")).examples) == 1000
    for content in (whole[:-1], whole[: len(whole) // 2], b"junk" * 9, whole + b"junk"):
        with pytest.raises(DataError, match="cannot be read") as raised:
            read(_file(tmp_path, content, f"data.jsonl{ending}"))
        _sentence(raised.value)
    with pytest.raises(FormatError, match="decompress it"):
        read(_file(tmp_path, whole, f"data.parquet{ending}"))
