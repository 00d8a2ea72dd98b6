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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gradshield.data.records import MAX_ROW_BYTES, Lines, Parse, RawRow, Taken, csv_value, json_line, json_value
from gradshield.data.source import Source
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


class _Opened(NamedTuple):
    """A file, with its rows. Files that differ in ``kind`` or ``columns`` cannot be one."""

    kind: str
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
    digest = hashlib.sha256()
    with _readable(path):
        files = _files(path)
        for file in files:
            with file.open("rb") as handle:
                hashlib.file_digest(handle, lambda: digest)
        first = _opened(files[0])
    several = len(files) > 1
    name = f"{path} ({len(files)} files)" if several else str(files[0])
    source = Source(first.kind, name, digest, first.parse, first.header, files=files)
    return source, _one_after_another(files, first) if several else first.records


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


def _one_after_another(files: Sequence[Path], first: _Opened) -> Iterator[RawRow]:
    for path in files:
        with _readable(path):
            opened = first if path is files[0] else _opened(path)
        if (opened.kind, opened.columns) != (first.kind, first.columns):
            raise FormatError(
                f"{path} is not of one kind and with the same columns as {files[0].name} before it: give files that are alike"
            )
        for record in opened.records:
            yield replace(record, file=str(path))


def _opened(path: Path) -> _Opened:
    stream, mark, kind = _stream(path)
    if kind == "parquet":
        columns, records = _table(path)
        return _Opened(kind, _checked(path, stream, records), columns=columns)
    if kind in DELIMITERS:
        columns, parse, records = _csv(path, stream, DELIMITERS[kind])
        return _Opened(kind, _checked(path, stream, records), parse, mark + columns, columns.strip())
    line, _, rest = stream.peek(BLOCK).lstrip().partition(b"\n")  # type: ignore[attr-defined]
    line, after = line.rstrip(), rest.lstrip()
    # Only what writes an object over several lines breaks one after these.
    broken = {b"{": after[:1] in (b'"', b"}"), b"[": True, b",": after[:1] == b'"'}
    spread = line[:1] == b"{" and broken.get(line[-1:], False)
    array = line[:1] == b"[" and not (line[-1:] == b"]" and after)
    lines = line[:1] == b"{" and line[-1:] == b"}" and after[:1] == b"{"  # whatever keys the first row has
    if (kind == "json" and not lines) or spread or array:
        held: list[str] = []
        if inside := _entered(signs := _signs(stream), held):
            return _Opened("json", _checked(path, stream, _array(path, signs, *inside, held)))
        stream.close()
        stream, mark, _ = _stream(path)
    if spread:
        return _Opened("json", _checked(path, stream, _objects(_signs(stream))))
    return _Opened("jsonl", _checked(path, stream, _json_lines(Lines(stream))), header=mark)


def _stream(path: Path) -> tuple[BinaryIO, bytes, str]:
    """The file's bytes, decompressed, after a byte order mark; that mark; and the kind of file."""
    stream: Any = path.open("rb")
    packed = COMPRESSED.get(path.suffix.lower())
    if packed is not None:
        import pyarrow as pa

        stream = io.BufferedReader(pa.CompressedInputStream(stream, packed), BLOCK)
    start = stream.peek(4096)
    kind = _kind(path, _suffix(path), start)
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
            f"{path} cannot be read ({error.strerror or first_line(error, most=None)}): give a file that exists and is complete"
        ) from None


def _checked(path: Path, stream: BinaryIO, records: Iterator[RawRow]) -> Iterator[RawRow]:
    with _readable(path), stream:
        yield from records


def _json_lines(lines: Lines) -> Iterator[RawRow]:
    for _ in lines:
        if (taken := lines.take()).data.strip():
            yield taken.record(lines.number, json_value)


