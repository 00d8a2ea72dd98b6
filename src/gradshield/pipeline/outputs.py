"""What a scan leaves behind: rows, scores, a report and, last of all, the manifest.

    screened/
      kept.jsonl         rows that stay, as they came (the suffix follows the input: .csv, .tsv, .json, .parquet)
      removed.jsonl      rows that go
      quarantine.jsonl   rows that could not be used: row, line, reason, raw
      scores.parquet     one line per scored row
      report.html        the same, to look at
      manifest.json      written last: its presence means a finished scan
      .gradshield/       finished shards, the direction, and what `cut` needs to draw the report again

Every file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradshield import data as rows_in
from gradshield.columns import Coded
from gradshield.errors import DataError
from gradshield.files import instead, replacing, write_text
from gradshield.intervals import wilson
from gradshield.models import LoadedModel
from gradshield.types import Bools, EvalResult, Example, Ints, Manifest, Rate, Rendered, Selection

if TYPE_CHECKING:
    from gradshield.pipeline import review
    from gradshield.pipeline.rows import Prepared
    from gradshield.pipeline.scoring import Scored

WORK = ".gradshield"
KINDS = "kinds.json"  # in it: the kinds of harm that a scan named, for the cuts after it
RANKED = 20_000  # labelled rows, the most that AUROCs are taken on
LEAST_RANKED = 1_000  # of either class, where there are so many
WRITTEN = 1 << 16  # lines of the scores that are made and written at once
PARTS = tuple(f"{part}{suffix}" for suffix in rows_in.WRITTEN for part in ("kept", "removed"))
WRITTEN_BY_A_SCAN = (*PARTS, "quarantine.jsonl", "scores.parquet", "report.html", "manifest.json")
PACKAGES = ("gradshield", "torch", "transformers", "peft", "trl", "datasets", "numpy", "scipy", "scikit-learn")
# What the score of `Screen` is made of, and what a table calls it; nothing where it ranks no rows.
SIGNALS = {"request": "request alone", "fihs": "FIHS alone", "pivots": ""}


def check(output: str | Path) -> None:
    """Raises DataError where no output folder can be made, before anything is loaded; makes nothing."""
    folder = Path(output)
    nearest = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if not nearest.is_dir():
        raise DataError(
            f"the output folder {str(folder)!r} cannot be made ({nearest} is a file): give another --output"
        )
    if not os.access(nearest, os.W_OK):
        raise DataError(f"the output folder {str(folder)!r} cannot be written to: give another --output")


def check_own(
    output: str | Path,
    data: Any = None,
    written: Sequence[str] = WRITTEN_BY_A_SCAN,
    read: Sequence[Any] = (),
    mark: str = "scores.parquet",
) -> None:
    """Raises DataError where a command would write over its input, over another command's results, or over files of nobody's.

    ``written`` are the patterns of what it writes into the folder, ``read`` the models that it starts from, and ``mark`` is a
    file that stands beside a manifest of this command alone.
    """
    folder = Path(output)
    for model in read:
        for name in (_name(model), getattr(model, "adapter", None)):
            if name and folder.is_dir() and os.path.isdir(name) and folder.samefile(name):
                raise DataError(
                    f"the output folder {str(folder)!r} is the folder of the model {str(name)!r}, which would be written over: "
                    "give another --output"
                )
    there = sorted({path for pattern in written for path in folder.glob(pattern)})
    if isinstance(data, str | Path) and os.path.exists(data):
        for path in there:
            if path.samefile(data):
                raise DataError(
                    f"the data {str(data)!r} lies in the output folder under a name that is written there: give another --output"
                )
    if (folder / "manifest.json") in there and _of_ours(folder) and not (folder / mark).exists():
        raise DataError(
            f"the output folder {str(folder)!r} holds what another command has found, which would be written over: give another "
            "--output"
        )
    if there and not _of_ours(folder):
        raise DataError(
            f"the output folder {str(folder)!r} holds {there[0].name!r} and is no folder of GradShield's: give another --output, "
            "so that nothing is written over"
        )


def _name(model: Any) -> str | Path | None:
    """Where a model is from, as far as it says: a name or path, a loaded model, or one of transformers."""
    if model is None or isinstance(model, str | Path):
        return model
    found = getattr(model, "name", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return found if isinstance(found, str) else None


def _of_ours(folder: Path) -> bool:
    """Whether a command wrote here before: it has left its manifest, or was stopped and has left its working folder."""
    if (folder / WORK).is_dir():
        return True
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return "gradshield" in found["versions"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return False


def prepare(output: str | Path) -> Path:
    """The output folder with its working folder. Raises DataError when it cannot be written to."""
    folder = Path(output)
    try:
        (folder / WORK / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the output folder {str(folder)!r} cannot be made ({error.strerror}): give another --output"
        ) from None
    if not os.access(folder, os.W_OK):
        raise DataError(f"the output folder {str(folder)!r} cannot be written to: give another --output")
    return folder


def versions() -> dict[str, str]:
    """Python and every package that can change a number."""
    installed = {name: _installed(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: v for name, v in installed.items() if v is not None}}


@cache
def _installed(package: str) -> str | None:
    """Asked for every shard's and arm's key, and slow to look up."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def manifest(
    command: str,
    source: rows_in.Source,
    loaded: LoadedModel,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
) -> Manifest:
    """The manifest of a command on one dataset and one model."""
    return Manifest(
        command=command,
        versions=versions(),
        data={"name": source.name, "kind": source.kind, "sha256": source.sha256, "rows": source.rows},
        model={
            "name": loaded.name,
            "sha256": loaded.digest,
            "class": type(loaded.model).__name__,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "adapter": loaded.adapter,
        },
        settings=settings,
        results=dict(results),
    )


