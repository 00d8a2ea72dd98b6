"""One process at a time writes to an output folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from gradshield import files
from gradshield.errors import DataError
from gradshield.runs import WORK

LOCK = "lock"
SCAN = "scan"  # where a training has its scan
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def alone(output: str | Path | None) -> Iterator[bool]:
    """Have the folder for this process alone until the block ends, which is told whether it is locked; None needs no folder.

    The operating system lets go of the lock when the process ends, however it ends. A folder that is made for it, and in which
    nothing was written, is taken away again. Where the file system or the platform knows no locks, all go on: every
    file is written under a drawn name and put in its place in one step, so that two scans of the same rows do double
    work and no harm; nothing half written is taken away then, since another process may be writing it. Raises DataError
    where another process has the folder, or where it cannot be made.
    """
    if output is None:
        yield False
        return
    folder = Path(output)
    made = [path for path in (folder / WORK, folder, *folder.parents) if not path.exists()]
    try:
        handle, locked = _locked(folder)
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
                (folder / WORK / LOCK).unlink()
            for path in made:
                path.rmdir()  # refused where it holds something
        handle.close()


def _locked(folder: Path) -> tuple[TextIO, bool]:
    """The lock file, open, and whether it is locked: it is not where there are no locks."""
    (folder / WORK).mkdir(parents=True, exist_ok=True)
    path = folder / WORK / LOCK
    while True:
        handle = path.open("a+", encoding="utf-8")
        locked = _lock(handle)
        if locked is False:
            handle.seek(0)
            owner = handle.read(200).strip()
            handle.close()
            raise DataError(
                f"the output folder {str(folder)!r} is in use by another run{f' ({owner})' if owner else ''}: wait until it "
                "has ended, or give another --output"
            )
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                break
        handle.close()  # another process took the file away between opening and locking
        (folder / WORK).mkdir(parents=True, exist_ok=True)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    return handle, bool(locked)


def _lock(handle: TextIO) -> bool | None:
    """Whether this process has the lock; None where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True
