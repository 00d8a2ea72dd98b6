"""The command line: argument parsing only, long because every option is declared here; ``pipeline`` does the work."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gradshield.errors import DataError, GateError, GradShieldError, UsageError
from gradshield.report.text import visible

if TYPE_CHECKING:
    from gradshield.types import Selection

app = typer.Typer(
    name="gradshield",
    help="Keep a language model aligned while it is fine-tuned: find the rows of a fine-tuning set that would break its "
    "safety, and remove them.\n\nStart with `gradshield demo` (nothing is downloaded), then "
    "`gradshield scan data.jsonl --model MODEL --output screened/`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

Data = Annotated[
    str, typer.Argument(help="JSONL, JSON, CSV or Parquet file, or the name of a hub dataset.", show_default=False)
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder or hub name of an aligned causal LM, or of a PEFT adapter.")
]
Format = Annotated[
    str | None, typer.Option("--format", help="Read every row as this shape instead of telling it by its keys.")
]
Allow = Annotated[Path | None, typer.Option(help="File of row ids that a person has cleared, one a line: they stay.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Rule = Annotated[
    str,
    typer.Option(
        "--threshold", "-t", help="Where to cut: a rule and its options, such as competition:q=0.05 or ratio:5%."
    ),
]
FailAbove = Annotated[
    str | None, typer.Option(help="Exit with code 5 when more than this share of the rows is removed, such as 1%.")
]
MaxLength = Annotated[int | None, typer.Option(help="Cut rows at this many tokens, as training will (default 1024).")]


@app.command()
def scan(
    data: Data,
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the rows, the scores, the report and the manifest.")
    ],
    threshold: Rule = "competition",
    probe: Annotated[str, typer.Option(help="Unsafety score (see `gradshield methods`).")] = "token_gap",
    aggregate: Annotated[str, typer.Option(help="How a row's tokens are counted (see `gradshield methods`).")] = "push",
    subspace: Annotated[str, typer.Option(help="Which parameters count: all, targets, lora, last:K, last:P%.")] = "all",
    engine: Annotated[
        str, typer.Option(help="How derivatives are computed: auto, or one of `gradshield methods`.")
    ] = "auto",
    lora_config: Annotated[
        Path | None, typer.Option(help="PEFT config (JSON) of the adapter that training will add.")
    ] = None,
    training_config: Annotated[
        Path | None, typer.Option(help="JSON of the TRL SFTConfig options of the training.")
    ] = None,
    probes: Annotated[Path | None, typer.Option(help="Your own harmful requests (.jsonl, .csv, .txt).")] = None,
    lookalikes: Annotated[Path | None, typer.Option(help="Your own harmless requests (.jsonl, .csv, .txt).")] = None,
    answer_prefix: Annotated[
        str, typer.Option(help="Text at the start of every probed answer (a closed thinking block).")
    ] = "",
    template_kwargs: Annotated[
        str, typer.Option(help='JSON for the chat template, such as {"enable_thinking": false}.')
    ] = "{}",
    labels: Annotated[
        Path | None, typer.Option(help="JSON list of 0 and 1 (harmful) per row: measured, never used to decide.")
    ] = None,
    allow: Allow = None,
    fail_above: FailAbove = None,
    format: Format = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")] = False,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Score a model that does not refuse its probes.")
    ] = False,
    max_length: MaxLength = None,
    token_budget: Annotated[int, typer.Option(help="Positions of one batch, padding included.")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    adapter: Annotated[str | None, typer.Option(help="Folder or hub name of a PEFT adapter on the model.")] = None,
    seed: Annotated[
        int, typer.Option(help="Of the adapter's initialisation, the oracle's sample and the mixture's start.")
    ] = 0,
    trust_remote_code: Remote = False,
) -> None:
    """Find the rows of a fine-tuning set that would make the model less safe, and part them from the rest.

    Writes kept, removed, quarantine.jsonl, scores.parquet, report.html and manifest.json. An interrupted scan goes on
    where it stopped.
    """
    gate = share(fail_above)
    allowed, truth = read_ids(allow), read_labels(labels)
    template = json_object("--template-kwargs", template_kwargs)
    training = json_file("--training-config", training_config)
    lora = json_file("--lora-config", lora_config)
    quiet_libraries()
    from gradshield import models
    from gradshield import probes as probing_room
    from gradshield.pipeline.options import peft_config, sft_options
    from gradshield.pipeline.scan import scan as run
    from gradshield.pipeline.settings import Probing, ScanSettings

    settings = ScanSettings(probe, aggregate, subspace, engine, threshold, seed, token_budget)
    probing = Probing(
        requests=probing_room.read_prompts(probes) if probes else (),
        lookalikes=probing_room.read_prompts(lookalikes) if lookalikes else (),
        answer_prefix=answer_prefix,
        template=template,
        uncertified=uncertified,
    )
    require_data(data)
    with progress() as report:
        report("loading the model", 0, 1)
        loaded = models.load(model, adapter, device, dtype, trust_remote_code)
        report("loading the model", 1, 1)
        selection = run(
            data,
            model=loaded,
            peft_config=peft_config(lora),
            training_args=sft_options(training),
            max_length=max_length,
            output=output,
            settings=settings,
            probing=probing,
            format=format,
            strict=strict,
            allow=allowed,
            labels=truth,
            command=command_line(),
            progress=report,
        )
    summary(selection, output)
    check_gate(selection, gate)


@app.command()
def cut(
    folder: Annotated[Path, typer.Argument(help="The output folder of a finished scan.", show_default=False)],
    threshold: Rule = "competition",
    allow: Allow = None,
    fail_above: FailAbove = None,
) -> None:
    """Cut saved scores again with another threshold; no model is needed."""
    gate, allowed = share(fail_above), read_ids(allow)
    from gradshield.pipeline.recut import recut

    selection = recut(folder, threshold, allowed, command_line())
    summary(selection, folder)
    check_gate(selection, gate)


@app.command()
def show(
    data: Data,
    row: Annotated[int, typer.Option("--row", "-n", help="Position in the file, from 0.", min=0)] = 0,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model whose tokenizer and template to use (default: the bundled lab's)."),
    ] = None,
    format: Format = None,
    max_length: MaxLength = None,
    training_config: Annotated[
        Path | None, typer.Option(help="JSON of the TRL SFTConfig options of the training.")
    ] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Print a row as the model sees it, the tokens that count in the loss coloured."""
    training = json_file("--training-config", training_config)
    quiet_libraries()
    from gradshield.pipeline.options import sft_options
    from gradshield.pipeline.show import seen

    require_data(data)
    view = seen(data, row, model, format, sft_options(training), max_length, trust_remote_code)
    for text, counts in view.pieces:
        out.print(Text(visible(text), style="bold green" if counts else "dim"), end="")
    out.print()
    out.print(
        f"[dim]row {row} · {escape(view.shape)} · {view.tokens} tokens, [/dim][bold green]{view.counted} in the loss[/bold green]"
    )


