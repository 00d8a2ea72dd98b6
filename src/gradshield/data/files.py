"""Files to raw records: each row's exact bytes with its value, or the reason why it cannot be parsed.

jsonl     one object per line; blank lines are skipped
json      an array of objects, or ``{"data": [...]}``
csv, tsv  a header and records; a quoted cell may hold newlines
parquet   a table

All but Parquet may be compressed (``.gz``, ``.zst``).
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from gradshield.data.canonical import json_line
from gradshield.data.records import MAX_ROW_BYTES, Lines, Parse, Record, Taken, csv_value, json_value
from gradshield.data.source import Source
from gradshield.errors import DataError, FormatError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 20  # bytes of a JSON array read at once
_MARK = re.compile(rb'\\.|["\[\]{},]', re.DOTALL)
_DATA = re.compile(rb'\s*"data"\s*:\s*')


def open_file(path: Path) -> tuple[Source, Iterator[Record]]:
    """Open a data file by its suffix, or for an unknown suffix by its first bytes: its source, and an iterator of its rows.

    Raises
    ------
    DataError
        The path is a folder, or cannot be read.
    FormatError
        It is not one of the file kinds above, or is broken as a whole.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the data file in it ({', '.join(SUFFIXES)})")
    with _readable(path):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256")
        stream, header, kind = _stream(path)
        parse: Parse = json_value
        if kind == "json" and (inside := _entered(signs := _signs(stream))):
            header, records = b"", _array(path, signs, *inside)
        elif kind == "parquet":
            records = _table(path)
        elif kind in DELIMITERS:
            header, parse, records = _csv(path, header, Lines(stream), DELIMITERS[kind])
        else:
            if kind == "json":  # concatenated objects
                stream.close()
                stream, header, _ = _stream(path)
            kind, records = "jsonl", _json_lines(Lines(stream))
    return Source(kind, str(path), digest, parse, header), _checked(path, stream, records)


def _stream(path: Path) -> tuple[BinaryIO, bytes, str]:
    """The file's bytes, decompressed, after a byte order mark; that mark; and the kind of file."""
    stream: Any = path.open("rb")
    suffix, packed = path.suffix.lower(), COMPRESSED.get(path.suffix.lower())
    if packed is not None:
        import pyarrow as pa

        stream = io.BufferedReader(pa.CompressedInputStream(stream, packed), BLOCK)
        suffix = path.with_suffix("").suffix.lower()
    start = stream.peek(4096)
    kind = _kind(path, suffix, start)
    if kind == "parquet" and packed is not None:
        raise FormatError(
            f"{path} is a compressed Parquet file: decompress it, since Parquet compresses its own columns"
        )
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) and kind != "parquet":
        raise FormatError(f"{path} is UTF-16: data files must be UTF-8, so convert it first")
    return stream, stream.read(len(BOM)) if start.startswith(BOM) else b"", kind


def _kind(path: Path, suffix: str, start: bytes) -> str:
    if kind := SUFFIXES.get(suffix):
        return kind
    if start.startswith(b"PAR1"):
        return "parquet"
    first = start.removeprefix(BOM).lstrip()[:1]
    if first in (b"{", b"["):
        return "jsonl" if first == b"{" else "json"
    raise FormatError(
        f"{path} is of an unknown kind: give one of {', '.join(SUFFIXES)} with that suffix, followed by "
        f"{' or '.join(COMPRESSED)} if it is compressed"
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns read errors of the system or a decompressor into DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or _line(error)}): give a file that exists and is complete"
        ) from None


def _checked(path: Path, stream: BinaryIO, records: Iterator[Record]) -> Iterator[Record]:
    with _readable(path), stream:
        yield from records


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")


def _json_lines(lines: Lines) -> Iterator[Record]:
    for _ in lines:
        if (taken := lines.take()).data.strip():
            yield taken.record(lines.number, json_value)


def _csv(path: Path, bom: bytes, lines: Lines, delimiter: str) -> tuple[bytes, Parse, Iterator[Record]]:
    """The mark and the header, the parser of a record, and the records."""
    # The limit is per process, and its default is smaller than some answers.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    texts = (line.decode(errors="surrogateescape") for line in lines)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        columns: list[str] = next((cells for cells in reader if cells), [])
        header = lines.take().record(1, bytes)
    except csv.Error:
        header = Record(1, b"", reason="broken")
    if header.reason:
        raise FormatError(f"{path} has a first line that is not a CSV header: give the names of the columns there")
    if len(set(columns)) < len(columns):
        raise FormatError(f"{path} names a column twice in its header ({', '.join(columns)}): rename one of them")
    parse = partial(csv_value, columns, delimiter)
    return bom + header.source, parse, _csv_records(lines, reader, parse)


def _csv_records(lines: Lines, reader: Iterator[list[str]], parse: Parse) -> Iterator[Record]:
    """The reader only finds where a record ends: each is parsed from its own bytes, as on every later read."""
    while True:
        line = lines.number + 1
        try:
            next(reader)
        except StopIteration:
            return
        except csv.Error:
            pass
        if (taken := lines.take()).data.strip():
            yield taken.record(line, parse)


def _signs(stream: BinaryIO) -> Iterator[tuple[bytes, bytes, int]]:
    """The brackets and commas of JSON text outside strings, at a nesting depth of at most two.

    Yields the bytes since the previous one, the sign, and the depth after it. The end of a block has an empty sign.
    """
    quoted, depth = False, 0
    while block := stream.read(BLOCK):
        while block.endswith(b"\\") and (more := stream.read(1)):
            block += more
        start = 0
        for mark in _MARK.finditer(block):
            sign = mark[0]
            if sign == b'"':
                quoted = not quoted
            elif not quoted and len(sign) == 1:
                depth += (sign in b"[{") - (sign in b"]}")
                if depth <= 2:
                    yield block[start : mark.start()], sign, depth
                    start = mark.end()
        yield block[start:], b"", depth


def _entered(signs: Iterator[tuple[bytes, bytes, int]]) -> tuple[int, int] | None:
    """Skip to the inside of the array of rows: its nesting depth and line. None if there is no such array."""
    line, key = 1, b""
    for before, sign, depth in signs:
        line += before.count(b"\n")
        key = (key + before)[:99]
        if sign == b"[" and ((depth == 1 and not key.strip()) or (depth == 2 and _DATA.fullmatch(key))):
            return depth, line
        if sign and depth <= 0:
            return None
        key = b"" if depth == 1 and sign in (b"{", b",") else key + sign
    return None


def _array(path: Path, signs: Iterator[tuple[bytes, bytes, int]], inside: int, line: int) -> Iterator[Record]:
    """The elements of the array whose inside has the depth ``inside`` and begins on ``line``."""
    taken, begun, first = Taken(), line, True
    for before, sign, depth in signs:
        line += before.count(b"\n")
        if not taken.size:
            before = before.lstrip()
            begun = line - before.count(b"\n")
        taken.add(before)
        if depth < inside or (sign == b"," and depth == inside):
            taken.data = taken.data.rstrip()
            if taken.data or sign == b"," or not first:
                yield taken.record(begun, json_value)
            if depth < inside:
                return
            taken, first = Taken(), False
        else:
            taken.add(sign)
    raise FormatError(
        f"{path} is not valid JSON (the row that begins on line {begun} has no end): fix it there, or give one object "
        "per line as .jsonl"
    )


def _table(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            values = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
            for line, value in enumerate(values, 1):
                yield Record(line, json_line(value), value)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise FormatError(f"{path} is not a readable Parquet file ({_line(error)}): write it again") from None