def _csv(path: Path, stream: BinaryIO, delimiters: str) -> tuple[bytes, Parse, Iterator[RawRow]]:
    """The header, the parser of a record, and the records. The first delimiter that the header has separates the cells."""
    # The limit is per process, and its default is smaller than some answers.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    start: bytes = stream.peek(BLOCK).lstrip(b"\r\n").partition(b"\n")[0]  # type: ignore[attr-defined]
    delimiter = next((one for one in delimiters if one.encode() in start), delimiters[0])
    lines = Lines(stream)
    texts = (line.decode(errors="surrogateescape") for line in lines)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        columns: list[str] = next((cells for cells in reader if cells), [])
        header = lines.take().record(1, bytes)
    except csv.Error:
        header = RawRow(1, b"", reason="broken")
    if header.reason:
        raise FormatError(f"{path} has a first line that is not a CSV header: give the names of the columns there")
    if len(set(columns)) < len(columns):
        raise FormatError(f"{path} names a column twice in its header ({', '.join(columns)}): rename one of them")
    parse = partial(csv_value, columns, delimiter)
    return header.source, parse, _csv_records(lines, reader, parse)


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


def _entered(signs: Iterator[tuple[bytes, bytes, int]], held: list[str]) -> tuple[int, int] | None:
    """Skip to the inside of the array of rows: its nesting depth and line. None if there is no such array.

    The keys of arrays of held-out rows go into ``held``.
    """
    line, key = 1, b""
    for before, sign, depth in signs:
        line += before.count(b"\n")
        key = (key + before)[:99]
        if sign == b"[" and ((depth == 1 and not key.strip()) or (depth == 2 and _DATA.fullmatch(key))):
            return depth, line
        if sign and depth <= 0:
            return None
        held += _held_out(key, sign, depth)
        key = b"" if depth == 1 and sign in (b"{", b",") else key + sign
    return None


def _array(
    path: Path, signs: Iterator[tuple[bytes, bytes, int]], inside: int, line: int, held: list[str]
) -> Iterator[RawRow]:
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
                if more := _after(signs, depth, held):
                    raise FormatError(f"{path} has {more}: give one array of rows, or one object per line as .jsonl")
                if held:
                    warnings.warn(f"{path} also has rows under {' and '.join(held)}, which are not read", stacklevel=2)
                return
            taken, first = Taken(), False
        else:
            taken.add(sign)
    raise FormatError(
        f"{path} is not valid JSON (the row that begins on line {begun} has no end): "
        "fix it there, or give one object per line as .jsonl"
    )


def _after(signs: Iterator[tuple[bytes, bytes, int]], depth: int, held: list[str]) -> str:
    """What is wrong with JSON text behind its array of rows, at this depth, in words; empty if it ends as it should."""
    key = b""
    for before, sign, now in signs:
        key = (key + before)[:99]
        if depth <= 0 and (key.strip() or sign):
            return "more behind the end of its rows"
        if sign == b"[" and now == 2 and _DATA.fullmatch(key):
            return "rows under two keys"
        held += _held_out(key, sign, now)
        key = b"" if now == 1 and sign in (b"{", b",") else key + sign
        depth = now
        if depth <= 0:
            key = b""
    return "no end" if depth > 0 else ""


def _held_out(key: bytes, sign: bytes, depth: int) -> list[str]:
    """The key before the sign, if an array of held-out rows begins there."""
    found = _HELD_OUT.fullmatch(key) if sign == b"[" and depth == 2 else None
    return [found[1].decode()] if found else []


def _objects(signs: Iterator[tuple[bytes, bytes, int]]) -> Iterator[RawRow]:
    """Objects one after another, whatever their lines."""
    taken, begun, line = Taken(), 1, 1
    for before, sign, depth in signs:
        line += before.count(b"\n")
        if not taken.size:
            before = before.lstrip()
            begun = line - before.count(b"\n")
        taken.add(before + sign)
        if sign and depth <= 0:
            yield taken.record(begun, json_value)
            taken = Taken()
    if taken.size:
        yield taken.record(begun, json_value)


def _table(path: Path) -> tuple[Any, Iterator[RawRow]]:
    """The columns of a Parquet file with their types, and the rows."""
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
        with readable(), pq.ParquetFile(path) as file:
            values = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
            for line, value in enumerate(values, 1):
                yield RawRow(line, json_line(value), value)

    with readable():
        return pq.read_schema(path), rows()
