"""Measure rows in shards that are written as they finish, so that an interrupted scan resumes where it stopped.

A shard's key is a hash of everything its numbers depend on (the tokens of its rows, the direction, the engine, the budget, the
package versions) and nothing else: no positions, names or times. The rows' own hashes determine where a shard ends, so that
editing, inserting or deleting a row changes its shard and at most one next to it. A finished shard is never measured again.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from gradshield.data import batches
from gradshield.data.spool import Picked, Values
from gradshield.errors import DataError, ModelError
from gradshield.files import replacing
from gradshield.models.modules import text_config
from gradshield.runs import versions
from gradshield.selectors import Measured, Selector
from gradshield.selectors.base import no_direction
from gradshield.types import Batch, Direction, Rendered

MEAN_ROWS = 128  # one row in 128 ends its shard
MOST_ROWS = 1024  # most rows in a shard: identical rows may contain no end
LOGITS_BUDGET = 2**27  # entries of one batch's logits: 512 MiB in float32

T = TypeVar("T")
Shard = tuple[str, list[Rendered]]  # the shard's key, and its rows


@dataclass(frozen=True, eq=False)
class Measurer:
    """Measures the shards of one selection: the inputs that all of them share."""

    selector: Selector
    model: nn.Module
    direction: Direction
    token_budget: int

    def measure(self, rows: Sequence[Rendered]) -> Measured:
        """Measure one shard in batches, halved if memory runs out."""
        parts: list[Measured] = []
        for batch in batches(rows, self.token_budget, label_budget(self.model)):
            parts += _with_back_off(partial(self.selector.measure, self.model, self.direction), batch)
        return Measured.joined(parts)


class Hands(Protocol):
    """Whoever measures: takes the missing shards, and returns each under its key, in any order.

    ``missing`` is consumed only as work proceeds, so that only the shards being measured are in memory.
    """

    def __call__(self, job: Measurer, missing: Iterable[Shard]) -> Iterator[tuple[str, Measured]]: ...


def here(job: Measurer, missing: Iterable[Shard]) -> Iterator[tuple[str, Measured]]:
    """Measure in this process, one shard at a time."""
    for key, rows in missing:
        yield key, job.measure(rows)


def measure(
    selector: Selector,
    model: nn.Module,
    direction: Direction,
    rendered: Sequence[Rendered],
    token_budget: int,
    store: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    hands: Hands = here,
    seen: Measured | None = None,
) -> Measured:
    """Measure all rows, which come in the order of their numbers; shards found in ``store`` are read instead.

    A selector of two stages measures only what its look leaves open, in shards of those rows alone. ``seen`` is the look's
    result; without it, it looks first. ``progress`` counts the rows that are finished.
    """
    look: Any = getattr(selector, "look", None)
    own = rendered
    if look is not None:
        seen = seen or measure(look, model, no_direction(look.name), rendered, token_budget, None, progress, hands)
        own = Picked(rendered, np.flatnonzero(look.further(seen)))
    open_after = getattr(selector, "further", lambda part: np.zeros(len(part.rows), dtype=np.bool_))
    gathered, done = _Gathered(), len(rendered) - len(own)

    def take(part: Measured) -> None:
        nonlocal done
        gathered.add(part)
        done += int((~open_after(part)).sum())
        progress(done, len(rendered))

    shared = _shared(selector, direction, token_budget)

    def missing() -> Iterator[Shard]:
        for rows, hashes in cut(own):
            key = hashlib.sha256(b"\n".join([shared, b"".join(hashes)])).hexdigest()
            found = _read(_file(store, key), rows) if store else None
            if found is None:
                yield key, rows
            else:
                take(found)

    for key, part in hands(Measurer(selector, model, direction, token_budget), missing()):
        if store:
            _write(_file(store, key), part)
        take(part)
    found = gathered.measured()
    return found if seen is None else seen.updated(found)


class _Gathered:
    """Collects shards as they arrive: four numbers per row in memory, per-token values on disk."""

    def __init__(self) -> None:
        self._numbers: dict[str, array[Any]] = {
            "rows": array("q"), "sums": array("d"), "nll": array("d"), "lengths": array("q")
        }  # fmt: skip
        self._tokens: Values | None = Values()
        self._extra = array("d")

    def add(self, part: Measured) -> None:
        """Copy a shard's numbers."""
        for name, column in self._numbers.items():
            column.frombytes(getattr(part, name).astype(column.typecode).tobytes())
        if part.extra is not None:
            self._extra.frombytes(part.extra.astype(np.float64).tobytes())
        if part.tokens is None:
            self._tokens = None
        elif self._tokens is not None:
            for values in part.tokens:
                self._tokens.add(values)

    def measured(self) -> Measured:
        """All rows, in input order."""
        numbers: dict[str, Any] = {name: np.frombuffer(one, one.typecode) for name, one in self._numbers.items()}
        rows = numbers["rows"]
        extra = np.frombuffer(self._extra, np.float64).reshape(len(rows), -1) if self._extra else None
        found = Measured(**numbers, tokens=self._tokens, extra=extra)
        return found if (rows[1:] >= rows[:-1]).all() else found.only(np.argsort(rows, kind="stable"))


