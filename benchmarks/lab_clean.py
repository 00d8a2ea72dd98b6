"""Scores of clean rows of every task of the lab, which the threshold conformal cuts by.

    python -m benchmarks.lab_clean --output clean/

Each task's rows are scanned into ``clean/TASK/``. Their seed is none of the grid's, so that no row is cut by its own score.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gradshield import lab
from gradshield.scanning.scan import scan
from gradshield.training.course import lab_model, lab_probing

SEED = 100


def main() -> None:
    """Scan the clean rows of each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("clean"), help="a folder; each task gets one in it")
    output: Path = parser.parse_args().output
    for task in lab.TASKS:
        rows, _ = lab.mix(task, harm="none", ratio=0, seed=SEED)
        answers = {"max_length": 256, "assistant_only_loss": None}
        found = scan(
            rows, model=lab_model("aligned"), probing=lab_probing(), output=output / task, training_args=answers
        )
        print(f"{task}: {len(found.scores.values)} clean rows scored into {output / task / 'scores.parquet'}")


if __name__ == "__main__":
    main()
