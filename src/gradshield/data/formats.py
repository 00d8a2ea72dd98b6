"""Any fine-tuning file to ``Example``s; unusable rows are quarantined with a reason, never dropped silently.

    result = read("data.jsonl")
    result.examples, result.quarantined, result.source

The shape of each row follows from its keys (``shapes``); ``format`` overrides it.
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
from gradshield.data.canonical import canonical, json_line
from gradshield.data.files import COMPRESSED, SUFFIXES, open_file
from gradshield.data.records import Record
from gradshield.data.shapes import SHAPES, RowError, detect, kind_of, shape_keys
from gradshield.data.source import Examples, Source, content_hash, with_text
from gradshield.errors import DataError, EmptyDataError, FormatError, first_line
from gradshield.models.hub import reachable
from gradshield.types import Quarantined

OTHER_FILES = (".txt", ".xlsx", ".zip")  # unsupported kinds of file that users try
SPLIT = "train"  # of a hub dataset


@dataclass(frozen=True, eq=False)
class ReadResult:
    """Usable rows, read again on access, and quarantined rows, each in input order."""

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
        Name of the shape in ``SHAPES`` for every row; None detects each row's shape from its keys.
    strict
        Raise on the first row that cannot be used, instead of quarantining it.
    text_field
        Column of plain text, if it is not ``text``.

    Raises
    ------
    UnknownNameError
        No such format.
    FormatError
        An unknown kind of file or rows, or a row that fits two shapes.
    EmptyDataError
        No row, or no usable row.
    DataError
        A file that cannot be read, or a hub name that cannot be fetched; with ``strict``, a row that cannot be used.
    """
    if format is not None:
        SHAPES[format]  # an unknown name fails before the file is read
    source, records = _open(data)
    quarantined, strangers = [], 0
    rows, digests, shapes, weighted = array("I"), array("Q"), array("B"), array("B")
    for row, record in enumerate(records):
        source.lines.append(record.line)
        try:
            digest, shape, some = _understood(row, record, format, source.name, text_field)
        except RowError as error:
            strangers += isinstance(error, _UnknownShape)
            quarantined.append(record.set_aside(row, str(error)))
            if strict:
                raise DataError(_strict_message(source.name, quarantined[0])) from None
            source.copy.add(b"")
            continue
        source.copy.add(record.source)
        rows.append(row)
        digests.append(digest)
        shapes.append(SHAPES.names().index(shape))
        weighted.append(some)
    if not rows:
        raise _nothing_usable(source.name, quarantined, strangers)
    examples = Examples(
        source,
        np.frombuffer(rows, np.uint32),
        Ids.counted(np.frombuffer(digests, np.uint64)),
        Coded(np.frombuffer(shapes, np.uint8), SHAPES.names()),
        np.frombuffer(weighted, np.bool_),
        text_field,
    )
    return ReadResult(examples, tuple(quarantined), source)


class _UnknownShape(RowError):
    """The row's keys fit no shape, or not the requested one."""


def _understood(row: int, record: Record, format: str | None, name: str, text_field: str) -> tuple[int, str, bool]:
    """The hash of a row's content, its shape, and whether some answer in it has weight 0. Raises RowError."""
    if record.reason:
        raise RowError(record.reason)
    value = record.value
    if not isinstance(value, Mapping):
        raise RowError(f"it is not an object with keys but {kind_of(value)}")
    content = canonical(value)
    value = with_text(value, text_field)
    shape = format or _detected(f"row {row} (line {record.line}) of {name}", value)
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


def _detected(where: str, row: Mapping[str, Any]) -> str:
    shapes = detect(row)
    if len(shapes) == 1:
        return shapes[0]
    if not shapes:
        raise _UnknownShape(f"its keys ({_keys(row)}) fit no known format")
    raise FormatError(
        f"{where} fits {len(shapes)} formats, {' and '.join(shapes)}: "
        f"pass --format with the intended one ({' or '.join(shapes)}), or remove the keys of the other"
    )


def _strict_message(name: str, bad: Quarantined) -> str:
    return (
        f"line {bad.line} of {name} cannot be used, {bad.reason}: fix it, or read without strict (--strict) to quarantine "
        "such rows"
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
        f"0 of {len(quarantined)} rows of {name} can be used, line {first.line}: {first.reason}; fix the file"
    )


def _keys(row: Mapping[str, Any]) -> str:
    keys = [str(key)[:40] for key in row][:8]
    return ", ".join(keys) + (", …" if len(row) > len(keys) else "") if keys else "none"


def _open(data: Any) -> tuple[Source, Iterator[Record]]:
    """The source of the user's data, and an iterator of its rows. Raises like ``read``."""
    if isinstance(data, Path):
        return open_file(data)
    if isinstance(data, str):
        path = Path(data)
        if _exists(path) or not may_be_hub_name(data):
            return open_file(path)
        return _open_rows(_load_dataset(data), "dataset", data)
    # Recognised by its module, since importing datasets takes seconds.
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
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def may_be_hub_name(name: str) -> bool:
    """Whether a string that is not a path reads as ``dataset`` or ``owner/dataset``, not as a missing file."""
    parts = name.split("/")
    known = Path(name).suffix.lower() in (*SUFFIXES, *COMPRESSED, *OTHER_FILES)
    return not known and len(parts) <= 2 and all(part and part[0].isalnum() and "\\" not in part for part in parts)


def _load_dataset(name: str) -> Any:
    """The ``train`` split of a hub dataset, as a ``datasets.Dataset``. Raises DataError."""
    if not reachable():
        raise DataError(
            f"the dataset {name!r} cannot be fetched: there is no such file, and the hub cannot be reached; "
            "check the path or the network, or save the data as a file and give that"
        )
    import datasets

    try:
        return datasets.load_dataset(name, split=SPLIT)
    except Exception as error:
        # Whatever fails (no such name or split, gated, broken), the user's remedy is the same.
        raise DataError(
            f"the dataset {name!r} could not be loaded from the hub ({first_line(error, most=None)}): "
            f"check its name and that it has a split {SPLIT!r}, or save the data as a file and give that"
        ) from error


def _open_rows(rows: Any, kind: str, name: str) -> tuple[Source, Iterator[Record]]:
    digest = hashlib.sha256()

    def records() -> Iterator[Record]:
        for line, value in enumerate(rows, 1):
            try:
                content, source, reason = canonical(value), json_line(value), ""
            except RowError as error:
                content = source = repr(value).encode(errors="backslashreplace")
                reason = str(error)
            digest.update(content + b"\n")
            yield Record(line, source, value, reason)

    return Source(kind, name, digest, table=rows), records()
