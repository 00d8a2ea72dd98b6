"""Whole scans from a folder of weights to the report, split by stage, in floors of the same rows, both in processor time.

Three arms a number of rows: ``before`` measures FIHS on every row and keeps nothing (``screen:all``, no cache), ``first`` is the
default on a model that was never scanned, ``cached`` the same once more. The stages are those a scan reports as its progress;
reading rows, which is a part of scoring them, is timed at its one entry.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.scoring.arms import floor
from benchmarks.scoring.cases import Case, Spec, open_case
from gradshield import cache
from gradshield.models import loading
from gradshield.scanning.scan import scan
from gradshield.scanning.settings import ScanSettings
from gradshield.selectors.screen import Look

COUNTS = (100, 1000)  # rows of a scan
ARMS = {"before": "screen:all", "first": "screen", "cached": "screen"}
READING, SCORING, REST = "reading rows", "scoring rows", "everything else"
STAGES = (
    "loading the model",
    "rendering rows",
    "asking the probes",
    "reading known requests",
    READING,
    "finding the direction",
    "checking the engine",
    "scoring known rows",
    SCORING,
    "naming the harm",
    "writing",
    REST,
)


class Clock:
    """A scan's progress as processor seconds of each stage; ``first`` are the clock's until the first rows are scored."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.first = float("nan")
        self._began, self._last = time.perf_counter(), time.process_time()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.add(stage if done else REST)
        if stage == SCORING and done and self.first != self.first:
            self.first = time.perf_counter() - self._began

    def add(self, stage: str) -> None:
        """Count the time since the last call for a stage."""
        now = time.process_time()
        self.seconds[stage] += now - self._last
        self._last = now

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Count the first look at rows for a stage of its own."""
        real = Look.measure

        def measure(look: Look, *given: Any) -> Any:
            self.add(SCORING)
            found = real(look, *given)
            self.add(READING)
            return found

        with patch.object(Look, "measure", measure):
            yield


def measure(spec: Spec, counts: Sequence[int], rounds: int, told: Callable[[str], None]) -> list[dict[str, Any]]:
    """One line an arm and number of rows: the median share of each stage in floors, and the range of the whole."""
    found = []
    for count in counts:
        case = open_case(replace(spec, rows=count))
        each: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                for arm in ARMS:
                    told(f"a scan of {count:,} rows, {arm}")
                    each[arm].append(_once(case, arm, Path(folder)))
        for arm, times in each.items():
            ratios = {stage: statistics.median(t[stage] / t["floor"] for t in times) for stage in STAGES}
            whole = [sum(t[stage] for stage in STAGES) / t["floor"] for t in times]
            found.append(
                {
                    "model": spec.model,
                    "rows": len(case.rendered),
                    "tokens": sum(len(t.ids) for row in case.rendered for t in row.sequences),
                    "arm": arm,
                    "stages": ratios,
                    "whole": statistics.median(whole),
                    "low": min(whole),
                    "high": max(whole),
                    "floor_seconds": statistics.median(t["floor"] for t in times),
                    "first_row_seconds": statistics.median(t["first"] for t in times),
                }
            )
    return found


def _once(case: Case, arm: str, folder: Path) -> dict[str, float]:
    """Processor seconds of each stage and of the floor just before it, and the clock's until the first row is scored."""
    with floor(case, case.rendered) as run:
        run()
        began = time.process_time()
        run()
        base = time.process_time() - began
    kept = "" if arm == "before" else str(folder / "cache")
    with patch.dict(os.environ, {cache.VARIABLE: kept}):
        clock = Clock()
        with clock.reading():
            loaded = loading.load(case.name, device=case.spec.device, dtype=case.dtype)
            clock("loading the model", 1, 1)
            scan(
                [case.source[row.row] for row in case.rendered] if case.source else [],
                model=loaded,
                output=folder / arm,
                settings=ScanSettings(selector=ARMS[arm]),
                probing=case.probing,
                progress=clock,
            )
        clock.add(REST)
    return {**dict.fromkeys(STAGES, 0.0), **clock.seconds, "floor": base, "first": clock.first}


def cells(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of one model: a line a stage, a column for each number of rows and arm."""
    head = ("stage", *(f"{line['rows']:,} {line['arm']}" for line in lines))
    body = [(stage, *(f"{line['stages'][stage]:.2f}" for line in lines)) for stage in STAGES]
    whole = ("whole scan", *(f"{line['whole']:.2f} ({line['low']:.2f}–{line['high']:.2f})" for line in lines))
    first = ("s to the first row", *(f"{line['first_row_seconds']:.1f}" for line in lines))
    return [head, *body, whole, first]
