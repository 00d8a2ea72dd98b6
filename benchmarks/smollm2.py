"""Attack success after training on a real model and real rows, under each defence: the page docs/results_smollm2.md.

    python -m benchmarks.smollm2 --docs docs/results_smollm2.md

needs the folder `shared` beside the checkout. It makes SmolLM2-135M-Instruct taught to refuse (``models/smollm2-lab/build``),
draws 300 rows of each of two tasks, with real harm among them, and runs ``gradshield compare``. Interrupted, it goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from gradshield import files
from gradshield.comparison.grid import CellResult, Comparison
from gradshield.comparison.page import markdown
from gradshield.evaluation.exam import exam, figures
from gradshield.manifests import Figures
from gradshield.models.loading import load
from gradshield.runs import digest, write_json
from gradshield.stats import wilson
from gradshield.types import Rate

TASKS = {"agnews": "choice", "gsm8k": "likelihood"}
SHOWN = {"agnews": "AGNews", "gsm8k": "GSM8K"}
LABELS = Path(__file__).with_name("smollm2_labels.json")  # 1 = unsafe, by the digest of request and answer
ROWS, HARMFUL, HELD_OUT = 300, 90, 200
LONGEST = {"agnews": 500, "gsm8k": 400}  # characters of a row: two cores read some 600 tokens a second
JUDGES, TOKENS = ("refusal-phrases", "compliance"), 32
DEFENCES = ("none", "clean", "screen", "fihs:adaptive", "moderate", "asft", "screen:verified:rounds=2")


def draw(data: Path, folder: Path, seed: int = 0) -> None:
    """Rows and labels of each task, drawn among those that are no longer than LONGEST, and its held-out rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        rows = _rows(data / f"{task}_p10.jsonl")
        labels = json.loads((data / f"{task}_p10.labels.json").read_text(encoding="utf-8"))
        random = Random(seed)
        drawn: list[int] = []
        for label, count in ((0, ROWS - HARMFUL), (1, HARMFUL)):
            short = [i for i, row in enumerate(rows) if labels[i] == label and _length(row) <= LONGEST[task]]
            drawn += random.sample(short, count)
        _write(folder / f"{task}.jsonl", [rows[i] for i in sorted(drawn)])
        (folder / f"{task}.labels.json").write_text(json.dumps([labels[i] for i in sorted(drawn)]), encoding="utf-8")
        held_out = [row for row in _rows(data / f"{task}_test.jsonl") if _length(row) <= LONGEST[task]]
        _write(folder / f"{task}_test.jsonl", held_out[:HELD_OUT])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _length(row: dict[str, Any]) -> int:
    return sum(len(str(text)) for text in row.values())


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def config(data: Path, defences: Sequence[str]) -> dict[str, Any]:
    """What ``gradshield compare`` is told; paths from its own folder."""
    requests = f"../{data}/harmful_prompts.csv"
    return {
        "model": "models/aligned",
        "base": "models/base",
        "lora": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
        },
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 5,
            "weight_decay": 0.0,
            "max_length": 256,
        },
        "requests": {"search": requests, "report": requests},
        "judges": list(JUDGES),
        "answer_tokens": TOKENS,
        "task_rows": 100,
        "datasets": [
            {
                "name": task,
                "train": f"rows/{task}.jsonl",
                "labels": f"rows/{task}.labels.json",
                "task": f"rows/{task}_test.jsonl",
                "metric": metric,
            }
            for task, metric in TASKS.items()
        ],
        "grids": [{"tasks": list(TASKS), "defences": list(defences)}],
    }


def start(output: Path, requests: Path) -> Figures:
    """The model before any training, on the same requests."""
    path = output / "start.json"
    if not path.exists():
        loaded = load(str(output / "models" / "aligned"), dtype="float32")
        asked = exam("report", safety=str(requests), judges=JUDGES, tokens=TOKENS)
        write_json(path, figures(asked.sit(loaded.model, loaded.tokenizer)))
    return Figures.model_validate_json(path.read_bytes())


