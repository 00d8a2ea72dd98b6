"""What each rule takes to cut a million scores.

    python -m benchmarks.thresholds --rows 1000000 --json thresholds.json

Scores and decoys are drawn: of a harmless row both are the size of a normal number, of a harmful one (a twentieth) the
score is larger by a gamma number of mean 8. Every rule cuts the same scores, three times; printed is the median.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from gradshield.thresholds import Threshold
from gradshield.thresholds.adaptive import Adaptive
from gradshield.thresholds.competition import Competition
from gradshield.thresholds.conformal import Conformal
from gradshield.thresholds.decoy import Decoy
from gradshield.thresholds.fixed import Fixed
from gradshield.thresholds.ratio import Ratio
from gradshield.types import Floats

PORTION, ROUNDS = 0.05, 3


def scores(count: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Scores and decoys of so many rows, the harmful ones first: (N,) each."""
    rng = np.random.default_rng(seed)
    values, decoys = np.abs(rng.normal(size=(2, count)))
    harmful = int(PORTION * count)
    values[:harmful] += rng.gamma(4, 2, harmful)
    return values, decoys


def rules() -> dict[str, Threshold]:
    """Every rule that cuts scores by itself, by name. ``conformal`` is given as many clean scores."""
    clean = np.abs(np.random.default_rng(1).normal(size=10**6))
    made: list[Threshold] = [Competition(), Decoy(), Adaptive(), Ratio(), Conformal(clean), Fixed(4.0)]
    return {rule.name: rule for rule in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**6, help="scores (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    values, decoys = scores(options.rows)
    found = []
    for name, rule in rules().items():
        seconds = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            cut = rule.cut(values, decoys)
            seconds.append(time.perf_counter() - began)
        removed = int((values > cut.value).sum())
        found.append({"name": name, "rows": options.rows, "seconds": float(np.median(seconds)), "removed": removed})
        print(f"{name:12} {np.median(seconds):7.3f} s   {removed:,} of {options.rows:,} rows removed", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
