"""Methods by name. The lists of choices in help, errors and documents are read from here, never typed.

A room makes one ``Registry`` and registers its own entries where they are defined::

    PROBES: Registry[type[Probe]] = Registry("probe")

    @PROBES.register("token_gap")
    class TokenGap: ...

The first line of an entry's docstring is what ``gradshield methods`` prints next to its name.

Other packages add methods through an entry point in the group ``gradshield.plugins`` that names the module that registers
them; it is imported when a name is first looked up in any registry.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from gradshield.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """An ordered map from name to entry; its lookup error lists the names."""

    def __init__(self, kind: str, needs: Sequence[str] = ()) -> None:
        """``needs`` are the attributes that every entry must have."""
        self.kind, self.needs = kind, needs
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: register an entry. Raises ValueError if the name is taken, or the entry lacks an attribute."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            if missing := [need for need in self.needs if not hasattr(entry, need)]:
                raise ValueError(f"{self.kind} {name!r} lacks {', '.join(missing)}")
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """The entry. Raises UnknownNameError, which lists the known names."""
        entries = self._live()
        try:
            return entries[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, list(entries)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._live())

    def _live(self) -> Mapping[str, T]:
        """Every entry by name, plugins included."""
        plugins()
        return self._entries

    def summary(self, name: str) -> str:
        """First line of the entry's docstring."""
        return (inspect.getdoc(self[name]) or "").split("\n", 1)[0]


PLUGINS = "gradshield.plugins"
_plugins: dict[str, str] | None = None


def plugins() -> Mapping[str, str]:
    """Import every plugin, once: name and version of those that load. A broken one raises a warning, not an error."""
    global _plugins
    if _plugins is None:
        _plugins = found = {}  # set first: a plugin may look a name up while it is imported
        for entry in entry_points(group=PLUGINS):
            package, version = (entry.dist.name, entry.dist.version) if entry.dist else (entry.module, "")
            try:
                entry.load()
            except Exception as error:  # a broken plugin must not stop a scan that does not use it
                reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
                warnings.warn(
                    f"the plugin {package} {version} could not be loaded from {entry.value} ({reason}), so its methods are "
                    "missing: fix it, or uninstall it",
                    stacklevel=2,
                )
            else:
                found[package] = version
    return _plugins
