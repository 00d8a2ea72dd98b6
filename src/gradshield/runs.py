"""A run's output folder: its lock, the digests of its inputs, and its JSON files.

The manifest is written last: its presence means a finished run. Every file is written atomically.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from fnmatch import fnmatch
from functools import cache
from glob import has_magic
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from gradshield import files
from gradshield.errors import DataError
from gradshield.files import write_text
from gradshield.manifests import Manifest, Model, Record
from gradshield.registry import plugins
from gradshield.types import EvalResult

if TYPE_CHECKING:
    from gradshield.models.loading import LoadedModel

_MEASURED = TypeAdapter(EvalResult)
M = TypeVar("M", bound=Manifest)
MANIFEST, CERTIFICATE = "manifest.json", "certificate.json"
WORK = ".gradshield"
LOCK = "lock"
SCAN = "scan"  # folder of a training's own scan
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PACKAGES = ("gradshield", "torch", "transformers", "peft", "trl", "datasets", "numpy", "scipy", "scikit-learn")
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from a file system without locks


@contextmanager
def alone(output: str | Path | None) -> Iterator[bool]:
    """Lock an output folder for this process until the block ends; yields whether it is locked. With None there is no folder.

    The operating system releases the lock when the process ends, however it ends. A folder that this call created and nothing
    was written to is removed again. On a file system without locks the run continues: all writes are atomic, so two scans of
    the same rows waste work but corrupt nothing; temporary files then stay, since another process may be writing them. Raises
    DataError if another process holds the folder, or if it cannot be created.
    """
    if output is None:
        yield False
        return
    folder = Path(output)
    made = [path for path in (folder / WORK, folder, *folder.parents) if not path.exists()]
    path = folder / WORK / LOCK
    # A lock that is only a file's existence would survive a kill: no fallback to one.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except Timeout:
        owner = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        raise _unusable(
            folder,
            f"is in use by another run{f' ({owner})' if owner else ''}",
            "wait until it ends, or give another --output",
        ) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise _unusable(folder, f"cannot be written to ({error.strerror})") from None
    locked = lock.is_locked
    try:
        for own in (folder, folder / SCAN) if locked else ():
            for part in (own, own / WORK, own / WORK / "shards"):
                files.sweep(part)
        yield locked
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _unusable(
            folder,
            f"cannot be written to ({error.strerror})",
            "free some space and run the same command again, which resumes where it stopped",
        ) from None
    finally:
        with suppress(OSError):
            if os.listdir(folder / WORK) == [LOCK] and folder / WORK in made:
                path.unlink()
            for part in made:
                part.rmdir()  # fails if it is not empty
        lock.release()


def check(output: str | Path, written: Sequence[str], mark: str, *, data: Any = None, read: Sequence[Any] = ()) -> None:
    """Raises DataError if a command cannot write to a folder, or would overwrite what is not its own; creates nothing.

    That is its input, another command's results, and files that GradShield did not write. ``written`` are patterns of the
    files it writes, ``read`` the models it starts from, and ``mark`` is a file that this command alone writes to its folder.
    """
    folder = Path(output)
    _check_writable(folder)
    for model in read:
        for name in (_name(model), getattr(model, "adapter", None)):
            if name and folder.is_dir() and os.path.isdir(name) and folder.samefile(name):
                raise _unusable(folder, f"is the folder of the model {str(name)!r}, which would be overwritten")
    there = sorted({path for pattern in written for path in folder.glob(pattern)})
    if isinstance(data, str | Path):
        if any(_matches(str(data), folder / name) for name in written):
            raise DataError(
                f"the pattern {str(data)!r} matches files that are written to the output folder, which would be read as data "
                "the next time: give another --output"
            )
        if os.path.exists(data) and folder.is_dir() and folder.samefile(data):
            raise _unusable(folder, "is the folder of the data, and what is written there would be read as data")
        if os.path.exists(data) and any(path.samefile(data) for path in there):
            raise DataError(
                f"the data {str(data)!r} is in the output folder under the name of an output file: give another --output"
            )
    if there and not _used_before(folder):
        raise _unusable(
            folder,
            f"holds {there[0].name!r} and was not written by GradShield",
            "give another --output, so that nothing is overwritten",
        )
    if folder / MANIFEST in there and not (folder / mark).exists():
        raise _unusable(folder, "holds the results of another command, which would be overwritten")


def _unusable(folder: Path, why: str, remedy: str = "give another --output") -> DataError:
    return DataError(f"the output folder {str(folder)!r} {why}: {remedy}")


def _check_writable(folder: Path) -> None:
    nearest = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if not nearest.is_dir():
        raise _unusable(folder, f"cannot be created ({nearest} is a file)")
    if not os.access(nearest, os.W_OK):
        raise _unusable(folder, "cannot be written to")


def _matches(pattern: str, path: Path) -> bool:
    """Whether a pattern of names (not a file's own name) matches a path."""
    if not has_magic(pattern) or os.path.exists(pattern):
        return False
    wanted, found = os.path.abspath(pattern), os.path.abspath(path)
    if "**" in wanted:  # any number of folders, none too
        return fnmatch(found, wanted) or fnmatch(found, wanted.replace(f"**{os.sep}", ""))
    return wanted.count(os.sep) == found.count(os.sep) and fnmatch(found, wanted)


def _name(model: Any) -> str | Path | None:
    """The name or path of a model: as given, or as a loaded or transformers model records it; None if unknown."""
    if model is None or isinstance(model, str | Path):
        return model
    found = getattr(model, "name", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return found if isinstance(found, str) else None


def _used_before(folder: Path) -> bool:
    """Whether a command wrote here before: it left a manifest, or was stopped and left its working folder."""
    if (folder / WORK).is_dir():
        return True
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return "gradshield" in found["versions"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return False


def prepare(output: str | Path) -> Path:
    """Create the output folder with its working folder. Raises DataError if it cannot be written to."""
    folder = Path(output)
    _check_writable(folder)
    (folder / WORK / "shards").mkdir(parents=True, exist_ok=True)
    return folder


def versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a number, plugins included."""
    return {"python": platform.python_version(), **_installed(), **plugins()}


@cache  # every shard's and arm's key needs it, and the lookup is slow
def _installed() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def model_of(loaded: LoadedModel) -> Model:
    """A loaded model in a manifest."""
    return Model(
        name=loaded.name,
        sha256=loaded.digest,
        kind=type(loaded.model).__name__,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        adapter=loaded.adapter,
    )


def read_manifest(folder: Path, kind: type[M]) -> M:
    """The manifest in the folder of a finished run. Raises DataError if there is none of this kind, or if it is damaged."""
    try:
        return kind.model_validate(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = error.errors()[0]
        why = f"{'.'.join(map(str, wrong['loc'])) or 'the whole'}: {wrong['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "it is not JSON"
    raise DataError(
        f"{str(folder)!r} is not the folder of a finished {kind.verb}, or its {MANIFEST} was changed ({why}): run "
        f"`gradshield {kind.verb}` into it first"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON: records and dataclasses as their fields, and numbers that are not finite as null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, default=str) + "\n")


def finite(value: Any) -> Any:
    """The same value in JSON form, with NaN and infinities as None."""
    if isinstance(value, Record):
        return finite(value.plain())
    if is_dataclass(value) and not isinstance(value, type):
        return finite(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Write values as JSON, one a line."""
    write_text(path, "".join(json.dumps(finite(v), ensure_ascii=False, default=str) + "\n" for v in values))


def measured(value: Any) -> EvalResult:
    """A measurement from its JSON form. Raises ValueError if it is damaged."""
    return _MEASURED.validate_python(value)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, its keys and the members of sets sorted; other types count as their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_ordered).encode()).hexdigest()


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
