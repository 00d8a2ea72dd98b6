"""The cost of a scan, without running it: rows read and counted, the engine chosen, and some shards timed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradshield.data import Format
from gradshield.scanning import shards
from gradshield.scanning.preparing import scored_model
from gradshield.scanning.rows import prepare
from gradshield.scanning.scoring import ready
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.selectors import Fihs
from gradshield.types import Floats, Progress, Quarantined, quiet

if TYPE_CHECKING:
    from peft import PeftConfig

PATIENCE = 20.0  # seconds for timing


@dataclass(frozen=True)
class Spread:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """The size and cost of a scan.

    ``read_as``   how many rows were read in which way: the shape, and where there was a choice, what was chosen
    ``unusable``  why rows cannot be scored: each kind of reason, the line of its first row, and the number of rows
    ``engine``    the chosen engine of a FIHS-based selector; empty for others
    ``before``    seconds of everything that does not grow with the rows, with a loaded model
    ``seconds``   to measure all rows in one process
    ``memory``    peak bytes on the device, on a CPU of the process; 0 if unknown
    """

    rows: int
    scored: int
    read_as: Mapping[str, int]
    unusable: tuple[tuple[str, int, int], ...]
    tokens: int
    loss_tokens: int
    longest: int
    engine: str
    shards: int
    sampled: int
    sampled_rows: int
    before: float
    seconds: Spread
    memory: int


def estimate(
    data: Any,
    *,
    model: Any,
    tokenizer: Any = None,
    peft_config: PeftConfig | None = None,
    training_args: Any = None,
    settings: ScanSettings | None = None,
    probing: Probing | None = None,
    format: str | Format | None = None,
    patience: float = PATIENCE,
    progress: Progress = quiet,
) -> Estimate:
    """Everything that `scan` does before it measures rows, then a random sample of its shards, timed. Nothing is written.

    Parameters
    ----------
    patience
        Most seconds for timing. All other parameters, and the errors, are those of `gradshield.scan`.

    Examples
    --------
    >>> import gradshield as gs
    >>> from gradshield import lab
    >>> rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.05, n=36)
    >>> probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    >>> found = gs.estimate(rows, model=lab.checkpoint("aligned"), probing=probing, patience=1)
    >>> found.rows, found.scored
    (38, 38)
    """
    settings, probing = settings or ScanSettings(), probing or Probing()
    began = time.monotonic()
    rows = prepare(data, model, tokenizer, training_args, probing.template, format, progress)
    loaded = rows.loaded
    with scored_model(loaded, settings, peft_config) as (scored, targets, _):
        found = ready(scored, rows, settings, probing, targets, progress)
        before = time.monotonic() - began
        parts, loss = [], 0
        for of_shard, _ in shards.cut(rows.rendered):
            sequences = [sequence for row in of_shard for sequence in row.sequences]
            lengths = [len(sequence.ids) for sequence in sequences]
            loss += sum(int(sequence.loss.sum()) for sequence in sequences)
            parts.append((len(of_shard), sum(lengths), max(lengths)))
        sizes, tokens, longest = np.array(parts).T
        ends = np.cumsum(sizes)

        def measured(part: int) -> float:
            chosen = [rows.rendered[i] for i in range(ends[part] - sizes[part], ends[part])]
            start = time.perf_counter()
            # Gives values on the CPU, so no kernel is still running.
            shards.measure(found.selector, scored, found.direction, chosen, settings.token_budget)
            return time.perf_counter() - start

        # The shard with the longest row runs first, untimed: it warms the kernels and needs the most memory.
        progress("timing a sample", 0, len(parts))
        measured(int(np.argmax(longest)))
        timed: dict[int, float] = {}
        end = time.monotonic() + patience
        for part in np.random.default_rng(settings.seed).permutation(len(parts)).tolist():
            if len(timed) >= 3 and time.monotonic() > end:
                break
            timed[part] = measured(part)
            progress("timing a sample", len(timed), len(parts))
        progress("timing a sample", len(parts), len(parts))
        memory = _peak(loaded.device)
    fihs = found.selector if isinstance(found.selector, Fihs) else None
    sample = list(timed)
    return Estimate(
        rows=rows.read.source.rows,
        scored=len(rows.rendered),
        read_as=rows.read.source.read_as,
        unusable=_reasons(rows.quarantined),
        tokens=int(tokens.sum()),
        loss_tokens=loss,
        longest=rows.rendered.longest,
        engine=fihs.engine.name if fihs else "",
        shards=len(parts),
        sampled=len(sample),
        sampled_rows=int(sizes[sample].sum()),
        before=before,
        seconds=ratio_estimate(np.array(list(timed.values())), tokens[sample], float(tokens.sum()), len(parts)),
        memory=memory,
    )


def ratio_estimate(seconds: Floats, tokens: Floats, whole: float, count: int) -> Spread:
    """Seconds for the ``whole`` tokens, from a random sample of its ``count`` shards (Cochran 1977, the ratio estimator).

    Tokens explain most of a shard's time, so a few shards suffice; a sample of all shards has no spread.
    """
    n, rate = len(seconds), seconds.sum() / tokens.sum()
    value = float(rate * whole)
    if n < 2:
        return Spread(value, value if n == count else 0.0, value if n == count else float("inf"))
    left = seconds - rate * tokens
    error = np.sqrt((1 - n / count) * (left**2).sum() / (n * (n - 1))) / tokens.mean() * whole
    return Spread(value, max(0.0, float(value - 1.96 * error)), float(value + 1.96 * error))


def _reasons(quarantined: Iterable[Quarantined]) -> tuple[tuple[str, int, int], ...]:
    """(reason, line, rows) by number of rows; reasons that differ only in their numbers are merged."""
    found: dict[str, tuple[str, int, int]] = {}
    for row in quarantined:
        kind = re.sub(r"\d+", "0", row.reason)
        reason, line, count = found.get(kind, (row.reason, row.line, 0))
        found[kind] = (reason, line, count + 1)
    return tuple(sorted(found.values(), key=lambda reason: (-reason[2], reason[1])))


def _peak(device: torch.device) -> int:
    """Peak bytes in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
