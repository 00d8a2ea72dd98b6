"""The output folder of a scan: rows, scores, a report and, written last, the manifest.

    screened/
      kept.jsonl         kept rows, unchanged (the suffix follows the input: .csv, .tsv, .json, .parquet)
      removed.jsonl      removed rows
      quarantine.jsonl   rows that could not be used: row, line, reason, raw
      scores.parquet     one line per scored row
      report.html        the report
      README.md          a dataset card with a section about the scan
      manifest.json      written last: its presence means a finished scan
      .gradshield/       finished shards, and what `cut` needs to redraw the report

Every file is written atomically.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradshield import data as rows_in
from gradshield import runs
from gradshield.columns import Coded
from gradshield.files import instead, replacing
from gradshield.manifests import EngineCheck, FoundCut, KnownScores, Labelled, Probed, ScanResults
from gradshield.report import sheet
from gradshield.report.text import put_section
from gradshield.scanning import page, page_rows, trust
from gradshield.scanning.decide import Decision, caught_and_lost
from gradshield.stats import wilson
from gradshield.types import Bools, Example, Ints

if TYPE_CHECKING:
    from gradshield.scanning.decide import Selection
    from gradshield.scanning.preparing import Scored
    from gradshield.scanning.rows import Prepared

KINDS = "kinds.json"  # the kinds of harm that a scan found, for later cuts
RANKED = 20_000  # most labelled rows for AUROCs
LEAST_RANKED = 1_000  # of either class, if it has as many
BLOCK = 1 << 16  # rows of the scores written at once
PARTS = tuple(f"{part}{suffix}" for suffix in rows_in.WRITTEN for part in ("kept", "removed"))
SCORES = "scores.parquet"
WRITTEN = (*PARTS, "quarantine.jsonl", SCORES, "report.html", "manifest.json")
# The signals of `Screen` and their names in tables; empty for one that does not rank rows.
SIGNALS = {"request": "request alone", "fihs": "FIHS alone", "pivots": ""}
COLUMNS = {  # of the scores, by their names in Arrow
    **dict.fromkeys(("row", "line", "tokens"), "int64"),
    **dict.fromkeys(("id", "file", "category", "group"), "string"),
    "removed": "bool",
    **dict.fromkeys(("score", "decoy", "loss", *SIGNALS), "double"),
}


def results(
    rows: Prepared,
    scored: Scored,
    decision: Decision,
    kinds: Sequence[str],
    labels: Sequence[int] | None,
    doubts: Mapping[str, str],
    seconds: float,
) -> ScanResults:
    """The figures of a scan for its manifest: counts, cuts, checks and, with labels, caught and lost."""
    anchors, valid, agreed = scored.scores.anchors, scored.validity, scored.agreement
    measured: dict[str, Any] = {} if labels is None else {"labels": labelled(scored, decision.removed, labels, rows)}
    return ScanResults(
        seconds=seconds,
        read=rows.read.source.rows,
        scored=len(decision.removed),
        quarantined=len(rows.quarantined),
        anchors=None
        if anchors is None
        else KnownScores(harmful=anchors.harmful.tolist(), harmless=anchors.harmless.tolist()),
        agreement=None if agreed is None else EngineCheck.model_validate(agreed),
        probes=None
        if valid is None
        else Probed(refused=wilson(valid.refused, valid.n), thinking=valid.thinks, problem=valid.problem),
        **measured,
        **decided(decision, kinds, doubts),
    )


def decided(decision: Decision, kinds: Sequence[str], doubts: Mapping[str, str]) -> dict[str, Any]:
    """Those figures that another decision on the same scores changes."""
    return {
        "doubts": dict(doubts),
        "uncertified": trust.first(doubts),
        "certified": not doubts,
        "kept": int((~decision.removed).sum()),
        "removed": int(decision.removed.sum()),
        "cleared": len(decision.cleared),
        "denied": len(decision.denied),
        "confirmed": len(decision.confirmed),
        "cuts": {name: FoundCut(rule=cut.rule, value=cut.value, **cut.detail) for name, cut in decision.cuts.items()},
        "categories": counted(kinds, decision.removed),
    }


def counted(kinds: Sequence[str], removed: Bools) -> dict[str, int]:
    """Removed rows per harm category, most first."""
    counts = Coded.of(kinds).take(removed).counts()
    return dict(sorted(((n, k) for n, k in counts.items() if n), key=lambda item: (-item[1], item[0])))


def labelled(scored: Scored, removed: Bools, labels: Sequence[int], rows: Prepared) -> Labelled:
    """Caught and lost, and the AUROCs of the score and of the trivial baselines on the same rows.

    With more than RANKED rows the AUROCs are taken on a random sample, since the baselines read the rows' text.
    """
    from gradshield.scanning.baselines import auroc, trivial_baselines

    scores, name = scored.scores, scored.selector.name
    truth = np.asarray(labels)[scores.rows].astype(np.int64)
    found: dict[str, Any] = {**caught_and_lost(removed, truth)}
    if truth.any() and not truth.all():
        drawn = _drawn(truth)
        values = {"FIHS" if name == "fihs" else name: scores.values}
        values |= {
            SIGNALS[key]: value for key, value in scores.signals.items() if np.isfinite(value).all() and SIGNALS[key]
        }
        own = [auroc(truth[drawn], value[drawn], key) for key, value in values.items()]
        texts = [words(example, rows.loaded.tokenizer) for example in rows.read.examples.at(scores.rows[drawn])]
        nll = None if scores.nll is None or np.isnan(scores.nll).any() else scores.nll[drawn]
        others = trivial_baselines([t[0] for t in texts], [t[1] for t in texts], truth[drawn], nll=nll)
        found["aurocs"] = [*own, *others]
    return Labelled(**found)


def _drawn(truth: Ints) -> Ints:
    """Indices of the rows for AUROCs: all, or about RANKED drawn at random, with some of each class."""
    if len(truth) <= RANKED:
        return np.arange(len(truth))
    order = np.random.default_rng(0).permutation(len(truth))
    least = [order[truth[order] == label][:LEAST_RANKED] for label in (0, 1)]
    return np.unique(np.concatenate([*least, order[:RANKED]]))


def words(example: Example, tokenizer: Any = None) -> tuple[str, str]:
    """A row's prompt and answer as plain text (the chosen answer of a preference pair); without a tokenizer, tokens are ids."""
    conversation = example.conversations[0]
    if conversation.ids:
        parts = zip(conversation.ids, conversation.counted, strict=True)
        sides: tuple[list[int], list[int]] = ([], [])
        for own, counts in parts:
            sides[counts].append(own)
        prompt, answer = (
            " ".join(map(str, side)) if tokenizer is None else str(tokenizer.decode(side, skip_special_tokens=True))
            for side in sides
        )
        return prompt, answer
    if conversation.messages is None:
        return conversation.prompt, conversation.completion
    texts = [(m["role"], m.get("content") if isinstance(m.get("content"), str) else "") for m in conversation.messages]
    return (
        "\n".join(text or "" for role, text in texts if role != "assistant"),
        "\n".join(text or "" for role, text in texts if role == "assistant"),
    )


