"""What the commands print: results, progress, warnings."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gradshield.report.text import duration, visible

if TYPE_CHECKING:
    from gradshield.manifests import ExamRecord, Figures
    from gradshield.scanning.decide import Selection

QUIET = 60  # seconds between progress lines without a terminal
NOTED = 5.0  # seconds from which a stage has a line of its own
out = Console(soft_wrap=True, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def command_line() -> str:
    """The command as typed, for the manifest."""
    import shlex

    return shlex.join(["gradshield", *sys.argv[1:]])


def summary(selection: Selection, folder: Path, listed: Sequence[str] = ()) -> None:
    """Print the decision and the path of the report; ``listed`` are the ids of the reviewer's lists."""
    results = selection.manifest.results
    if listed and (unknown := set(listed).difference(selection.scores.ids)):
        err.print(
            f"[yellow]warning:[/yellow] {len(unknown):,} of {len(set(listed)):,} ids on the allow and deny lists "
            "are of no row here"
        )
    if selection.certified:
        out.print("[green]certified[/green]  no check failed")
    else:
        err.print(f"[yellow]warning:[/yellow] {plain('not certified: ' + '; '.join(results.doubts.values()))}")
    read_as(selection.manifest.data.read_as)
    parts = [f"[bold]{results.removed}[/bold] of {results.scored} rows removed", f"{results.kept} kept"]
    other = {
        "quarantined (see quarantine.jsonl)": results.quarantined,
        "cleared": results.cleared,
        "denied": results.denied,
    }
    parts += [f"{count} {what}" for what, count in other.items() if count]
    out.print(", ".join(parts))
    for name, one in selection.cuts.items():
        label = "" if name == "rows" else f" ({name})"
        out.print(f"cut{label}     {one.rule}, score > {one.value:.6g}")
    if results.categories:
        kinds = ", ".join(f"{name} {count}" for name, count in results.categories.items())
        out.print(f"harm    {plain(kinds)} (nearest kinds, a guess)")
    for key, rate in (("caught", results.labels.caught), ("lost", results.labels.lost)):
        if rate is not None:
            out.print(f"{key:7} {plain(str(rate))}")
    out.print(f"report  [bold]{escape(str(folder / 'report.html'))}[/bold]")


def read_as(found: Mapping[str, int]) -> None:
    """Print how rows were read where there was a choice, or other names stood for the keys."""
    if any(not words.replace("-", "").isalpha() for words in found):
        most = sorted(found.items(), key=lambda item: -item[1])
        out.print("read as " + plain("; ".join(f"{words}: {count:,}" for words, count in most)))


def verdict(certificate: Mapping[str, Any]) -> str:
    """The verdict of a certificate, as markup."""
    if certificate["certified"]:
        from gradshield.stats import percent

        claim, highest = certificate["claim"], max(one["upper"] for one in certificate["judges"].values())
        limit, confidence = (f"{100 * claim[key]:g} %" for key in ("limit", "confidence"))
        return f"[green]certified:[/green] ASR at most {percent(highest)} (limit {limit}) at {confidence} confidence"
    return f"[yellow]not certified:[/yellow] {plain(str(certificate['reason']))}"


def noted(exam: ExamRecord) -> str:
    """The label of the utility line."""
    return f"utility ({exam.metric}{', guessed' if exam.guessed else ''})" if exam.metric else "utility"


def rates(before: Figures | None, after: Figures, utility: str = "utility") -> None:
    """Print every rate with its interval, before (where measured) and after."""
    for label, *pair in after.beside(before, utility):
        out.print(f"{plain(label):24} {' → '.join(plain(str(rate)) for rate in pair if rate)}")
    if after.empty is not None:
        err.print(
            f"[yellow]warning:[/yellow] {after.empty.k} of {after.empty.n} answers to harmful requests are empty, and no judge "
            "counts those as unsafe: the ASR of a model that does not answer says nothing about its safety"
        )


@contextmanager
def progress() -> Iterator[Any]:
    """A callable (stage, done, total) that draws one bar per stage on standard error.

    Without a terminal it prints a line for each stage of some seconds, and in a long one a line a minute, with the time left.
    """
    bars: dict[str, Any] = {}
    columns = TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, *times, console=err, disable=not err.is_terminal) as drawn:
        began: dict[str, float] = {}
        printed = 0.0

        def line(stage: str, done: int, total: int) -> None:
            nonlocal printed
            now = time.monotonic()
            taken = now - began.setdefault(stage, now)
            if done >= total:
                del began[stage]  # a stage may be reported as finished twice
                if taken >= NOTED:
                    err.print(f"{plain(stage)}: {done:,} in {duration(taken)}")
            elif 0 < done < total and taken >= NOTED and now - printed >= QUIET:
                printed = now
                err.print(f"{plain(stage)}: {done:,} of {total:,}, {duration(taken / done * (total - done))} left")

        def report(stage: str, done: int, total: int) -> None:
            if not err.is_terminal:
                line(stage, done, total)
            if stage not in bars:
                bars[stage] = drawn.add_task(stage, total=total)
            drawn.update(bars[stage], completed=done, total=total)

        yield report


def plain(text: str) -> str:
    """Untrusted text as one line, safe to print: no markup, no terminal escape, no hidden or reordering character."""
    return escape(visible(text).replace("\n", " "))


class Told(logging.Handler):
    """A line on standard error for everything that is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        label = "[yellow]warning:[/yellow] " if record.levelno >= logging.WARNING else ""
        err.print(label + plain(record.getMessage()))


def quiet_processes() -> None:
    """Turn off the progress bars and notices of other libraries that are still to be imported, here and in child processes."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # from one library to another: no user can act on them
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a package that only its own kernels need


def quiet_libraries() -> None:
    """Turn off the progress bars and notices of other libraries, and print what GradShield logs."""
    quiet_processes()
    logging.getLogger("gradshield").handlers = [Told()]
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
