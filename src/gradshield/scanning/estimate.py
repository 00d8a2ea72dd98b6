"""What a scan would take, without making it: the rows told and counted, the engine chosen, and some shards timed."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradshield.scanning import shards
from gradshield.scanning.cost import PASSES, Shape, Spread, hours, ratio_estimate
from gradshield.scanning.ranking import ready
from gradshield.scanning.rows import prepare
from gradshield.scanning.scoring import Ready, carrying, weights_changed
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.selectors import Fihs
from gradshield.types import Progress, Quarantined, Rendered, quiet

if TYPE_CHECKING:
    from peft import PeftConfig

PATIENCE = 20.0  # seconds that are spent on timing


@dataclass(frozen=True)
class Estimate:
    """What a scan would find and take.

    ``unusable``  why rows cannot be scored: the first such reason, its line, and how many rows have one like it
    ``engine``    of the selector fihs, with its agreement on a sample; empty for others
    ``operations``  of one forward pass over all rows
    ``before``    seconds from the start to the first measured row, without loading the model
    ``seconds``   to measure all rows in this one process
    ``memory``    most bytes held by the device, on a CPU by the process; 0 where that cannot be told
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
    shape: Shape
    operations: float
    shards: int
    sampled: int
    sampled_rows: int
    before: float
    seconds: Spread
    memory: int
    kinds: int

    @property
    def passes(self) -> float:
        """Forward passes that the engine comes to over all weights; 0 where it is none of the fast ones."""
        return PASSES.get(self.engine, 0.0)

    def hours(self, kept: float) -> float:
        """Hours of one device that keeps ``kept`` operations a second, with this engine over all weights."""
        return hours(self.operations, kept, self.passes)


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

    Parameters
    ----------
    patience
        How many seconds may go into timing. All others are those of `gradshield.scan`, and so are the errors.

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
    rows = prepare(data, model, tokenizer, training_args, max_length, probing.template, format, strict, progress)
    loaded = rows.loaded
    targets = weights_changed(loaded.model, peft_config)
    adapter = peft_config if settings.subspace == "lora" else None
    with ExitStack() as stack:
        scored_model = stack.enter_context(carrying(loaded.model, adapter, settings.seed))
        found = ready(scored_model, loaded, rows.rendered, settings, probing, targets, progress)
        before = time.monotonic() - began
        job = shards.Job(found.selector, scored_model, found.direction, settings.token_budget)
        shape = Shape.of(loaded.model)
        parts = _Parts(rows.rendered, shape)
        seconds = _timed(job, rows.rendered, parts, settings.seed, patience, progress)
        memory = _peak(loaded.device)
    chosen = np.array(list(seconds))
    return Estimate(
        name=rows.read.source.name,
        rows=rows.read.source.rows,
        scored=len(rows.rendered),
        unusable=_reasons(rows.quarantined),
        tokens=parts.tokens,
        loss_tokens=parts.loss,
        longest=rows.rendered.longest,
        engine=_engine(found),
        shape=shape,
        operations=float(parts.work.sum()),
        shards=len(parts.work),
        sampled=len(chosen),
        sampled_rows=int(parts.sizes[chosen].sum()),
        before=before,
        seconds=ratio_estimate(
            np.array(list(seconds.values())), parts.work[chosen], float(parts.work.sum()), len(parts.work)
        ),
        memory=memory,
        kinds=_kinds(found),
    )


class _Parts:
    """The shards of a scan by their sizes: where each ends, its work, and which holds the longest row."""

    def __init__(self, rendered: Iterable[Rendered], shape: Shape) -> None:
        sizes, work, longest = [], [], []
        self.tokens = self.loss = 0
        for rows, _ in shards.cut(rendered):
            lengths = np.array([len(tokens.ids) for row in rows for tokens in row.sequences])
            loss = np.array([int(tokens.loss.sum()) for row in rows for tokens in row.sequences])
            self.tokens, self.loss = self.tokens + int(lengths.sum()), self.loss + int(loss.sum())
            sizes.append(len(rows))
            work.append(shape.forward(lengths, loss).sum())
            longest.append(lengths.max())
        self.sizes, self.work = np.array(sizes), np.array(work)
        self.ends = np.cumsum(self.sizes)
        self.widest = int(np.argmax(longest))

    def rows(self, part: int, rendered: Sequence[Rendered]) -> list[Rendered]:
        """The rows of one shard."""
        end = int(self.ends[part])
        return [rendered[i] for i in range(end - int(self.sizes[part]), end)]


def _timed(
    job: shards.Job, rendered: Sequence[Rendered], parts: _Parts, seed: int, patience: float, progress: Progress
) -> dict[int, float]:
    """Seconds of shards in random order, as many as patience has; at least three where there are as many.

    The shard with the longest row comes first, untimed: it warms the kernels, and needs the most memory.
    """
    order = np.random.default_rng(seed).permutation(len(parts.work))
    progress("timing a sample", 0, len(order))
    job.measure(parts.rows(parts.widest, rendered))
    seconds: dict[int, float] = {}
    end = time.monotonic() + patience
    for part in order.tolist():
        if len(seconds) >= 3 and time.monotonic() > end:
            break
        rows = parts.rows(part, rendered)
        began = time.perf_counter()
        job.measure(rows)  # its values are on the CPU: nothing is still under way
        seconds[part] = time.perf_counter() - began
        progress("timing a sample", len(seconds), len(order))
    progress("timing a sample", len(order), len(order))
    return seconds


def _reasons(quarantined: Iterable[Quarantined]) -> tuple[tuple[str, int, int], ...]:
    """(reason, line, rows) by number of rows; reasons that differ in their numbers alone are one."""
    found: dict[str, tuple[str, int, int]] = {}
    for row in quarantined:
        kind = re.sub(r"\d+", "0", row.reason)
        reason, line, count = found.get(kind, (row.reason, row.line, 0))
        found[kind] = (reason, line, count + 1)
    return tuple(sorted(found.values(), key=lambda reason: (-reason[2], reason[1])))


def _engine(found: Ready) -> str:
    return found.selector.engine.name if isinstance(found.selector, Fihs) else ""


def _kinds(found: Ready) -> int:
    return len(set(found.selector.requests.categories)) if isinstance(found.selector, Fihs) else 0


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
