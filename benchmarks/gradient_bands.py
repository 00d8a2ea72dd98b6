"""Do rows of large gradient hurt safety more than rows of moderate gradient? (arXiv 2604.17215, on the bundled lab.)

    python -m benchmarks.gradient_bands --output bands/

Rows are ranked by the norm of the gradient of their mean loss at the start. Equally many rows are trained on from the lowest,
the middle and the highest part of that ranking, and at random; harmless rows alone, and rows with 10 % explicit harm.
All arms have the same steps and settings. Writes ``bands.json``, with the share of harmful rows in each band.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

SHARE = 0.2


def bands(values: Any, seed: int) -> dict[str, Any]:
    """Positions of a fifth of the rows: the lowest, the ones nearest the median, the highest, and random ones."""
    count = int(SHARE * len(values))
    order = np.argsort(values, kind="stable")
    middle = np.argsort(np.abs(values - np.median(values)), kind="stable")
    drawn = np.random.default_rng(seed).permutation(len(values))
    return {"low": order[:count], "moderate": middle[:count], "high": order[-count:], "random": drawn[:count]}


def run(task: str, harm: str, seed: int, n: int) -> dict[str, Any]:
    """Four arms of one task and mix, with the ASR by both judges and the utility of each."""
    from gradshield import lab
    from gradshield.evaluation.exam import figures, lab_exam
    from gradshield.training.course import Course, lab_job
    from gradshield.training.defences import parse

    rows, labels = lab.mix(task, harm=harm, ratio=0.0 if harm == "none" else 0.1, n=n, seed=seed)
    course = Course(lab_job(task, rows, labels, seed))
    scores = course.scored("gradnorm").scores
    none = parse("none")
    whole = course.dataset(none, course.chosen(none))
    found: dict[str, Any] = {"task": task, "harm": harm, "seed": seed, "n": n, "arms": {}}
    for name, places in bands(scores.values, seed).items():
        chosen = sorted(places.tolist())
        fitted = course.fit(none, [whole[i] for i in chosen])
        measured = lab_exam(task, "report", seed).sit(fitted.model, course.loaded.tokenizer)
        found["arms"][name] = {
            "rows": len(chosen),
            "harmful": sum(labels[int(scores.rows[i])] for i in chosen),
            "norms": [float(scores.values[places].min()), float(scores.values[places].max())],
            "mean_tokens": float(np.mean([sum(t != -100 for t in whole[i]["labels"]) for i in chosen])),
            **figures(measured).plain(),
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    """Every task, with and without harm, over the seeds."""
    import torch

    from gradshield import lab, runs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bands"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=500, help="harmless rows of each mix")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(options.seeds):
        for task in lab.TASKS:
            for harm in ("none", "explicit"):
                one = run(task, harm, seed, options.rows)
                found.append(one)
                shown = {k: f"{100 * v['asr']['rate']:.1f}" for k, v in one["arms"].items()}
                print(task, harm, seed, json.dumps(shown), flush=True)
    command = f"python -m benchmarks.gradient_bands --seeds {options.seeds} --rows {options.rows}"
    whole = {"command": command, "versions": runs.versions(), "share": SHARE, "runs": found}
    runs.write_json(options.output / "bands.json", whole)


if __name__ == "__main__":
    main()
