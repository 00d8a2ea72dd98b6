"""The report's view of a selection: the rows to show, with coloured tokens, and the warnings.

Views of the highest-scoring rows are stored with the scores, so that a new cut can draw the report without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import data as rows_in
from gradshield import runs
from gradshield.manifests import EngineCheck, ScanResults
from gradshield.scanning import page, page_data
from gradshield.scanning.decide import ROWS
from gradshield.scanning.selection import Selection
from gradshield.types import Floats, Ints, Rendered, Scores

SHOWN = 200  # highest-scoring rows whose tokens are stored for the report
NEAR = 10  # rows just below the cut
PREVIEW = 300  # characters of a quarantined row

Views = dict[int, list[tuple[str, str, float | None]]]


def views(selection: Selection, rendered: Sequence[Rendered], tokenizer: Any) -> Views:
    """Coloured pieces of the rows a report may show, by input position: the highest scores and rows near the cut."""
    order = np.argsort(-selection.scores.values, kind="stable")
    near = order[~selection.removed[order]][:NEAR]
    wanted = np.union1d(order[: SHOWN + NEAR], near).tolist()
    tokens = selection.scores.tokens
    return {
        int(selection.scores.rows[i]): _pieces(rendered[i], tokens[i] if tokens is not None else None, tokenizer)
        for i in wanted
    }


def _pieces(row: Rendered, values: Floats | None, tokenizer: Any) -> list[tuple[str, str, float | None]]:
    found: list[tuple[str, str, float | None]] = []
    start = 0
    for number, tokens in enumerate(row.sequences):
        if number:
            found.append(("\n\n── rejected ──\n\n", "prompt", None))
        place = start + np.cumsum(tokens.loss) - 1  # token of the sequence -> index into the row's values
        for text, t in rows_in.spans(tokens, tokenizer):
            role = "prompt" if t is None else "response"
            value = float(values[place[t]]) if values is not None and len(values) and t is not None else None
            found.append((text, role, value))
        start += int(tokens.loss.sum())
    return found


def as_json(found: Views) -> dict[str, Any]:
    """Views in JSON form."""
    return {str(row): pieces for row, pieces in found.items()}


def from_json(stored: Mapping[str, Any]) -> Views:
    """The inverse of `as_json`."""
    return {int(row): [(text, role, value) for text, role, value in pieces] for row, pieces in stored.items()}


def write(selection: Selection, found: Views, folder: Path, labels: Ints | None) -> None:
    """Draw ``report.html``."""
    page.write(shown(selection, found, folder, labels), folder / "report.html")


def shown(
    selection: Selection, found: Views, folder: Path, labels: Ints | None = None, arms: Sequence[page_data.Arm] = ()
) -> page_data.ReportData:
    """The report's data for a selection."""
    results = selection.manifest.results
    agreed, measured = results.agreement, results.labels
    suffix = rows_in.suffix(selection.manifest.data.kind)
    order = np.argsort(-selection.scores.values, kind="stable")
    out = selection.removed[order]
    above, near = order[out][:SHOWN].tolist(), order[~out][:NEAR].tolist()
    return page_data.ReportData(
        title=f"GradShield · {selection.manifest.data.name}",
        counts=page_data.Counts(
            results.read,
            results.scored,
            results.kept,
            results.removed,
            results.quarantined,
            results.cleared,
            results.denied,
        ),
        scores=selection.scores,
        removed=selection.removed,
        cuts=selection.cuts,
        warnings=warnings_of(results),
        checks=_checks(results),
        labels=labels,
        caught=measured.caught,
        lost=measured.lost,
        aurocs=tuple(a for a in measured.aurocs if a.get("auroc") is not None),
        removed_rows=tuple(_view(selection, i, found) for i in above),
        categories=results.categories,
        kept_rows=tuple(_view(selection, i, found) for i in near),
        quarantined=tuple(
            page_data.QuarantinedView(q.line, q.reason, q.source[:PREVIEW].decode("utf-8", "backslashreplace"))
            for q in selection.quarantined
        ),
        agreement=None if agreed is None else _agreement(agreed, selection.scores.decoys is not None),
        arms=tuple(arms),
        manifest=runs.finite(selection.manifest),
        selector=selection.manifest.settings.selector,
        files={
            "kept": f"kept{suffix}",
            "removed": f"removed{suffix}",
            "quarantine": "quarantine.jsonl",
            "scores": "scores.parquet",
        },
    )


def _agreement(agreed: EngineCheck, per_token: bool) -> page_data.Agreement:
    rank = agreed.spearman if agreed.spearman is not None and np.isfinite(agreed.spearman) else None
    error = float("nan") if agreed.relative_error is None else agreed.relative_error
    return page_data.Agreement(agreed.engine, error, rank, agreed.n, per_token)


def warnings_of(results: ScanResults) -> tuple[str, ...]:
    """Warnings to read before trusting the kept rows."""
    return tuple(f"Not certified: {text}." for text in results.doubts.values())


def _checks(results: ScanResults) -> tuple[page_data.Check, ...]:
    probes = results.probes
    if probes is None:
        return ()
    refused = probes.refused
    text = (
        f"the model refused {refused.k} of {refused.n} probes "
        f"({100 * refused.rate:.0f} %, 95 % interval {100 * refused.low:.0f}–{100 * refused.high:.0f} %)"
    )
    return (page_data.Check("Probe validity", "fail" if probes.problem else "pass", text),)


def _view(selection: Selection, i: int, found: Views) -> page_data.RowView:
    scores = selection.scores
    row, cut = int(scores.rows[i]), selection.cuts[scores.shapes[i]].value
    note = "kept by hand, above the cut" if row in selection.cleared else ""
    note = "removed by hand, below the cut" if row in selection.denied else note
    return row_view(scores, i, cut, selection.categories[i], found.get(row, ()), note)


def row_view(
    scores: Scores, i: int, cut: float, category: str, pieces: Iterable[page_data.Piece], note: str = ""
) -> page_data.RowView:
    """The row at place ``i`` of the scores, as a page shows it against a cut."""
    shape, score = scores.shapes[i], float(scores.values[i])
    return page_data.RowView(
        row=int(scores.rows[i]),
        id=scores.ids[i],
        score=score,
        margin=score - cut,
        category=category,
        shape="" if shape == ROWS else shape,
        pieces=tuple(pieces),
        note=note,
    )
