"""The rows of the input: the bytes of each, what they say, a copy on disk, examples made of it, and files written of it.

Of a row longer than ``MAX_ROW_BYTES`` only the head, the size and the hash are kept. A row takes about 30 bytes in memory: its
offset in the copy, its line, a hash of its content and its shape.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gradshield.columns import Coded, Ids, OnDemand
from gradshield.data.messages import RowError, parsed
from gradshield.data.shapes import Format
from gradshield.data.spool import Scratch, Tables
from gradshield.errors import DataError
from gradshield.files import replacing
from gradshield.types import Bools, Example, Ints, Quarantined

MAX_ROW_BYTES = 8 << 20
HEAD_BYTES = 1 << 20  # kept of a row that cannot be used
# CSV columns that never hold plain text, so that JSON in them is parsed.
JSON_COLUMNS = ("messages", "conversations", "tools", "chat_template_kwargs")

GROUP = 1 << 14  # rows of a Parquet file written at once
WRITTEN = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

Parse = Callable[[str], Any]


@dataclass(frozen=True)
class RawRow:
    """One row of the input, parsed but not yet converted, or the ``reason`` why it cannot be parsed.

    ``line`` is 1-based. If ``source`` is only the head of a longer row, ``whole`` has the size and SHA-256 of all of it.
    ``file`` is the path of the row's file if there are several.
    """

    line: int
    source: bytes
    value: Any = None
    reason: str = ""
    whole: tuple[int, str] | None = None
    file: str = ""

    def set_aside(self, row: int, reason: str = "") -> Quarantined:
        """The row as quarantined, only its head if it is long, since quarantined rows stay in memory."""
        size, sha256 = self.whole or (len(self.source), hashlib.sha256(self.source).hexdigest())
        reason = (reason or self.reason) + (f" (in {Path(self.file).name})" if self.file else "")
        return Quarantined(row, self.line, reason, self.source[:HEAD_BYTES], size, sha256)


class Taken:
    """Collects the bytes of one row; of too long a row only the head, the size and the hash."""

    def __init__(self) -> None:
        self.data, self.size = bytearray(), 0
        self._digest: Any = None

    def add(self, data: bytes) -> None:
        self.size += len(data)
        if self._digest is not None:
            self._digest.update(data)
            return
        self.data += data
        if len(self.data) - self.data.endswith(b"\n") > MAX_ROW_BYTES:
            self._digest = hashlib.sha256(self.data)
            del self.data[HEAD_BYTES:]

    def record(self, line: int, parse: Parse) -> RawRow:
        """The collected row. ``parse`` gives its value, or raises RowError."""
        data = bytes(self.data)
        if self._digest is not None:
            reason = f"it has {self.size:,} bytes, more than the {MAX_ROW_BYTES:,} that a row may have"
            return RawRow(line, data, reason=reason, whole=(self.size, self._digest.hexdigest()))
        try:
            return RawRow(line, data, parse(_text(data)))
        except RowError as error:
            return RawRow(line, data, reason=str(error))


class Lines:
    """The lines of a stream, counted and bounded; ``take`` returns the bytes read since its last call."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._taken, self.number = stream, Taken(), 0

    def take(self) -> Taken:
        """The lines read since the last call, as one row."""
        taken, self._taken = self._taken, Taken()
        return taken

    def __iter__(self) -> Iterator[bytes]:
        """Each line; one that is too long is replaced by a line with the same effect on CSV quoting."""
        while data := self._stream.readline(MAX_ROW_BYTES + 1):
            self.number += 1
            self._taken.add(data)
            if len(data) > MAX_ROW_BYTES and not data.endswith(b"\n"):
                quotes = data.count(b'"')
                while not data.endswith(b"\n") and (data := self._stream.readline(HEAD_BYTES)):
                    self._taken.add(data)
                    quotes += data.count(b'"')
                data = b'"\n' if quotes % 2 else b"\n"
            yield data


