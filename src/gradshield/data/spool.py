"""Rendered rows kept on disk, so that memory does not grow with what they say: each is read back when it is asked for."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import overload

import numpy as np

from gradshield.errors import DataError
from gradshield.types import Rendered, Tokens

IDS = np.dtype(np.int32)  # no vocabulary is larger


class Spool(Sequence[Rendered]):
    """Rows in the order in which they were added, in a nameless temporary file that goes with this object.

    On disk a row takes 5 bytes a token; in memory its id, its shape and two numbers stay. Raises DataError where the folder
    of temporary files (``TMPDIR``) is full.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gradshield-")  # noqa: SIM115 (closed with this object)
        self._lock = Lock()
        self._unread = False
        self._ids: list[str] = []
        self._shapes: list[str] = []
        self._rows, self._ends = array("q"), array("q", [0])

    def add(self, row: Rendered) -> None:
        """Put a row after the others."""
        parts = [np.int64(len(row.sequences)).tobytes()]
        for tokens in row.sequences:
            parts += [np.int64(len(tokens.ids)).tobytes(), np.float64(tokens.coefficient).tobytes()]
            parts += [tokens.ids.astype(IDS).tobytes(), tokens.loss.tobytes()]
        data = b"".join(parts)
        with _room():
            self._file.write(data)
        self._unread = True
        self._ids.append(row.id)
        self._shapes.append(row.shape)
        self._rows.append(row.row)
        self._ends.append(self._ends[-1] + len(data))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Rendered: ...

    @overload
    def __getitem__(self, index: slice) -> list[Rendered]: ...

    def __getitem__(self, index: int | slice) -> Rendered | list[Rendered]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return Rendered(
            self._rows[place],
            self._ids[place],
            self._shapes[place],
            _sequences(self._read(self._ends[place], self._ends[place + 1])),
        )

    def _read(self, start: int, end: int) -> bytes:
        with self._lock:
            if self._unread:
                with _room():
                    self._file.flush()
                self._unread = False
            if hasattr(os, "pread"):  # moves no position that a forked process may share
                return os.pread(self._file.fileno(), end - start, start)
            self._file.seek(start)
            data: bytes = self._file.read(end - start)
            self._file.seek(0, os.SEEK_END)
            return data


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the folder of temporary files {tempfile.gettempdir()!r} cannot be written to ({error.strerror}): free some space, "
            "or set TMPDIR to a folder that has some"
        ) from None


def _sequences(data: bytes) -> tuple[Tokens, ...]:
    found, at = [], 8
    for _ in range(int(np.frombuffer(data, np.int64, 1)[0])):
        length = int(np.frombuffer(data, np.int64, 1, at)[0])
        coefficient = float(np.frombuffer(data, np.float64, 1, at + 8)[0])
        ids = np.frombuffer(data, IDS, length, at + 16).astype(np.int64)
        at += 16 + IDS.itemsize * length
        found.append(Tokens(ids, np.frombuffer(data, np.bool_, length, at).copy(), coefficient))
        at += length
    return tuple(found)
