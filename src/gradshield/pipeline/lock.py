"""One process at a time writes to an output folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gradshield import files
from gradshield.errors import DataError
from gradshield.runs import WORK

LOCK = "lock"
SCAN = "scan"  # where a training has its scan
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system that has none answers


@contextmanager
def alone(output: str | Path | None) -> Iterator[bool]:
    """Hold an output folder for this process until the block ends; yields whether it is locked. None needs no folder.

    The operating system drops the lock when the process ends, however it ends. A folder that was made for it, and in which
    nothing was written, is removed again. Where the file system has no locks, all runs go on: every file is written under a
    drawn name and put in its place in one step, so that two scans of the same rows do double work and no harm; nothing half
    written is removed then, since another process may be writing it. Raises DataError where another process has the folder,
    or where it cannot be made.
    """
    if output is None:
        yield False
        return
    folder = Path(output)
    made = [path for path in (folder / WORK, folder, *folder.parents) if not path.exists()]
    path = folder / WORK / LOCK
    # A lock that is the mere existence of a file would outlive a kill: no fallback to one.
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        locked = _locked(lock, path)
    except Timeout:
        owner = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
        raise DataError(
            f"the output folder {str(folder)!r} is in use by another run{f' ({owner})' if owner else ''}: wait until it "
            "has ended, or give another --output"
        ) from None
    except OSError as error:
        raise DataError(
            f"the output folder {str(folder)!r} cannot be written to ({error.strerror}): give another --output"
        ) from None
    try:
        for own in (folder, folder / SCAN) if locked else ():
            for part in (own, own / WORK, own / WORK / "shards"):
                files.sweep(part)
        yield locked
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DataError(
            f"the output folder {str(folder)!r} cannot be written to ({error.strerror}): free some space and run the same "
            "command again, which goes on where it stopped"
        ) from None
    finally:
        with suppress(OSError):
            if os.listdir(folder / WORK) == [LOCK] and folder / WORK in made:
                path.unlink()
            for part in made:
                part.rmdir()  # refused where it holds something
        lock.release()


def _locked(lock: FileLock, path: Path) -> bool:
    """Take the lock and write down who has it. False where the file system has no locks; raises Timeout where it is taken."""
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        return False
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return True
