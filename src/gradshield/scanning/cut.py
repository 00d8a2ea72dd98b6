"""Cut saved scores again, without a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from gradshield import data as rows_in
from gradshield import runs
from gradshield.columns import Coded, Ids
from gradshield.errors import DataError, UsageError
from gradshield.manifests import Labelled, ScanManifest, ScanResults
from gradshield.runs import alone
from gradshield.scanning import outputs, trust
from gradshield.scanning.decide import Decision, Selection, caught_and_lost, decide, read_ids
from gradshield.scanning.page_rows import stored_views
from gradshield.thresholds import Threshold
from gradshield.thresholds import parse as parse_threshold
from gradshield.types import Anchors, Bools, Cut, Ints, Quarantined, Scores

NO_CATEGORY = "not measured"
ALLOW, DENY = "allow.txt", "deny.txt"  # what a reviewer keeps and removes, in the folder of the scan
OPTIONAL = ("decoy", "tokens", "loss", *outputs.SIGNALS)
UNLABELLED = (
    "the labels of the scan are missing or damaged, so this cut cannot be measured by them: scan with --labels again"
)
KINDS, LABELS = TypeAdapter(dict[int, str]), TypeAdapter(list[Literal[0, 1]])


def cut(
    folder: str | Path,
    threshold: str | Threshold | None = None,
    allow: Iterable[str] | None = None,
    deny: Iterable[str] | None = None,
    command: str = "gradshield.cut",
) -> Selection:
    """Apply another threshold to the scores of a finished scan, and rewrite its rows, scores, report and manifest.

    The default threshold is that of the scan's selector. Rows that the scan kept have no harm category, since that needs the
    model: they get ``"not measured"``.

    Parameters
    ----------
    folder
        The output folder of a finished scan.
    threshold
        A rule with its options as typed (``ratio:5%``), or a Threshold.
    allow, deny
        Ids of rows that a reviewer has cleared, which are kept, and denied, which are removed; None for the lists in the folder,
        as ``gradshield review`` writes them. A list that the scan was given is not remembered.

    Raises
    ------
    DataError
        The folder is not a finished scan, or its files do not belong together.
    UsageError
        The rule needs more rows than stand out, and would keep all that are removed now; a row is allowed and denied.

    Examples
    --------
    >>> import gradshield as gs
    >>> from gradshield import lab
    >>> rows, _ = lab.mix("dialogue", harm="explicit", ratio=0.05, n=36)
    >>> probing = gs.Probing(requests=lab.requests("direction"), lookalikes=lab.lookalikes("direction"))
    >>> _ = gs.scan(rows, model=lab.checkpoint("aligned"), probing=probing, output="screened")
    >>> len(gs.cut("screened", "ratio:10%").removed_rows)
    3
    """
    path = Path(folder)
    runs.read_manifest(path, ScanManifest)
    with alone(path):
        old = Scanned.read(path)
        if threshold is None:
            from gradshield.selectors import SELECTORS  # where needed: it brings torch

            threshold = SELECTORS[old.manifest.settings.selector.partition(":")[0]].rule
        rule = parse_threshold(threshold, old.manifest.settings.seed) if isinstance(threshold, str) else threshold
        allow, deny = (
            own_list(path, name) if given is None else given for name, given in ((ALLOW, allow), (DENY, deny))
        )
        decision = decide(old.scores, rule, allow, deny)
        _check_enough(old.scores, decision, old.removed)
        return write(path, old, decision, threshold if isinstance(threshold, str) else rule.name, command)


def own_list(folder: Path, name: str) -> list[str]:
    """The ids of a list in the folder of a scan, ``allow.txt`` or ``deny.txt``; none without one. Raises DataError."""
    path = folder / name
    return read_ids(path, "the list") if path.exists() or path.is_symlink() else []


@dataclass(frozen=True, eq=False)
class Scanned:
    """A finished scan, read back: its rows in input order.

    ``removed`` (N,), ``categories``, ``lines`` and ``files`` are aligned with the scores.
    """

    manifest: ScanManifest
    scores: Scores
    removed: Bools
    categories: Coded
    rows: rows_in.Examples
    lines: Ints
    files: Coded

    @classmethod
    def read(cls, path: Path) -> Scanned:
        """Raises DataError if the folder is not a finished scan, or its files do not belong together."""
        manifest = runs.read_manifest(path, ScanManifest)
        scores, removed, categories, lines, files = read_scores(path, manifest)
        if (known := manifest.results.anchors) is not None:
            harmful, harmless = (np.array(values, dtype=np.float64) for values in (known.harmful, known.harmless))
            scores = replace(scores, anchors=Anchors(harmful, harmless))
        rows = _together(path, manifest, scores, removed)
        return cls(manifest, scores, removed, categories, rows, lines, files)

    @property
    def cuts(self) -> dict[str, Cut]:
        """The cuts of the scan, by group."""
        return stored_cuts(self.manifest.results)


def stored_cuts(results: ScanResults) -> dict[str, Cut]:
    """The cuts of a manifest, which has no infinities: one that removes nothing, or everything, is null there."""
    unbounded = -math.inf if results.removed - results.denied else math.inf
    return {
        name: Cut(unbounded if one.value is None else one.value, one.rule, one.model_extra or {})
        for name, one in results.cuts.items()
    }


def write(path: Path, scanned: Scanned, decision: Decision, threshold: str, command: str) -> Selection:
    """Rewrite the outputs of a scan, whose folder this process has alone, for another decision on its scores."""
    old, scores, rows, removed = scanned.manifest, scanned.scores, scanned.rows, decision.removed
    kinds = _kinds(path, scores.rows[scanned.removed], scanned.categories, scanned.removed)
    names = Coded.of(
        kinds.get(row, NO_CATEGORY) if out else "" for row, out in zip(scores.rows.tolist(), removed, strict=True)
    )
    examples = rows.at(scores.rows[decision.unread(scores.rows)][: trust.LOOKED_AT])
    opener_fihs = old.settings.selector_found.get("opener_fihs")
    truth = _labels(path, len(removed))
    problem, quarantined = old.results.doubts.get("probes", ""), _quarantined(path, old.results.quarantined)
    doubts = trust.doubts(scores, decision, examples, problem, opener_fihs, len(quarantined), truth)
    if truth is None and (old.results.labels != Labelled() or "labels" in old.results.doubts):
        doubts["labels"] = UNLABELLED
    kept = {name: value for name, value in old.results if name in old.results.model_fields_set}
    kept.pop("filtered", None)  # measured on a model trained on other rows
    kept.pop("labels", None)
    if truth is not None:
        kept["labels"] = old.results.labels.model_copy(update=caught_and_lost(removed, truth))
    results = ScanResults(**kept | outputs.decided(decision, names, doubts))
    settings = old.settings.model_copy(update={"threshold": threshold})
    selection = Selection(
        **vars(decision),
        scores=scores,
        categories=names,
        quarantined=quarantined,
        keep=lambda: rows_in.take(scores.rows[~removed], rows.source),
        manifest=old.model_copy(update={"command": command, "settings": settings, "results": results}),
        lines=scanned.lines,
        files=scanned.files,
    )
    outputs.write_cut(selection, path, rows.source, stored_views(path), truth)
    return selection


def _check_enough(scores: Scores, decision: Decision, removed_before: Bools) -> None:
    """Raises UsageError where a rule that needs several rows to remove any would keep all that were removed before."""
    groups = Coded.of(scores.shapes)
    for name, one in decision.cuts.items():
        own, needed, leading = groups.where(name), one.detail.get("fewest", 0), one.detail.get("leading", 0)
        before, now = int(removed_before[own].sum()), int((scores.values[own] > one.value).sum())
        if before and not now and 0 < leading < needed:
            larger = f"a larger q ({one.rule}:q={math.ceil(100 / leading) / 100:g}) or " if leading > 1 else ""
            raise UsageError(
                f"the threshold {one.rule!r} with q = {one.detail['q']:g} removes {needed} rows or none, and only {leading} "
                f"score{'s' * (leading == 1)} above every decoy, so that the {before} rows removed now would all be kept: give "
                f"{larger}another rule; the result stays as it was"
            )


def _kinds(folder: Path, rows: Ints, names: Coded, removed: Bools) -> dict[int, str]:
    """The kind of harm of every row that the scan removed; the first cut stores it for later ones."""
    path = folder / runs.WORK / outputs.KINDS
    try:
        return KINDS.validate_json(path.read_bytes())
    except (OSError, ValueError):  # missing before the first cut
        found = {r: name for r, name in zip(rows.tolist(), names.take(removed), strict=True) if name != NO_CATEGORY}
        runs.write_json(path, found)
        return found


class Table(NamedTuple):
    """``scores.parquet``, in input order: everything but the scores is aligned with them."""

    scores: Scores
    removed: Bools
    categories: Coded
    lines: Ints
    files: Coded


def read_scores(folder: Path, manifest: ScanManifest | None = None) -> Table:
    """The scores of a scan and what was decided on them; ``manifest`` is that of the folder, if it was read.

    Raises DataError if they cannot be read, or are not of the scan of the folder's manifest.
    """
    manifest = manifest or runs.read_manifest(folder, ScanManifest)
    opener_fihs = manifest.settings.selector_found.get("opener_fihs")
    try:
        table = pq.read_table(folder / outputs.SCORES)
        known = [name for name in outputs.COLUMNS if name not in OPTIONAL or name in table.column_names]
        columns = {name: _column(table, name) for name in known}
        numbers = {
            n: one.to_numpy(zero_copy_only=False) for n, one in columns.items() if outputs.COLUMNS[n] != "string"
        }
        texts = {n: _texts(one) for n, one in columns.items() if outputs.COLUMNS[n] == "string"}
        scores = Scores(
            rows=numbers["row"],
            ids=Ids.of(texts["id"]),
            values=numbers["score"],
            shapes=Coded.of(texts["group"]),
            decoys=numbers.get("decoy"),
            lengths=numbers.get("tokens"),
            nll=numbers.get("loss"),
            signals={n: numbers[n] for n in outputs.SIGNALS if n in numbers},
        )
        rows, real = scores.rows, [one for one in (scores.values, scores.decoys) if one is not None]
        whole = opener_fihs is None or (math.isfinite(opener_fihs) and scores.signals.keys() == outputs.SIGNALS.keys())
        whole &= bool((np.diff(rows) > 0).all() and (rows >= 0).all() and (rows < manifest.results.read).all())
        whole &= all(np.isfinite(one).all() for one in real)
        if not (whole and Coded.of(scores.shapes).counts().keys() <= manifest.results.cuts.keys()):
            raise ValueError(folder)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, OverflowError):
        raise DataError(
            f"the scores of {str(folder)!r} cannot be read (scores.parquet): run `gradshield scan` into it again"
        ) from None
    categories, files = Coded.of(texts["category"]), Coded.of(texts["file"])
    return Table(scores, numbers["removed"], categories, numbers["line"], files)


def _column(table: pa.Table, name: str) -> Any:
    """One column. Raises ValueError for a type that is not its own, or a null (of real numbers, it reads as NaN)."""
    column, kind = table[name], outputs.COLUMNS[name]
    if str(column.type).removeprefix("large_") != kind or (column.null_count and kind != "double"):
        raise ValueError(name)
    return column


def _texts(column: Any) -> Iterator[str]:
    """The strings of an Arrow column, few in memory at a time."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), 1024):
            yield from chunk.slice(start, 1024).to_pylist()


