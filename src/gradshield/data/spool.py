"""Rows and their values on disk, read back on access, so that memory does not grow with their size."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

import numpy as np

from gradshield.columns import OnDemand
from gradshield.errors import DataError
from gradshield.types import Floats, Ints, Rendered, Tokens

T = TypeVar("T")
IDS = np.dtype(np.int32)  # no vocabulary is larger


class Scratch(OnDemand[bytes]):
    """Byte strings in an unnamed temporary file that is deleted with this object; 8 bytes each in memory.

    Raises DataError if the folder of temporary files (``TMPDIR``) is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gradshield-")  # noqa: SIM115 (closed with this object)
        weakref.finalize(self, self._file.close)
        self._lock = Lock()
        self._starts = array("Q", [0])  # the start of each piece, and of the next one

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, data: bytes) -> None:
        with room():
            self._file.write(data)
        self._starts.append(self._starts[-1] + len(data))

    def _at(self, index: int) -> bytes:
        start, end = self._starts[index : index + 2]
        with self._lock:
            with room():
                self._file.flush()
            if hasattr(os, "pread"):  # does not move a file position shared with a forked process
                return os.pread(self._file.fileno(), end - start, start)
            self._file.seek(start)
            data: bytes = self._file.read(end - start)
            self._file.seek(0, os.SEEK_END)
            return data


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


class _OnDisk(OnDemand[T]):
    """A sequence whose entries are made from their bytes in a `Scratch`."""

    def __init__(self) -> None:
        self._scratch = Scratch()

    def _made(self, data: bytes) -> T:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._scratch)

    def _at(self, index: int) -> T:
        return self._made(self._scratch[index])


class Spool(_OnDisk[Rendered]):
    """Rendered rows in the order they were added. A row takes 5 bytes per token and about 60 more on disk.

    ``longest`` is the number of tokens of the longest sequence so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def add(self, row: Rendered) -> None:
        head = [row.row, row.id, row.shape, [(len(tokens.ids), tokens.coefficient) for tokens in row.sequences]]
        parts = [json.dumps(head).encode(), b"\n"]
        for tokens in row.sequences:
            parts += [tokens.ids.astype(IDS).tobytes(), tokens.loss.tobytes()]
            self.longest = max(self.longest, len(tokens.ids))
        self._scratch.add(b"".join(parts))

    def _made(self, data: bytes) -> Rendered:
        head, _, body = data.partition(b"\n")
        row, name, shape, sequences = json.loads(head)
        found, at = [], 0
        for length, coefficient in sequences:
            ids = np.frombuffer(body, IDS, length, at).astype(np.int64)
            at += IDS.itemsize * length
            found.append(Tokens(ids, np.frombuffer(body, np.bool_, length, at).copy(), coefficient))
            at += length
        return Rendered(row, name, shape, tuple(found))


class Values(_OnDisk[Floats]):
    """One array of numbers per row, in the order they were added: 8 bytes per number on disk."""

    def add(self, rows: Iterable[Floats]) -> None:
        for values in rows:
            self._scratch.add(np.asarray(values, dtype=np.float64).tobytes())

    def _made(self, data: bytes) -> Floats:
        return np.frombuffer(data, np.float64).copy()


class Picked(OnDemand[T]):
    """Entries of a sequence by their indices (n,), read on access."""

    def __init__(self, whole: Sequence[T], places: Ints) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def _at(self, index: int) -> T:
        return self._whole[int(self._places[index])]


class Scattered(OnDemand[Floats]):
    """Arrays of the rows at ``places`` (n,), ascending, of ``count`` rows: empty for the others."""

    def __init__(self, arrays: Sequence[Floats], places: Ints, count: int) -> None:
        self._arrays, self._places, self._count = arrays, places, count

    def __len__(self) -> int:
        return self._count

    def _at(self, index: int) -> Floats:
        at = int(np.searchsorted(self._places, index))
        return self._arrays[at] if at < len(self._places) and self._places[at] == index else np.zeros(0)
