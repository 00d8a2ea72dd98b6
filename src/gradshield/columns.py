"""Columns of short strings at a few bytes a row, so that a million rows are a few arrays, not a million Python objects."""

from __future__ import annotations

import re
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradshield.types import Bools

T = TypeVar("T")
_ID = re.compile(r"[0-9a-f]{16}(?:-([2-9]|[1-9][0-9]+))?")


class OnDemand(Sequence[T]):
    """A sequence whose entries are made on access."""

    @abstractmethod
    def _at(self, index: int) -> T:
        """The entry at an index from 0."""

    def take(self, where: Any) -> Any:
        """The entries of a slice."""
        return [self._at(index) for index in range(len(self))[where]]

    def __getitem__(self, index: Any) -> Any:
        return self.take(index) if isinstance(index, slice) else self._at(range(len(self))[index])


class _Column(OnDemand[str]):
    """Equal to any sequence of the same strings; `take` also takes indices or a mask, and gives a column."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # the arrays are mutable

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:4])) + (", …" if len(self) > 4 else "")
        return f"{type(self).__name__}({len(self)}: {shown})"


class Coded(_Column):
    """Strings with few distinct values (row shapes, groups, kinds of harm): ``names[codes[i]]``, usually one byte each."""

    def __init__(self, codes: NDArray[Any], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.codes = codes.astype(np.min_scalar_type(max(len(self.names) - 1, 0)), copy=False)

    @classmethod
    def of(cls, values: Iterable[str]) -> Coded:
        """Any strings as a column; a column is returned unchanged."""
        if isinstance(values, Coded):
            return values
        known: dict[str, int] = {}
        codes = array("I", (known.setdefault(value, len(known)) for value in values))
        return cls(np.array(codes), tuple(known))

    def where(self, name: str) -> Bools:
        """(N,) which strings equal ``name``."""
        return self.codes == self.names.index(name) if name in self.names else np.zeros(len(self), dtype=np.bool_)

    def counts(self) -> dict[str, int]:
        """How often each string occurs; strings that never occur are left out."""
        found = np.bincount(self.codes, minlength=len(self.names)).tolist()
        return {name: count for name, count in zip(self.names, found, strict=True) if count}

    def renamed(self, names: Sequence[str]) -> Coded:
        """The same column with the i-th name replaced by ``names[i]``; several may become one."""
        fresh = tuple(dict.fromkeys(names))
        return Coded(np.array([fresh.index(name) for name in names], dtype=np.int64)[self.codes], fresh)

    def only(self, where: Bools) -> Coded:
        """The same column where the mask is set, the empty string elsewhere."""
        names = ("", *self.names)
        return Coded(np.where(where, self.codes.astype(np.int64) + 1, 0), names).renamed(names)

    def take(self, where: Any) -> Coded:
        return Coded(self.codes[where], self.names)

    def __len__(self) -> int:
        return len(self.codes)

    def _at(self, index: int) -> str:
        return self.names[int(self.codes[index])]

    def __iter__(self) -> Iterator[str]:
        return (self.names[code] for code in self.codes)


class Ids(_Column):
    """Row ids: 16 hex digits of a hash, with ``-2``, ``-3``, … for repeated content. 12 bytes each."""

    def __init__(self, digests: NDArray[np.uint64], repeats: NDArray[np.uint32]) -> None:
        self.digests, self.repeats = digests, repeats

    @classmethod
    def of(cls, texts: Iterable[str]) -> Ids:
        """Ids in text form as a column; a column is returned unchanged. Raises ValueError for text that is not an id."""
        if isinstance(texts, Ids):
            return texts
        digests, repeats = array("Q"), array("I")
        for text in texts:
            found = _ID.fullmatch(text)
            if found is None:
                raise ValueError(f"{text!r} is not a row id")
            digests.append(int(text[:16], 16))
            repeats.append(int(found[1] or 1))
        return cls(np.array(digests), np.array(repeats))

    @classmethod
    def counted(cls, digests: NDArray[np.uint64]) -> Ids:
        """Ids of these hashes, in order; equal hashes are numbered."""
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        first = np.r_[True, ordered[1:] != ordered[:-1]] if len(ordered) else np.zeros(0, dtype=np.bool_)
        repeats = np.ones(len(digests), dtype=np.uint32)
        if not first.all():
            places = np.arange(len(ordered))
            repeats[order] = places - np.maximum.accumulate(np.where(first, places, 0)) + 1
        return cls(digests, repeats)

    def take(self, where: Any) -> Ids:
        return Ids(self.digests[where], self.repeats[where])

    def __len__(self) -> int:
        return len(self.digests)

    def _at(self, index: int) -> str:
        digest, count = f"{self.digests[index]:016x}", self.repeats[index]
        return digest if count == 1 else f"{digest}-{count}"

    def __iter__(self) -> Iterator[str]:
        return map(self._at, range(len(self)))
