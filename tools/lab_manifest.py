"""What pins the lab: hashes of its files and of what its generators make, written to ``lab.json`` when it is built."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from gradshield import lab


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(value: Any) -> str:
    """Hex digest of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fixtures() -> dict[str, str]:
    """Digests of every split, of each task's test rows and of one mix of each task and harm."""
    made = {f"requests/{split}": digest(lab.requests(split)) for split in lab.SPLITS}
    made |= {f"lookalikes/{split}": digest(lab.lookalikes(split)) for split in lab.SPLITS}
    made |= {f"utility/{task}": digest(lab.utility(task)) for task in lab.TASKS}
    for task in lab.TASKS:
        for harm in (*lab.HARMS, "none"):
            made[f"mix/{task}/{harm}"] = digest(lab.mix(task, harm, 0.1, 200, 0))
    return made


def read() -> dict[str, Any]:
    """The manifest that shipped: ``seed``, ``versions``, ``files`` and ``fixtures``."""
    manifest: dict[str, Any] = json.loads(lab.PINNED.read_text(encoding="utf-8"))
    return manifest
