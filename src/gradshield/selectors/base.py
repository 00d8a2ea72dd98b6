"""The selector interface: measure batch by batch, then score the whole dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import nn

from gradshield.data.spool import Picked
from gradshield.errors import ScoreError, UsageError
from gradshield.models.loading import parameters_digest
from gradshield.options import Given, Spec, build, of, read
from gradshield.registry import Registry
from gradshield.types import Batch, Bools, Direction, Floats, Ints, Scores


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of one batch, by row; no state across rows, so that any distributed map can make it.

    ``sums[i]`` is the row's value; ``tokens[i]`` its per-token values in order (chosen before rejected, each times its
    sequence's coefficient), None from an engine without them; for a whole dataset they are on disk and read on access.
    ``nll`` is the mean loss in nats, ``lengths`` the number of loss tokens. ``extra`` (N, E) holds the selector's own columns.
    """

    rows: Ints
    sums: Floats
    nll: Floats
    lengths: Ints
    tokens: Sequence[Floats] | None = None
    extra: Floats | None = None

    @staticmethod
    def joined(parts: Sequence[Measured]) -> Measured:
        """All parts as one, in input order."""
        order = np.argsort(np.concatenate([p.rows for p in parts]), kind="stable")

        def whole(name: str) -> Any:
            return np.concatenate([getattr(p, name) for p in parts])[order]

        tokens = [values for p in parts for values in p.tokens or ()]
        return Measured(
            **{name: whole(name) for name in ("rows", "sums", "nll", "lengths")},
            tokens=None if any(p.tokens is None for p in parts) else tuple(tokens[i] for i in order),
            extra=None if parts[0].extra is None else whole("extra"),
        )

    def only(self, places: Ints) -> Measured:
        """The rows at these places."""
        tokens = None if self.tokens is None else Picked(self.tokens, places)
        extra = None if self.extra is None else self.extra[places]
        return Measured(self.rows[places], self.sums[places], self.nll[places], self.lengths[places], tokens, extra)

    def updated(self, found: Measured) -> Measured:
        """These rows with values of those that were ``found``, both in input order, and tokens of no other; ``extra`` stays."""
        places = np.searchsorted(self.rows, found.rows)
        sums, nll = self.sums.copy(), self.nll.copy()
        sums[places], nll[places] = found.sums, found.nll
        own = np.full(len(self.rows), -1)
        own[places] = np.arange(len(places))
        tokens = None if found.tokens is None else Picked(found.tokens, own, np.zeros(0))
        return replace(self, sums=sums, nll=nll, tokens=tokens)


class Selector(Protocol):
    """A method that scores rows; the methods of this package inherit what is the same in most.

    ``rule`` is the default threshold. ``travels``: ``measure`` needs nothing but the given model, so other processes can run
    it. ``probed``: the method is FIHS or built on it; it has `Fihs`'s attributes, its probes must be valid, and its engine is
    checked against the oracle. The constructor declares the options (`options`), and names any argument that
    `scanning.scoring` provides: ``subspace``, its ``targets``, ``seed``, the ``rendered`` rows, ``tokenizer``, ``references``.

    A method of two stages also has a ``look`` of the class ``looks``: a selector without ``finish`` that measures each row as far
    as a cheaper look tells, without a direction. Its ``further(seen)`` are the rows (N,) that ``measure`` must see (`Screen`).
    """

    name: str
    rule: str = "ratio:10%"
    travels: bool = True
    probed: bool = False

    def prepare(self, model: nn.Module) -> Direction:
        """The direction; of a method without one, `no_direction`."""
        return no_direction(self.name, model)

    def measure(self, model: nn.Module, direction: Direction, batch: Batch) -> Measured:
        """The measurements of one batch."""
        ...

    def finish(self, raw: Measured, ids: Sequence[str], shapes: Sequence[str]) -> Scores:
        """One score per row of the whole dataset, in numpy: here the measured value.

        ``ids`` and ``shapes`` go on unchanged, as compact columns (`columns`). Raises ScoreError naming rows that are not finite.
        """
        require_finite(raw)
        return Scores(raw.rows, ids, raw.sums, shapes, lengths=raw.lengths, nll=raw.nll)

    def settings(self) -> Mapping[str, Any]:
        """Everything but rows, model and direction that a measured number depends on, JSON-able."""
        return {}


