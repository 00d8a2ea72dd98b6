"""Atomic writes: a file appears complete or not at all, even if the process is killed or several write at once; small reads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gradshield.errors import DataError

PART = ".part"
_OURS = re.compile(rf"\..+\.[0-9a-f]{{12}}{re.escape(PART)}", re.DOTALL)  # as `drawn` names them


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; when the block ends, the file there replaces ``path`` atomically.

    On any error an older file at ``path`` is left unchanged. Raises OSError if the file cannot be written, including by
    safetensors, which raises an error type of its own.
    """
    with drawn(path) as folder:
        part = folder / path.name
        yield part
        _open_to_others(part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Text in UTF-8; lone surrogates, as in a file name that is not UTF-8, are escaped."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_text(path: Path, what: str, remedy: str = "check its path") -> str:
    """A small file of a user in UTF-8, without its byte order mark. Raises DataError, which calls it ``what``."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"{what} {str(path)!r} cannot be read ({reason}): {remedy}") from None


def read_json(path: Path, what: str) -> Any:
    """A small JSON file of a user. Raises DataError, which calls it ``what``."""
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} {str(path)!r} is not JSON ({error}): fix it") from None


def read_labels(path: Path | None, what: str) -> list[int] | None:
    """The rows' labels, a JSON list of 0 and 1; None without a file. Raises DataError, which calls the file ``what``."""
    if path is None:
        return None
    value = read_json(path, what)
    if not isinstance(value, list) or not all(isinstance(label, int) and label in (0, 1) for label in value):
        raise DataError(f"{what} {str(path)!r} is not a list of 0 and 1: give one label for every row, as JSON")
    return [int(label) for label in value]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def drawn(path: Path) -> Iterator[Path]:
    """A temporary folder next to ``path``, removed when the block ends.

    Its name is random, since processes on different machines may share a folder and a process id. It is a folder, not a
    file, since a library may write extra files next to the path it is given. A failed write by safetensors raises OSError.
    """
    folder = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PART}")
    folder.mkdir()
    try:
        yield folder
    except SafetensorError as error:
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def instead(folder: Path, last: str, earlier: Iterable[str]) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` once all are complete, so that a full disk destroys nothing.

    The old ``last``, the file that marks the others as one set, and the files named in ``earlier`` are deleted first; the
    new ``last`` is moved last.
    """
    with drawn(folder / "new") as new:
        yield new
        written = [path for path in new.rglob("*") if path.is_file()]
        for path in written:
            _open_to_others(path)
        for name in (last, *earlier):
            (folder / name).unlink(missing_ok=True)
        for path in sorted(written, key=lambda path: path == new / last):
            os.replace(path, folder / path.relative_to(new))


def _open_to_others(file: Path) -> None:
    """Give a file the usual mode: safetensors makes it readable by the owner only."""
    with suppress(PermissionError):  # a file system without modes
        file.chmod(file.parent.stat().st_mode & 0o666)


def sweep(folder: Path, age: float = 0.0) -> None:
    """Delete the temporary folders that killed processes left in a folder, those that are at least ``age`` seconds old.

    With 0, no other process may be writing there.
    """
    for part in folder.glob(f".*{PART}"):
        if _OURS.fullmatch(part.name):
            with suppress(FileNotFoundError):  # its process has finished
                if time.time() - part.stat().st_mtime >= age:
                    shutil.rmtree(part, ignore_errors=True)


def own_name(name: str) -> str:
    """The own name of a file or folder; a relative one, such as a model of the hub, is as it was typed."""
    path = Path(name)
    return path.name if path.is_absolute() else name