def _file(store: Path, key: str) -> Path:
    return store / f"{key}.safetensors"


def cut(rendered: Iterable[Rendered]) -> Iterator[tuple[list[Rendered], list[bytes]]]:
    """Rows in shards, in order, each with the hashes of its rows.

    A shard ends after a row whose hash is a multiple of MEAN_ROWS, and after MOST_ROWS rows at the latest. So one edit makes
    at most two new shards; it may make more only in a stretch of over MOST_ROWS rows without an end (one in 3,000 is that
    long), up to the next end.
    """
    rows: list[Rendered] = []
    hashes: list[bytes] = []
    for row in rendered:
        rows.append(row)
        hashes.append(_content(row))
        if int.from_bytes(hashes[-1][:8]) % MEAN_ROWS == 0 or len(rows) == MOST_ROWS:
            yield rows, hashes
            rows, hashes = [], []
    if rows:
        yield rows, hashes


def _content(row: Rendered) -> bytes:
    """SHA-256 of everything a row's numbers depend on."""
    sha = hashlib.sha256()
    for tokens in row.sequences:
        sha.update(np.int64(len(tokens.ids)).tobytes() + tokens.ids.tobytes() + tokens.loss.tobytes())
        sha.update(np.float64(tokens.coefficient).tobytes())
    return sha.digest()


def label_budget(model: nn.Module) -> int:
    """Most loss tokens in a batch, so that its logits stay within LOGITS_BUDGET."""
    return max(1, LOGITS_BUDGET // int(text_config(model).vocab_size))


def _with_back_off(call: Callable[[Batch], T], batch: Batch) -> Iterator[T]:
    """The call's result on a batch; if memory runs out, on its two halves. Raises ModelError if a single row does not fit."""
    try:
        yield call(batch)
        return
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        rows = np.unique(batch.rows)
        if len(rows) == 1:
            raise ModelError(
                f"row {rows[0]} ({int(batch.attention.sum())} tokens) does not fit into memory by itself: shorten it with "
                "--max-length, or use a smaller dtype or a larger device"
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        yield from _with_back_off(call, _part(batch, np.isin(batch.rows, half)))


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _part(batch: Batch, keep: np.ndarray) -> Batch:
    width = int(batch.attention[keep].sum(1).max())
    return Batch(
        batch.ids[keep, :width],
        batch.attention[keep, :width],
        batch.loss[keep, :width],
        batch.rows[keep],
        batch.coefficients[keep],
    )


def _shared(selector: Selector, direction: Direction, token_budget: int) -> bytes:
    """What the numbers of every shard depend on, package versions included: a bug fix may change them."""
    settings = [selector.name, dict(selector.settings()), direction.digest, token_budget, versions()]
    return json.dumps(settings, sort_keys=True).encode()


def _write(path: Path, part: Measured) -> None:
    arrays = {"sums": part.sums, "nll": part.nll, "lengths": part.lengths}
    if part.tokens is not None:
        arrays["tokens"] = np.concatenate(part.tokens)
    if part.extra is not None:
        arrays["extra"] = part.extra
    try:
        with replacing(path) as part_of_it:
            save_file(arrays, part_of_it, {"sha256": _digest(arrays)})
    except OSError as error:
        raise DataError(
            f"{path.parent} cannot be written ({error.strerror or error}): free some space, or give another --output"
        ) from None


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode() + arrays[name].tobytes())
    return sha.hexdigest()


def _read(path: Path, rows: Sequence[Rendered]) -> Measured | None:
    """A finished shard, its values assigned to the rows of this run; None if it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            intact = (file.metadata() or {}).get("sha256") == _digest(arrays)
    except (OSError, ValueError, SafetensorError):
        return None
    if not intact:
        return None
    numbers = np.array(sorted(row.row for row in rows), dtype=np.int64)
    tokens = None
    if "tokens" in arrays:
        tokens = tuple(np.split(arrays["tokens"], np.cumsum(arrays["lengths"])[:-1]))
    return Measured(numbers, arrays["sums"], arrays["nll"], arrays["lengths"], tokens, arrays.get("extra"))
