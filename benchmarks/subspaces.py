"""How well do the last layers alone rank? AUROC of FIHS in `last:k` beside all parameters, on every labelled mix.

    python -m benchmarks.subspaces --shared DIR --json subspaces.json

``DIR`` holds ``data/NAME.jsonl`` with ``NAME.labels.json`` and ``models/english-lab/aligned``: measured are all harmful rows
of each mix and the first ``--rows`` harmless ones. Without it the lab's mixes are (10 % of each kind of harm in each task,
seed 0, the lab's own requests). Probe and aggregate are the defaults, the engine is `finite-difference` at its default
step. One direction a model and subspace serves all of its mixes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SUBSPACES = ("last:1", "last:25%", "last:50%", "last:75%", "all")
ROWS = 300
CHECKED = 16  # rows that are scored by the oracle as well


def english(shared: Path, rows: int) -> Iterator[tuple[str, Any, list[int]]]:
    """Every mix of the folder that has both labels: all of its harmful rows, and the first ``rows`` harmless ones."""
    for path in sorted((shared / "data").glob("*.labels.json")):
        name = path.name.removesuffix(".labels.json")
        lines = path.with_name(f"{name}.jsonl").read_text().splitlines()
        labels = np.array(json.loads(path.read_text()))
        kept = np.flatnonzero((labels == 1) | (np.cumsum(labels == 0) <= rows))
        if labels.any():
            yield name, [json.loads(lines[i]) for i in kept], labels[kept].tolist()


def bundled(rows: int) -> Iterator[tuple[str, Any, list[int]]]:
    """The lab's mixes: every task with every kind of harm."""
    from gradshield import lab

    for task in lab.TASKS:
        for harm in lab.HARMS:
            yield f"lab {task} {harm}", *lab.mix(task, harm=harm, ratio=0.1, n=rows)


def selectors(loaded: Any, probing: Any, subspaces: list[str]) -> dict[str, tuple[Any, Any]]:
    """Of each subspace, FIHS with the default probe and aggregate, and its direction."""
    from gradshield.gradients import FiniteDifference
    from gradshield.scanning.preparing import asked_of
    from gradshield.scanning.settings import ScanSettings
    from gradshield.selectors import Fihs, parse_aggregate

    asked, harmless = asked_of(loaded.tokenizer, probing)
    settings = ScanSettings()
    probe = settings.make_probe()
    probe.fit(loaded.model, loaded.tokenizer, asked, harmless)
    made = {s: Fihs(probe, asked, FiniteDifference(), parse_aggregate(settings.aggregate), s) for s in subspaces}
    return {name: (selector, selector.prepare(loaded.model)) for name, selector in made.items()}


def measured(loaded: Any, ready: dict[str, tuple[Any, Any]], data: Any, labels: list[int]) -> list[dict[str, Any]]:
    """One mix in every subspace: AUROC with its interval, agreement with the oracle, share of parameters that move."""
    from copy import copy

    from gradshield.gradients import Loop, agreement
    from gradshield.scanning import shards
    from gradshield.scanning.baselines import auroc
    from gradshield.scanning.rows import prepare

    rows = prepare(data, loaded.model, loaded.tokenizer).rendered
    truth = np.array(labels)[[row.row for row in rows]]
    checked = [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:CHECKED])]
    found = []
    for name, (selector, direction) in ready.items():
        raw = shards.measure(selector, loaded.model, direction, rows, 4096)
        scores = selector.finish(raw, [row.id for row in rows], [row.shape for row in rows])
        slow = copy(selector)
        slow.engine = Loop()
        oracle = shards.measure(slow, loaded.model, direction, checked, 4096)
        agreed = agreement(name, raw.sums[np.isin(raw.rows, oracle.rows)], oracle.sums)
        moved = sum(v[0].numel() for v in direction.tensors.values())
        found.append(
            {
                "subspace": name,
                **auroc(truth, scores.values).model_dump(exclude={"name", "absent"}),
                "spearman": agreed.spearman,
                "relative_error": agreed.relative_error,
                "parameters": moved / sum(p.numel() for p in loaded.model.parameters()),
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Every mix in every subspace, as a table and as JSON."""
    import torch

    from gradshield import lab
    from gradshield.models import loading
    from gradshield.scanning.settings import Probing
    from gradshield.training.course import lab_probing

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="a folder of labelled mixes and the model that they are for")
    parser.add_argument("--rows", type=int, default=ROWS, help="harmless rows of each mix")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    checkpoint, mixes, probing = lab.checkpoint("aligned"), bundled(options.rows), lab_probing()
    if options.shared:
        checkpoint, mixes = options.shared / "models" / "english-lab" / "aligned", english(options.shared, options.rows)
        probing = Probing()
    loaded = loading.load(checkpoint, dtype="float32")
    ready = selectors(loaded, probing, list(SUBSPACES))
    table: list[dict[str, Any]] = []
    print("| mix | " + " | ".join(SUBSPACES) + " |\n|---|" + "---|" * len(SUBSPACES))
    for name, data, labels in mixes:
        found = measured(loaded, ready, data, labels)
        cells = [f"{f['auroc']:.3f} ({f['low']:.3f} to {f['high']:.3f})" for f in found]
        print(f"| {name}, {found[0]['n_pos']} of {len(labels)} | " + " | ".join(cells) + " |", flush=True)
        table.append({"mix": name, "subspaces": found})
        if options.json:
            options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