@app.command()
def methods() -> None:
    """List what there is: probes, engines, aggregates, subspaces, thresholds, selectors, row shapes."""
    quiet_libraries()
    from gradshield.pipeline.options import catalogue

    for kind, entries in catalogue().items():
        table = Table(
            title=kind, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for name, text in entries.items():
            table.add_row(escape(name), escape(text))
        Console(highlight=False).print(table, "")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for everything the demo writes.")] = Path(
        "gradshield-demo"
    ),
    task: Annotated[str, typer.Option(help="Utility task of the bundled lab.")] = "choice",
    harm: Annotated[str, typer.Option(help="Kind of harm mixed in.")] = "explicit",
    ratio: Annotated[str, typer.Option(help="Share of harmful rows.")] = "10%",
    seed: Annotated[int, typer.Option(help="Of the mix, the scan and the training.")] = 0,
) -> None:
    """Scan a poisoned set with the bundled lab model, fine-tune with and without the filter, and compare."""
    amount = share(ratio)
    quiet_libraries()
    from gradshield.pipeline.demo import run

    with progress() as report:
        result = run(output, task, harm, amount or 0.0, seed, command_line(), report)
    table = Table(title="GradShield demo", title_justify="left", title_style="bold")
    table.add_column("")
    for name in result.columns:
        table.add_column(name, justify="right")
    for measure, cells in result.rows:
        table.add_row(measure, *cells)
    Console(highlight=False).print(table)
    out.print("[dim]rates with their 95 % Wilson interval and n[/dim]")
    out.print(f"report  [bold]{escape(str(output / 'report.html'))}[/bold]")


# ---- what the commands share ----------------------------------------------------------------------------------------


def command_line() -> str:
    """The command as typed, for the manifest."""
    import shlex

    return shlex.join(["gradshield", *sys.argv[1:]])


def share(text: str | None) -> float | None:
    """``1%`` or ``0.01``. Raises UsageError for anything that is not a share from 0 to 1."""
    if text is None:
        return None
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"{text!r} is not a share of the rows: give a percentage such as 1%, or a number from 0 to 1")
    return value


def read_ids(path: Path | None) -> list[str]:
    """Row ids of an allow list: one a line, ``#`` begins a comment."""
    if path is None:
        return []
    lines = read_text("--allow", path).splitlines()
    return [found for line in lines if (found := line.partition("#")[0].strip())]


def read_labels(path: Path | None) -> list[int] | None:
    """A JSON list of 0 and 1. Raises DataError for anything else."""
    if path is None:
        return None
    value = json_text("--labels", path)
    if not isinstance(value, list) or not all(v in (0, 1) for v in value):
        raise DataError(
            f"the --labels file {path.name!r} is not a list of 0 and 1: give one label for every row, as JSON"
        )
    return [int(v) for v in value]