def _together(folder: Path, old: ScanManifest, scores: Scores, removed: Bools) -> rows_in.Examples:
    """The scored rows, from the kept and the removed file, at their positions in the input."""
    suffix, order = rows_in.suffix(old.data.kind), np.argsort(removed, kind="stable")
    parts = {folder / f"{name}{suffix}": removed == flag for name, flag in (("kept", False), ("removed", True))}
    files = tuple(path for path, own in parts.items() if own.any())
    if not files:
        raise DataError(f"{str(folder)!r} has no scored row: run `gradshield scan` again")
    found = rows_in.read_files(files, rows_in.Format(**old.settings.format.plain())).examples
    lines, names = found.source.places(found.rows)
    for path in files:
        own, here = parts[path], names.where(str(path))
        if here.sum() != own.sum():
            raise DataError(
                f"{path.name} has {here.sum()} rows, and the scores have {own.sum()}: it was changed after the scan; run "
                "`gradshield scan` again"
            )
        # Only the hashes: the repeat counts -2, -3 are those of the files.
        changed = found.ids.digests[here] != Ids.of(scores.ids).digests[own]
        if changed.any():
            raise DataError(
                f"line {lines[here][changed][0]} of {path.name} is not the row that was scored: it was changed "
                "after the scan; run `gradshield scan` again"
            )
    return found.moved(scores.rows[order])


def _quarantined(folder: Path, count: int) -> tuple[Quarantined, ...]:
    """The ``count`` quarantined rows of a scan. Raises DataError if the file does not hold them."""
    path = folder / "quarantine.jsonl"
    try:
        # Split at newlines only: a row may contain other characters at which splitlines breaks.
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        rows = [json.loads(line) for line in lines if line]
        if len(rows) != count:
            raise ValueError(count)
        return tuple(
            Quarantined(r["row"], r["line"], r["reason"], r["raw"].encode(), r["bytes"], r["sha256"]) for r in rows
        )
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{path} cannot be read: it was changed after the scan; run `gradshield scan` again") from None


def _labels(folder: Path, scored: int) -> Any:
    """The label of each scored row (N,); None without labels, or if they cannot be read."""
    try:
        found = LABELS.validate_json((folder / runs.WORK / "labels.json").read_bytes())
    except (OSError, ValueError):
        return None
    return np.array(found, dtype=np.int64) if len(found) == scored else None