def with_results(selection: Selection, scored: Scored, rows: Prepared, labels: Sequence[int] | None) -> Selection:
    """The selection with its figures in the manifest: counts, cuts, checks and, with labels, caught and lost."""
    anchors, valid = selection.scores.anchors, scored.validity
    results: dict[str, Any] = {
        **selection.manifest.results,
        "read": rows.read.source.rows,
        "scored": len(selection.removed),
        "kept": int((~selection.removed).sum()),
        "removed": int(selection.removed.sum()),
        "quarantined": len(selection.quarantined),
        "cleared": len(selection.cleared),
        "certified": selection.certified,
        "cuts": {name: {"rule": c.rule, "value": c.value, **c.detail} for name, c in selection.cuts.items()},
        "anchors": None if anchors is None else {k: v.tolist() for k, v in vars(anchors).items()},
        "categories": counted(selection),
        "agreement": None if scored.agreement is None else asdict(scored.agreement),
        "probes": None
        if valid is None
        else {
            "refused": wilson(valid.refused, valid.n).as_dict(),
            "thinking": valid.thinks,
            "problem": valid.problem,
        },
    }
    if labels is not None:
        results["labels"] = labelled(selection, labels, rows.read.examples, scored.selector.name)
    return replace(selection, manifest=replace(selection.manifest, results=results))


def counted(selection: Selection) -> dict[str, int]:
    """Removed rows per harm category, most first."""
    counts = Coded.of(selection.categories).take(selection.removed).counts()
    return dict(sorted(((n, k) for n, k in counts.items() if n), key=lambda item: (-item[1], item[0])))


def labelled(
    selection: Selection, labels: Sequence[int], examples: rows_in.Examples, name: str = "fihs"
) -> dict[str, Any]:
    """Caught and lost, and the AUROC of the score beside the trivial baselines on the same rows.

    The AUROCs of more than RANKED rows are those of so many drawn at random: the baselines read the rows' words.
    """
    from gradshield.evaluation.baselines import auroc, trivial_baselines

    truth = np.asarray(labels)[selection.scores.rows].astype(np.int64)
    removed = selection.removed
    found: dict[str, Any] = {}
    if truth.any():
        found["caught"] = wilson(int((removed & (truth == 1)).sum()), int(truth.sum())).as_dict()
    if not truth.all():
        found["lost"] = wilson(int((removed & (truth == 0)).sum()), int((truth == 0).sum())).as_dict()
    if truth.any() and not truth.all():
        drawn, scores = _drawn(truth), selection.scores
        values = {"FIHS" if name == "fihs" else name: scores.values}
        values |= {
            SIGNALS[key]: value for key, value in scores.signals.items() if np.isfinite(value).all() and SIGNALS[key]
        }
        own = [{"name": key, **auroc(truth[drawn], value[drawn]).as_dict()} for key, value in values.items()]
        texts = [words(example) for example in examples.at(scores.rows[drawn])]
        nll = None if scores.nll is None else scores.nll[drawn]
        others = trivial_baselines([t[0] for t in texts], [t[1] for t in texts], truth[drawn], nll=nll)
        found["aurocs"] = [*own, *others]
    return found


def _drawn(truth: Ints) -> Ints:
    """Places of the rows that AUROCs are taken on: all of them, or RANKED drawn at random, with some of each class."""
    if len(truth) <= RANKED:
        return np.arange(len(truth))
    order = np.random.default_rng(0).permutation(len(truth))
    least = [order[truth[order] == label][:LEAST_RANKED] for label in (0, 1)]
    return np.unique(np.concatenate([*least, order[:RANKED]]))


def words(example: Example) -> tuple[str, str]:
    """A row's prompt and answer as plain text (the chosen answer of a preference pair)."""
    conversation = example.conversations[0]
    if conversation.messages is None:
        return conversation.prompt, conversation.completion
    texts = [(m["role"], m.get("content") if isinstance(m.get("content"), str) else "") for m in conversation.messages]
    return (
        "\n".join(text or "" for role, text in texts if role != "assistant"),
        "\n".join(text or "" for role, text in texts if role == "assistant"),
    )


