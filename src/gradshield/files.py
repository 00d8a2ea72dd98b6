"""Files that appear whole or not at all, whatever stops the process that writes them, and however many write at once."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to: what stands there when the block ends takes the place of ``path`` in one step.

    Whatever goes wrong, an older file at ``path`` stays as it was. Raises OSError where nothing can be written, also where
    safetensors says so in words of its own.
    """
    with drawn(path) as folder:
        part = folder / path.name
        yield part
        _open_to_others(part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Text in UTF-8; halves of characters, as in the name of a file that is not UTF-8, are written as escapes."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def drawn(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` that is gone when the block ends.

    Its name is drawn, since processes of several machines that share a folder may have one number. It is a folder, and no
    file, since a library may write under a name of its own beside the one that it is given. What safetensors could not write
    is an OSError.
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
    """A folder for files that go into ``folder`` once all of them are whole, so that a full disk costs nothing that is there.

    Only then goes the old file ``last``, which says that the others belong together, with what is there of ``earlier``; the
    new one comes last.
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
    """The mode of any new file: safetensors writes for the owner alone."""
    with suppress(PermissionError):  # a file system without modes
        file.chmod(file.parent.stat().st_mode & 0o666)


def sweep(folder: Path) -> None:
    """Take away what killed processes left half written in a folder that no other process is writing to."""
    for part in folder.glob(f".*{PART}"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
