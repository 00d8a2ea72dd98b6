"""A job's scan as its folder holds it: the scores, a cut that is moved, and the rows with their tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import runs
from gradshield.columns import Coded
from gradshield.errors import GradShieldError
from gradshield.manifests import ScanManifest
from gradshield.report.draw import Chart
from gradshield.report.text import number
from gradshield.scanning import cut as cuts
from gradshield.scanning.page_charts import category_chart, score_charts
from gradshield.scanning.page_rows import SHOWN, RowView, ShownRow, Views, references, row_view, show_rows, stored_views
from gradshield.types import Bools, Cut, Ints, Scores

ROWS = 20  # of a page
NEAR = 8  # kept rows just under the cut
NAMED = 40  # rows that the answer to a moved cut names
BYTES = 400_000  # of the rows of a page
LONGEST = 20_000  # characters that are read of a row whose tokens were not kept


@dataclass(frozen=True, eq=False)
class Scan:
    """A finished scan. Arrays are aligned with ``scores``; ``views`` has the tokens of the rows that the report shows."""

    folder: Path
    manifest: ScanManifest
    scores: Scores
    removed: Bools
    categories: Coded
    cuts: Mapping[str, Cut]
    views: Views

    @property
    def at(self) -> float:
        """The cut of the largest group of rows, where a moved one starts."""
        counts = Coded.of(self.scores.shapes).counts()
        return self.cuts[max(counts, key=lambda name: counts[name])].value

    @property
    def ends(self) -> tuple[float, float]:
        """A little under the lowest score, and a little over the highest: the page rounds what is chosen."""
        low, high = float(self.scores.values.min()), float(self.scores.values.max())
        return low - 0.01 * (high - low or 1.0), high + 0.01 * (high - low or 1.0)

    def moved(self, value: float | None) -> Bools:
        """The rows that a cut at ``value`` takes; without one, those that the scan took."""
        return self.removed if value is None else self.scores.values > value

    def charts(self, value: float | None) -> tuple[Chart, ...]:
        """The report's own charts, with the cut at ``value``."""
        at = self.cuts if value is None else dict.fromkeys(self.cuts, Cut(value, "fixed"))
        charts = score_charts(self.scores, self.moved(value), at, self.manifest.settings.selector)
        return charts if value is not None else charts + category_chart(self.manifest.results.categories)

    def answer(self, value: float | None) -> dict[str, Any]:
        """What a cut does: how many rows go, and which of them would not, or would, by the scan's own."""
        removed, moved = self.moved(value), value is not None
        counts = {"rows": len(removed), "go": int(removed.sum()), "moved": moved, "value": value if moved else self.at}
        more, fewer = self._named(removed & ~self.removed), self._named(self.removed & ~removed)
        return {**counts, "more": more, "fewer": fewer}

    def _named(self, which: Bools) -> dict[str, Any]:
        rows = self.scores.rows[which]
        return {"count": len(rows), "rows": ", ".join(number(int(row)) for row in rows[:NAMED]), "most": NAMED}

    def rows(self, value: float | None, page: int) -> tuple[list[ShownRow], int, list[ShownRow]]:
        """A page of the rows that go, highest scores first; how many pages there are; and the kept rows next to the cut."""
        removed = self.moved(value)
        order = np.argsort(-self.scores.values, kind="stable")
        out = order[removed[order]]
        reference = references(self._view(i, value, {}) for i in order[:SHOWN].tolist())
        pages = max(math.ceil(len(out) / ROWS), 1)
        page = min(max(page, 1), pages)
        shown = out[(page - 1) * ROWS : page * ROWS]
        near = order[~removed[order]][:NEAR]
        texts = self._texts(np.concatenate([shown, near]))
        go, stay = ([self._view(i, value, texts) for i in part.tolist()] for part in (shown, near))
        return show_rows(go, reference, BYTES), pages, show_rows(stay, reference, BYTES)

    def _view(self, i: int, value: float | None, texts: Mapping[int, str]) -> RowView:
        scores = self.scores
        row, at = int(scores.rows[i]), self.cuts[scores.shapes[i]].value if value is None else value
        pieces = self.views.get(row) or ([(texts[i], "row", None)] if i in texts else [])
        return replace(row_view(scores, i, at, self.categories[i], pieces), shape="")

    def _texts(self, wanted: Ints) -> dict[int, str]:
        """The beginning of rows whose tokens were not kept, from the scan's files of rows, which hold a row a line."""
        found = {}
        for name, own in (("removed.jsonl", self.removed), ("kept.jsonl", ~self.removed)):
            bare = (i for i in wanted.tolist() if own[i] and int(self.scores.rows[i]) not in self.views)
            lines = {int(own[:i].sum()): i for i in bare}
            if lines and (self.folder / name).is_file():
                with (self.folder / name).open(encoding="utf-8", errors="backslashreplace", newline="\n") as source:
                    for at, line in enumerate(islice(source, max(lines) + 1)):
                        if at in lines:
                            found[lines[at]] = line[:LONGEST]
        return found


def read(folder: Path) -> Scan | None:
    """The finished scan in a folder; None if there is none, or while it is written anew."""
    try:
        return _read(folder, (folder / "manifest.json").stat().st_mtime_ns)
    except (OSError, GradShieldError, ValueError, KeyError):
        return None


@lru_cache(maxsize=4)
def _read(folder: Path, _changed: int) -> Scan:
    manifest = runs.read_manifest(folder, ScanManifest)
    scores, removed, categories, *_ = cuts.read_scores(folder, manifest)
    if not len(removed) or len(removed) != manifest.results.scored:
        raise ValueError("the scores and the manifest are of two scans")
    return Scan(folder, manifest, scores, removed, categories, cuts.stored_cuts(manifest.results), stored_views(folder))
