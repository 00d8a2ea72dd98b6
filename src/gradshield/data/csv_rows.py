"""Records of a CSV with the exact bytes of each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gradshield.data.records import MAX_ROW_BYTES, Line, Lines, Opened, Record, not_text, oversized, set_aside
from gradshield.errors import FormatError
from gradshield.types import Quarantined

# Cells that never hold plain text, so that a JSON text in them is meant as JSON.
JSON_COLUMNS = ("messages", "conversations", "tools", "chat_template_kwargs")


class _CSVRecords:
    """Records of a CSV with the exact bytes of each: the lines that the ``csv`` reader took to complete it."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._taken: list[Line] = []
        # The limit is one per process, and its default is smaller than an answer may be.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        self._reader = csv.reader(self._feed(), strict=True)

    def _feed(self) -> Iterator[str]:
        while line := self._lines.next():
            self._taken.append(line)
            if line.sha256:
                # It spoils its record whatever it says; what keeps the reader in step is whether it changes quoting.
                yield '"\n' if line.odd_quotes else "\n"
            else:
                yield line.data.decode(errors="surrogateescape")

    def digest(self) -> str:
        """SHA-256 of the record that ``next`` gave last, also of the parts of it that were not kept."""
        return self._lines.hexdigest_since_mark()

    def next(self) -> tuple[list[str], list[Line], str | None] | None:
        """Cells, lines and what is wrong; None at the end. A blank line has no cells."""
        self._taken = []
        self._lines.mark()
        try:
            cells, reason = next(self._reader), None
        except StopIteration:
            return None
        except csv.Error as error:
            cells, reason = [], f"it is not valid CSV ({error})"
        return cells, self._taken, reason


def open_csv(path: Path) -> Opened:
    lines = Lines(path.open("rb"))
    records = _CSVRecords(lines)
    header: list[str] = []
    taken: list[Line] = []
    while not header:
        found = records.next()
        if found is None:
            break
        header, taken, reason = found
        if reason or any(line.sha256 or not_text(line.data) for line in taken):
            raise FormatError(f"{path} has a first line that is not a CSV header: give the names of the columns there")
    if len(set(header)) < len(header):
        raise FormatError(f"{path} names a column twice in its header ({', '.join(header)}): rename one of them")
    raw = b"".join(line.data for line in taken)
    parse = partial(_record_value, header)
    return Opened("csv", str(path), _csv_records(records, header), lines.hexdigest, lines.bom + raw, parse=parse)


def _csv_records(records: _CSVRecords, header: list[str]) -> Iterator[Record | Quarantined]:
    row = 0
    while found := records.next():
        cells, taken, reason = found
        data = b"".join(line.data for line in taken)
        if not cells and not reason and not data.strip():
            continue
        size = sum(line.size for line in taken)
        if size > MAX_ROW_BYTES:
            yield oversized(row, taken[0].number, data, size, records.digest())
        else:
            yield _csv_record(row, taken[0], cells, data, reason, header)
        row += 1


def _csv_record(
    row: int, first: Line, cells: list[str], data: bytes, reason: str | None, header: list[str]
) -> Record | Quarantined:
    reason = not_text(data) or reason
    if reason is None and len(cells) != len(header):
        reason = f"it has {len(cells)} cells where the header names {len(header)} columns"
    if reason is not None:
        return set_aside(row, first.number, reason, data)
    return Record(row, first.number, data, _named(header, cells), first.start)


def _named(header: list[str], cells: list[str]) -> dict[str, Any]:
    return {name: _cell(name, text) for name, text in zip(header, cells, strict=True)}


def _record_value(header: list[str], data: bytes) -> dict[str, Any]:
    """The value of a record by itself. Raises ValueError where it is none of as many cells as the header names."""
    try:
        (cells,) = csv.reader(io.StringIO(data.decode()), strict=True)
    except csv.Error as error:
        raise ValueError(str(error)) from None
    return _named(header, cells)


def _cell(column: str, text: str) -> Any:
    if column not in JSON_COLUMNS:
        return text
    if not text:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
