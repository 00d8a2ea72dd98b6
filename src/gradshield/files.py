"""Files that appear whole or not at all, whatever stops the process that writes them, and however many write at once."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to: what stands there when the block ends takes the place of ``path`` in one step.

    The name is drawn, since processes of several machines that share a folder may have one number. Whatever goes wrong,
    an older file at ``path`` stays as it was. Raises OSError where nothing can be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PART}")
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Take away what killed processes left half written in a folder that no other process is writing to."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)
