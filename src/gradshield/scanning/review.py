"""A person decides on single rows of a finished scan: what was said, in which order rows come, and the new result.

The decisions are two files in the folder of the scan, ``allow.txt`` and ``deny.txt``, one row id a line with the time and the
reason behind ``#``: the lists that ``cut`` reads there, and that ``scan --allow`` and ``cut --allow --deny`` take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from gradshield.errors import UsageError
from gradshield.files import write_text
from gradshield.scanning import outputs
from gradshield.scanning.cut import ALLOW, DENY, NO_CATEGORY, Scanned, write
from gradshield.scanning.decide import Selection, above, reviewed
from gradshield.scanning.page_rows import Piece, RowView, references, row_view, stored_views
from gradshield.types import Bools, Floats, Ints

REASON = 300  # characters of a reason
NEAREST = 20  # rows that say how tokens are tinted


@dataclass(frozen=True)
class Said:
    """What a person said of a row: ``keep`` it or remove it, why, and when (ISO 8601, UTC)."""

    keep: bool
    reason: str
    at: str


class Review:
    """A finished scan under review. The caller has its folder alone (`runs.alone`)."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the folder is not a finished scan."""
        self.folder = folder
        self.verdicts = dict(_read(folder))
        self._open()

    def _open(self) -> None:
        self.scanned = Scanned.read(self.folder)
        self.views = stored_views(self.folder)
        scores, cuts = self.scanned.scores, self.scanned.cuts
        self.beyond: Bools = above(scores, cuts)  # (N,) the rows above the cut
        self.margins: Floats = scores.values - np.array([cuts[shape].value for shape in scores.shapes])  # (N,)
        self.order: Ints = np.argsort(np.abs(self.margins), kind="stable")  # (N,) places, the nearest to the cut first
        # What tints of tokens are shares of, on every page.
        self.tint = references(self.row(place) for place in self.order[:NEAREST].tolist())
        ids = scores.ids
        known = {id: place for place, id in enumerate(ids) if id in self.verdicts}
        # What earlier lists decided and this folder's do not name, such as those of `scan --allow`.
        before, at = self.beyond != self.scanned.removed, datetime.now(UTC).isoformat(timespec="seconds")
        for place in np.flatnonzero(before).tolist():
            if ids[place] not in known:
                known[ids[place]] = place
                self.verdicts[ids[place]] = Said(bool(self.beyond[place]), "decided before this review", at)
        self.places = known

    def decide(self, place: int, keep: bool, reason: str) -> None:
        """Keep or remove the row at this place among the scores; written when this returns. Raises UsageError for no such row."""
        id = self._id(place)
        said = " ".join(reason.split())[:REASON]
        self.verdicts[id] = Said(keep, said, datetime.now(UTC).isoformat(timespec="seconds"))
        self.places[id] = place
        self._save()

    def undo(self, place: int) -> None:
        """Leave the row to its score again."""
        id = self._id(place)
        if self.verdicts.pop(id, None) is not None:
            del self.places[id]
            self._save()

    def _id(self, place: int) -> str:
        if not 0 <= place < len(self.beyond):
            raise UsageError(f"there is no row {place}: reload the page")
        return self.scanned.scores.ids[place]

    def _save(self) -> None:
        for name, keep in ((ALLOW, True), (DENY, False)):
            lines = (f"{id}  # {v.at} {v.reason}\n" for id, v in self.verdicts.items() if v.keep == keep)
            write_text(self.folder / name, "".join(lines))

    @property
    def removed(self) -> int:
        """Rows that the decisions leave removed."""
        return int(self._out().sum())

    @property
    def waiting(self) -> bool:
        """Whether the folder does not have the decisions yet."""
        confirmed = sum(self.beyond[place] and not self.verdicts[id].keep for id, place in self.places.items())
        return bool((self._out() != self.scanned.removed).any()) or confirmed != self.scanned.manifest.results.confirmed

    def _out(self) -> Bools:
        """Which rows the decisions leave removed, (N,)."""
        found = self.beyond.copy()
        for id, place in self.places.items():
            found[place] = not self.verdicts[id].keep
        return found

    def apply(self, command: str) -> Selection:
        """Split the rows again under the scan's own cut and the decisions."""
        lists = [[id for id, v in self.verdicts.items() if v.keep == keep] for keep in (True, False)]
        decision = reviewed(self.scanned.scores, self.scanned.cuts, *lists)
        found = write(self.folder, self.scanned, decision, self.scanned.manifest.settings.threshold, command)
        self._open()
        return found

    def row(self, place: int) -> RowView:
        """One row, with its tokens where the scan has stored them, else its text."""
        scores, category = self.scanned.scores, self.scanned.categories[place]
        row, cut = int(scores.rows[place]), self.scanned.cuts[scores.shapes[place]].value
        pieces = self.views.get(row) or self._text(row)
        return row_view(scores, place, cut, "" if category == NO_CATEGORY else category, pieces)

    def _text(self, row: int) -> Iterator[Piece]:
        (example,) = self.scanned.rows.at(np.array([row]))
        prompt, answer = outputs.words(example)
        yield prompt, "prompt", None
        yield answer, "response", None


def _read(folder: Path) -> Iterator[tuple[str, Said]]:
    """The decisions in a folder; of a row in both lists, that it is removed."""
    for name, keep in ((ALLOW, True), (DENY, False)):
        path = folder / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            id, _, note = line.partition("#")
            at, _, reason = note.strip().partition(" ")
            if id.strip():
                yield id.strip(), Said(keep, reason, at)