def no_direction(name: str, model: nn.Module | None = None, subspace: str = "all") -> Direction:
    """The result of ``prepare`` for a method without a direction; ``model`` is None for one that does not use the model.

    No tensors, and a digest, for the names of saved shards, of the method, the subspace and the bytes of every parameter.
    """
    weights = parameters_digest(model) if model is not None else ""
    return Direction({}, (), (), hashlib.sha256(f"{name}\n{subspace}\n{weights}".encode()).hexdigest())


def members(batch: Batch) -> tuple[Ints, list[Ints]]:
    """The rows of a batch in order of first appearance, and the sequences of each."""
    rows, first = np.unique(batch.rows, return_index=True)
    rows = rows[np.argsort(first)]
    return rows, [np.flatnonzero(batch.rows == row) for row in rows]


def trainable(model: nn.Module) -> list[str]:
    """Names of the trainable parameters. Raises UsageError if there are none."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise UsageError(
            "the model has no trainable parameter, and rows are selected by their gradient over those: unfreeze some, or "
            "add an adapter"
        )
    return names


def standing(batch: Batch) -> Ints:
    """The sequences that stand for their rows: of a preference pair the chosen answer, else all."""
    toward = batch.coefficients > 0
    return np.flatnonzero(toward | ~np.isin(batch.rows, batch.rows[toward]))


def by_row(batch: Batch, nll: Floats) -> tuple[Ints, Floats, Ints]:
    """Rows as `members` gives them, each one's mean loss in nats and number of loss tokens.

    ``nll`` is (B, T), or (B,) where the tokens are summed already.
    """
    rows, sequences = members(batch)
    lengths = np.array([int(batch.loss[own].sum()) for own in sequences], dtype=np.int64)
    return rows, np.array([float(nll[own].sum()) for own in sequences]) / np.maximum(lengths, 1), lengths


def require_finite(raw: Measured) -> None:
    """Raises ScoreError that names the rows whose value or loss is not finite."""
    bad = raw.rows[~(np.isfinite(raw.sums) & np.isfinite(raw.nll))]
    if len(bad):
        raise ScoreError(
            f"{len(bad)} of {len(raw.rows)} rows have a score that is not finite ({listed(bad)}): check the model's weights "
            "for overflow, or load it in float32 (--dtype float32)"
        )


def listed(rows: Ints) -> str:
    """``rows 1, 2, 3``: at most ten of them."""
    return f"rows {', '.join(map(str, rows[:10].tolist()))}" + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")


SELECTORS: Registry[type[Selector]] = Registry(
    "selector", needs=("name", "rule", "travels", "probed", "prepare", "measure", "finish", "settings")
)


class OnlineSelection(Protocol):
    """A method that selects rows during training, at the current weights; ``training.inside`` runs it in a trainer.

    ``begin`` is called once, after the adapter is added and before the first step; ``choose`` gets every collated batch
    (rows numbered 0 to B - 1) and returns which rows train, at least one (B,); ``correct`` may rewrite the ``.grad`` of the
    trainable parameters, after a step's backward passes and before the optimiser's step; ``record`` is JSON-able: the settings
    and counts so far. ``least`` is the smallest batch from which the method can drop its full share of rows; from smaller ones
    it drops less, or none.
    """

    name: str

    @property
    def least(self) -> int: ...

    def begin(self, model: nn.Module) -> None: ...

    def choose(self, model: nn.Module, batch: Batch) -> Bools: ...

    def correct(self, model: nn.Module) -> None: ...

    def record(self) -> Mapping[str, Any]: ...


ONLINE: Registry[type[OnlineSelection]] = Registry("online selection")  # methods that select rows during training

GIVEN = ("subspace", "targets", "seed")  # constructor arguments that come from the scan, not from the spec


def check(text: str) -> None:
    """Raises UsageError for an unknown selector, or options that it does not take."""
    spec = Spec.split(text)
    made = SELECTORS[spec.name]
    if not hasattr(made, "parse"):
        read("selector", spec, {name: option for name, option in of(made).items() if name not in GIVEN})


def make(text: str, given: Given) -> Selector:
    """A selector as typed (``gradnorm``, ``larf:opening``), with the arguments its constructor names. Raises UsageError.

    A class whose options are not ``key=value`` pairs has a ``parse(options, given)`` that builds it.
    """
    spec = Spec.split(text)
    made: Any = SELECTORS[spec.name]
    found: Selector = (
        made.parse(text.partition(":")[2], given) if hasattr(made, "parse") else build("selector", spec, made, given)
    )
    return found
