"""What a scan would take, without making it: the rows read and counted, the engine chosen, and some shards timed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradshield.pipeline import shards
from gradshield.pipeline.ranking import ready
from gradshield.pipeline.rows import prepare
from gradshield.pipeline.scoring import carrying, weights_changed
from gradshield.pipeline.settings import Probing, Progress, ScanSettings, quiet
from gradshield.selectors import Fihs
from gradshield.types import Floats, Quarantined

if TYPE_CHECKING:
    from peft import PeftConfig

PATIENCE = 20.0  # seconds that are spent on timing


@dataclass(frozen=True)
class Spread:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """What a scan would find and take.

    ``unusable``  why rows cannot be scored: the first such reason, its line, and how many rows have one like it
    ``engine``    of the selector fihs, with its agreement on a sample; empty for others
    ``before``    seconds from the start to the first measured row, without loading the model
    ``seconds``   to measure all rows in this one process
    ``memory``    most bytes held by the device, on a CPU by the process; 0 where that cannot be known
    ``kinds``     categories of harm, one more measurement each of the rows that are removed
    """

    name: str
    rows: int
    scored: int
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
    kinds: int


def estimate(
    data: Any,
    *,
    model: Any,
    tokenizer: Any = None,
    peft_config: PeftConfig | None = None,
    training_args: Any = None,
    max_length: int | None = None,
    settings: ScanSettings | None = None,
    probing: Probing | None = None,
    format: str | None = None,
    strict: bool = False,
    patience: float = PATIENCE,
    progress: Progress = quiet,
) -> Estimate:
    """Everything that `scan` does before it measures rows, then a random sample of its shards, timed. Nothing is written.

    Parameters are those of `gradshield.scan`; ``patience`` is how many seconds may go into timing. Raises what it raises.
    """
    settings, probing = settings or ScanSettings(), probing or Probing()
    began = time.monotonic()
    rows = prepare(data, model, tokenizer, training_args, max_length, probing.template, format, strict, progress)
    loaded = rows.loaded
    targets = weights_changed(loaded.model, peft_config)
    adapter = peft_config if settings.subspace == "lora" else None
    with ExitStack() as stack:
        scored_model = stack.enter_context(carrying(loaded.model, adapter, settings.seed))
        found = ready(scored_model, loaded, rows.rendered, settings, probing, targets, progress)
        before = time.monotonic() - began
        job = shards.Job(found.selector, scored_model, found.direction, settings.token_budget)
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
            job.measure(chosen)  # its values are on the CPU: nothing is still under way
            return time.perf_counter() - start

        # The shard with the longest row comes first, untimed: it warms the kernels, and needs the most memory.
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
        name=rows.read.source.name,
        rows=rows.read.source.rows,
        scored=len(rows.rendered),
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
        kinds=len(set(fihs.requests.categories)) if fihs else 0,
    )


def ratio_estimate(seconds: Floats, tokens: Floats, whole: float, count: int) -> Spread:
    """Seconds for the ``whole`` tokens, from a random sample of its ``count`` shards (Cochran 1977, the ratio estimator).

    Tokens explain most of what a shard takes, so that few are enough; a sample that is everything has no spread left.
    """
    n, rate = len(seconds), seconds.sum() / tokens.sum()
    value = float(rate * whole)
    if n < 2:
        return Spread(value, value if n == count else 0.0, value if n == count else float("inf"))
    left = seconds - rate * tokens
    error = np.sqrt((1 - n / count) * (left**2).sum() / (n * (n - 1))) / tokens.mean() * whole
    return Spread(value, max(0.0, float(value - 1.96 * error)), float(value + 1.96 * error))


def _reasons(quarantined: Iterable[Quarantined]) -> tuple[tuple[str, int, int], ...]:
    """(reason, line, rows) by number of rows; reasons that differ in their numbers alone are one."""
    found: dict[str, tuple[str, int, int]] = {}
    for row in quarantined:
        kind = re.sub(r"\d+", "0", row.reason)
        reason, line, count = found.get(kind, (row.reason, row.line, 0))
        found[kind] = (reason, line, count + 1)
    return tuple(sorted(found.values(), key=lambda reason: (-reason[2], reason[1])))


def _peak(device: torch.device) -> int:
    """The most bytes that were in use so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
