"""Any fine-tuning file to ``Example``s; unusable rows are quarantined with a reason, never dropped silently.

    result = read("data.jsonl")
    result.examples, result.quarantined, result.source

The shape of each row follows from its keys (``shapes``); a `Format` overrides it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import Any

import numpy as np

from gradshield.columns import Coded, Ids
from gradshield.data.messages import RowError, kind_of
from gradshield.data.raw_files import COMPRESSED, SUFFIXES, open_file, open_files
from gradshield.data.shapes import SHAPES, Decided, Format, as_trl, shape_keys
from gradshield.data.source import Examples, RawRow, Source, canonical, content_hash, json_line
from gradshield.errors import DataError, EmptyDataError, FormatError, first_line
from gradshield.models.loading import reachable
from gradshield.types import Quarantined

OTHER_FILES = (".txt", ".xlsx", ".zip")  # unsupported kinds of file that users try
SPLIT = "train"  # of a dataset
SAVED = ("state.json", "dataset_dict.json")  # in a folder that save_to_disk wrote


@dataclass(frozen=True, eq=False)
class ReadResult:
    """Usable rows, read again on access, and quarantined rows, each in input order.

    ``unseen`` are columns of the format that no row has.
    """

    examples: Examples
    quarantined: tuple[Quarantined, ...]
    source: Source
    unseen: frozenset[str] = frozenset()


def read(data: Any, format: str | Format | None = None) -> ReadResult:
    """Read a path, a hub name, a table or a list of dicts.

    ``data`` is a file, a folder of files or a pattern; a dataset's folder (``save_to_disk``) or hub name; a ``Dataset``, a
    pandas, polars or Arrow table, or a list of dicts. ``format`` is how rows are read: a `Format`, or the name of a shape in
    ``SHAPES`` for every row; None detects each row's shape.

    Raises UnknownNameError for no such format; FormatError for an unknown kind of file or rows; EmptyDataError for no row or no
    usable row; DataError for a file that cannot be read, a hub name that cannot be fetched and, if ``format`` is strict, a row
    that cannot be used.
    """
    return _usable(*_open(data), Format.of(format))


def read_files(files: tuple[Path, ...], format: Format) -> ReadResult:
    """As `read`, some files as one, in the order given."""
    return _usable(*open_files(files, str(files[0].parent)), format)


def _usable(source: Source, records: Iterator[RawRow], format: Format) -> ReadResult:
    quarantined, strangers, names = [], 0, list(SHAPES)
    unseen = {column for key, column in format.columns.items() if key != "text"}  # that of text may be TRL's own option
    rows, digests, shapes, as_trl = array("I"), array("Q"), array("B"), array("B")
    for row, record in enumerate(records):
        source.lines.append(record.line)
        if unseen and isinstance(record.value, Mapping):
            unseen.difference_update(record.value)
        if record.file and (not source.starts or source.starts[-1][1] != record.file):
            source.starts.append((row, record.file))
        try:
            content, decided, alike = _understood(record, format)
        except RowError as error:
            strangers += isinstance(error, _UnknownShape)
            quarantined.append(record.set_aside(row, str(error)))
            if format.strict:
                raise DataError(
                    f"line {record.line} of {source.name} cannot be used, {quarantined[0].reason}: fix it, or read without "
                    "strict (--strict) to quarantine such rows"
                ) from None
            source.copy.add(b"")
            continue
        source.copy.add(record.source)
        source.read_as[str(decided)] += 1
        rows.append(row)
        digests.append(content_hash(content))
        shapes.append(names.index(str(decided.shape)))
        as_trl.append(alike)
    if not rows:
        raise _nothing_usable(source.name, quarantined, strangers)
    examples = Examples(
        source,
        np.frombuffer(rows, np.uint32),
        Ids.counted(np.frombuffer(digests, np.uint64)),
        Coded(np.frombuffer(shapes, np.uint8), names),
        np.frombuffer(as_trl, np.bool_),
        format,
    )
    return ReadResult(examples, tuple(quarantined), source, frozenset(unseen))


class _UnknownShape(RowError):
    """The row's keys fit no shape, or not the requested one."""


def _understood(record: RawRow, format: Format) -> tuple[bytes, Decided, bool]:
    """A row's content, how it is read, and whether TRL reads it alike. Raises RowError for a row that cannot be used."""
    if record.reason:
        raise RowError(record.reason)
    value = record.value
    if not isinstance(value, Mapping):
        raise RowError(f"it is not an object with keys but {kind_of(value)}")
    content = canonical(value)
    decided = format.decide(value)
    shape = decided.shape
    if shape is None and format.name is not None:
        raise _UnknownShape(f"it lacks {' or '.join(SHAPES[format.name].keys)}, the keys of the format {format.name}")
    if shape is None:
        keys = ", ".join(str(key)[:40] for key in list(value)[:8]) + (", …" if len(value) > 8 else "")
        raise _UnknownShape(f"its keys ({keys or 'none'}) fit no known format")
    try:
        conversations = decided.convert(value)
    except RecursionError:
        raise RowError("it is nested too deeply") from None
    alike = not decided.names and as_trl(value, shape, conversations)
    return content, decided, alike


