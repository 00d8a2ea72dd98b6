"""What was found on a model, kept for the next scan of it: in the user's cache folder, under a hash of all it depends on.

``GRADSHIELD_CACHE`` names another folder; empty, nothing is kept. The entries used longest ago are deleted beyond ``MOST`` bytes.
A file that is not named like an entry is never touched: the folder may hold anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from platformdirs import user_cache_path

from gradshield import files
from gradshield.errors import DataError, UsageError

VARIABLE = "GRADSHIELD_CACHE"
MOST = 4 * 2**30  # bytes of all entries; one of more than a quarter of it is not kept

_ENTRY = re.compile(r"[a-z]+-[0-9a-f]{40}\.(?:json|safetensors)")
T = TypeVar("T")


def folder() -> Path | None:
    """Where entries are kept; None if nothing is kept. Raises UsageError for a variable that names no folder."""
    named = os.environ.get(VARIABLE)
    if named is None:
        return user_cache_path("gradshield", appauthor=False)
    try:
        return Path(named).expanduser() if named.strip() else None
    except RuntimeError:
        raise UsageError(f"{VARIABLE} is {named!r}, and there is no such home folder: name another, or none") from None


def remembered(
    name: str, make: Callable[[], T], save: Callable[[T, Path], None], load: Callable[[Path], T], size: int = 0
) -> T:
    """The entry of this name (a hash is part of it), or what ``make`` returns, which is then kept.

    ``load`` raises DataError, OSError or ValueError for a damaged entry, which is made again. A folder that cannot be written to
    costs the entry, not the scan. ``size`` is the entry's size in bytes if it is large.
    """
    kept = folder()
    if kept is None or size > MOST / 4:
        return make()
    path = kept / name
    with suppress(DataError, OSError, ValueError):
        found = load(path)
        with suppress(OSError):  # one that may only be read
            os.utime(path)
        return found
    made = make()
    with suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        save(made, path)
        _trim(path)
    return made


def save_json(value: Any, path: Path) -> None:
    """Write a JSON-able value with its hash."""
    text = json.dumps(value)
    files.write_text(path, hashlib.sha256(text.encode()).hexdigest() + "\n" + text)


def load_json(path: Path) -> Any:
    """Read it back. Raises DataError if the text does not match its hash, OSError and ValueError."""
    found, _, text = path.read_text(encoding="utf-8").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != found:
        raise DataError(path.name)  # `remembered` makes it again
    return json.loads(text)


def entries() -> list[tuple[Path, os.stat_result]]:
    """All entries, the last used (``st_mtime``: read or written) first."""
    kept, found = folder(), []
    for path in kept.iterdir() if kept is not None and kept.is_dir() else ():
        with suppress(OSError):  # another process may delete it
            if _ENTRY.fullmatch(path.name) and path.is_file():
                found.append((path, path.stat()))
    return sorted(found, key=lambda entry: -entry[1].st_mtime)


def clear() -> int:
    """Delete all entries; returns how many. Raises DataError if the folder cannot be written to."""
    found, kept = entries(), folder()
    try:
        for path, _ in found:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be deleted ({error.strerror}): delete it yourself") from None
    if kept is not None:
        files.sweep(kept)
    return len(found)


def _trim(new: Path) -> None:
    """Delete the entries used longest ago until the rest fit, but never the new one."""
    total = 0
    for path, status in entries():
        total += status.st_size
        if total > MOST and path != new:
            path.unlink(missing_ok=True)
