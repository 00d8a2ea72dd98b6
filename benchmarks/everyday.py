"""How many requests of each file the default scan reads as harm: ``python -m benchmarks.everyday FILE... --model MODEL``.

Files hold rows with ``prompt`` (JSONL, CSV or another kind of data file), or one prompt a line (``.txt``). Each prompt is read as
the one user message of a chat, as the scan reads a row's; no answer has a part in it. Prints a table, and JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from gradshield import runs
from gradshield.gradients import pick
from gradshield.models.loading import load
from gradshield.probes import open_turns, read_prompts
from gradshield.scanning.preparing import Known, ask, ruler
from gradshield.scanning.settings import Probing, ScanSettings
from gradshield.selectors import Screen
from gradshield.stats import wilson
from gradshield.thresholds import parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="files of prompts, each a set")
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", type=Path, help="where the table is written as JSON")
    given = parser.parse_args()

    loaded = load(given.model, dtype="float32")
    known, quiet = Known(loaded.model, loaded), lambda *_: None
    probing = Probing()
    asked = ask(known, pick("auto", loaded.model, per_token=True), ScanSettings(), probing, quiet)
    reading = ruler(known, asked.validity, probing, quiet).reading
    cut = parse(Screen.rule).cut(np.zeros(1), None, reading.anchors).value
    print(f"the cut is {cut:.3f}\n\n| requests | n | beyond the cut | median r |\n|---|---|---|---|")
    cells = []
    for file in given.files:
        turns = open_turns(loaded.tokenizer, read_prompts(file))
        values = reading.read(loaded.model, turns.ids)
        rate = wilson(int((values > cut).sum()), len(values))
        print(f"| {file.stem} | {rate.n} | {rate} | {np.median(values):.2f} |", flush=True)
        cells.append({"set": file.stem, "k": rate.k, "n": rate.n, "median": float(np.median(values))})
    if given.json:
        found = {"cut": cut, "ruler_sha256": reading.digest, "versions": runs.versions(), "cells": cells}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
