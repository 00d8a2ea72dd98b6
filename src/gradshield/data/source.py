"""The source of the rows, with a copy of each on disk, and rows made from it on access.

A row takes about 30 bytes in memory: its offset in the copy, its line, a hash of its content and its shape.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradshield.columns import Coded, Ids, OnDemand
from gradshield.data.records import ID_LENGTH, Parse, json_value
from gradshield.data.shapes import Format
from gradshield.data.spool import Scratch
from gradshield.errors import DataError
from gradshield.types import Bools, Example, Ints

GROUP = 1 << 14  # rows of a Parquet file copied at once
SPAN = 1 << 12  # rows of two Parquet files merged at once


@dataclass(frozen=True, eq=False)
class Source:
    """The source of the rows, with everything needed to write some of them unchanged.

    ``kind`` is ``jsonl``, ``json``, ``csv``, ``tsv``, ``parquet``, ``dataset`` or ``list``. ``digest`` is the SHA-256 of the
    bytes of its ``files``, or without files of the rows' canonical JSON. ``parse`` gives the value of a row's bytes; ``header``
    is the byte order mark and a CSV's first line; ``table`` is the ``Dataset`` or the list. Reading fills ``lines`` with the line
    of each row, ``copy`` with the bytes of the usable ones (of a table, as a line of JSON), ``starts`` with the first row and the
    path of each of several files, and ``read_as`` with how many rows were read in which way: the shape, and where there was a
    choice, what was chosen.
    """

    kind: str
    name: str
    digest: Any = field(repr=False)
    parse: Parse = field(default=json_value, repr=False)
    header: bytes = b""
    table: Any = field(default=None, repr=False)
    files: tuple[Path, ...] = ()
    lines: array[int] = field(default_factory=lambda: array("I"), repr=False)
    copy: Scratch = field(default_factory=Scratch, repr=False)
    starts: list[tuple[int, str]] = field(default_factory=list, repr=False)
    read_as: Counter[str] = field(default_factory=Counter, repr=False)

    def places(self, rows: Ints) -> tuple[Ints, Coded]:
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
        return (self.copy[int(row)] for row in rows)

    def tables(self, rows: Ints) -> Iterator[Any]:
        """Some rows of Parquet files, in increasing order, as Arrow tables, possibly empty; the files are read to their end.

        Raises DataError if the file has changed since it was first read.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        start, digest = 0, hashlib.sha256()
        try:
            for path in self.files:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(GROUP):
                        first, last = np.searchsorted(rows, (start, start + len(batch)))
                        yield pa.Table.from_batches([batch]).take(rows[first:last] - start)
                        start += len(batch)
                with path.open("rb") as handle:
                    hashlib.file_digest(handle, lambda: digest)
            same = digest.digest() == self.digest.digest()
        except (OSError, pa.ArrowException):
            same = False
        if not same:
            raise DataError(
                f"{self.name} was changed while its rows were in use: do not change it, and run the same command again"
            )


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

    def _at(self, index: int) -> Example:
        row, shape = int(self.rows[index]), self.shapes[index]
        raw = self.source.copy[row]
        value = self.source.parse(raw)
        return Example(row, self.ids[index], shape, raw, self.format.decide(value, shape).convert(value))


class Together:
    """The rows of a kept and a removed file, in the order of the original input."""

    def __init__(self, parts: Mapping[bool, Examples], rows: Ints, removed: Bools) -> None:
        self._parts, self._rows, self._removed = parts, rows, removed
        self._places = (
            np.where(removed, np.cumsum(removed), np.cumsum(~removed)) - 1
        )  # index of each row in its own file
        first = next(iter(parts.values())).source
        self.kind, self.header, self.parse = first.kind, first.header, first.parse

    def _found(self, rows: Iterable[int]) -> Iterator[tuple[Examples, int]]:
        for at in np.searchsorted(self._rows, np.fromiter(rows, np.int64)):
            yield self._parts[bool(self._removed[at])], int(self._places[at])

    def examples(self, rows: Iterable[int]) -> Iterator[Example]:
        """The rows at these positions in the input."""
        return (part[place] for part, place in self._found(rows))

    def raw(self, rows: Iterable[int]) -> Iterator[bytes]:
        """As `Source.raw`."""
        return (part.source.copy[int(part.rows[place])] for part, place in self._found(rows))

    def tables(self, rows: Ints) -> Iterator[Any]:
        """As `Source.tables`; both files are read in parallel."""
        import pyarrow as pa

        wanted = np.isin(self._rows, rows)
        spans = [slice(start, start + SPAN) for start in range(0, len(self._rows), SPAN)]
        files = [
            _sized(
                part.source.tables(part.rows.astype(np.int64)),
                [int((self._removed[span] == flag).sum()) for span in spans],
            )
            for flag, part in sorted(self._parts.items())
        ]
        for span, tables in zip(spans, zip(*files, strict=True), strict=True):
            order = np.argsort(np.argsort(self._removed[span], kind="stable"))
            yield pa.concat_tables(tables).take(order[wanted[span]])


def _sized(tables: Iterator[Any], sizes: Iterable[int]) -> Iterator[Any]:
    """The rows of tables, regrouped into tables of these sizes."""
    import pyarrow as pa

    waiting = next(tables)
    for size in sizes:
        while len(waiting) < size:
            waiting = pa.concat_tables([waiting, next(tables)])
        yield waiting.slice(0, size)
        waiting = waiting.slice(size)
    for _ in tables:  # reads to the end, where the file's hash is compared
        pass


Rows = Source | Together


def content_hash(content: bytes) -> int:
    """The integer behind a row's id."""
    return int.from_bytes(hashlib.sha256(content).digest()[: ID_LENGTH // 2])
