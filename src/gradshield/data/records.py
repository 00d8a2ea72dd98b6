"""A row's bytes in the input, with rows of any length in bounded memory, and the canonical bytes that its id is the hash of.

Of a row longer than ``MAX_ROW_BYTES`` only the head, the size and the hash are kept.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gradshield.data.messages import RowError
from gradshield.types import Quarantined

MAX_ROW_BYTES = 8 << 20
HEAD_BYTES = 1 << 20  # kept of a row that cannot be used
# CSV columns that never hold plain text, so that JSON in them is parsed.
JSON_COLUMNS = ("messages", "conversations", "tools", "chat_template_kwargs")

Parse = Callable[[bytes], Any]


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
            return RawRow(line, data, _text_only(data) and parse(data))
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


def json_value(data: bytes) -> Any:
    """The value of a row of JSON. Raises RowError."""
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise RowError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RowError(f"it is not valid JSON ({error.msg} at character {error.pos + 1})") from None
    except ValueError as error:  # a number with thousands of digits
        raise RowError(f"it is not valid JSON ({str(error).split(';')[0]})") from None


def csv_value(columns: Sequence[str], delimiter: str, data: bytes) -> dict[str, Any]:
    """The value of one CSV record, every cell as text except JSON columns. Raises RowError."""
    try:
        (cells,) = csv.reader(io.StringIO(data.decode()), delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise RowError(f"it is not valid CSV ({error})") from None
    if len(cells) != len(columns):
        raise RowError(f"it has {len(cells)} cells where the header names {len(columns)} columns")
    return {name: _cell(name, text) for name, text in zip(columns, cells, strict=True)}


def _cell(column: str, text: str) -> Any:
    if column not in JSON_COLUMNS:
        return text
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return text


def _text_only(data: bytes) -> bool:
    """True; raises RowError for bytes that are not text."""
    if b"\0" in data:
        raise RowError("it has NUL bytes")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise RowError(f"it is not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1})") from None
    return True


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