def _text(data: bytes) -> str:
    """Raises RowError for bytes that are not text."""
    if b"\0" in data:
        raise RowError("it has NUL bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RowError(f"it is not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1})") from None


def json_value(text: str) -> Any:
    """The value of a row of JSON. Raises RowError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise RowError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RowError(f"it is not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except ValueError as error:  # a number with thousands of digits
        raise RowError(f"it is not valid JSON ({str(error).split(';')[0]})") from None


def csv_value(columns: Sequence[str], delimiter: str, text: str) -> dict[str, Any]:
    """The value of one CSV record, every cell as text except JSON columns. Raises RowError."""
    try:
        (cells,) = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise RowError(f"it is not valid CSV ({error})") from None
    if len(cells) != len(columns):
        raise RowError(f"it has {len(cells)} cells where the header names {len(columns)} columns")
    row: dict[str, Any] = dict(zip(columns, cells, strict=True))
    return row | {name: parsed(row[name] or None) for name in JSON_COLUMNS if name in row}


_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # the backslash is not itself escaped
ID_LENGTH = 16  # hex digits: 64 bits, so that a million rows collide with probability 3e-8


def canonical(row: Any) -> bytes:
    """The row as JSON in UTF-8 with sorted keys. Raises RowError if some of it is not text."""
    try:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
        content = text.encode()
    except UnicodeEncodeError:
        raise RowError("it holds half of a surrogate pair, which is not text") from None
    except RecursionError:
        raise RowError("it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RowError(f"it cannot be written as JSON ({error})") from None
    if _NUL.search(text):
        raise RowError("it has NUL characters")
    return content


def json_line(row: Mapping[str, Any]) -> bytes:
    """The row as one line of JSON in its own key order, for rows that were not bytes."""
    return json.dumps(row, ensure_ascii=False, default=_plain).encode(errors="backslashreplace") + b"\n"


def _plain(value: Any) -> Any:
    """Values that JSON lacks: mappings, arrays, dates, bytes."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.hex() if isinstance(value, bytes) else str(value)


@dataclass(frozen=True, eq=False)
class Source:
    """The source of the rows, with everything needed to write some of them unchanged.

    ``kind`` is ``jsonl``, ``json``, ``csv``, ``tsv``, ``parquet``, ``dataset`` or ``list``. ``digest`` is the SHA-256 of the
    bytes of its ``files``, or without files of the rows' canonical JSON. ``parse`` gives the value of a row's text; ``header``
    is the byte order mark and a CSV's first line; ``table`` is the ``Dataset`` or the list. Reading fills ``lines`` with the line
    of each row, ``copy`` with the bytes of the usable ones (of a table, as a line of JSON), ``tables`` with the rows of Parquet
    files, ``starts`` with the first row and the path of each of several files, and ``read_as`` with how many rows were read in
    which way: the shape, and where there was a choice, what was chosen. ``own`` gives the positions in the files of rows that go
    by others (`Examples.moved`).
    """

    kind: str
    name: str
    digest: Any = field(repr=False)
    parse: Parse = field(default=json_value, repr=False)
    header: bytes = b""
    table: Any = field(default=None, repr=False)
    files: tuple[Path, ...] = ()
    lines: array[int] = field(default_factory=lambda: array("I"), repr=False)
    copy: Scratch[bytes] = field(default_factory=Scratch, repr=False)
    tables: Tables = field(default_factory=Tables, repr=False)
    starts: list[tuple[int, str]] = field(default_factory=list, repr=False)
    read_as: Counter[str] = field(default_factory=Counter, repr=False)
    own: Ints | None = field(default=None, repr=False)

    def places(self, rows: NDArray[Any]) -> tuple[Ints, Coded]:
        """Of each of some rows the line on which it begins, and its file, empty where there is none: (n,) each."""
        starts = self.starts or [(0, self.name if self.files else "")]
        own = np.searchsorted([first for first, _ in starts], rows, side="right") - 1
        return np.asarray(self.lines, dtype=np.int64)[rows], Coded(own, [name for _, name in starts])

    @property
    def sha256(self) -> str:
        return str(self.digest.hexdigest())

    @property
    def rows(self) -> int:
        """The number of rows, quarantined ones included."""
        return len(self.lines)

    def raw(self, rows: Iterable[int]) -> Iterator[bytes]:
        """The unchanged bytes of some usable rows."""
        return (self.copy[int(row if self.own is None else self.own[row])] for row in rows)

    def picked(self, rows: Ints) -> Any:
        """Some rows of Parquet files as one Arrow table."""
        return self.tables.rows(rows if self.own is None else self.own[rows])