def write(selection: Selection, folder: Path, rows: Prepared, labels: Sequence[int] | None) -> None:
    """Write everything that a scan leaves, in the place of what an earlier one left."""
    from gradshield.pipeline import review

    views = review.views(selection, rows.rendered, rows.loaded.tokenizer)
    truth = None if labels is None else np.asarray(labels)[selection.scores.rows].astype(np.int64)
    with instead(folder, "manifest.json", (*PARTS, f"{WORK}/labels.json", f"{WORK}/{KINDS}")) as new:
        (new / WORK).mkdir()
        write_json(new / WORK / "views.json", review.as_json(views))
        if truth is not None:
            write_json(new / WORK / "labels.json", truth.tolist())
        rows_in.write_quarantine(selection.quarantined, new / "quarantine.jsonl")
        _write_cut(selection, new, rows.read.source, views, truth)


def write_cut(
    selection: Selection, folder: Path, source: rows_in.Rows, views: review.Views, truth: Ints | None
) -> None:
    """Write what another cut changes, the rows as they stand in ``source``."""
    with instead(folder, "manifest.json", PARTS) as new:
        _write_cut(selection, new, source, views, truth)


def _write_cut(
    selection: Selection, folder: Path, source: rows_in.Rows, views: review.Views, truth: Ints | None
) -> None:
    from gradshield.pipeline import review

    suffix = rows_in.suffix(source.kind)
    parts = {f"kept{suffix}": selection.kept_rows, f"removed{suffix}": selection.removed_rows}
    rows_in.write_parts({folder / name: rows for name, rows in parts.items()}, source)
    write_scores(selection, folder / "scores.parquet")
    review.write(selection, views, folder, truth)
    write_manifest(selection.manifest, folder)


def write_scores(selection: Selection, path: Path) -> None:
    """One line per scored row; docs/outputs.md describes the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = selection.scores

    def lines(own: slice) -> Any:
        columns: dict[str, Any] = {
            "row": pa.array(scores.rows[own], pa.int64()),
            "id": pa.array(scores.ids[own], pa.string()),
            "score": pa.array(scores.values[own], pa.float64()),
            "removed": pa.array(selection.removed[own], pa.bool_()),
            "category": pa.array(selection.categories[own], pa.string()),
            "group": pa.array(scores.shapes[own], pa.string()),
        }
        if scores.decoys is not None:
            columns["decoy"] = pa.array(scores.decoys[own], pa.float64())
        if scores.lengths is not None:
            columns["tokens"] = pa.array(scores.lengths[own], pa.int64())
        if scores.nll is not None:
            columns["loss"] = pa.array(scores.nll[own], pa.float64())
        for name in SIGNALS:
            if name in scores.signals:
                columns[name] = pa.array(scores.signals[name][own], pa.float64())
        return pa.table(columns)

    with replacing(path) as part, pq.ParquetWriter(part, lines(slice(0)).schema) as writer:
        for start in range(0, len(scores.rows), WRITTEN):
            writer.write_table(lines(slice(start, start + WRITTEN)))


def write_manifest(value: Manifest, folder: Path) -> None:
    """The manifest."""
    write_json(folder / "manifest.json", asdict(value))


def write_json(path: Path, value: Any) -> None:
    """JSON with plain numbers only: what is not finite becomes null."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, default=str) + "\n")


def finite(value: Any) -> Any:
    """The same value with NaN and infinities as None, and numpy numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def caught_and_lost(rows: Sequence[Rendered], removed: Bools, labels: Sequence[int]) -> dict[str, Any]:
    """Of the rows labelled harmful and of the others, what went. A kind that is not there is left out."""
    harmful = np.array([bool(labels[row.row]) for row in rows])
    return {
        name: wilson(int(removed[own].sum()), int(own.sum())).as_dict()
        for name, own in (("caught", harmful), ("lost", ~harmful))
        if own.any()
    }


def stored(result: EvalResult) -> dict[str, Any]:
    """A measurement as JSON holds it, every answer included."""
    rates = {name: asdict(rate) for name, rate in result.rates.items()}
    rows = json.loads(json.dumps([dict(row) for row in result.outputs], default=plain))
    return {"rates": rates, "outputs": rows}


def result(value: Mapping[str, Any]) -> EvalResult:
    """A stored measurement, read back."""
    return EvalResult({name: Rate(**rate) for name, rate in value["rates"].items()}, tuple(value["outputs"]))


def write_outputs(found: EvalResult, path: Path) -> None:
    """Every prompt with its answer, verdicts or score, one JSON line each."""
    write_text(path, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in stored(found)["outputs"]))


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, its keys and the members of sets in order; what JSON has no form for counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_ordered).encode()).hexdigest()


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def plain(value: Any) -> Any:
    """Dataclasses and arrays as JSON holds them; for ``json.dumps(default=...)``."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
