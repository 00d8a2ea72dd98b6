"""Rows leave as they came: byte for byte, in the same kind of file. A file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gradshield.data.canonical import json_line
from gradshield.data.records import HEAD_BYTES, Oversized
from gradshield.data.source import Raw, Source
from gradshield.errors import DataError
from gradshield.files import replacing
from gradshield.types import Ints, Quarantined

GROUP = 1 << 16  # rows of a row group of a Parquet file


class Rows(Protocol):
    """What rows can be written from: a `Source`, or several put together again."""

    @property
    def kind(self) -> str: ...

    @property
    def header(self) -> bytes: ...

    def raw(self, rows: Iterable[int], whole: bool = False) -> Iterator[Raw]: ...

    def tables(self, rows: Ints, whole: bool = False) -> Iterator[Any]: ...

    def schema(self) -> Any: ...


def write(rows: Sequence[int] | Ints, source: Rows, path: str | Path) -> None:
    """Write some rows of ``source`` by their positions, which increase, in the kind of file they came in (``Source.suffix``)."""
    write_parts({Path(path): rows}, source)


def write_parts(parts: Mapping[Path, Sequence[int] | Ints], source: Rows) -> None:
    """Several files at once, none of which is put in its place before all are whole.

    The rows are read again from where they came. A newline is added only after a row that ended the input without one and
    is not the last here. Raises DataError where a file cannot be written, and where the input has changed; what stood at the
    paths is then still there.
    """
    fill = _fill_table if source.kind == "parquet" else _fill_text
    with ExitStack() as stack:
        for path, rows in parts.items():
            part = stack.enter_context(_replacing(path))
            fill(part, np.asarray(rows, dtype=np.int64), source)


def take(rows: Sequence[int] | Ints, source: Source) -> Any:
    """Some rows in the form they were given in Python: ``Dataset.select`` of a ``Dataset``, else a list of the rows."""
    if source.kind == "dataset":
        return source.table.select(rows)
    return list(source.raw(int(row) for row in rows))


def write_quarantine(quarantined: Iterable[Quarantined], path: str | Path) -> None:
    """Write bad rows as JSON lines: ``row``, ``line``, ``reason``, ``raw``, ``bytes``, ``sha256``.

    ``raw`` is the row as text, bytes that are not UTF-8 escaped with a backslash, at most 1 MiB of it; ``bytes`` and
    ``sha256`` are of the whole row. Raises DataError where the file cannot be written.
    """
    with _replacing(Path(path)) as part:
        _write_chunks(part, map(_quarantine_line, quarantined))


def _quarantine_line(bad: Quarantined) -> bytes:
    entry = {
        "row": bad.row,
        "line": bad.line,
        "reason": bad.reason,
        "raw": bad.source[:HEAD_BYTES].decode(errors="backslashreplace"),
        "bytes": bad.size if isinstance(bad, Oversized) else len(bad.source),
        "sha256": bad.sha256 if isinstance(bad, Oversized) else hashlib.sha256(bad.source).hexdigest(),
    }
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _fill_table(part: Path, rows: Ints, source: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(part, source.schema()) as writer:
        waiting: list[Any] = []
        for table in source.tables(rows, whole=True):
            waiting.append(table)
            if sum(map(len, waiting)) >= GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))


def _fill_text(part: Path, rows: Ints, source: Rows) -> None:
    raws = source.raw(rows.tolist(), whole=True)
    _write_chunks(part, _chunks((r if isinstance(r, bytes) else json_line(r) for r in raws), source, len(rows)))


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


def _write_chunks(part: Path, chunks: Iterable[bytes]) -> None:
    with part.open("wb") as handle:
        handle.writelines(chunks)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path``, to be put in its place in one step."""
    try:
        with replacing(path) as part:
            yield part
    except OSError as error:
        raise DataError(
            f"{path.name} cannot be written ({error.strerror or error}): give a folder that can, or free some space"
        ) from None
