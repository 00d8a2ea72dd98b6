"""Rendered rows on disk, read back on access, so that memory does not grow with their size; and their padded batches."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from gradshield.columns import OnDemand
from gradshield.errors import DataError, UsageError
from gradshield.types import Batch, Floats, Ints, Rendered, Tokens

T = TypeVar("T")
PAD = 0  # any id will do: nothing attends to it
IDS = np.dtype(np.int32)  # no vocabulary is larger


class Scratch(OnDemand[T]):
    """Entries (byte strings, but for the subclasses) in an unnamed temporary file, each read back on access.

    The file is deleted with this object. An entry takes 8 bytes in memory. Raises DataError if the folder of temporary files
    (``TMPDIR``) is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gradshield-")  # noqa: SIM115 (closed with this object)
        weakref.finalize(self, self._file.close)
        self._lock = Lock()
        self._starts = array("Q", [0])  # the start of each entry, and of the next one

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, entry: T) -> None:
        data = self._packed(entry)
        with room():
            self._file.write(data)
        self._starts.append(self._starts[-1] + len(data))

    def _packed(self, entry: Any) -> bytes:
        return bytes(entry)

    def _unpacked(self, data: bytes) -> Any:
        return data

    def _at(self, index: int) -> T:
        start, end = self._starts[index : index + 2]
        with self._lock:
            with room():
                self._file.flush()
            if hasattr(os, "pread"):  # does not move a file position shared with a forked process
                data = os.pread(self._file.fileno(), end - start, start)
            else:
                self._file.seek(start)
                data = self._file.read(end - start)
                self._file.seek(0, os.SEEK_END)
        found: T = self._unpacked(data)
        return found


@contextmanager
def room() -> Iterator[None]:
    """Raises DataError if the folder of temporary files cannot be written to."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the folder of temporary files {tempfile.gettempdir()!r} cannot be written to ({error.strerror}): free some space, "
            "or set TMPDIR to a folder with space"
        ) from None


class Spool(Scratch[Rendered]):
    """Rendered rows in the order they were added. A row takes 5 bytes per token and about 60 more on disk.

    ``longest`` is the number of tokens of the longest sequence so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def _packed(self, row: Rendered) -> bytes:
        head = [row.row, row.id, row.shape, [(len(tokens.ids), tokens.coefficient) for tokens in row.sequences]]
        parts = [json.dumps(head).encode(), b"\n"]
        for tokens in row.sequences:
            parts += [tokens.ids.astype(IDS).tobytes(), tokens.loss.tobytes()]
            self.longest = max(self.longest, len(tokens.ids))
        return b"".join(parts)

    def _unpacked(self, data: bytes) -> Rendered:
        head, _, body = data.partition(b"\n")
        row, name, shape, sequences = json.loads(head)
        found, at = [], 0
        for length, coefficient in sequences:
            ids = np.frombuffer(body, IDS, length, at).astype(np.int64)
            at += IDS.itemsize * length
            found.append(Tokens(ids, np.frombuffer(body, np.bool_, length, at).copy(), coefficient))
            at += length
        return Rendered(row, name, shape, tuple(found))


class Values(Scratch[Floats]):
    """One array of numbers per row, in the order they were added: 8 bytes per number on disk."""

    def _packed(self, values: Floats) -> bytes:
        return np.asarray(values, dtype=np.float64).tobytes()

    def _unpacked(self, data: bytes) -> Floats:
        return np.frombuffer(data, np.float64).copy()


class Tables(Scratch[Any]):
    """Arrow tables of one schema, whose rows are counted through."""

    def __init__(self) -> None:
        super().__init__()
        self.firsts = [0]  # the number of the first row of each table, and of the next one

    def add(self, entry: Any) -> None:
        super().add(entry)
        self.firsts.append(self.firsts[-1] + len(entry))

    def _packed(self, table: Any) -> bytes:
        import pyarrow as pa

        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    def _unpacked(self, data: bytes) -> Any:
        import pyarrow as pa

        return pa.ipc.open_stream(data).read_all()

    def rows(self, rows: Ints) -> Any:
        """Some rows, in the order given, as one table."""
        import pyarrow as pa

        own = np.searchsorted(self.firsts, rows, side="right") - 1
        parts = [self[int(n)].take(rows[own == n] - self.firsts[n]) for n in np.unique(own)]
        return pa.concat_tables([self[0].slice(0, 0), *parts]).take(np.argsort(np.argsort(own, kind="stable")))


class Picked(OnDemand[T]):
    """Entries of a sequence by their indices (n,), read on access; ``other`` at an index of -1."""

    def __init__(self, whole: Sequence[T], places: Ints, other: Any = None) -> None:
        self._whole, self._places, self._other = whole, places, other

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, index: int) -> T:
        place = int(self._places[index])
        found: T = self._whole[place] if place >= 0 else self._other
        return found


def batches(rendered: Iterable[Rendered], token_budget: int, label_budget: int) -> Iterator[Batch]:
    """Group rows of similar length, longest first, so that a batch too large for memory fails at once.

    ``token_budget`` is the most positions in a batch, padding included: B * T. ``label_budget`` is the most loss positions in a
    batch; each costs a row of V logits. A row is never split; one that exceeds a budget alone gets its own batch. The order
    depends only on the rows. Raises UsageError for a budget below 1.
    """
    for name, budget in (("token_budget", token_budget), ("label_budget", label_budget)):
        if budget < 1:
            raise UsageError(f"{name} is {budget}: give at least 1")
    group: list[Rendered] = []
    width = labels = sequences = 0
    for row in sorted(rendered, key=lambda row: (-_width(row), row.row)):
        loss = sum(int(tokens.loss.sum()) for tokens in row.sequences)
        more = sequences + len(row.sequences)
        if group and (more * width > token_budget or labels + loss > label_budget):
            yield collate(group)
            group, labels, more = [], 0, len(row.sequences)
        if not group:
            width = _width(row)
        group.append(row)
        labels, sequences = labels + loss, more
    if group:
        yield collate(group)


def collate(rows: Iterable[Rendered]) -> Batch:
    """Pad the sequences of some rows, in their order, into one batch."""
    pairs: list[tuple[int, Tokens]] = [(row.row, tokens) for row in rows for tokens in row.sequences]
    size, width = len(pairs), max(len(tokens.ids) for _, tokens in pairs)
    ids = np.full((size, width), PAD, dtype=np.int64)
    attention = np.zeros((size, width), dtype=np.bool_)
    loss = np.zeros((size, width), dtype=np.bool_)
    for b, (_, tokens) in enumerate(pairs):
        length = len(tokens.ids)
        ids[b, :length] = tokens.ids
        attention[b, :length] = True
        loss[b, :length] = tokens.loss
    return Batch(
        ids=ids,
        attention=attention,
        loss=loss,
        rows=np.array([row for row, _ in pairs], dtype=np.int64),
        coefficients=np.array([tokens.coefficient for _, tokens in pairs], dtype=np.float64),
    )


def _width(row: Rendered) -> int:
    return max(len(tokens.ids) for tokens in row.sequences)
