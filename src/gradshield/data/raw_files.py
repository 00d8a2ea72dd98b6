"""Files to raw records: each row's exact bytes with its value, or the reason why it cannot be parsed.

jsonl     one object per line; blank lines are skipped
json      an array of objects, also under ``data`` or ``train`` of one object; or objects over several lines, one after another
csv, tsv  a header and records; a quoted cell may hold newlines; a CSV may be separated by tabs or semicolons
parquet   a table

All but Parquet may be compressed (``.gz``, ``.zst``). A folder or a pattern is one file: its files, one after another.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from glob import glob, has_magic
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gradshield.data.source import MAX_ROW_BYTES, Lines, Parse, RawRow, Source, Taken, csv_value, json_line, json_value
from gradshield.data.spool import Tables
from gradshield.errors import DataError, FormatError, first_line

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
DELIMITERS = {"csv": ",\t;", "tsv": "\t"}  # in the order tried
BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 20  # bytes of a JSON array read at once
_MARK = re.compile(rb'\\.|["\[\]{},]', re.DOTALL)
_DATA = re.compile(rb'\s*"(?:data|train)"\s*:\s*')
_HELD_OUT = re.compile(rb'\s*"((?:test|val|eval|dev)\w*)"\s*:\s*')
_Signs = Iterator[tuple[bytes, bytes, int]]


class _Opened(NamedTuple):
    """A file, with its rows. Files that differ in ``kind`` or ``columns`` cannot be one."""

    kind: str
    stream: BinaryIO
    records: Iterator[RawRow]
    parse: Parse = json_value
    header: bytes = b""
    columns: Any = None


def open_file(path: Path) -> tuple[Source, Iterator[RawRow]]:
    """Open data files by their suffix, or for an unknown suffix by their first bytes: their source, and an iterator of the rows.

    ``path`` is a file, a folder of files or a pattern (``data/*.jsonl``); several files are read in the order of their names.

    Raises DataError for a file that is not there or cannot be read; FormatError for one that is of no kind above or broken as a
    whole, and for files that differ in kind or columns.
    """
    with _readable(path):
        return open_files(_files(path), str(path))


def open_files(files: tuple[Path, ...], name: str) -> tuple[Source, Iterator[RawRow]]:
    """As `open_file`, some files in the order given."""
    digest, tables = hashlib.sha256(), Tables()
    for file in files:
        with _readable(file), file.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    with _readable(files[0]):
        first = _opened(files[0], tables)
    name = f"{name} ({len(files)} files)" if len(files) > 1 else str(files[0])
    source = Source(first.kind, name, digest, first.parse, first.header, files=files, tables=tables)
    return source, _rows(files, first, tables)


def _rows(files: tuple[Path, ...], first: _Opened, tables: Tables) -> Iterator[RawRow]:
    """The rows of the files, one after another."""
    for path in files:
        with _readable(path):
            opened = first if path is files[0] else _opened(path, tables)
            if (opened.kind, opened.columns) != (first.kind, first.columns):
                raise FormatError(
                    f"{path} is not of one kind and with the same columns as {files[0].name} before it: give files that are alike"
                )
            with opened.stream:
                for record in opened.records:
                    yield replace(record, file=str(path)) if len(files) > 1 else record


def _files(path: Path) -> tuple[Path, ...]:
    """The files of a folder or a pattern, or the file itself. Raises DataError if there are none, or of several kinds."""
    pattern = has_magic(str(path)) and not path.exists()
    if not pattern and not path.is_dir():
        return (path,)
    if (path / "scores.parquet").is_file():
        raise DataError(
            f"{path} is the folder of a finished scan: give the file in it that you mean, such as its kept rows"
        )
    found = map(Path, glob(str(path), recursive=True)) if pattern else path.iterdir()
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    if not pattern:
        files = [file for file in files if _suffix(file) in SUFFIXES]
    if not files:
        raise DataError(
            f"{path} {'matches no file' if pattern else 'is a folder without a data file'}: give a file "
            f"({', '.join(SUFFIXES)}), or a folder or pattern of such files"
        )
    if len({SUFFIXES.get(_suffix(file)) for file in files}) > 1:
        shown = ", ".join(file.name for file in files[:4])
        raise DataError(
            f"{path} has data files of several kinds ({shown}): give a pattern, such as '{files[0].parent}/*.jsonl'"
        )
    return tuple(files)


def _suffix(path: Path) -> str:
    """The suffix of what a file holds once it is unpacked."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _opened(path: Path, tables: Tables) -> _Opened:
    stream, mark, kind = _stream(path)
    if kind == "parquet":
        columns, records = _table(path, tables)
        return _Opened(kind, stream, records, columns=columns)
    if kind in DELIMITERS:
        return _csv(path, kind, stream, mark)
    line, _, rest = stream.peek(BLOCK).lstrip().partition(b"\n")  # type: ignore[attr-defined]
    line, after = line.rstrip(), rest.lstrip()
    # Only what writes an object over several lines breaks one after these.
    broken = {b"{": after[:1] in (b'"', b"}"), b"[": True, b",": after[:1] == b'"'}
    spread = line[:1] == b"{" and broken.get(line[-1:], False)
    array = line[:1] == b"[" and not (line[-1:] == b"]" and after)
    lines = line[:1] == b"{" and line[-1:] == b"}" and after[:1] == b"{"  # whatever keys the first row has
    if (kind == "json" and not lines) or spread or array:
        signs, held = _signs(stream), list[str]()
        inside, line_number = _seek(signs, held)
        if inside > 0:
            return _Opened("json", stream, _array(path, signs, inside, line_number, held))
        stream.close()
        stream, mark, _ = _stream(path)
    if spread:
        values = _values(path, _signs(stream), 0, 1)
        return _Opened("json", stream, (taken.record(begun, json_value) for taken, begun, _ in values))
    return _Opened("jsonl", stream, _json_lines(Lines(stream)), header=mark)


def _stream(path: Path) -> tuple[BinaryIO, bytes, str]:
    """The file's bytes, decompressed, after a byte order mark; that mark; and the kind of file."""
    stream: Any = path.open("rb")
    packed = COMPRESSED.get(path.suffix.lower())
    if packed is not None:
        import pyarrow as pa

        stream = io.BufferedReader(pa.CompressedInputStream(stream, packed), BLOCK)
    start = stream.peek(4096)
    kind = _kind(path, start)
    if kind == "parquet" and packed is not None:
        raise FormatError(
            f"{path} is a compressed Parquet file: decompress it, since Parquet compresses its own columns"
        )
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) and kind != "parquet":
        raise FormatError(f"{path} is UTF-16: data files must be UTF-8, so convert it first")
    return stream, stream.read(len(BOM)) if start.startswith(BOM) else b"", kind


def _kind(path: Path, start: bytes) -> str:
    if kind := SUFFIXES.get(_suffix(path)):
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
            f"{path} cannot be read ({error.strerror or first_line(error, most=None)}): give a file that exists and is complete"
        ) from None


def _json_lines(lines: Lines) -> Iterator[RawRow]:
    for _ in lines:
        if (taken := lines.take()).data.strip():
            yield taken.record(lines.number, json_value)


def _csv(path: Path, kind: str, stream: BinaryIO, mark: bytes) -> _Opened:
    """A table of text, whose cells the first delimiter that its header has separates."""
    # The limit is per process, and its default is smaller than some answers.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    start: bytes = stream.peek(BLOCK).lstrip(b"\r\n").partition(b"\n")[0]  # type: ignore[attr-defined]
    delimiter = next((one for one in DELIMITERS[kind] if one.encode() in start), DELIMITERS[kind][0])
    lines = Lines(stream)
    texts = (line.decode(errors="surrogateescape") for line in lines)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        columns: list[str] = next((cells for cells in reader if cells), [])
        header = lines.take().record(1, str)
    except csv.Error:
        header = RawRow(1, b"", reason="broken")
    if header.reason:
        raise FormatError(f"{path} has a first line that is not a CSV header: give the names of the columns there")
    if len(set(columns)) < len(columns):
        raise FormatError(f"{path} names a column twice in its header ({', '.join(columns)}): rename one of them")
    parse = partial(csv_value, columns, delimiter)
    records = _csv_records(lines, reader, parse)
    return _Opened(kind, stream, records, parse, mark + header.source, (delimiter, columns))


def _csv_records(lines: Lines, reader: Iterator[list[str]], parse: Parse) -> Iterator[RawRow]:
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


def _signs(stream: BinaryIO) -> _Signs:
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


def _seek(signs: _Signs, held: list[str]) -> tuple[int, int]:
    """Skip to the inside of an array of rows: its nesting depth and line, counted from here.

    Without one the depth is 0 where the value ends, and -1 if it has no end. Keys of arrays of held-out rows go into ``held``.
    """
    line, key = 1, b""
    for before, sign, depth in signs:
        line += before.count(b"\n")
        key = (key + before)[:99]
        if sign == b"[" and ((depth == 1 and not key.strip()) or (depth == 2 and _DATA.fullmatch(key))):
            return depth, line
        if sign == b"[" and depth == 2 and (found := _HELD_OUT.fullmatch(key)):
            held.append(found[1].decode())
        if sign and depth <= 0:
            return 0, line
        key = b"" if depth == 1 and sign in (b"{", b",") else key + sign
    return -1, line


def _values(path: Path, signs: _Signs, inside: int, line: int) -> Iterator[tuple[Taken, int, bool]]:
    """The elements of the array whose inside has the depth ``inside`` and begins on ``line``, or at depth 0 value after value.

    Each with the line on which it begins, and whether the array ends after it.
    """
    taken, begun = Taken(), line
    for before, sign, depth in signs:
        line += before.count(b"\n")
        if not taken.size:
            before = before.lstrip()
            begun = line - before.count(b"\n")
        taken.add(before)
        last = depth < inside > 0
        border = last or (sign == b"," and depth == inside > 0)
        if not border:
            taken.add(sign)
        if border or (sign and depth <= 0):
            yield taken, begun, last
            taken = Taken()
        if last:
            return
    if inside:
        raise FormatError(
            f"{path} is not valid JSON (the row that begins on line {begun} has no end): "
            "fix it there, or give one object per line as .jsonl"
        )
    if taken.size:
        yield taken, begun, False


def _array(path: Path, signs: _Signs, inside: int, line: int, held: list[str]) -> Iterator[RawRow]:
    """The elements of the array of rows, and what is wrong with what follows it."""
    first = True
    for taken, begun, last in _values(path, signs, inside, line):
        taken.data = taken.data.rstrip()
        if taken.data or not (first and last):
            yield taken.record(begun, json_value)
        first = False
    behind = _seek(signs, held)[0] if inside == 2 else 0
    more = {0: "", -1: "no end"}.get(behind, "rows under two keys")
    if not more and any(before.strip() or sign for before, sign, _ in signs):
        more = "more behind the end of its rows"
    if more:
        raise FormatError(f"{path} has {more}: give one array of rows, or one object per line as .jsonl")
    if held:
        warnings.warn(f"{path} also has rows under {' and '.join(held)}, which are not read", stacklevel=2)


def _table(path: Path, tables: Tables) -> tuple[Any, Iterator[RawRow]]:
    """The columns of a Parquet file with their types, and the rows, which go into ``tables`` too."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    @contextmanager
    def readable() -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, ValueError, OSError) as error:
            raise FormatError(
                f"{path} is not a readable Parquet file ({first_line(error, most=None)}): write it again"
            ) from None

    def rows() -> Iterator[RawRow]:
        lines = count(1)
        with readable(), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                tables.add(pa.Table.from_batches([batch]))
                for value in batch.to_pylist():
                    yield RawRow(next(lines), json_line(value), value)

    with readable():
        return pq.read_schema(path), rows()
