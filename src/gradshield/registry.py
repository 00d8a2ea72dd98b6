"""Names to things. Lists of choices in help, errors and documents come from here, never from typing.

A room makes one ``Registry`` and registers its own entries where they are defined::

    PROBES: Registry[type[Probe]] = Registry("probe")

    @PROBES.register("token_gap")
    class TokenGap: ...

The first line of an entry's docstring is what ``gradshield methods`` prints beside its name.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from gradshield.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """An ordered map from name to entry, whose error names what there is."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: hold the entry under ``name``. Raises ValueError when the name is taken."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry. Raises UnknownNameError, which lists the live names."""
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self.names()) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def names(self) -> list[str]:
        """Every name, in the order of registration."""
        return list(self._entries)

    def summary(self, name: str) -> str:
        """First line of the entry's docstring."""
        return (inspect.getdoc(self[name]) or "").split("\n", 1)[0]
