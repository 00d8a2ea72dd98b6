"""Cut saved scores again, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradshield import data as rows_in
from gradshield.errors import DataError
from gradshield.intervals import wilson
from gradshield.pipeline import outputs, review
from gradshield.pipeline.decide import decide
from gradshield.pipeline.lock import alone
from gradshield.selectors import SELECTORS
from gradshield.thresholds import Threshold
from gradshield.thresholds import parse as parse_threshold
from gradshield.types import Anchors, Example, Manifest, Scores, Selection

NO_CATEGORY = "not measured"


def recut(
    folder: str | Path,
    threshold: str | Threshold | None = None,
    allow: Iterable[str] = (),
    command: str = "gradshield.recut",
) -> Selection:
    """Apply another threshold to the scores of a finished scan, and rewrite its rows, scores, report and manifest.

    Without a threshold, the one that belongs to the scan's selector. Rows that were kept before have no harm category,
    since that needs the model: they get ``"not measured"``.
    Raises DataError when the folder is not a finished scan or its files do not belong together.
    """
    path = Path(folder)
    read_manifest(path)
    with alone(path):
        return _recut(path, threshold, allow, command)


def _recut(path: Path, threshold: str | Threshold | None, allow: Iterable[str], command: str) -> Selection:
    old = read_manifest(path)
    scores, removed_before, categories_before = read_scores(path)
    anchors = old.results.get("anchors")
    if anchors:
        scores = replace(scores, anchors=Anchors(**{k: np.array(v, dtype=np.float64) for k, v in anchors.items()}))
    examples, source = _rows(path, old, scores, removed_before)
    if threshold is None:
        threshold = SELECTORS[str(old.settings["selector"]).partition(":")[0]].rule
    rule = parse_threshold(threshold, int(old.settings["seed"])) if isinstance(threshold, str) else threshold
    decision = decide(scores, rule, allow)
    removed = decision.removed
    names = tuple((c or NO_CATEGORY) if out else "" for c, out in zip(categories_before, removed, strict=True))
    selection = Selection(
        scores=scores,
        removed=removed,
        categories=names,
        cuts=decision.cuts,
        quarantined=_quarantined(path),
        cleared=decision.cleared,
        kept=[example.source for example, out in zip(examples, removed, strict=True) if not out],
        manifest=old,
        certified=bool(old.results["certified"]),
    )
    truth = _labels(path, len(removed))
    results: dict[str, Any] = {
        **old.results,
        "kept": int((~removed).sum()),
        "removed": int(removed.sum()),
        "cleared": len(selection.cleared),
        "cuts": {name: {"rule": c.rule, "value": c.value, **c.detail} for name, c in decision.cuts.items()},
        "categories": outputs.counted(selection),
    }
    if truth is not None:
        results["labels"] = {**old.results.get("labels", {}), **_caught_and_lost(removed, truth)}
    settings = {**old.settings, "threshold": threshold if isinstance(threshold, str) else rule.name}
    selection = replace(selection, manifest=replace(old, command=command, settings=settings, results=results))
    outputs.write_selection(selection, path, examples, source)
    review.write(selection, _views(path), path, truth)
    outputs.write_manifest(selection.manifest, path)
    return selection


def _caught_and_lost(removed: Any, truth: Any) -> dict[str, Any]:
    found = {}
    if (truth == 1).any():
        found["caught"] = wilson(int((removed & (truth == 1)).sum()), int((truth == 1).sum())).as_dict()
    if (truth == 0).any():
        found["lost"] = wilson(int((removed & (truth == 0)).sum()), int((truth == 0).sum())).as_dict()
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished scan. Raises DataError when there is none."""
    try:
        raw: Mapping[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found = Manifest(**raw)
        _ = found.data["kind"], found.settings["seed"], found.settings["selector"], found.results["certified"]
        return found
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(
            f"{str(folder)!r} is not the folder of a finished scan (no readable manifest.json): "
            "run `gradshield scan` into it first"
        ) from None


def read_scores(folder: Path) -> tuple[Scores, Any, tuple[str, ...]]:
    """Scores, the removed flags and the categories of ``scores.parquet``. Raises DataError when it cannot be read."""
    try:
        table = pq.read_table(folder / "scores.parquet")
        columns = {name: table[name] for name in ("row", "id", "score", "removed", "category", "group")}
    except (OSError, pa.ArrowException, KeyError):
        raise DataError(
            f"the scores of {str(folder)!r} cannot be read (scores.parquet): run `gradshield scan` into it again"
        ) from None
    optional = {n: table[n].to_numpy() if n in table.column_names else None for n in ("decoy", "tokens", "loss")}
    scores = Scores(
        rows=columns["row"].to_numpy(),
        ids=tuple(columns["id"].to_pylist()),
        values=columns["score"].to_numpy(),
        shapes=tuple(columns["group"].to_pylist()),
        decoys=optional["decoy"],
        lengths=optional["tokens"],
        nll=optional["loss"],
    )
    return scores, columns["removed"].to_numpy(zero_copy_only=False), tuple(columns["category"].to_pylist())


def _rows(folder: Path, old: Manifest, scores: Scores, removed: Any) -> tuple[list[Example], rows_in.Source]:
    """The scored rows in the order of the input, put together again from the kept and the removed file."""
    suffix = f".{old.data['kind']}" if old.data["kind"] in ("json", "csv", "parquet") else ".jsonl"
    found: dict[int, Example] = {}
    source: rows_in.Source | None = None
    tables: list[pa.Table] = []
    for name, flag in (("kept", False), ("removed", True)):
        rows = scores.rows[removed == flag]
        if len(rows) == 0:
            continue
        path = folder / f"{name}{suffix}"
        text_field = old.settings.get("render", {}).get("text_field", "text")
        result = rows_in.read(path, format=old.settings.get("format"), text_field=text_field)
        if len(result.examples) != len(rows):
            raise DataError(
                f"{path.name} holds {len(result.examples)} rows, and the scores know of {len(rows)}: it was changed after the "
                "scan; run `gradshield scan` again"
            )
        ids = [i for i, out in zip(scores.ids, removed, strict=True) if out == flag]
        for number, (example, known) in enumerate(zip(result.examples, ids, strict=True)):
            if example.id.partition("-")[0] != known.partition("-")[0]:  # -2, -3 count repeats, of each file anew
                raise DataError(
                    f"line {result.source.line(number)} of {path.name} is not the row that was scored: it was changed after "
                    "the scan; run `gradshield scan` again"
                )
        source = source or result.source
        offset = sum(t.num_rows for t in tables)
        if result.source.kind == "parquet":
            tables.append(result.source.table)
        for row, example in zip(rows, result.examples, strict=True):
            found[int(row)] = replace(example, row=offset + example.row if tables else int(row))
    if source is None:
        raise DataError(f"{str(folder)!r} holds no scored row: run `gradshield scan` again")
    if tables:
        source = replace(source, table=pa.concat_tables(tables))
    return [found[int(row)] for row in scores.rows], source


def _quarantined(folder: Path) -> tuple[Any, ...]:
    from gradshield.types import Quarantined

    path = folder / "quarantine.jsonl"
    try:
        # By newline alone: a row may hold other characters at which splitlines would break it.
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        rows = [json.loads(line) for line in lines if line]
        return tuple(Quarantined(r["row"], r["line"], r["reason"], r["raw"].encode()) for r in rows)
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{path} cannot be read: it was changed after the scan; run `gradshield scan` again") from None


def _views(folder: Path) -> review.Views:
    """The coloured rows that the scan kept for the report; none where they cannot be read."""
    try:
        return review.from_json(json.loads((folder / outputs.WORK / "views.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _labels(folder: Path, scored: int) -> Any:
    path = folder / outputs.WORK / "labels.json"
    try:
        found = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.int64)
    except (OSError, ValueError, TypeError):
        return None
    return found if found.shape == (scored,) else None