def _nothing_usable(name: str, quarantined: Sequence[Quarantined], strangers: int) -> DataError:
    if not quarantined:
        return EmptyDataError(f"{name} has no rows: give a file with at least one")
    first = quarantined[0]
    if strangers:
        return FormatError(
            f"no row of {name} can be used, line {first.line}: {first.reason}; "
            f"known formats and their keys are {shape_keys()}; say which column is which with --columns KEY=COLUMN, "
            "such as --columns prompt=question,completion=answer"
        )
    return EmptyDataError(
        f"0 of {len(quarantined)} rows of {name} can be used, line {first.line}: {first.reason}; fix the file"
    )


def _open(data: Any) -> tuple[Source, Iterator[RawRow]]:
    """The source of the user's data, and an iterator of its rows. Raises like ``read``."""
    if isinstance(data, str | Path):
        path = Path(data)
        if any(_exists(path / name) for name in SAVED):
            return _open_rows(_split(_load_folder(path), str(path)), "dataset", str(path))
        if isinstance(data, Path) or is_file(data) or not may_be_hub_name(data):
            return open_file(path)
        return _open_rows(_load_dataset(data), "dataset", data)
    # Recognised by its module, since importing datasets takes seconds.
    module, kind = type(data).__module__.partition(".")[0], type(data).__name__
    if module == "datasets" and kind in ("Dataset", "DatasetDict"):
        return _open_rows(_split(data, "the dataset").with_format(None), "dataset", "the dataset")
    if module == "datasets":
        raise FormatError(
            f"the data is an {kind}, whose rows pass by once, and a scan needs them again: load the dataset without "
            "streaming=True, or write its rows to a file and give that"
        )
    if hasattr(data, "__arrow_c_stream__"):
        return _open_rows(_from_table(data, kind), "dataset", "the table")
    if isinstance(data, Sequence) and not isinstance(data, bytes | bytearray):
        return _open_rows(data, "list", "the list")
    raise FormatError(f"the data is a {kind}: give a path, a hub name, a Dataset, a table, or a list of dicts")


def is_file(name: str) -> bool:
    """Whether a string names a file, a folder or a pattern of names."""
    return has_magic(name) or _exists(Path(name))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return False


def may_be_hub_name(name: str) -> bool:
    """Whether a string that is not a path reads as ``owner/dataset:config:split``, not as a missing file."""
    base, *rest = name.split(":")
    parts = base.split("/")
    known = Path(base).suffix.lower() in (*SUFFIXES, *COMPRESSED, *OTHER_FILES)
    fits = len(parts) <= 2 and all(part and part[0].isalnum() and "\\" not in part for part in parts)
    return fits and not known and len(rest) <= 2 and not any("/" in part or "\\" in part for part in rest)


def _load_dataset(name: str) -> Any:
    """A split of a hub dataset, ``name``, ``name:config`` or ``name:config:split``, as a ``Dataset``. Raises DataError."""
    if not reachable():
        raise DataError(
            f"the dataset {name!r} cannot be fetched: there is no such file, and the hub cannot be reached; "
            "check the path or the network, or save the data as a file and give that"
        )
    import datasets

    base, config, split = (*name.split(":"), "", "")[:3]
    try:
        return datasets.load_dataset(base, config or None, split=split or SPLIT)
    except Exception as error:
        # Whatever fails (no such name or split, gated, broken), the user's remedy is the same.
        raise DataError(
            f"the dataset {name!r} could not be loaded from the hub ({first_line(error, most=None)}): check its name and that "
            f"it has a split {split or SPLIT!r} (NAME:CONFIG:SPLIT names another), or save the data as a file and give that"
        ) from error


def _load_folder(path: Path) -> Any:
    """What ``save_to_disk`` wrote. Raises DataError."""
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds, from datasets and Arrow
        raise DataError(
            f"{path} cannot be read as a saved dataset ({first_line(error, most=None)}): save it again with save_to_disk"
        ) from error


def _split(data: Any, name: str) -> Any:
    """The ``Dataset`` itself, or of a ``DatasetDict`` the split ``train``, or the only one. Raises FormatError."""
    if type(data).__name__ != "DatasetDict":
        return data
    if SPLIT not in data and len(data) != 1:
        raise FormatError(f"{name} has the splits {', '.join(data)}, and none is {SPLIT!r}: give one of them")
    return data.get(SPLIT, next(iter(data.values())))


def _from_table(table: Any, kind: str) -> Any:
    """A pandas, polars or Arrow table as a ``Dataset``. Raises FormatError."""
    import datasets
    import pyarrow as pa

    try:
        if type(table).__module__.startswith("pandas"):
            return datasets.Dataset.from_pandas(table, preserve_index=False)
        # Polars has a type of text of its own in a stream, which some versions of datasets do not know.
        return datasets.Dataset(table.to_arrow() if hasattr(table, "to_arrow") else pa.table(table))
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise FormatError(
            f"the {kind} is not a table of one type per column ({first_line(error, most=None)}): give a list of dicts"
        ) from None


def _open_rows(rows: Any, kind: str, name: str) -> tuple[Source, Iterator[RawRow]]:
    digest = hashlib.sha256()

    def records() -> Iterator[RawRow]:
        for line, value in enumerate(rows, 1):
            try:
                content, source, reason = canonical(value), json_line(value), ""
            except RowError as error:
                content = source = repr(value).encode(errors="backslashreplace")
                reason = str(error)
            digest.update(content + b"\n")
            yield RawRow(line, source, value, reason)

    return Source(kind, name, digest, table=rows), records()
