"""Any fine-tuning file to ``Example``s; rows that cannot be used are set aside with a reason, never dropped silently.

    result = read("data.jsonl")
    result.examples, result.quarantined, result.source

The shape of each row is told by its keys (``shapes``); ``format`` overrides.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.columns import Coded, Ids
from gradshield.data.canonical import canonical, raw
from gradshield.data.files import SUFFIXES, open_file
from gradshield.data.hub import load_dataset
from gradshield.data.records import Opened, Record, set_aside
from gradshield.data.shapes import SHAPES, RowError, detect, shape_keys
from gradshield.data.source import Examples, Source, content_hash, with_text
from gradshield.errors import DataError, EmptyDataError, FormatError
from gradshield.types import Quarantined

OTHER_FILES = (".txt", ".tsv", ".xlsx", ".gz", ".zip")  # kinds of file that cannot be read, and that people try


@dataclass(frozen=True, eq=False)
class ReadResult:
    """Good rows, which are read again when they are asked for, and bad rows, each in the order of the input."""

    examples: Examples
    quarantined: tuple[Quarantined, ...]
    source: Source


def read(
    data: Any,
    format: str | None = None,
    strict: bool = False,
    text_field: str = "text",
) -> ReadResult:
    """Read a path, a hub name, a ``datasets.Dataset`` or a list of dicts.

    Parameters
    ----------
    format
        Name of a shape in ``SHAPES`` that every row is read as; None tells each row's shape by its keys.
    strict
        Raise on the first row that cannot be used, instead of setting it aside.
    text_field
        Column of plain text, where it is not ``text``.

    Raises
    ------
    UnknownNameError
        No such format.
    FormatError
        A kind of file or of rows that is not known, or a row that fits two shapes.
    EmptyDataError
        No row, or none that can be used.
    DataError
        A file that cannot be read, or a hub name that cannot be fetched; with ``strict``, a row that cannot be used.
    """
    if format is not None:
        SHAPES[format]  # an unknown name is told before the file is read
    opened = _open(data)
    good = _Good(opened.parse is not None)
    quarantined: list[Quarantined] = []
    strangers = 0
    for record in opened.records:
        good.stands(record)
        bad = record if isinstance(record, Quarantined) else None
        if isinstance(record, Record):
            try:
                good.add(record.row, *_understood(record, format, opened.name, text_field))
            except _UnknownShape as error:
                strangers += 1
                bad = _set_aside(record, str(error))
            except RowError as error:
                bad = _set_aside(record, str(error))
        if bad is not None:
            if strict:
                raise DataError(_strict_message(opened.name, bad))
            quarantined.append(bad)
    if not good.rows:
        raise _nothing_usable(opened.name, quarantined, strangers)
    return good.read(opened, quarantined, text_field)


class _Good:
    """What is kept of good rows as they go by: a number or two in every column."""

    def __init__(self, placed: bool) -> None:
        self.rows, self._digests, self._shapes = array("I"), array("Q"), array("B")
        self._weighted, self._lines = array("B"), array("I")
        self._starts, self._sizes = array("Q"), array("I")
        self._placed = placed
        self._names = SHAPES.names()

    def stands(self, record: Record | Quarantined) -> None:
        """Where a row stands, be it good or bad."""
        self._lines.append(record.line)
        if self._placed:
            self._starts.append(record.start if isinstance(record, Record) else 0)
            self._sizes.append(len(record.source) if isinstance(record, Record) else 0)

    def add(self, row: int, digest: int, shape: str, weighted: bool) -> None:
        """A row that can be used."""
        self.rows.append(row)
        self._digests.append(digest)
        self._shapes.append(self._names.index(shape))
        self._weighted.append(weighted)

    def read(self, opened: Opened, quarantined: Sequence[Quarantined], text_field: str) -> ReadResult:
        """All of it, once the input has been read to its end."""
        source = Source(
            kind=opened.kind,
            name=opened.name,
            sha256=opened.sha256(),
            rows=len(self._lines),
            header=opened.header,
            table=opened.table,
            lines=self._lines,
            starts=self._starts,
            sizes=self._sizes,
            parse=opened.parse,
        )
        examples = Examples(
            source,
            np.frombuffer(self.rows, np.uint32),
            Ids.counted(np.frombuffer(self._digests, np.uint64)),
            Coded(np.frombuffer(self._shapes, np.uint8), self._names),
            np.frombuffer(self._weighted, np.bool_),
            text_field,
        )
        return ReadResult(examples, tuple(quarantined), source)


class _UnknownShape(RowError):
    """The keys of the row fit no shape, or not the one asked for."""


def _understood(record: Record, format: str | None, name: str, text_field: str) -> tuple[int, str, bool]:
    """The hash of a row's content, its shape, and whether some answer in it does not count. Raises RowError."""
    value = record.value
    if not isinstance(value, Mapping):
        raise RowError(f"it is not an object with keys but {_article(value)}")
    content = canonical(value)
    value = with_text(value, text_field)
    shape = format or _detected(record, value, name)
    if not SHAPES[shape].fits(value):
        raise _UnknownShape(f"it lacks {' or '.join(SHAPES[shape].keys)}, the keys of the format {shape}")
    try:
        conversations = SHAPES[shape].convert(value)
    except RecursionError:
        raise RowError("it is nested too deeply") from None
    weighted = any(
        message["role"] == "assistant" and not trained
        for conversation in conversations
        for message, trained in zip(conversation.messages or (), conversation.trained, strict=False)
    )
    return content_hash(content), shape, weighted


