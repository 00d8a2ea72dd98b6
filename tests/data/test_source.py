"""Rows are made and written from a copy of what was read, whatever becomes of the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradshield.data import read, render_all, suffix, take, write_parts
from gradshield.data.trl import IGNORED, labelled, to_trl
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"Say {n}, é\u2028", "completion": f" {n}" if n % 5 else ""} for n in range(40)]  # eight are bad


def made(kind: str, folder: Path) -> Any:
    """The rows in every kind of input; of files, with what may stand between rows."""
    path = folder / f"data.{kind}"
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    if kind == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(lines))
    elif kind == "json":
        path.write_bytes(b'\xef\xbb\xbf{"ab\xc3\xa9": 1, "data": [ ' + b" ,\n ".join(lines) + b"]}")
    elif kind == "csv":
        cells = "".join(f'"{r["prompt"]}\nand ""on""",{r["completion"]}\r\n\n' for r in ROWS)
        path.write_bytes(b"\xef\xbb\xbfprompt,completion\n" + cells.encode())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    else:
        return ROWS if kind == "list" else datasets.Dataset.from_list(ROWS)
    return path


def packed(path: Path, kind: str) -> Path:
    """The same file, compressed where ``kind`` ends so."""
    if kind.endswith((".gz", ".zst")):
        codec = {"gz": "gzip", "zst": "zstd"}[kind.rpartition(".")[2]]
        with pa.CompressedOutputStream(f"{path}.{kind.rpartition('.')[2]}", codec) as out:
            out.write(path.read_bytes())
        path = path.with_name(f"{path.name}.{kind.rpartition('.')[2]}")
    return path


KINDS = ["jsonl", "json", "csv", "parquet", "dataset", "list"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_a_row_gives_the_same(kind: str, tmp_path: Path) -> None:
    examples = read(made(kind, tmp_path)).examples
    whole = list(examples)
    assert len(whole) == len(examples) == 32 and [e.row for e in whole] == examples.rows.tolist()
    assert [examples[i] for i in range(-32, 0)] == whole == examples[:]
    assert list(examples.at(np.array([1, 13, 39]))) == [e for e in whole if e.row in (1, 13, 39)]
    assert [e.id for e in whole] == list(examples.ids) and [e.shape for e in whole] == list(examples.shapes)
    with pytest.raises(IndexError):
        examples[32]
    if kind in ("jsonl", "json", "csv"):
        content = (tmp_path / f"data.{kind}").read_bytes()
        assert all(e.source in content for e in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_some_rows_are_written_and_taken(kind: str, tmp_path: Path) -> None:
    result = read(made(kind, tmp_path))
    name = f"some{suffix(result.source.kind)}"
    rows = [1, 2, 11, 38]
    write_parts({tmp_path / name: rows}, result.source)
    again = read(tmp_path / name).examples
    assert [e.conversations for e in again] == [e.conversations for e in result.examples if e.row in rows]
    assert list(again.ids) == [e.id for e in result.examples if e.row in rows]
    given = list(take(rows, result.source))
    assert given == [result.source.parse(e.source.decode()) for e in result.examples if e.row in rows]


def _changed(path: Path, change: str) -> None:
    content = path.read_bytes()
    if change == "deleted":
        os.remove(path)
        return
    changed = {
        "word": content.replace(b"Say 3", b"Say 4", 1),
        "longer": content.replace(b"Say", b"Tell", 1),
        "shorter": content[: len(content) // 2],
        "end": content + b"\n",
    }[change]
    assert changed != content
    path.write_bytes(changed)


CHANGES = ["word", "longer", "shorter", "deleted", "end"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "csv.zst"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_meanwhile_changes_nothing(kind: str, change: str, tmp_path: Path) -> None:
    path = packed(made(kind.partition(".")[0], tmp_path), kind)
    result = read(path)
    whole, name = list(result.examples), f"out{suffix(result.source.kind)}"
    write_parts({tmp_path / name: [1, 2, 11]}, result.source)
    written = (tmp_path / name).read_bytes()
    if path.suffix in (".gz", ".zst", ".parquet") and change in ("word", "longer"):
        change = "shorter"
    _changed(path, change)
    assert list(result.examples) == whole
    write_parts({tmp_path / name: [1, 2, 11]}, result.source)
    assert (tmp_path / name).read_bytes() == written


def test_tokens_for_a_trainer_lie_in_a_file_that_goes_with_them(tmp_path: Path) -> None:
    result = read(ROWS)
    rendered = render_all(result.examples, tiny_tokenizer()).rendered
    dataset = to_trl([], rendered)
    twin = datasets.Dataset.from_list([labelled(row) for row in rendered])
    assert dataset.features == twin.features and dataset[:] == twin[:]
    assert {label for row in dataset for label in row["labels"]} >= {IGNORED}
    (file,) = dataset.cache_files
    path = Path(file["filename"])
    assert path.exists()
    del dataset
    assert not path.parent.exists()
