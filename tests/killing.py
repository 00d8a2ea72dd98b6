"""What runs in the other processes of the tests of kills and locks: a scan on the lab's model that may end at any moment."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradshield import lab, runs
from gradshield import scan as scan_rows
from gradshield.models import loading
from gradshield.training.course import lab_probing

ROWS = 200
TOUCHES = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.listdir", "os.truncate"})


def context() -> Any:
    """Processes that begin with everything imported, so that a scan takes the time of a scan."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.killing"])
    return found


def rows() -> list[Any]:
    """A small mix, some of it harmful."""
    found, labels = lab.mix("topic", harm="explicit", ratio=0.1)
    harmful = [row for row, label in zip(found, labels, strict=True) if label]
    return [*found[: ROWS - 20], *harmful[:20]]


class Lockless(runs.FileLock):
    """On a file system without locks."""

    def acquire(self, *_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def scan(data: Path, output: Path, touched: Callable[[], None] = lambda: None, locked: bool = True) -> None:
    """Scan; ``touched`` is called before every file or folder of the output is opened, moved, made or taken away."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not locked:
        runs.FileLock = Lockless
    own = str(output)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in TOUCHES and arguments and str(arguments[0]).startswith(own):
            touched()

    sys.addaudithook(heard)
    loaded = loading.load(lab.checkpoint("aligned"), dtype="float32")
    scan_rows(str(data), model=loaded, output=output, probing=lab_probing())


def counting(data: Path, output: Path, told: Any) -> None:
    """An undisturbed scan that tells how often it touched a file."""
    count = [0]

    def touched() -> None:
        count[0] += 1

    scan(data, output, touched)
    told.put(count[0])


def killed_at(data: Path, output: Path, number: int) -> None:
    """A scan that is killed just before it touches a file for the so-manyeth time."""
    left = [number]

    def touched() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    scan(data, output, touched)


def without_lock(data: Path, output: Path) -> None:
    """A scan that thinks the folder its own, as where a file system knows no locks."""
    scan(data, output, locked=False)


def held(output: Path, ready: Any) -> None:
    """Have a folder until killed."""
    with runs.alone(output):
        ready.set()
        signal.pause()


def result(output: Path) -> dict[str, Any]:
    """What a scan found, bit for bit; of the manifest all but the time it took and where it was asked to write."""
    found: dict[str, Any] = {
        name: (output / name).read_bytes()
        for name in ("kept.jsonl", "removed.jsonl", "quarantine.jsonl", "scores.parquet")
    }
    manifest = json.loads((output / "manifest.json").read_text())
    manifest["results"].pop("seconds")
    return {**found, "manifest": manifest}
