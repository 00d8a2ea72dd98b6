"""``gradshield cache``: what is kept of models that were scanned."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from gradshield import cache as kept
from gradshield.cli.common import out, plain
from gradshield.report.text import duration


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all entries.")] = False,
) -> None:
    """List what is kept of scanned models, so that the next scan of the same model starts sooner.

    An entry holds what a scan found on a model before its first row: its answers to the probes, the direction of its unsafety
    score, how it reads known requests. No row of a dataset is in it. GRADSHIELD_CACHE names another folder; if it is empty,
    nothing is kept.
    """
    folder = kept.folder()
    if folder is None:
        out.print("nothing is kept: GRADSHIELD_CACHE is empty")
        return
    if clear:
        out.print(f"{kept.clear()} entries deleted from {plain(str(folder))}")
        return
    found = kept.entries()
    for entry in found:
        name, _, digest = entry.path.stem.partition("-")
        used = duration(max(0.0, time.time() - entry.used))
        out.print(f"{plain(name):10} {plain(digest[:12]):12} {entry.size / 2**20:9.1f} MiB   used {used} ago")
    whole = sum(entry.size for entry in found) / 2**20
    out.print(f"{len(found)} entries, {whole:.1f} of {kept.MOST / 2**20:,.0f} MiB, in {plain(str(folder))}")
