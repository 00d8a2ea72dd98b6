"""A row as it stands in the input, and lines of any length read in bounded memory.

Past ``MAX_ROW_BYTES`` only a line's head, size and hash are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from gradshield.types import Quarantined

MAX_ROW_BYTES = 8 << 20
HEAD_BYTES = 1 << 20  # what is held of a row that cannot be used
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One row as it stands in the input, parsed but not yet understood.

    ``line`` is 1-based; ``start`` is where the row begins in a file of text, in bytes.
    """

    row: int
    line: int
    source: bytes | Mapping[str, Any]
    value: Any
    start: int = 0


@dataclass(frozen=True)
class Oversized(Quarantined):
    """A row of which only the head is held, in ``source``; ``size`` and ``sha256`` are of the whole row."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Opened:
    """An input being read. ``sha256()`` is known only once ``records`` has run to its end.

    ``parse`` gives the value of a row's bytes, as ``records`` do; a table has no bytes.
    """

    kind: str
    name: str
    records: Iterator[Record | Quarantined]
    sha256: Callable[[], str]
    header: bytes = b""
    table: Any = None
    parse: Callable[[bytes], Any] | None = None


class Line(NamedTuple):
    """A line with its newline. Of a line that is too long: its head, and the SHA-256 of the whole.

    ``start`` is where it begins in the file. ``odd_quotes`` says whether a line that is too long has an odd number of ``"``,
    so opens or closes a quoted cell of a CSV.
    """

    number: int
    start: int
    data: bytes
    size: int
    sha256: str = ""
    odd_quotes: bool = False


class Lines:
    """The lines of a file, counted, hashed and bounded."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._digest = hashlib.sha256()
        self._mark = hashlib.sha256()
        self.bom = b""
        self._number = 0
        self._at = 0

    def hexdigest(self) -> str:
        return self._digest.hexdigest()

    def mark(self) -> None:
        """Begin the hash of what is read from here on, for a record of several lines."""
        self._mark = hashlib.sha256()

    def hexdigest_since_mark(self) -> str:
        return self._mark.hexdigest()

    def __iter__(self) -> Iterator[Line]:
        while line := self.next():
            yield line

    def next(self) -> Line | None:
        """The next line, None at the end of the file."""
        data = self._handle.readline(MAX_ROW_BYTES + 1)
        if not data:
            self._handle.close()
            return None
        self._hash(data)
        self._number += 1
        start, self._at = self._at, self._at + len(data)
        if self._number == 1 and data.startswith(BOM):
            self.bom, data, start = BOM, data[len(BOM) :], len(BOM)
        if len(data) <= MAX_ROW_BYTES or data.endswith(b"\n"):
            return Line(self._number, start, data, len(data))
        whole, size, head, quotes = hashlib.sha256(data), len(data), data[:HEAD_BYTES], data.count(b'"')
        while not data.endswith(b"\n") and (data := self._handle.readline(HEAD_BYTES)):
            self._hash(data)
            self._at += len(data)
            whole.update(data)
            size += len(data)
            quotes += data.count(b'"')
        return Line(self._number, start, head, size, whole.hexdigest(), quotes % 2 == 1)

    def _hash(self, data: bytes) -> None:
        self._digest.update(data)
        self._mark.update(data)


def set_aside(row: int, line: int, reason: str, data: bytes) -> Quarantined:
    """The record of a row that cannot be used, with its head alone where it is long: bad rows stay in memory."""
    if len(data) <= HEAD_BYTES:
        return Quarantined(row, line, reason, data)
    return Oversized(row, line, reason, data[:HEAD_BYTES], len(data), hashlib.sha256(data).hexdigest())


def oversized(row: int, line: int, head: bytes, size: int, sha256: str) -> Oversized:
    """The record of a row that is too long to be used."""
    reason = f"it has {size:,} bytes, more than the {MAX_ROW_BYTES:,} that a row may have"
    return Oversized(row, line, reason, head[:HEAD_BYTES], size, sha256)


def not_text(data: bytes) -> str | None:
    if b"\0" in data:
        return "it has NUL bytes"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1})"
    return None