class Examples(OnDemand[Example]):
    """The usable rows of a source, in order, each made on access.

    ``rows`` are their input positions, ``ids`` and ``shapes`` as in `Example`; ``as_trl`` marks rows that TRL reads alike, and
    ``format`` is what they were read with.
    """

    def __init__(
        self, source: Source, rows: NDArray[np.uint32], ids: Ids, shapes: Coded, as_trl: Bools, format: Format
    ) -> None:
        self.source, self.rows, self.ids, self.shapes, self.as_trl = source, rows, ids, shapes, as_trl
        self.format = format

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, rows: Ints) -> Iterator[Example]:
        """The rows at these positions in the input."""
        return (self[int(place)] for place in np.searchsorted(self.rows, rows))

    def moved(self, positions: Ints) -> Examples:
        """The same rows at other positions (n,), those that they had in the file that they come from."""
        order, own = np.argsort(positions), np.zeros(int(positions.max()) + 1, np.int64)
        own[positions] = self.rows
        rows = positions[order].astype(np.uint32)
        source = replace(self.source, own=own)
        return Examples(source, rows, self.ids.take(order), self.shapes.take(order), self.as_trl[order], self.format)

    def _at(self, index: int) -> Example:
        row, shape = int(self.rows[index]), self.shapes[index]
        (raw,) = self.source.raw([row])
        value = self.source.parse(raw.decode())
        return Example(row, self.ids[index], shape, raw, self.format.decide(value, shape).convert(value))


def content_hash(content: bytes) -> int:
    """The integer behind a row's id."""
    return int.from_bytes(hashlib.sha256(content).digest()[: ID_LENGTH // 2])


def suffix(kind: str) -> str:
    """Suffix of the output files for this kind of input: a ``Dataset`` or a list becomes JSON lines."""
    return f".{kind}" if f".{kind}" in WRITTEN else ".jsonl"


def write_parts(parts: Mapping[Path, Sequence[int] | Ints], source: Source) -> None:
    """Write rows by their increasing positions, each file in the kind they came in (`suffix`); none replaces an older one before
    all are complete.

    A newline is added only after a row that ended the input without one and is not the last here. Raises DataError if a file
    cannot be written; existing files are then left unchanged.
    """
    with ExitStack() as stack:
        for path, rows in parts.items():
            part, places = stack.enter_context(_replacing(path)), np.asarray(rows, dtype=np.int64)
            if source.kind == "parquet":
                _write_table(part, source, places)
            else:
                with part.open("wb") as handle:
                    handle.writelines(_chunks(source.raw(places), source, len(places)))


def take(rows: Sequence[int] | Ints, source: Source) -> Any:
    """Some rows as Python objects: ``Dataset.select`` of a ``Dataset``, else a list of the rows."""
    if source.kind == "dataset":
        return source.table.select(rows)
    if source.kind == "list":
        return [source.table[row] for row in rows]
    return [source.parse(raw.decode()) for raw in source.raw(rows)]


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


def _write_table(part: Path, source: Source, rows: Ints) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(part, source.tables[0].schema) as writer:
        for start in range(0, len(rows), GROUP):
            writer.write_table(source.picked(rows[start : start + GROUP]))


def _chunks(rows: Iterable[bytes], source: Source, count: int) -> Iterator[bytes]:
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
