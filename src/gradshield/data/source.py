"""Where rows came from and where each one stands, so that it can be read again; and rows that are read when asked for.

What stays in memory of a row is some 40 bytes: its place in the file, its line, a hash of its content and its shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gradshield.columns import Coded, Ids
from gradshield.data.canonical import ID_LENGTH, canonical
from gradshield.data.files import SUFFIXES
from gradshield.data.shapes import SHAPES
from gradshield.errors import DataError
from gradshield.types import Bools, Conversation, Example, Ints

BLOCK = 1 << 20  # bytes that are read at once where they are only hashed
Raw = bytes | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Source:
    """Where the rows came from, and what is needed to read some of them again and to write them as they came.

    ``kind`` is ``jsonl``, ``json``, ``csv``, ``parquet``, ``dataset`` or ``list``. ``rows`` counts good and bad rows.
    ``sha256`` is of the file's bytes, or of the rows' canonical JSON where there was no file. ``header`` is a byte
    order mark and a CSV's first line. ``table`` is the ``Dataset`` or the list. ``lines`` has each row's line, ``starts``
    and ``sizes`` the place of each good row in a file of text, in bytes; ``parse`` gives the value of such bytes.
    """

    kind: str
    name: str
    sha256: str
    rows: int
    header: bytes = b""
    table: Any = field(default=None, repr=False)
    lines: Sequence[int] = field(default=(), repr=False)
    starts: Sequence[int] = field(default=(), repr=False)
    sizes: Sequence[int] = field(default=(), repr=False)
    parse: Callable[[bytes], Any] | None = field(default=None, repr=False)

    def line(self, row: int) -> int:
        """1-based line of the file, or row of the table, on which a row begins."""
        return int(self.lines[row])

    @property
    def suffix(self) -> str:
        """Suffix of a file that ``write`` writes from here: rows of a ``Dataset`` or a list become JSON lines."""
        return f".{self.kind}" if f".{self.kind}" in SUFFIXES else ".jsonl"

    def raw(self, rows: Iterable[int], whole: bool = False) -> Iterator[Raw]:
        """Some good rows as they stand in the input, in increasing order: bytes of a text file, else mappings.

        With ``whole`` the file is read from end to end and its hash compared. Raises DataError where the file cannot be read
        any more, or is no longer the one that was read.
        """
        if self.parse is not None:
            return self._bytes(rows, whole)
        if self.kind == "parquet":
            tables = self.tables(np.fromiter(rows, np.int64), whole)
            return (value for table in tables for value in table.to_pylist())
        if self.kind == "dataset":
            return iter(self.table.select(np.fromiter(rows, np.int64)))
        return (self.table[row] for row in rows)

    def tables(self, rows: Ints, whole: bool = False) -> Iterator[Any]:
        """Some rows of a Parquet file as Arrow tables, in increasing order. Raises DataError as ``raw`` does."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.name) as file:
                start = 0
                for group in range(file.num_row_groups):
                    end = start + file.metadata.row_group(group).num_rows
                    if not np.any((rows >= start) & (rows < end)):
                        start = end
                        continue
                    for batch in file.iter_batches(1024, [group]):
                        own = rows[(rows >= start) & (rows < start + len(batch))] - start
                        start += len(batch)
                        if len(own):
                            yield pa.Table.from_batches([batch]).take(own)
            if whole:
                with open(self.name, "rb") as handle:
                    self._same(hashlib.file_digest(handle, "sha256").hexdigest())
        except (OSError, pa.ArrowException) as error:
            raise self.changed() from error

    def schema(self) -> Any:
        """The Arrow schema of a Parquet file. Raises DataError as ``raw`` does."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_schema(self.name)
        except (OSError, pa.ArrowException) as error:
            raise self.changed() from error

    def value(self, raw: Raw) -> Any:
        """What the bytes of a row say; of a table the row is its own value. Raises ValueError where they say nothing."""
        return self.parse(raw) if self.parse is not None and isinstance(raw, bytes) else raw

    def changed(self) -> DataError:
        """That the input is not what it was when it was read."""
        return DataError(
            f"{self.name} was changed while its rows were being used: leave it as it is, and run the same command again"
        )

    def _bytes(self, rows: Iterable[int], whole: bool) -> Iterator[bytes]:
        digest, at = hashlib.sha256(), 0
        try:
            with Path(self.name).open("rb") as handle:
                for row in rows:
                    start, size = self.starts[row], self.sizes[row]
                    while whole and at < start and (skipped := handle.read(min(BLOCK, start - at))):
                        digest.update(skipped)
                        at += len(skipped)
                    if at != start:
                        handle.seek(start)
                    data = handle.read(size)
                    if whole:
                        digest.update(data)
                    at = start + size
                    yield data
                if whole:
                    for block in iter(partial(handle.read, BLOCK), b""):
                        digest.update(block)
                    self._same(digest.hexdigest())
        except OSError as error:
            raise self.changed() from error

    def _same(self, sha256: str) -> None:
        if sha256 != self.sha256:
            raise self.changed()


class Examples(Sequence[Example]):
    """The good rows of a source, in its order; each is read again when it is asked for.

    ``rows`` are their positions in the input, ``ids`` and ``shapes`` as in `Example`, ``weighted`` says of which rows some
    assistant turn does not count. Raises DataError where a row is no longer what it was.
    """

    def __init__(
        self, source: Source, rows: NDArray[np.uint32], ids: Ids, shapes: Coded, weighted: Bools, text_field: str
    ) -> None:
        self.source, self.rows, self.ids, self.shapes, self.weighted = source, rows, ids, shapes, weighted
        self._text_field = text_field

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return next(self._made([range(len(self))[index]]))

    def __iter__(self) -> Iterator[Example]:
        return self._made(range(len(self)))

    def at(self, rows: Ints) -> Iterator[Example]:
        """The rows at these positions in the input, which increase."""
        return self._made(np.searchsorted(self.rows, rows))

    def _made(self, places: Sequence[int] | Ints) -> Iterator[Example]:
        raws = self.source.raw(int(self.rows[place]) for place in places)
        for place, raw in zip(places, raws, strict=True):
            yield self._example(int(place), raw)

    def _example(self, place: int, raw: Raw) -> Example:
        try:
            value = self.source.value(raw)
            digest = content_hash(canonical(value))
        except (ValueError, RecursionError) as error:
            raise self.source.changed() from error
        if digest != self.ids.digests[place]:
            raise self.source.changed()
        shape = self.shapes[place]
        row, conversations = int(self.rows[place]), convert(value, shape, self._text_field)
        return Example(row, self.ids[place], shape, raw, conversations)


def content_hash(content: bytes) -> int:
    """The number that a row's id is made of."""
    return int.from_bytes(hashlib.sha256(content).digest()[: ID_LENGTH // 2])


def convert(value: Mapping[str, Any], shape: str, text_field: str) -> tuple[Conversation, ...]:
    """The sequences of a row that is read as ``shape``. Raises RowError."""
    return SHAPES[shape].convert(with_text(value, text_field))


def with_text(value: Mapping[str, Any], text_field: str) -> Mapping[str, Any]:
    """The row with its column of plain text under ``text``."""
    return {**value, "text": value[text_field]} if text_field != "text" and text_field in value else value