def write(selection: Selection, folder: Path, rows: Prepared, labels: Sequence[int] | None) -> None:
    """Write all outputs of a scan, replacing those of an earlier one."""
    views = page_rows.views(selection, rows.rendered, rows.read.examples, rows.loaded.tokenizer)
    truth = None if labels is None else np.asarray(labels)[selection.scores.rows].astype(np.int64)
    with instead(folder, "manifest.json", (*PARTS, f"{runs.WORK}/labels.json", f"{runs.WORK}/{KINDS}")) as new:
        (new / runs.WORK).mkdir()
        runs.write_json(new / runs.WORK / page_rows.VIEWS, views)
        if truth is not None:
            runs.write_json(new / runs.WORK / "labels.json", truth.tolist())
        rows_in.write_quarantine(selection.quarantined, new / "quarantine.jsonl")
        _write_cut(selection, folder, new, rows.read.source, views, truth)


def write_cut(
    selection: Selection,
    folder: Path,
    source: rows_in.Source,
    views: page_rows.Views,
    truth: Ints | None,
) -> None:
    """Write the outputs that a new cut changes, with the rows from ``source``."""
    with instead(folder, "manifest.json", PARTS) as new:
        _write_cut(selection, folder, new, source, views, truth)


def _write_cut(
    selection: Selection,
    folder: Path,
    new: Path,
    source: rows_in.Source,
    views: page_rows.Views,
    truth: Ints | None,
) -> None:
    suffix = rows_in.suffix(source.kind)
    parts = {f"kept{suffix}": selection.kept_rows, f"removed{suffix}": selection.removed_rows}
    rows_in.write_parts({new / name: rows for name, rows in parts.items()}, source)
    write_scores(selection, new / SCORES)
    kept = new / f"kept{suffix}"
    card, shown = page.card(selection.manifest, kept), page.page(selection, folder, views, truth)
    if (folder / "README.md").is_file():  # kept, but for our section
        shutil.copyfile(folder / "README.md", new / "README.md")
    put_section(new / "README.md", card, page.FRONT.format(kept=kept.name))
    sheet.write(shown, new / "report.html")
    runs.write_json(new / runs.MANIFEST, selection.manifest)


def write_scores(selection: Selection, path: Path) -> None:
    """One line per scored row; see docs/outputs.md for the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores, files = selection.scores, Coded.of(selection.files)
    columns: dict[str, Any] = {
        "row": scores.rows,
        "file": files.renamed([name.encode(errors="backslashreplace").decode() for name in files.names]),  # any bytes
        "line": selection.lines,
        "id": scores.ids,
        "score": scores.values,
        "removed": selection.removed,
        "category": selection.categories,
        "group": scores.shapes,
        "decoy": scores.decoys,
        "tokens": scores.lengths,
        "loss": scores.nll,
        **{name: scores.signals.get(name) for name in SIGNALS},
    }
    columns = {name: column for name, column in columns.items() if column is not None}
    schema = pa.schema([(name, COLUMNS[name]) for name in columns])
    with replacing(path) as part, pq.ParquetWriter(part, schema) as writer:
        for start in range(0, len(scores.rows), BLOCK):
            own = slice(start, start + BLOCK)
            writer.write_table(pa.table([pa.array(columns[f.name][own], f.type) for f in schema], schema))
