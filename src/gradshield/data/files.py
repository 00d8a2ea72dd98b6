"""Files to raw records: each row's exact bytes with its value, or the reason why it has none.

jsonl     one object per line; blank lines are no rows
json      an array of objects, or ``{"data": [...]}``
csv       a header and records; a quoted cell may hold newlines
parquet   a table
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradshield.data.csv_rows import open_csv
from gradshield.data.json_rows import open_json, open_jsonl
from gradshield.data.records import BOM, Opened, Record
from gradshield.errors import DataError, FormatError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def open_file(path: Path) -> Opened:
    """Open a data file by its suffix, or by its first bytes where the suffix is not known.

    Raises
    ------
    DataError
        The path is a folder, or cannot be read.
    FormatError
        It is not one of the kinds of file above, or is broken as a whole.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the data file in it ({', '.join(SUFFIXES)})")
    try:
        with path.open("rb") as handle:
            start = handle.read(4096)
        kind = _kind(path, start)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")) and kind != "parquet":
            raise FormatError(f"{path} is UTF-16: data files must be UTF-8, so convert it first")
        if kind == "jsonl":
            return open_jsonl(path)
        return {"json": open_json, "csv": open_csv, "parquet": _open_parquet}[kind](path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): give a file that exists") from None


def _kind(path: Path, start: bytes) -> str:
    if kind := SUFFIXES.get(path.suffix.lower()):
        return kind
    if start.startswith(b"PAR1"):
        return "parquet"
    first = start.removeprefix(BOM).lstrip()[:1]
    if first in (b"{", b"["):
        return "jsonl" if first == b"{" else "json"
    raise FormatError(
        f"{path} is not a kind of file that is known: give one of {', '.join(SUFFIXES)}, uncompressed, with that suffix"
    )


def _open_parquet(path: Path) -> Opened:
    import pyarrow.parquet as pq

    with _readable(path):
        file = pq.ParquetFile(path)
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return Opened("parquet", str(path), _table_records(path, file.iter_batches(1024)), lambda: digest)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises FormatError for what Arrow cannot read."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError) as error:
        raise FormatError(f"{path} is not a Parquet file that can be read ({_line(error)}): write it again") from None


def _table_records(path: Path, batches: Iterator[Any]) -> Iterator[Record]:
    row = 0
    while True:
        with _readable(path):
            batch = next(batches, None)
            values = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        for value in values:
            yield Record(row, row + 1, value, value)
            row += 1


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
