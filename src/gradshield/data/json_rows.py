"""Rows of JSON lines, and of a JSON array with the exact text of each element."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradshield.data.records import BOM, MAX_ROW_BYTES, Line, Lines, Opened, Record, not_text, oversized, set_aside
from gradshield.errors import FormatError
from gradshield.types import Quarantined


def open_jsonl(path: Path) -> Opened:
    lines = Lines(path.open("rb"))
    first = lines.next()  # so that a byte order mark is known before the rows are
    return Opened("jsonl", str(path), _jsonl_records(first, lines), lines.hexdigest, lines.bom, parse=_line_value)


def _jsonl_records(first: Line | None, lines: Lines) -> Iterator[Record | Quarantined]:
    row = 0
    for line in _chain(first, lines):
        if not line.data.strip() and not line.sha256:
            continue
        yield _jsonl_record(row, line)
        row += 1


def _chain(first: Line | None, lines: Lines) -> Iterator[Line]:
    if first is not None:
        yield first
        yield from lines


def _jsonl_record(row: int, line: Line) -> Record | Quarantined:
    if line.sha256:
        return oversized(row, line.number, line.data, line.size, line.sha256)
    if reason := not_text(line.data):
        return set_aside(row, line.number, reason, line.data)
    try:
        return Record(row, line.number, line.data, _line_value(line.data), line.start)
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"it is not valid JSON ({error.msg} at column {error.colno})"
    except ValueError as error:  # a number of thousands of digits
        reason = f"it is not valid JSON ({str(error).split(';')[0]})"
    return set_aside(row, line.number, reason, line.data)


def _line_value(data: bytes) -> Any:
    return json.loads(data.decode())


def open_json(path: Path) -> Opened:
    raw = path.read_bytes()
    digest, mark = hashlib.sha256(raw).hexdigest(), BOM if raw.startswith(BOM) else b""
    # Bytes that are not UTF-8 spoil their own row, not the file: they pass as surrogates and are found again below.
    text = raw.removeprefix(BOM).decode(errors="surrogateescape")
    with _broken(path):
        start = _array_start(text, json.JSONDecoder(strict=False))
    if start is None:
        return open_jsonl(path)
    return Opened("json", str(path), _json_records(path, text, start, len(mark)), lambda: digest, parse=_element_value)


@contextmanager
def _broken(path: Path) -> Iterator[None]:
    """Raises FormatError for what is wrong with a JSON file as a whole."""
    try:
        yield
    except RecursionError:
        raise FormatError(f"{path} is JSON nested too deeply to read: give an array of plain objects") from None
    except json.JSONDecodeError as error:
        raise FormatError(
            f"{path} is not valid JSON ({error.msg} at line {error.lineno}, column {error.colno}): "
            "mend it there, or give one object per line as .jsonl"
        ) from None
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({str(error).split(';')[0]}): mend it") from None


def _element_value(data: bytes) -> Any:
    return json.JSONDecoder(strict=False).decode(data.decode())


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _expect(text: str, at: int, allowed: str) -> str:
    if at >= len(text) or text[at] not in allowed:
        raise json.JSONDecodeError(f"expected {' or '.join(allowed)}", text, at)
    return text[at]


def _array_start(text: str, decoder: json.JSONDecoder) -> int | None:
    """Index just after the ``[`` of the rows; None where the file is objects one after the other (JSON lines)."""
    at = _skip(text, 0)
    if _expect(text, at, "[{") == "[":
        return at + 1
    at = _skip(text, at + 1)
    while at < len(text) and text[at] == '"':
        key, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        _expect(text, at, ":")
        at = _skip(text, at + 1)
        if key == "data" and text[at : at + 1] == "[":
            return at + 1
        _, at = decoder.raw_decode(text, at)
        at = _skip(text, at)
        if _expect(text, at, ",}") == "}":
            break
        at = _skip(text, at + 1)
    return None


def _elements(text: str, at: int, decoder: json.JSONDecoder) -> Iterator[tuple[int, int, Any]]:
    """Start, end and value of each element of the array whose inside begins at ``at``."""
    at = _skip(text, at)
    if at < len(text) and text[at] == "]":
        return
    while True:
        value, end = decoder.raw_decode(text, at)
        yield at, end, value
        at = _skip(text, end)
        if _expect(text, at, ",]") == "]":
            return
        at = _skip(text, at + 1)


def _json_records(path: Path, text: str, inside: int, at: int) -> Iterator[Record | Quarantined]:
    """Elements of the array whose inside begins at the character ``inside``; ``at`` is the byte at which ``text`` begins."""
    line, counted, passed, row = 1, 0, 0, 0
    elements = _elements(text, inside, json.JSONDecoder(strict=False))
    while True:
        with _broken(path):
            found = next(elements, None)
        if found is None:
            return
        start, end, value = found
        line, counted = line + text.count("\n", counted, start), start
        at += len(text[passed:start].encode(errors="surrogateescape"))
        data = text[start:end].encode(errors="surrogateescape")
        if len(data) > MAX_ROW_BYTES:
            yield oversized(row, line, data, len(data), hashlib.sha256(data).hexdigest())
        elif reason := not_text(data):
            yield set_aside(row, line, reason, data)
        else:
            yield Record(row, line, data, value, at)
        at, passed, row = at + len(data), end, row + 1
