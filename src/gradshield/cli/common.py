"""What the commands share: the options several take, files named by options, and how to speak to a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gradshield.errors import DataError, GateError, ModelError, UsageError
from gradshield.options import number
from gradshield.report.text import visible
from gradshield.types import Rate

if TYPE_CHECKING:
    from gradshield.types import Selection

QUIET = 60  # seconds between two lines of progress where there is no terminal
out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)

Data = Annotated[
    str, typer.Argument(help="JSONL, JSON, CSV, TSV or Parquet file, or the name of a hub dataset.", show_default=False)
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
    str | None,
    typer.Option(
        "--threshold",
        "-t",
        help="Where to cut: a rule and its options, such as competition:q=0.05 or ratio:5% (default: the selector's own).",
    ),
]
FailAbove = Annotated[
    str | None, typer.Option(help="Exit with code 5 when more than this share of the rows is removed, such as 1%.")
]
Probes = Annotated[Path | None, typer.Option(help="Your own harmful requests (.jsonl, .csv, .txt).")]
Lookalikes = Annotated[Path | None, typer.Option(help="Your own harmless requests (.jsonl, .csv, .txt).")]
Safety = Annotated[
    str, typer.Option(help="Requests to attack with: builtin, none, or a file of your own (.jsonl, .csv, .txt).")
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        help="Who judges answers, may be repeated: refusal-phrases (default), classifier:MODEL, guard:MODEL, "
        "llm:MODEL@URL, moderation:MODEL@URL, lab-classifier, compliance.",
        show_default=False,
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(help="How the task is scored: exact, choice, number, contains, rouge-l… (default: guessed)."),
]
TrainingConfig = Annotated[
    Path | None,
    typer.Option(
        help="JSON of the TRL SFTConfig options of the training: the loss then covers what TRL would train on, not answers alone."
    ),
]
Tokens = Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)]
MaxLength = Annotated[int | None, typer.Option(help="Cut rows at this many tokens, as training will (default 1024).")]


def command_line() -> str:
    """The command as typed, for the manifest."""
    import shlex

    return shlex.join(["gradshield", *sys.argv[1:]])


def share(text: str | None) -> float | None:
    """``1%`` or ``0.01``. Raises UsageError for what is not a share from 0 to 1, and for a bare 1, which may mean either."""
    if text is None:
        return None
    value = number(text)
    if not 0 <= value <= 1:
        raise UsageError(f"{text!r} is not a share of the rows: give a percentage such as 1%, or a number from 0 to 1")
    if value == 1 and not text.endswith("%"):
        raise UsageError(f"{text!r} may mean one row in a hundred or all of them: write 1% or 100%")
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
    from gradshield.data.formats import may_be_hub_name

    if not may_be_hub_name(data) and not Path(data).exists():
        raise DataError(
            f"there is no file {data!r}: give a JSONL, JSON, CSV, TSV or Parquet file, or the name of a hub dataset"
        )


def require_model(name: str) -> None:
    """Tell of a missing model folder before the libraries are loaded, which takes seconds. Raises ModelError."""
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no folder {name}: give a model's folder (with config.json) or a hub name")


def summary(selection: Selection, folder: Path) -> None:
    """What was decided, and where to look."""
    results = selection.manifest.results
    if not selection.certified:
        err.print(f"[yellow]warning:[/yellow] {plain('not certified: ' + '; '.join(results['doubts'].values()))}")
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
            out.print(f"{key:7} {plain(str(Rate.of(rate)))}")
    out.print(f"report  [bold]{escape(str(folder / 'report.html'))}[/bold]")


def verdict(certificate: Mapping[str, Any]) -> str:
    """Whether a certificate certifies anything, and why not."""
    if certificate["certified"]:
        return "[green]certified[/green]"
    return f"[yellow]not certified:[/yellow] {plain(str(certificate['reason']))}"


def check_gate(selection: Selection, gate: float | None) -> None:
    """Raises GateError when more was removed than allowed."""
    results = selection.manifest.results
    if gate is not None and results["removed"] > gate * results["scored"] * (1 + 1e-12):  # 0.7 % of 1000 is 7, not less
        percent = 100 * results["removed"] / results["scored"]
        raise GateError(
            f"{results['removed']} of {results['scored']} rows ({percent:.1f} %) were removed, and --fail-above allows "
            f"{100 * gate:g} %: look at the report, clear rows with --allow, or mend the data"
        )


def probing(
    probes: Path | None, lookalikes: Path | None, answer_prefix: str, template: dict[str, Any], uncertified: bool
) -> Any:
    """What the model is asked, from options. Raises DataError for a file of prompts that cannot be read."""
    from gradshield.probes import read_prompts
    from gradshield.scanning.settings import Probing

    return Probing(
        requests=read_prompts(probes) if probes else (),
        lookalikes=read_prompts(lookalikes) if lookalikes else (),
        answer_prefix=answer_prefix,
        template=template,
        uncertified=uncertified,
    )


def noted(metric: Mapping[str, Any]) -> str:
    """How utility was scored, for its line; ``metric`` has ``metric`` and ``guessed``."""
    name = str(metric.get("metric") or "")
    return f"utility ({name}{', guessed' if metric.get('guessed') else ''})" if name else "utility"


def rates(before: Mapping[str, Any], after: Mapping[str, Any], utility: str = "utility") -> None:
    """A table of rates with their intervals, before (where measured) and after."""
    names: list[tuple[str, tuple[str, ...]]] = [
        (f"ASR, {judge}", ("judges", judge)) for judge in after.get("judges", {})
    ]
    names += [
        (label, (key,)) for label, key in (("over-refusal", "over_refusal"), (utility, "utility")) if key in after
    ]
    for label, keys in names:
        texts = []
        for figures in (before, after):
            value: Any = figures
            for key in keys:
                value = value.get(key) if value else None
            if value:
                texts.append(plain(str(Rate.of(value))))
        out.print(f"{plain(label):24} {' → '.join(texts)}")


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
        said = time.monotonic()

        def report(stage: str, done: int, total: int) -> None:
            nonlocal said
            if not err.is_terminal and time.monotonic() - said > QUIET:  # a log shows that it goes on
                said = time.monotonic()
                err.print(f"{plain(stage)} {done}/{total}")
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
