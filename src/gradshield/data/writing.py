"""Rows leave as they came: byte for byte, in the same kind of file. A file appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gradshield.data.canonical import json_line
from gradshield.data.formats import Source
from gradshield.data.records import HEAD_BYTES, Oversized
from gradshield.errors import DataError
from gradshield.files import replacing
from gradshield.types import Example, Quarantined


def write(examples: Sequence[Example], source: Source, path: str | Path) -> None:
    """Write some rows of ``source``, in the order given, in the kind of file they came in (see ``Source.suffix``).

    A newline is added only after a row that ended the input without one and is not the last here. Raises DataError
    where the file cannot be written; what stood at ``path`` is then still there.
    """
    if source.kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = pa.array([example.row for example in examples], pa.int64())  # typed, so that none is a selection too
        _replace(Path(path), lambda part: pq.write_table(source.table.take(rows), part))
    else:
        _replace(Path(path), lambda part: _write_chunks(part, _chunks(examples, source)))


def take(examples: Sequence[Example], source: Source) -> Any:
    """Some rows in the form they were given in Python: ``Dataset.select`` of a ``Dataset``, else a list of the rows."""
    if source.kind == "dataset":
        return source.table.select([example.row for example in examples])
    return [source.table[example.row] if source.kind == "list" else example.source for example in examples]


def write_quarantine(quarantined: Iterable[Quarantined], path: str | Path) -> None:
    """Write bad rows as JSON lines: ``row``, ``line``, ``reason``, ``raw``, ``bytes``, ``sha256``.

    ``raw`` is the row as text, bytes that are not UTF-8 escaped with a backslash, at most 1 MiB of it; ``bytes`` and
    ``sha256`` are of the whole row. Raises DataError where the file cannot be written.
    """
    _replace(Path(path), lambda part: _write_chunks(part, map(_quarantine_line, quarantined)))


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


def _chunks(examples: Sequence[Example], source: Source) -> Iterable[bytes]:
    rows = [e.source if isinstance(e.source, bytes) else json_line(e.source) for e in examples]
    if source.kind == "json":
        yield b"[\n" + b",\n".join(rows) + b"\n]\n" if rows else b"[]\n"
        return
    yield source.header
    for number, row in enumerate(rows, 1):
        yield row
        if not row.endswith(b"\n") and number < len(rows):
            yield b"\n"


def _write_chunks(part: Path, chunks: Iterable[bytes]) -> None:
    with part.open("wb") as handle:
        handle.writelines(chunks)


def _replace(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a file beside ``path``, then put it in its place in one step."""
    try:
        with replacing(path) as part:
            fill(part)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}): give a folder that can") from None
