"""The content of files, on disk or at any fsspec URL, and what a job leaves in its folder for people to save.

A content is named by its file's id, and is complete where it is found.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from gradshield import files
from gradshield.runs import CERTIFICATE

BLOCK = 1 << 20
ABANDONED = 24 * 3600  # seconds after which nobody is still storing a content
ID = re.compile(r"file-[0-9a-f]{32}")


class Content:
    """A folder of contents."""

    def __init__(self, url: str) -> None:
        self.fs, self.root = fsspec.url_to_fs(url)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.fs.makedirs(self.root, exist_ok=True)

    def keep(self, id: str, source: IO[bytes]) -> tuple[int, str]:
        """Store a content under an id: its bytes and SHA-256. After an error nothing is there. Raises OSError."""
        if self.local:
            with files.replacing(Path(self._at(id))) as path, path.open("wb") as out:
                return _copied(source, out)
        part = f"{self._at(id)}.{secrets.token_hex(6)}.part"
        try:
            with self.fs.open(part, "wb") as out:
                done = _copied(source, out)
            self.fs.mv(part, self._at(id))
        except BaseException:
            self._remove(part)
            raise
        return done

    def sweep(self) -> None:
        """Delete what killed processes left of contents a day ago or earlier, where files are local."""
        if self.local:
            files.sweep(Path(self.root), ABANDONED)

    def read(self, id: str) -> Iterator[bytes]:
        """A content in blocks. Raises FileNotFoundError before the first one."""
        return _blocks(self.fs.open(self._at(id), "rb"))

    def fetch(self, id: str, to: Path) -> None:
        """Copy a content to a local file, which appears whole. Raises FileNotFoundError."""
        with files.replacing(to) as part, self.fs.open(self._at(id), "rb") as source, part.open("wb") as out:
            shutil.copyfileobj(source, out, BLOCK)

    def delete(self, id: str) -> None:
        self._remove(self._at(id))

    def ready(self) -> bool:
        """Whether the folder is there."""
        return bool(self.fs.exists(self.root))

    def _at(self, id: str) -> str:
        if not ID.fullmatch(id):
            raise ValueError("not the id of a file")
        return f"{self.root}/{id}"

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(path)


def _copied(source: IO[bytes], out: IO[bytes]) -> tuple[int, str]:
    """Copy a content; its bytes and SHA-256."""
    sha, size = hashlib.sha256(), 0
    for block in _blocks(source):
        sha.update(block)
        size += len(block)
        out.write(block)
    return size, sha.hexdigest()


def _blocks(source: Any) -> Iterator[bytes]:
    with source:
        while block := source.read(BLOCK):
            yield block


class Result(NamedTuple):
    """A file at ``path`` in a job's folder: its ``name`` on the wire ("" if it is not there), and its ``title`` for operators."""

    path: str
    name: str
    title: str


RESULTS = (
    Result("report.html", "report.html", "Report of the training"),
    Result("scan/report.html", "scan-report.html", "Report of the scan"),
    Result(CERTIFICATE, CERTIFICATE, "Certificate"),
    Result("scan/kept.jsonl", "", "Kept rows"),  # the caller has them, and a copy would count as the project's
    Result("scan/removed.jsonl", "removed.jsonl", "Removed rows"),
    Result("scan/quarantine.jsonl", "quarantine.jsonl", "Rows that could not be used"),
    Result("scan/scores.parquet", "scores.parquet", "Scores"),
    Result("outputs-after.jsonl", "answers.jsonl", "Answers of the safety check"),
)


def results(folder: Path) -> list[tuple[Result, int]]:
    """The results that there are and that are not empty, with their bytes."""
    sizes = ((one, (folder / one.path).stat().st_size) for one in RESULTS if (folder / one.path).is_file())
    return [(one, size) for one, size in sizes if size]


def certificate(folder: Path) -> dict[str, Any] | None:
    """What may be claimed of a job's model; None if there is no certificate, or if it cannot be read."""
    try:
        made = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        return made if isinstance(made["predicate"]["judges"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
