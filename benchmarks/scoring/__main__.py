"""What scoring a row costs, in units of the forward pass that no model-based score can do without.

    python -m benchmarks.scoring                         the lab's model, and Llamas of 10 M and 125 M random weights
    python -m benchmarks.scoring --quick                 the lab's model on few rows, in under a minute
    python -m benchmarks.scoring --models lab --json FILE --plot FILE --docs docs/performance.md
    python -m benchmarks.scoring --models DIR --data FILE.jsonl --labels FILE.json
    python -m benchmarks.scoring --models DIR --data FILE.jsonl --scans 100 1000 10000 --scans-only
    python -m benchmarks.scoring --models 0.5b 1.5b      on a GPU, in bfloat16

Whole scans come first, split by stage (`stages.py`), then, in one process and in turn, on the same model, rows, device and
precision: the floor (one batched, length-bucketed forward pass
with loss under inference_mode, our batches, logits of response positions only), the oracle, every engine over every subspace,
several directions at once, and the peers (bergson, kronfluence, torch.func, opacus) as their users
run them. The order turns from round to round; an arm's ratio is taken to the floor that ran just before it, on the same rows.
Values are compared with the oracle's. Peak memory is taken apart, each arm in a process of its own. A peer that is not installed
is left out by name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROUNDS, QUICK_ROUNDS = 5, 2
# Rows of a model, and the few that the oracle and the peers are timed on: lab and 10m in a quarter of an hour on two cores.
ROWS = {"lab": (100, 40), "10m": (24, 8), "125m": (4, 2), "0.5b": (256, 16), "1.5b": (128, 8)}
QUICK = (40, 12)
SPOKEN = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft's use of transformers
OWN_ROWS = (200, None)  # of a model given as a folder


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--models", nargs="+", default=["lab", "10m", "125m"], help=f"{', '.join(ROWS)}, or a folder")
    found.add_argument("--quick", action="store_true", help="the lab's model on few rows")
    found.add_argument("--rounds", type=int, help=f"timed rounds ({ROUNDS}; {QUICK_ROUNDS} with --quick)")
    found.add_argument("--rows", type=int, help="rows of every model (default: by model)")
    found.add_argument("--few", type=int, help="rows of the oracle and the peers (default: by model)")
    found.add_argument(
        "--scans", type=int, nargs="+", metavar="N", help="rows of the whole scans (100 1000; with --quick as --rows)"
    )
    found.add_argument("--scans-only", action="store_true", help="whole scans and nothing else")
    found.add_argument("--data", help="JSON lines for a model of your own")
    found.add_argument("--labels", help="a JSON list of 0 and 1, one for each row of --data")
    found.add_argument("--device", default="auto", help="cpu, cuda, auto (default)")
    found.add_argument("--dtype", default="auto", help="float32, bfloat16, auto: bfloat16 on CUDA (default)")
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch (%(default)s)")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    found.add_argument("--plot", type=Path, metavar="FILE", help="write the picture there, as SVG")
    found.add_argument(
        "--docs", type=Path, metavar="FILE", help="put the figures into a document, the picture beside it"
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 130 after Ctrl-C: what was finished before it has been written."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    # Read by the libraries when they are imported: theirs are not the bars to watch.
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONWARNINGS"] = SPOKEN  # of the processes that measure memory
    warnings.filterwarnings("ignore", SPOKEN.split(":")[1], FutureWarning)
    from gradshield.errors import GradShieldError

    try:
        run(options, shlex.join(["python", "-m", "benchmarks.scoring", *given]))
    except KeyboardInterrupt:
        print("interrupted: the models that were finished are above", file=sys.stderr)
        return 130
    except GradShieldError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Every model in turn; the files are written anew after each, so that an interruption loses one model at most."""
    from benchmarks.scoring import stages, table
    from benchmarks.scoring.cases import SHAPES

    models = ["lab"] if options.quick else options.models
    began = time.monotonic()
    counts = options.scans or ([options.rows or QUICK[0]] if options.quick else stages.COUNTS)
    report: dict[str, Any] = {
        "command": command,
        "seed": options.seed,
        "rounds": options.rounds,
        "versions": table.versions(),
        "machine": table.machine(options.threads),
        "scans": [],
        "cases": [],
        "rows": [],
    }
    # The stream is named now: while a peer is silenced, sys.stderr is another.
    watch, out = Console(file=sys.stderr), Console(width=None if sys.stdout.isatty() else 120)
    for model in models:
        if model not in SHAPES:  # random weights refuse nothing: no scan accepts them
            scans = scanned(model, counts, options, watch)
            report["scans"] += scans
            out.print(table.plain(f"{model}: whole scans, in floors", stages.cells(scans)), soft_wrap=True)
        if options.scans_only:
            report["seconds"] = round(time.monotonic() - began, 1)
            write(options, report)
            continue
        case, lines = measure(model, options, watch)
        report["cases"].append(case)
        report["rows"] += lines
        report["machine"] |= table.accelerator(case["device"])
        report["seconds"] = round(time.monotonic() - began, 1)
        out.print(table.terminal(model, lines), soft_wrap=True)
        out.print(table.about(case), highlight=False)
        out.print(
            f"beside our cheapest engine over the same parameters: {table.beside(lines) or 'no peer is installed'}"
        )
        for name, why in case["left_out"].items():
            out.print(f"left out: {name}: {why}", markup=False, highlight=False)
        write(options, report)
    host = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    said = f"{command}\n{host}\n{packages}\nseed {options.seed}, {report['seconds']} s"
    out.print(said, markup=False, highlight=False, soft_wrap=True)  # a command is copied: no line break of ours in it
    return report


