"""What a report shows: plain Python and numpy, gathered by the caller and checked at birth.

Every string here may come from someone else's file. Nothing is trusted: escaping is the page's work, not the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradshield.report.frame import Status
from gradshield.types import Bools, Cut, Ints, Rate, Scores

Piece = tuple[str, str, float | None]
"""A token's text, its role (``"prompt"``, or ``"response"`` where it counts in the loss), its FIHS where measured."""


FIHS = "fihs"  # the selector whose scores are pushes toward unsafe answers


@dataclass(frozen=True)
class Counts:
    """The headline: rows in the input, by outcome. ``cleared`` rows were kept by hand, ``denied`` removed."""

    read: int
    scored: int
    kept: int
    removed: int
    quarantined: int = 0
    cleared: int = 0
    denied: int = 0


@dataclass(frozen=True)
class Check:
    """One reason to trust the result, or not: ``Check("Probe validity", "pass", "refused 31 of 32 probes")``."""

    name: str
    status: Status
    text: str


@dataclass(frozen=True)
class RowView:
    """One row to read. ``margin`` is score minus cut (positive where the row is beyond it).

    ``pieces`` may be as long as the row: the page shows its strongest parts and says what it left out.
    ``note`` is one line next to the row, such as ``"cleared by allow.txt"``.
    """

    row: int
    id: str
    score: float
    margin: float
    category: str = ""
    shape: str = ""
    pieces: tuple[Piece, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class QuarantinedView:
    """A row that could not be used: its line in the input, the reason, and its beginning."""

    line: int
    reason: str
    preview: str = ""


@dataclass(frozen=True)
class Agreement:
    """How the engine's scores compare with the oracle's on ``rows`` rows drawn at random.

    ``relative_error`` is ‖f − o‖/‖o‖; ``spearman`` is None where ranks mean nothing (one row, constant scores).
    """

    engine: str
    relative_error: float
    spearman: float | None
    rows: int
    per_token: bool = False
    note: str = ""


@dataclass(frozen=True)
class Arm:
    """One line of the results table: what training on this selection gave. ``rates`` keeps its order as columns."""

    name: str
    rows_kept: int | None
    rates: Mapping[str, Rate]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything one page says.

    ``removed`` and ``labels`` (1 = harmful) are aligned with ``scores``. ``cuts`` is keyed by row shape; the key
    ``""`` stands for every shape not named. ``removed_rows`` and ``kept_rows`` (those nearest below the cut) may be a
    sample, highest scores first being best: totals come from ``counts`` and ``categories`` (removed rows by harm
    category; counted from ``removed_rows`` where None). ``aurocs`` are dicts ``{name, auroc, low, high, n_pos,
    n_neg}``, the scan's own score first. ``files`` names the outputs (``kept``, ``removed``, ``quarantine``,
    ``scores``). An empty ``verdict`` or ``next_steps`` is written from the counts. Any failing check, and any entry of
    ``warnings``, colours the verdict. ``selector`` names what the scores are; only those of ``fihs`` speak of unsafe answers.

    Raises ValueError where arrays do not align or a score is not finite.
    """

    title: str
    counts: Counts
    scores: Scores
    removed: Bools
    cuts: Mapping[str, Cut]
    verdict: str = ""
    warnings: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    labels: Ints | None = None
    caught: Rate | None = None
    lost: Rate | None = None
    aurocs: tuple[Mapping[str, Any], ...] = ()
    removed_rows: tuple[RowView, ...] = ()
    categories: Mapping[str, int] | None = None
    kept_rows: tuple[RowView, ...] = ()
    quarantined: tuple[QuarantinedView, ...] = ()
    agreement: Agreement | None = None
    arms: tuple[Arm, ...] = ()
    manifest: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    next_steps: tuple[str, ...] = ()
    selector: str = FIHS

    @property
    def score_name(self) -> str:
        """The label of a score axis."""
        return "score (FIHS)" if self.selector == FIHS else f"score ({self.selector})"

    def __post_init__(self) -> None:
        n = len(self.scores.values)
        aligned = {"removed": self.removed, "labels": self.labels, "decoys": self.scores.decoys}
        for name, array in aligned.items():
            if array is not None and len(array) != n:
                raise ValueError(f"{name} has {len(array)} entries for {n} scores: pass one for each scored row")
        if len(self.scores.shapes) != n:
            raise ValueError(f"shapes has {len(self.scores.shapes)} entries for {n} scores: pass one for each row")
        if not np.isfinite(self.scores.values).all():
            raise ValueError("a score is not finite: name such rows and leave them out before reporting")

    def cut_for(self, shape: str) -> Cut | None:
        """The cut of a row shape, or the one under ``""``, or None."""
        return self.cuts.get(shape, self.cuts.get(""))