def _detected(record: Record, row: Mapping[str, Any], name: str) -> str:
    shapes = detect(row)
    if len(shapes) == 1:
        return shapes[0]
    if not shapes:
        raise _UnknownShape(f"its keys ({_keys(row)}) fit no known format")
    raise FormatError(
        f"row {record.row} (line {record.line}) of {name} fits {len(shapes)} formats, {' and '.join(shapes)}: "
        f"pass --format with the one that is meant ({' or '.join(shapes)}), or leave out the keys of the other"
    )


def _set_aside(record: Record, reason: str) -> Quarantined:
    return set_aside(record.row, record.line, reason, raw(record.source))


def _strict_message(name: str, bad: Quarantined) -> str:
    return (
        f"line {bad.line} of {name} cannot be used, {bad.reason}: mend it, or read without strict "
        "(--strict) to set such rows aside"
    )


def _nothing_usable(name: str, quarantined: Sequence[Quarantined], strangers: int) -> DataError:
    if not quarantined:
        return EmptyDataError(f"{name} has no rows: give a file with at least one")
    first = quarantined[0]
    if strangers:
        return FormatError(
            f"no row of {name} can be used, line {first.line}: {first.reason}; "
            f"known formats and their keys are {shape_keys()}; rename the columns to those of one"
        )
    return EmptyDataError(
        f"none of the {len(quarantined)} rows of {name} can be used, line {first.line}: {first.reason}; mend the file"
    )


def _keys(row: Mapping[str, Any]) -> str:
    keys = [str(key)[:40] for key in row][:8]
    return ", ".join(keys) + (", …" if len(row) > len(keys) else "") if keys else "none"


def _article(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), f"a {type(value).__name__}")


def _open(data: Any) -> Opened:
    """What the user gave, as records. Raises what ``read`` documents."""
    if isinstance(data, Path):
        return open_file(data)
    if isinstance(data, str):
        path = Path(data)
        if _exists(path) or not may_be_hub_name(data):
            return open_file(path)
        return _open_rows(load_dataset(data), "dataset", data)
    # Told by its module, since importing datasets to ask takes seconds.
    module, kind = type(data).__module__.partition(".")[0], type(data).__name__
    if module == "datasets" and kind == "Dataset":
        return _open_rows(data.with_format(None), "dataset", "the dataset")
    if module == "datasets" or isinstance(data, Mapping):
        raise FormatError(f"the data is a {kind}, not a table of rows: give one split, as a Dataset or a list of rows")
    if isinstance(data, Sequence) and not isinstance(data, bytes | bytearray):
        return _open_rows(data, "list", "the list")
    raise FormatError(f"the data is a {kind}: give a path, a hub name, a datasets.Dataset or a list of dicts")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for a path, or with a NUL in it
        return False


def may_be_hub_name(name: str) -> bool:
    """Whether a string that is no path here reads as ``dataset`` or ``owner/dataset``, and not as a file that is missing."""
    parts = name.split("/")
    known = Path(name).suffix.lower() in (*SUFFIXES, *OTHER_FILES)
    return not known and len(parts) <= 2 and all(part and part[0].isalnum() and "\\" not in part for part in parts)


def _open_rows(rows: Any, kind: str, name: str) -> Opened:
    digest = hashlib.sha256()

    def records() -> Iterator[Record | Quarantined]:
        for row, value in enumerate(rows):
            try:
                content = canonical(value)
            except RowError:
                content = repr(value).encode(errors="backslashreplace")
            digest.update(content + b"\n")
            if isinstance(value, Mapping):
                yield Record(row, row + 1, value, value)
            else:
                reason = f"it is not an object with keys but {_article(value)}"
                yield set_aside(row, row + 1, reason, repr(value).encode(errors="backslashreplace"))

    return Opened(kind, name, records(), digest.hexdigest, table=rows)
