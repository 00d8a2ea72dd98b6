"""The commands that fine-tune: ``train`` under a defence, ``compare`` of many, and the ``demo``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradshield.cli import options
from gradshield.cli.common import (
    command_line,
    err,
    noted,
    out,
    plain,
    progress,
    quiet_libraries,
    rates,
    read_as,
    verdict,
)
from gradshield.errors import DataError, GateError, GradShieldError, UsageError
from gradshield.files import read_labels
from gradshield.report.text import duration

training = partial(typer.Option, rich_help_panel="Training")

if TYPE_CHECKING:
    from gradshield.manifests import SequenceRecord
    from gradshield.training.defences import Defence
    from gradshield.training.train import Trained


def train(
    data: Annotated[
        list[str],
        typer.Argument(help="Dataset to train on; several are trained one after another.", show_default=False),
    ],
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model, the scan and the report.")],
    defence: Annotated[
        str,
        typer.Option(
            "--defence",
            "--defense",
            "-d",
            help="One of `gradshield methods`, or several joined by +, such as fihs+asft.",
        ),
    ] = "screen",
    training_config: Annotated[
        Path | None,
        typer.Option(help="JSON of TRL SFTConfig options (DPOConfig for preference pairs), passed through."),
    ] = None,
    utility: Annotated[
        list[str] | None, typer.Option(help="Held-out rows of the task, one file per dataset.", show_default=False)
    ] = None,
    columns: options.Columns = None,
    base: Annotated[
        str | None, training(help="The model before its alignment, for asft and safelora: folder or hub name.")
    ] = None,
    lora_config: Annotated[
        Path | None, training(help="JSON of a PEFT config; without one, all weights are trained.")
    ] = None,
    safety_rows: Annotated[
        Path | None, training(help="Your own safety rows, for safeinstruct and dualselect (default: own refusals).")
    ] = None,
    report_to: Annotated[
        list[str] | None,
        training(
            help="Where to log the training and the rates, repeatable: wandb, mlflow, tensorboard, … (transformers' report_to).",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[bool, training("--merge", help="Save the plain model with the adapter merged in.")] = False,
    seed: Annotated[int, training(help="Seed of the scan, the adapter and the row order.")] = 0,
    safety: options.Safety = "builtin",
    judge: options.Judges = None,
    metric: options.Metric = None,
    max_new_tokens: options.Tokens = 64,
    format: options.Shape = None,
    max_length: options.MaxLength = None,
    labels: Annotated[
        Path | None,
        options.reading(help="JSON list of 0 and 1 (harmful) per row: reported, and used by the defence clean."),
    ] = None,
    probes: options.Probes = None,
    lookalikes: options.Lookalikes = None,
    answer_prefix: options.Prefix = "",
    template_kwargs: options.Template = "{}",
    uncertified: options.Uncertified = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.Remote = False,
) -> None:
    """Fine-tune under a defence, with safety and utility measured before and after.

    An interrupted run resumes where it stopped. Exit code 5 if no cut meets the targets of a verified threshold.
    """
    trainer = options.training_options(training_config, max_length)
    if report_to is not None:
        trainer["report_to"] = report_to
    lora = options.json_file("--lora-config", lora_config)
    template = options.template_variables(template_kwargs)
    truth = read_labels(labels, "the --labels file")
    shape = options.row_format(format, columns)
    for path in data:
        options.require_data(path)
    for name in (model, *([base] if base else ())):
        options.require_model(name)
    wanted = _wanted(data, utility or [], defence, base, truth)
    quiet_libraries()
    from gradshield.evaluation.exam import exams_of
    from gradshield.models.loading import ModelSource
    from gradshield.scanning.rows import read_rows
    from gradshield.scanning.settings import ScanSettings, peft_config, trl_options
    from gradshield.training.course import Needs, method_of
    from gradshield.training.sequence import Stage, sequence
    from gradshield.training.train import Reporters
    from gradshield.training.train import train as run

    Reporters(trainer.get("report_to"), output)  # what is not installed is said before the model is loaded
    measured = [
        exams_of(safety, judge, path, metric, max_new_tokens, answer_prefix, wanted.verified is not None, template)
        for path in (utility if utility else [None] * len(data))
    ]
    source, before = (
        name and ModelSource(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        for name in (model, base if wanted.needs_base else None)
    )
    with progress() as report:
        common: dict[str, Any] = {
            "model": source,
            "output": output,
            "defence": defence,
            "peft_config": peft_config(lora),
            "training": trainer,
            "settings": ScanSettings(seed=seed),
            "probing": options.probing(probes, lookalikes, answer_prefix, template, uncertified),
            "format": shape,
            "needs": Needs(base=before, safety_rows=safety_rows or ()),
            "seed": seed,
            "command": command_line(),
            "progress": report,
        }
        if len(data) > 1:
            for path in data:  # what is wrong with the last dataset is said before the first one trains
                method_of(read_rows(path, trl_options(trainer), shape), wanted)
            stages = sequence([Stage(path, exam) for path, exam in zip(data, measured, strict=True)], **common)
        else:
            done = run(data[0], exams=measured[0], labels=truth, merge=merge, **common)
    if len(data) > 1:
        _stages(stages, output)
        return
    _summary(done, output)
    if done.verdict is not None and not done.verdict.met:
        raise GateError(done.verdict.sentence + "; the safest model is kept")


def compare(
    config: Annotated[
        Path, typer.Argument(help="YAML of tasks, mixes, defences and seeds (docs/compare.md).", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for cells, arms, the table and the page.")],
    workers: Annotated[int, typer.Option(help="Processes, one core each.", min=1)] = 1,
) -> None:
    """Fine-tune and measure a grid of defences; finished cells are never run again.

    Exit code 1 if a cell failed: the table says why, and the same command retries it.
    """
    if not config.is_file():
        raise DataError(f"there is no config file {str(config)!r}: give a YAML file (docs/compare.md)")
    quiet_libraries()
    from gradshield.comparison.compare import compare as run
    from gradshield.comparison.grid import read

    checked = read(config)
    with progress() as report:
        whole = run(checked, output, workers, command_line(), report)
    cost = whole.cost
    out.print(
        f"{cost.cells} cells from {cost.arms} trained models (equal ones are shared), {duration(cost.cell_seconds)} of work"
        + (f", [bold]{cost.failed} failed[/bold]" if cost.failed else "")
    )
    out.print(f"table   [bold]{escape(str(output / 'results.md'))}[/bold]")
    out.print(f"page    [bold]{escape(str(output / 'results.html'))}[/bold]")
    if cost.failed:
        first = next(cell.failed for cell in whole.cells if cell.failed is not None)
        raise GradShieldError(
            f"{cost.failed} of {cost.cells} cells failed, the first because {first}; the table lists them, and the same "
            "command retries them"
        )


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo writes.")] = Path(
        "gradshield-demo"
    ),
    task: Annotated[str, typer.Option(help="Utility task of the bundled lab.")] = "choice",
    harm: Annotated[str, typer.Option(help="Kind of harm mixed in.")] = "explicit",
    ratio: Annotated[str, typer.Option(help="Share of harmful rows.")] = "10%",
    seed: Annotated[int, typer.Option(help="Seed of the mix, the scan and the training.")] = 0,
) -> None:
    """Scan a poisoned set with the bundled lab model, fine-tune with and without the filter, and compare."""
    amount = options.share("--ratio", ratio) or 0.0
    quiet_libraries()
    import torch

    from gradshield.comparison.demo import run

    # A second thread saves nothing on so small a model, and on a busy machine the two wait for each other.
    torch.set_num_threads(1)
    out.print("[dim]one scan, two trainings, three measurements: about a minute[/dim]")
    with progress() as report:
        result = run(output, task, harm, amount, seed, command_line(), report)
    table = Table(title="GradShield demo", title_justify="left", title_style="bold")
    table.add_column("")
    for name in result.columns:
        table.add_column(name, justify="right")
    for measure, cells in result.rows:
        table.add_row(measure, *cells)
    Console(highlight=False).print(table)
    out.print("[dim]rates with their 95 % Wilson interval and n[/dim]")
    out.print(f"report  [bold]{escape(str(output / 'report.html'))}[/bold]")
    out.print(
        "next    gradshield scan data.jsonl --model MODEL --output screened/   [dim]your rows and your model[/dim]"
    )


def _wanted(data: list[str], tasks: list[str], defence: str, base: str | None, labels: list[int] | None) -> Defence:
    """The parsed defence, its inputs checked before anything is loaded. Raises UsageError."""
    from gradshield.training.defences import parse

    if tasks and len(tasks) != len(data):
        raise UsageError(
            f"there are {len(tasks)} --utility files for {len(data)} datasets: give one per dataset, in the same order"
        )
    wanted = parse(defence)
    wanted.require(base, labels)
    if len(data) > 1 and labels is not None:
        raise UsageError("--labels belongs to one dataset, and several are given: train them separately")
    return wanted


def _stages(whole: SequenceRecord, folder: Path) -> None:
    """Print one line per stage, then the final measures. Raises GateError if a stage did not meet its targets."""
    for stage in whole.stages:
        parts = [f"ASR {100 * rate.rate:.1f} % ({plain(judge)})" for judge, rate in stage.asr.items()]
        parts += [] if stage.visage is None else [f"VISAGE {stage.visage:.2f}"]
        parts += [f"{plain(task)} {100 * rate.rate:.1f} %" for task, rate in stage.utility.items()]
        out.print(f"{plain(stage.name):16} {', '.join(parts)}")
    for name, values in whole.measures.items():
        if values and values[-1] is not None:
            out.print(f"{name.replace('_', ' '):20} {values[-1]:+.3f} [dim]at the end[/dim]")
    out.print(f"report  [bold]{escape(str(folder / 'report.html'))}[/bold]")
    if whole.unmet:
        raise GateError(
            f"no cut met the targets at {', '.join(whole.unmet)}: the safest model of each stage is kept; read the report"
        )


def _summary(done: Trained, folder: Path) -> None:
    results = done.manifest.results
    read_as(done.manifest.data.read_as)
    out.print(f"[bold]{results.removed}[/bold] of {results.rows} rows removed, {results.trained} trained on")
    for label, rate in (("harmful caught", results.caught), ("harmless lost", results.lost)):
        if rate is not None:
            out.print(f"{label:24} {rate.k} of {rate.n}")
    rates(results.before, results.after, noted(done.manifest.settings.report))
    if done.verdict is not None and done.verdict.met:
        out.print(f"verified  {plain(done.verdict.sentence)}")
    if done.certificate:
        out.print(verdict(done.certificate["predicate"]))
    if not results.after.judges:
        err.print("[yellow]warning:[/yellow] safety was not measured, so it is unknown how safe this model is")
    out.print(f"report  [bold]{escape(str(folder / 'report.html'))}[/bold]")
