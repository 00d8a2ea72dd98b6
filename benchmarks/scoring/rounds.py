"""Arms timed in turn, round after round, and what came of them: ratios to the floor, agreement, AUROC, memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.scoring.arms import FLOOR, GROUPS, Arm, Scored, floor, ours, truths
from benchmarks.scoring.cases import Case, Spec, open_case
from benchmarks.scoring.peers import missing, peers
from gradshield.errors import UsageError
from gradshield.gradients import agreement
from gradshield.scanning.baselines import auroc
from gradshield.selectors import parse_aggregate

Told = Callable[[str, int], None]
"""Told what is at work, and how many steps of work are done with it."""


class Time(NamedTuple):
    """Seconds of one run by the clock, and of the processor, which sums over threads."""

    clock: float
    processor: float


@dataclass(eq=False)
class Measured:
    """What one case gave: for each arm a list over the rounds, of its own time and of the floor's just before it."""

    arms: list[Arm]
    scored: dict[str, Scored]
    left_out: dict[str, str]
    times: dict[str, list[Time]] = field(default_factory=dict)
    floors: dict[str, list[Time]] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)


def every(case: Case) -> list[Arm]:
    """All arms of a case, ours and the peers'."""
    return [*ours(case), *peers()]


def rows_of(arm: Arm, case: Case) -> Sequence[Any]:
    """The rows that an arm is timed on."""
    return case.few if arm.slow else case.rendered


def try_out(case: Case, told: Told) -> Measured:
    """Run every arm once on all rows, untimed, and keep its values; what cannot run here is left out with its reason."""
    found = Measured([], {}, {})
    timed = {arm.name for arm in every(case)}
    for arm in [*truths(), *every(case)]:
        told(arm.name, 1)
        reason = missing(arm) if arm.group == "peer" else None
        if reason is None:
            try:
                with arm.ready(case, case.rendered) as run:
                    found.scored[arm.name] = run()
            except UsageError as error:  # an engine that says it cannot, such as finite differences in half precision
                reason = str(error)
            except Exception as error:
                if arm.group != "peer":
                    raise
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if reason is not None:
            found.left_out[arm.name] = reason
        elif arm.name in timed:
            found.arms.append(arm)
    return found


def time_rounds(case: Case, found: Measured, rounds: int, told: Told) -> None:
    """Every arm once a round, each just after the floor of its own rows, so that both meet the same machine.

    The order is turned by a third of its length each round, so that none is always first.
    """
    base = next(arm for arm in found.arms if arm.name == FLOOR)
    for turn in range(rounds):
        start = turn * max(1, len(found.arms) // 3) % len(found.arms)
        for arm in [*found.arms[start:], *found.arms[:start]]:
            told(arm.name, 1)
            rows = rows_of(arm, case)
            found.floors.setdefault(arm.name, []).append(_timed(base, case, rows))
            found.times.setdefault(arm.name, []).append(_timed(arm, case, rows))


def _timed(arm: Arm, case: Case, rows: Sequence[Any]) -> Time:
    """One run, what makes it ready not counted."""
    with arm.ready(case, rows) as run:
        gc.collect()
        _finish(case.device)
        used, began = time.process_time(), time.perf_counter()
        scored = run()
        _finish(case.device)
        return Time(time.perf_counter() - began - scored.outside, time.process_time() - used)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory ----------------------------------------------------------------------------------------------------------


def measure_peaks(case: Case, found: Measured, told: Told) -> None:
    """Peak memory of each arm over the loaded model, in a process of its own, in MB (10⁶ bytes).

    On a CPU it is the process's resident memory: its high-water mark during one run, the direction and whatever else makes
    the arm ready included, less what it held when the model and the rows were loaded and one forward pass had run. On
    CUDA it is the same of the allocator's figures. None where neither can be read.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scoring.rounds", "transformers.models.llama", "peft"])
    spec = replace(case.spec, disposable=True)
    workers = 1 if case.device.type == "cuda" else max(1, min(2, case.spec.threads))
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1) as pool:
        waiting = [(arm.name, pool.submit(peak, spec, arm.name)) for arm in found.arms]
        try:
            for name, future in waiting:
                told(f"memory of {name}", 1)
                found.peaks[name] = future.result()
        except BaseException:  # Ctrl-C above all: what waits its turn is not to be run first
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def peak(spec: Spec, name: str) -> float | None:
    """The peak of one arm on all rows, in this process."""
    case = open_case(spec)
    arm = next(a for a in every(case) if a.name == name)
    with floor(case, case.rendered[:1]) as warm:
        warm()
    before = _begin(case.device)
    if before is None:
        return None
    with arm.ready(case, case.rendered) as run:
        run()
        _finish(case.device)
    after = torch.cuda.max_memory_allocated(case.device) if case.device.type == "cuda" else _resident("VmHWM")
    return None if after is None else max(0.0, (after - before) / 1e6)


def _begin(device: torch.device) -> int | None:
    """Bytes held now, with the high-water mark set back to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed would hide what the arm takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):  # no Linux, or no glibc
        return None
    return _resident("VmRSS")


def _resident(kind: str) -> int | None:
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return 1024 * int(found[1]) if found else None


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures(case: Case, found: Measured) -> list[dict[str, Any]]:
    """One line an arm, the floor first: the median of its ratios to the floor just before it, and their range."""
    lines = [_line(case, found, arm) for arm in found.arms]
    return sorted(lines, key=lambda line: GROUPS.index(line["group"]))


def _line(case: Case, found: Measured, arm: Arm) -> dict[str, Any]:
    own, base = np.array(found.times[arm.name]), np.array(found.floors[arm.name])  # (rounds, 2) each
    ratios, processor = (own / base).T
    rows, scored = rows_of(arm, case), found.scored[arm.name]
    return {
        "model": case.spec.model,
        "name": arm.name,
        "group": arm.group,
        "rows": len(rows),
        "tokens": sum(len(t.ids) for row in rows for t in row.sequences),
        "seconds": float(np.median(own[:, 0])),
        "ratio_to_floor": float(np.median(ratios)),
        "low": float(ratios.min()),
        "high": float(ratios.max()),
        "processor_seconds": float(np.median(own[:, 1])),
        "processor_ratio": None if scored.outside else float(np.median(processor)),
        "peak_mb": found.peaks.get(arm.name),
        **_agreement(found, arm),
        **_aurocs(case, arm, scored),
    }


def _agreement(found: Measured, arm: Arm) -> Mapping[str, float | None]:
    """Spearman's rank correlation with the oracle over all rows, and ‖f − o‖/‖o‖."""
    if arm.truth is None:
        return {"agreement": None, "relative_error": None}
    oracle, values = found.scored[arm.truth].values, found.scored[arm.name].values
    assert oracle is not None and values is not None
    one = agreement(arm.name, values.ravel(), oracle.ravel())
    return {"agreement": one.spearman, "relative_error": one.relative_error}


def _aurocs(case: Case, arm: Arm, scored: Scored) -> Mapping[str, float | None]:
    """AUROC of the row's sum, and of the default aggregate where there are per-token values."""
    truth = case.truth
    whole = truth is not None and scored.values is not None and scored.values.shape == (1, len(truth))
    if not whole or truth is None or scored.values is None or len(set(truth)) < 2:
        return {"auroc": None, "auroc_push": None}
    push = parse_aggregate("push")
    found = {"auroc": auroc(truth, scored.values[0]).auroc, "auroc_push": None}
    if scored.tokens is not None:
        found["auroc_push"] = auroc(truth, [push(t) for t in scored.tokens]).auroc
    return found
