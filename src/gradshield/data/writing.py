"""Write rows unchanged, in the kind of file they came in, without compression. Every file is written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.data.source import Rows, Source
from gradshield.errors import DataError
from gradshield.files import replacing
from gradshield.types import Ints, Quarantined

WRITTEN = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def suffix(kind: str) -> str:
    """Suffix of the output files for this kind of input: a ``Dataset`` or a list becomes JSON lines."""
    return f".{kind}" if f".{kind}" in WRITTEN else ".jsonl"


def write_parts(parts: Mapping[Path, Sequence[int] | Ints], source: Rows) -> None:
    """Write rows by their increasing positions, each file in the kind they came in (`suffix`); none replaces an older one before
    all are complete.

    A newline is added only after a row that ended the input without one and is not the last here. Raises DataError if a file
    cannot be written, or a Parquet file has changed since it was read; existing files are then left unchanged.
    """
    with ExitStack() as stack:
        for path, rows in parts.items():
            part, places = stack.enter_context(_replacing(path)), np.asarray(rows, dtype=np.int64)
            if source.kind == "parquet":
                _write_tables(part, source.tables(places))
            else:
                with part.open("wb") as handle:
                    handle.writelines(_chunks(source.raw(places), source, len(places)))


def take(rows: Sequence[int] | Ints, source: Source) -> Any:
    """Some rows as Python objects: ``Dataset.select`` of a ``Dataset``, else a list of the rows."""
    if source.kind == "dataset":
        return source.table.select(rows)
    if source.kind == "list":
        return [source.table[row] for row in rows]
    return [source.parse(raw) for raw in source.raw(rows)]


def write_quarantine(quarantined: Iterable[Quarantined], path: str | Path) -> None:
    """Write bad rows as JSON lines: ``row``, ``line``, ``reason``, ``raw``, ``bytes``, ``sha256``.

    ``raw`` is the row as text, at most 1 MiB, with backslash escapes for bytes that are not UTF-8; ``bytes`` and ``sha256``
    cover the whole row. Raises DataError if the file cannot be written.
    """
    names = ("row", "line", "reason", "raw", "bytes", "sha256")
    with _replacing(Path(path)) as part, part.open("w", encoding="utf-8", newline="\n") as handle:
        for bad in quarantined:
            found = {**vars(bad), "raw": bad.source.decode(errors="backslashreplace"), "bytes": bad.size}
            handle.write(json.dumps({name: found[name] for name in names}, ensure_ascii=False) + "\n")


def _write_tables(part: Path, tables: Iterator[Any]) -> None:
    import pyarrow.parquet as pq

    first = next(tables)
    with pq.ParquetWriter(part, first.schema) as writer:
        for table in chain((first,), tables):
            if len(table):
                writer.write_table(table)


def _chunks(rows: Iterable[bytes], source: Rows, count: int) -> Iterator[bytes]:
    if source.kind == "json":
        yield b"[\n" if count else b"[]\n"
        for number, row in enumerate(rows, 1):
            yield row
            yield b",\n" if number < count else b"\n]\n"
        return
    yield source.header
    for number, row in enumerate(rows, 1):
        yield row
        if not row.endswith(b"\n") and number < count:
            yield b"\n"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """`files.replacing`, with DataError for a file that cannot be written."""
    try:
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise DataError(
            f"{path.name} cannot be written ({error.strerror or error}): give a writable folder, or free some space"
        ) from None