def scanned(model: str, counts: Sequence[int], options: argparse.Namespace, watch: Console) -> list[dict[str, Any]]:
    """Whole scans of one model."""
    from benchmarks.scoring import stages

    with tempfile.TemporaryDirectory() as folder, watch.status(model) as status:
        return stages.measure(
            spec_of(model, 0, None, options, folder),
            counts,
            options.rounds,
            lambda what: status.update(f"{model}: {what}"),
        )


def spec_of(model: str, rows: int, few: int | None, options: argparse.Namespace, folder: str) -> Any:
    """The ``Spec`` of a model and so many rows."""
    from benchmarks.scoring.cases import Spec

    return Spec(
        model,
        rows,
        few,
        options.seed,
        options.threads,
        options.device,
        folder,
        options.dtype,
        options.data,
        options.labels,
    )


def measure(model: str, options: argparse.Namespace, watch: Console) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One model: directions, a trial of every arm, the rounds, memory."""
    from benchmarks.scoring import rounds
    from benchmarks.scoring.arms import FLOOR, subspaces, truths
    from benchmarks.scoring.cases import SHAPES, open_case, prepare_directions

    count, few = QUICK if options.quick else ROWS.get(model, OWN_ROWS)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        few = options.few or (None if options.rows else few)
        spec = spec_of(model, options.rows or count, few, options, folder)
        bar = stack.enter_context(
            Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=watch, transient=True)
        )
        task = bar.add_task(f"{model}: loading", total=None)
        case = open_case(spec)
        arms = len(rounds.every(case))
        bar.update(task, total=1 + len(truths()) + arms * (2 + options.rounds))

        def told(what: str, steps: int) -> None:
            bar.update(task, description=f"{model}: {what}", advance=steps)

        told("directions", 1)
        prepare_directions(case, subspaces())
        found = rounds.try_out(case, told)
        rounds.time_rounds(case, found, options.rounds, told)
        rounds.measure_peaks(case, found, told)
    counted = [tokens for row in case.rendered for tokens in row.sequences]
    about = {
        "model": model,
        "weights": f"random, seed {spec.seed}" if model in SHAPES else "trained",
        "parameters": sum(p.numel() for p in case.model.parameters()),
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": str(case.device),
        "rows": len(case.rendered),
        "tokens": sum(len(t.ids) for t in counted),
        "response_tokens": sum(int(t.loss.sum()) for t in counted),
        "few": len(case.few),
        "few_tokens": sum(len(t.ids) for row in case.few for t in row.sequences),
        "harmful": None if case.truth is None else sum(case.truth),
        "floor_seconds": statistics.median(time.clock for time in found.times[FLOOR]),
        "left_out": found.left_out,
    }
    return about, rounds.figures(case, found)


def write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The files that were asked for."""
    from benchmarks.scoring import plot, table
    from gradshield import runs

    if options.json is not None:
        runs.write_json(options.json, report)
    picture = plot.svg(report["rows"])
    if options.plot is not None:
        options.plot.write_text(picture, encoding="utf-8")
    if options.docs is not None:
        if report["scans"]:
            table.rewrite(options.docs, table.scans(report), "scans")
        if report["cases"]:
            beside = options.docs.with_suffix(".svg")
            beside.write_text(picture, encoding="utf-8")
            table.rewrite(options.docs, table.section(report, beside.name))


if __name__ == "__main__":
    sys.exit(main())