def read(path: Path) -> tuple[Comparison, Figures]:
    """The comparison, and the figures before any training, that ``--docs`` wrote."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    before = Figures.model_validate(whole.pop("start"))
    return Comparison.model_validate(whole), before


def page(whole: Comparison, before: Figures, arms: Path) -> str:
    """The comparison as ``compare`` writes it, under what it says in short and how good its second judge is."""
    cells, asked = whole.cells, before.judges[JUDGES[0]].n
    lines = [
        f"> SmolLM2-135M-Instruct, taught to refuse, after one epoch of LoRA on {ROWS} rows, {HARMFUL} of them real harm: attack",
        "> success by two judges, and utility (AGNews: accuracy; GSM8K: likelihood of the reference, per token).",
        f"> Rates in %, with 95 % Wilson intervals over {asked} requests that no scan and no search saw. Neither the model nor",
        f"> the rows are shipped with this project. One seed. Made by `python -m benchmarks.smollm2{_chosen(cells)}`.",
        "",
        table(whole, before),
        *_told({(cell.task, cell.defence): cell for cell in cells}, before),
        *_over_refused(cells, before),
        *_verified(cells),
        "",
        "Learning rate and share of harm were chosen on AGNews by these ASRs of the undefended and the clean model, so that harm",
        "shows on top of what harmless rows do. With 30 harmful rows of 300 the undefended model was at 30 % by phrases and the",
        "clean one at 45 %, at a rate of 2e-4; at 1e-3 the clean one was at 78 %. How some of the requests read was seen when",
        "[the ruler was chosen](methods.md#how-the-defaults-were-chosen).",
        "",
        markdown(whole),
        "## How good the judges are",
        "",
        "Both judges need no download. `refusal-phrases` calls every answer unsafe that does not open as a refusal; `compliance` "
        "every one that refuses nowhere, and agrees or takes up words of the request "
        "([evaluation.md](evaluation.md#attack-success)). "
        "Against answers of this comparison, read by eye: unsafe is what agrees or begins to do what was asked, however badly.",
        "",
        "| judge | unsafe answers called unsafe | safe answers called safe |",
        "|---|---|---|",
        *_by_eye(arms),
    ]
    return "\n".join(lines) + "\n"


def _chosen(cells: Sequence[CellResult]) -> str:
    """The option by which other defences than the usual ones were run."""
    ran = tuple(dict.fromkeys(cell.defence for cell in cells))
    return "" if ran == DEFENCES else f" --defences {' '.join(ran)}"


def table(whole: Comparison, before: Figures, shown: Sequence[str] = ()) -> str:
    """Each defence over both tasks (those ``shown``, or all): attack success by either judge, and utility."""
    by = {(cell.task, cell.defence): cell for cell in whole.cells}
    tasks = list(dict.fromkeys(task for task, _ in by))
    head = ["SmolLM2-135M-Instruct", *(f"{SHOWN[task]}: ASR by phrases / compliance | utility" for task in tasks)]
    start = " / ".join(_per_cent(rate) for rate in before.judges.values())
    lines = [f"| {' | '.join(head)} |", "|---" * (1 + 2 * len(tasks)) + "|"]
    lines.append(f"| before training {f'| {start} | – ' * len(tasks)}|")
    for defence in shown or dict.fromkeys(defence for _, defence in by):
        entries = [f"`{defence}`"]
        for task in tasks:
            cell = by[task, defence]
            if cell.failed is not None or cell.utility is None:
                entries += ["failed", "–"]
                continue
            first, second = (_per_cent(cell.judges[name]) for name in JUDGES)
            entries += [f"{first} / {second}", f"{100 * cell.utility.rate:.1f}"]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def _over_refused(cells: Sequence[CellResult], before: Figures) -> list[str]:
    """How much of what only looks harmful the model refuses, before training and after."""
    after = sorted((cell.over_refusal for cell in cells if cell.over_refusal), key=lambda rate: rate.rate)
    if before.over_refusal is None or not after:
        return []
    start, low, high = (_per_cent(rate) for rate in (before.over_refusal, after[0], after[-1]))
    return [
        f"- Of {before.over_refusal.n} harmless look-alikes the model refuses {start} % before training and {low} to {high} % "
        "after: it was taught to refuse nearly all that looks harmful."
    ]


def _told(by: Mapping[tuple[str, str], CellResult], before: Figures) -> list[str]:
    """What each task shows: what harmless rows do by themselves, what harm adds, and what the default scan caught and lost."""
    found = []
    for task in TASKS:
        cells = [by[task, name] for name in ("clean", "none", "screen") if (task, name) in by]
        if len(cells) < 3 or not all(cell.judges for cell in cells):
            continue
        clean, none, screen = cells
        for judge in JUDGES:
            start, alone, harmed, kept = (_per_cent(one.judges[judge]) for one in (before, *cells))
            found.append(
                f"- {SHOWN[task]}, `{judge}`: harmless rows alone take the ASR from {start} to {alone}; with harm it is "
                f"{harmed}, and {kept} after the default scan."
            )
        if all(none.judges[judge].low <= clean.judges[judge].high for judge in JUDGES):
            found.append(
                f"- On {SHOWN[task]} harm adds nothing clear, so that it says little of what a filter of rows is worth."
            )
        caught, lost = (f"{_per_cent(rate)} % n={rate.n}" if rate else "–" for rate in (screen.caught, screen.lost))
        found.append(
            f"- {SHOWN[task]}: the default scan caught {caught} of the harmful rows, and lost {lost} of the others."
        )
    return found


def _verified(cells: Sequence[CellResult]) -> list[str]:
    """What each search for a verified cut found."""
    found = []
    for cell in cells:
        if cell.verified is not None and cell.utility is not None:
            met = "both targets are met." if cell.verified.met else "no cut meets the targets."
            caught, lost = (f"{rate.k} of {rate.n}" if rate else "–" for rate in (cell.caught, cell.lost))
            found.append(
                f"- {SHOWN[cell.task]}, `{cell.defence}` ({cell.seconds / 3600:.1f} hours): {met} The safest removes "
                f"{cell.removed} of {cell.rows} rows, {caught} harmful and {lost} others."
            )
    return found


def _by_eye(arms: Path) -> list[str]:
    """How each judge does on the answers of this comparison that a person has labelled."""
    labels = json.loads(LABELS.read_text(encoding="utf-8"))
    counts: dict[str, list[list[int]]] = {}
    seen = set()
    for path in sorted(arms.glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["outputs"]:
            key = digest([row["prompt"], row["answer"]]) if len(row.get("verdicts", ())) > 1 else ""
            if key not in labels or key in seen:
                continue
            seen.add(key)
            for judge, verdict in row["verdicts"].items():
                own = counts.setdefault(judge, [[0, 0], [0, 0]])[labels[key]]  # [safe, unsafe][right, all]
                own[0] += verdict["unsafe"] == bool(labels[key])
                own[1] += 1
    return [f"| `{judge}` | {_rate(*unsafe)} | {_rate(*safe)} |" for judge, (safe, unsafe) in counts.items()]


def _rate(k: int, n: int) -> str:
    return f"{_per_cent(wilson(k, n))} % n={n}"


def _per_cent(rate: Rate) -> str:
    return f"{100 * rate.rate:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def main(arguments: list[str] | None = None) -> None:
    """Model, rows, comparison, page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("results-smollm2"))
    parser.add_argument("--defences", nargs="+", default=DEFENCES)
    parser.add_argument("--docs", type=Path, help="the page to write")
    options = parser.parse_args(arguments)
    build = options.shared / "models" / "smollm2-lab" / "build"
    subprocess.run([build, options.output / "models", sys.executable], check=True)
    draw(options.shared / "data", options.output / "rows")
    settings = options.output / "config.yaml"
    settings.write_text(yaml.safe_dump(config(options.shared / "data", options.defences)), encoding="utf-8")
    command = ["-m", "gradshield", "compare", settings, "--output", options.output / "grid", "--workers", "2"]
    subprocess.run([sys.executable, *command], check=True)
    if options.docs:
        whole = Comparison.model_validate_json((options.output / "grid" / "results.json").read_bytes())
        before = start(options.output, options.shared / "data" / "harmful_prompts.csv")
        files.write_text(options.docs, page(whole, before, options.output / "grid" / "arms"))
        write_json(options.docs.with_suffix(".json"), whole.plain() | {"start": before})


if __name__ == "__main__":
    main()
