"""What the default scan catches and loses on fourteen ordinary tasks: ``python -m benchmarks.tasks FOLDER --model MODEL``.

Each task is there harmless (``p0``), with a tenth of harm (``p10``), and the same with openers decorrelated
(``p10_openers``). Seven tasks chose the constants and seven report, fixed in writing before any was looked at; the ruler was
chosen later, with harmful rows of all of them (docs/methods.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import runs
from gradshield.scanning import outputs, shards
from gradshield.scanning.baselines import auroc, trivial_baselines
from gradshield.scanning.decide import decide
from gradshield.scanning.rows import load, prepare
from gradshield.scanning.scoring import ready
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.selectors import Measured
from gradshield.stats import wilson
from gradshield.types import Rate, Rendered

CHOOSING = (
    "amazon_polarity_Is_this_product_review_positive",
    "cnn_dailymail_3_0_0_generate_story",
    "dream_generate_last_utterance",
    "gigaword_write_its_sentence",
    "paws_labeled_final_Rewrite",
    "quarel_choose_between",
    "sciq_Multiple_Choice_Closed_Book_",
)
REPORTING = (
    "common_gen_sentence_to_concepts",
    "cosmos_qa_context_question_description_text",
    "kilt_tasks_hotpotqa_formulate",
    "rotten_tomatoes_Reviewer_Sentiment_Feeling",
    "wiki_bio_key_content",
    "wiqa_what_might_be_the_first_step_of_the_process",
    "yelp_review_full_format_rating",
)
HALVES = {"choosing": CHOOSING, "reporting": REPORTING}
MIXES = ("p0", "p10", "p10_openers")
SIGNALS = ("score", "request")


def rows_of(folder: Path, task: str, mix: str, most: int) -> tuple[list[dict[str, Any]], list[int]]:
    """At most ``most`` harmless rows of a file, the first ones, and all its harmful rows, with their labels."""
    rows = [
        json.loads(line) for line in (folder / f"{task}.{mix}.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    labels = json.loads((folder / f"{task}.{mix}.labels.json").read_text(encoding="utf-8"))
    harmless = [i for i, label in enumerate(labels) if not label][:most]
    kept = sorted([*harmless, *(i for i, label in enumerate(labels) if label)])
    return [rows[i] for i in kept], [labels[i] for i in kept]


def cells(folder: Path, tasks: Sequence[str], model: str, most: int, max_length: int) -> Iterator[dict[str, Any]]:
    """Caught, lost and AUROCs of every task and mix; the model is asked its probes once, and equal rows are measured once."""
    loaded = load(model)
    settings, found = ScanSettings(), None
    known: dict[str, tuple[Any, ...]] = {}
    for task in tasks:
        for mix in MIXES:
            rows, labels = rows_of(folder, task, mix, most)
            ready_rows = prepare(rows, loaded, training_args={"max_length": max_length, "assistant_only_loss": None})
            rendered: list[Rendered] = list(ready_rows.rendered)
            if found is None:
                quiet: Any = lambda *_: None  # noqa: E731
                found = ready(loaded.model, ready_rows, settings, Probing(), (), quiet)
            new = [row for row in rendered if row.id not in known]
            if new:
                part = shards.measure(found.selector, loaded.model, found.direction, new, settings.token_budget)
                assert part.extra is not None and part.tokens is not None
                for i, row in enumerate(sorted(new, key=lambda row: row.row)):
                    known[row.id] = (part.sums[i], part.nll[i], part.lengths[i], part.tokens[i], part.extra[i])
            sums, nll, lengths, tokens, extra = zip(*(known[row.id] for row in rendered), strict=True)
            numbers = np.array([row.row for row in rendered])
            raw = Measured(numbers, np.array(sums), np.array(nll), np.array(lengths), tokens, np.stack(extra))
            scores = found.selector.finish(raw, *ready_rows.named())
            removed = decide(scores, settings.make_threshold()).removed
            truth = np.array([labels[row.row] for row in rendered])
            cell: dict[str, Any] = {"task": task, "mix": mix, "n": len(truth), "cut": settings.rule}
            for name, kind in (("caught", truth == 1), ("lost", truth == 0)):
                if kind.any():
                    cell[name] = asdict(wilson(int(removed[kind].sum()), int(kind.sum())))
            if truth.any():
                texts = [outputs.words(example) for example in ready_rows.read.examples.at(numbers)]
                signals = {"score": scores.values, "request": scores.signals["request"]}
                cell["auroc"] = {name: auroc(truth, value).auroc for name, value in signals.items()} | {
                    one.name: one.auroc
                    for one in trivial_baselines([t[0] for t in texts], [t[1] for t in texts], truth)
                }
            yield cell


def summary(found: Sequence[dict[str, Any]]) -> str:
    """The table of a run, and its means and worst cells."""
    lines = [
        "| task | mix | caught | lost | AUROC: score / request | best trivial |",
        "|---|---|---|---|---|---|",
    ]
    for cell in found:
        ranks = cell.get("auroc", {})
        own = " / ".join(f"{ranks[name]:.3f}" for name in SIGNALS if name in ranks) if ranks else "–"
        rivals = {k: v for k, v in ranks.items() if k not in SIGNALS and v is not None}
        best = max(rivals, key=lambda name: rivals[name]) if rivals else ""
        shown = [outputs_rate(cell.get(name)) for name in ("caught", "lost")]
        lines.append(
            f"| {cell['task']} | {cell['mix']} | {shown[0]} | {shown[1]} | {own} | "
            + (f"{best} {rivals[best]:.3f} |" if best else "– |")
        )
    for mix in MIXES:
        for name, worst in (("caught", min), ("lost", max)):
            values = [cell[name]["rate"] for cell in found if cell["mix"] == mix and name in cell]
            if values:
                lines.append(f"\n{mix}: {name} {100 * np.mean(values):.1f} % mean, {100 * worst(values):.1f} % worst")
    return "\n".join(lines)


def outputs_rate(rate: dict[str, Any] | None) -> str:
    """A rate in per cent with its interval and n."""
    return "–" if rate is None else str(Rate(**rate))


def page(runs: Sequence[dict[str, Any]]) -> str:
    """All runs as one page of Markdown."""
    parts = [
        "# Ordinary tasks\n\nWhat the default scan catches and loses on ordinary tasks (`python -m benchmarks.tasks`). The\n"
        "seven *choosing* tasks chose its constants. The seven *reporting* ones are held out in part: 64 harmful rows of\n"
        "all fourteen helped to choose the ruler, and they were looked at before\n"
        "([how often](methods.md#how-the-defaults-were-chosen)). Brackets hold the 95 % Wilson interval. *Best trivial* is\n"
        "the best of response length, prompt length, compliant openers and a TF-IDF classifier that is given the labels:\n"
        "it ranks these rows perfectly, so AUROC says little here.\n"
    ]
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
        head = f"## {run['model']}, {run['half']}\n\nAt most {run['most']} harmless rows a file; {versions}."
        parts.append(f"{head}\n\n{summary(run['cells'])}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one half on one model, and print or write its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where the tasks' files lie")
    parser.add_argument("--model")
    parser.add_argument("--name", help="what the tables call the model")
    parser.add_argument("--docs", type=Path, nargs="+", help="a page, and the JSON of the runs to put on it")
    parser.add_argument("--half", choices=HALVES, default="reporting")
    parser.add_argument("--most", type=int, default=200, help="harmless rows of a file")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--json", type=Path, help="where the cells are written")
    given = parser.parse_args(arguments)
    if given.docs:
        given.docs[0].write_text(
            page([json.loads(path.read_text(encoding="utf-8")) for path in given.docs[1:]]), "utf-8"
        )
        return
    if given.folder is None or given.model is None:
        parser.error("give the folder of the tasks and --model, or --docs")
    found = []
    for cell in cells(given.folder, HALVES[given.half], given.model, given.most, given.max_length):
        found.append(cell)
        print(
            f"{len(found)}/{len(HALVES[given.half]) * len(MIXES)} {cell['task']} {cell['mix']}",
            file=sys.stderr,
            flush=True,
        )
        if given.json:
            name = given.name or Path(given.model).name
            whole = {"model": name, "half": given.half, "most": given.most, "versions": runs.versions()}
            runs.write_json(given.json, {**whole, "cells": found})
    print(summary(found))


if __name__ == "__main__":
    main()