def read_text(option: str, path: Path) -> str:
    """A small text file named by an option. Raises DataError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise DataError(f"the file {str(path)!r} given to {option} cannot be read ({reason}): check its path") from None


def json_object(name: str, text: str) -> dict[str, Any]:
    """A JSON object given as an option. Raises UsageError when it is not one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON ({error}): write it with double quotes, inside single ones") from None
    if not isinstance(value, dict):
        raise UsageError(f"{name} holds a {type(value).__name__}: give a JSON object of options")
    return value


def json_text(option: str, path: Path) -> Any:
    """JSON from a file named by an option. Raises DataError when it is not."""
    try:
        return json.loads(read_text(option, path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file {str(path)!r} given to {option} is not JSON ({error}): mend it there") from None


def json_file(name: str, path: Path | None) -> dict[str, Any]:
    """A JSON object of options from a file. Raises DataError when it cannot be read, UsageError when it is another value."""
    if path is None:
        return {}
    value = json_text(name, path)
    if not isinstance(value, dict):
        raise UsageError(f"the file given to {name} holds a {type(value).__name__}: give a JSON object of options")
    return value


def require_data(data: str) -> None:
    """Tell of a missing file before a model is loaded. Raises DataError."""
    looks_like_a_file = Path(data).suffix in (".jsonl", ".json", ".csv", ".parquet") or os.sep in data.strip(os.sep)
    if looks_like_a_file and not Path(data).exists() and data.count("/") != 1:
        raise DataError(
            f"there is no file {data!r}: give a JSONL, JSON, CSV or Parquet file, or the name of a hub dataset"
        )


def summary(selection: Selection, folder: Path) -> None:
    """What was decided, and where to look."""
    results = selection.manifest.results
    for text in [] if selection.certified else ["nothing is certified: " + str(results["probes"]["problem"])]:
        err.print(f"[yellow]warning:[/yellow] {plain(text)}")
    parts = [f"[bold]{results['removed']}[/bold] of {results['scored']} rows removed", f"{results['kept']} kept"]
    parts += [f"{results[key]} {key}" for key in ("quarantined", "cleared") if results[key]]
    out.print(", ".join(parts))
    for name, one in selection.cuts.items():
        label = "" if name == "rows" else f" ({name})"
        out.print(f"cut{label}     {one.rule}, score > {one.value:.6g}")
    if results["categories"]:
        out.print("harm    " + plain(", ".join(f"{name} {count}" for name, count in results["categories"].items())))
    for key in ("caught", "lost"):
        rate = results.get("labels", {}).get(key)
        if rate:
            interval = f"({100 * rate['low']:.1f}–{100 * rate['high']:.1f}, n = {rate['n']})"
            out.print(f"{key:7} {100 * rate['rate']:.1f} % [dim]{interval}[/dim]")
    out.print(f"report  [bold]{escape(str(folder / 'report.html'))}[/bold]")


def check_gate(selection: Selection, gate: float | None) -> None:
    """Raises GateError when more was removed than allowed."""
    results = selection.manifest.results
    if gate is not None and results["removed"] > gate * results["scored"]:
        percent = 100 * results["removed"] / results["scored"]
        raise GateError(
            f"{results['removed']} of {results['scored']} rows ({percent:.1f} %) were removed, and --fail-above allows "
            f"{100 * gate:g} %: look at the report, clear rows with --allow, or mend the data"
        )


@contextmanager
def progress() -> Iterator[Any]:
    """A callable (stage, done, total) that draws one bar a stage, on the error stream, when that is a terminal."""
    bars: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as drawn:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = drawn.add_task(stage, total=total)
            drawn.update(bars[stage], completed=done, total=total)

        yield report


def plain(text: str) -> str:
    """Untrusted text for one line of markup: no markup, no terminal escape, no hidden or reordering character."""
    return escape(visible(text).replace("\n", " "))


def quiet_libraries() -> None:
    """Progress bars and advice of other libraries stay out of the way: there is one bar, ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # notices between libraries, nothing a user can act on
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; every error is one sentence and a documented exit code (docs/outputs.md)."""
    warnings.showwarning = lambda message, *_args, **_kw: err.print(f"[yellow]warning:[/yellow] {plain(str(message))}")
    try:
        app(args=arguments, standalone_mode=True)
    except GradShieldError as error:
        err.print(f"[red]error:[/red] {plain(str(error))}")
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, SystemExit) as stopped:
        # typer turns Ctrl-C into exit code 130 without a word.
        if isinstance(stopped, SystemExit) and stopped.code != 130:
            raise
        err.print("[yellow]interrupted:[/yellow] finished shards are kept; run the same command again to go on")
        raise SystemExit(130) from None
