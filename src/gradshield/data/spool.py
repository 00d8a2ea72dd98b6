"""Rows and their values kept on disk, so that memory does not grow with what they say: each is read back when asked for."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar, overload

import numpy as np

from gradshield.errors import DataError
from gradshield.types import Floats, Ints, Rendered, Tokens

T = TypeVar("T")
IDS = np.dtype(np.int32)  # no vocabulary is larger
STRIDE = 256  # of so many sizes the place of the first is known
BLOCK = 1 << 16  # bytes that are read at once where all is read in order


class Scratch:
    """Pieces of bytes one after the other in a nameless temporary file that goes with this object; 4 bytes each in memory.

    Raises DataError where the folder of temporary files (``TMPDIR``) is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gradshield-")  # noqa: SIM115 (closed with this object)
        self._lock = Lock()
        self._unread = False
        self._sizes = array("I")
        self._marks = array("Q")  # where every STRIDE-th piece begins
        self._end = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, data: bytes) -> None:
        """Put a piece after the others."""
        with room():
            self._file.write(data)
        self._unread = True
        if len(self._sizes) % STRIDE == 0:
            self._marks.append(self._end)
        self._sizes.append(len(data))
        self._end += len(data)

    def __getitem__(self, place: int) -> bytes:
        start = self._marks[place // STRIDE] + sum(self._sizes[place - place % STRIDE : place])
        return self._read(start, self._sizes[place])

    def __iter__(self) -> Iterator[bytes]:
        """Every piece in order, read in blocks."""
        start, place = 0, 0
        while place < len(self._sizes):
            end, size = place, 0
            while end < len(self._sizes) and (end == place or size + self._sizes[end] <= BLOCK):
                size += self._sizes[end]
                end += 1
            data, at = self._read(start, size), 0
            for length in self._sizes[place:end]:
                yield data[at : at + length]
                at += length
            start, place = start + size, end

    def _read(self, start: int, size: int) -> bytes:
        with self._lock:
            if self._unread:
                with room():
                    self._file.flush()
                self._unread = False
            if hasattr(os, "pread"):  # moves no position that a forked process may share
                return os.pread(self._file.fileno(), size, start)
            self._file.seek(start)
            data: bytes = self._file.read(size)
            self._file.seek(0, os.SEEK_END)
            return data


@contextmanager
def room() -> Iterator[None]:
    """Raises DataError where the folder of temporary files cannot be written to."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the folder of temporary files {tempfile.gettempdir()!r} cannot be written to ({error.strerror}): free some space, "
            "or set TMPDIR to a folder that has some"
        ) from None


class _OnDisk(Sequence[T]):
    """A sequence of which each entry is made from its bytes in a `Scratch`."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def _made(self, data: bytes) -> T:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._scratch)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._made(self._scratch[range(len(self))[index]])

    def __iter__(self) -> Iterator[T]:
        return map(self._made, self._scratch)


class Spool(_OnDisk[Rendered]):
    """Rendered rows in the order in which they were added. On disk a row takes 5 bytes a token and some 60 more.

    ``longest`` is the number of tokens of the longest sequence so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def add(self, row: Rendered) -> None:
        """Put a row after the others."""
        name, shape = row.id.encode(), row.shape.encode()
        parts = [np.array([row.row, len(name), len(shape), len(row.sequences)], np.int64).tobytes(), name, shape]
        for tokens in row.sequences:
            parts += [np.int64(len(tokens.ids)).tobytes(), np.float64(tokens.coefficient).tobytes()]
            parts += [tokens.ids.astype(IDS).tobytes(), tokens.loss.tobytes()]
            self.longest = max(self.longest, len(tokens.ids))
        self._scratch.add(b"".join(parts))

    def _made(self, data: bytes) -> Rendered:
        row, name, shape, count = np.frombuffer(data, np.int64, 4).tolist()
        at = 32 + name + shape
        return Rendered(row, data[32 : 32 + name].decode(), data[32 + name : at].decode(), _sequences(data, at, count))


def _sequences(data: bytes, at: int, count: int) -> tuple[Tokens, ...]:
    found = []
    for _ in range(count):
        length = int(np.frombuffer(data, np.int64, 1, at)[0])
        coefficient = float(np.frombuffer(data, np.float64, 1, at + 8)[0])
        ids = np.frombuffer(data, IDS, length, at + 16).astype(np.int64)
        at += 16 + IDS.itemsize * length
        found.append(Tokens(ids, np.frombuffer(data, np.bool_, length, at).copy(), coefficient))
        at += length
    return tuple(found)


class Values(_OnDisk[Floats]):
    """One array of numbers a row, in the order in which they were added: 8 bytes a number on disk."""

    def add(self, rows: Iterable[Floats]) -> None:
        """Put the arrays of some rows after the others."""
        for values in rows:
            self._scratch.add(np.asarray(values, dtype=np.float64).tobytes())

    def _made(self, data: bytes) -> Floats:
        return np.frombuffer(data, np.float64).copy()


class Picked(Sequence[T]):
    """Entries of a sequence by their places (n,), read from it when they are asked for."""

    def __init__(self, whole: Sequence[T], places: Ints) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Picked[T]: ...

    def __getitem__(self, index: int | slice) -> T | Picked[T]:
        if isinstance(index, slice):
            return Picked(self._whole, self._places[index])
        return self._whole[int(self._places[index])]
