"""The commands that measure: ``evaluate``, how safe and useful a model is, and ``certify``, a bound on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from gradshield.cli import options
from gradshield.cli.common import command_line, err, noted, out, plain, progress, quiet_libraries, rates, verdict
from gradshield.errors import GateError, UsageError

if TYPE_CHECKING:
    from gradshield.evaluation.certify import Checked

NAMED = 5  # changes that the error lists; the rest are counted


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or hub name of a model, or of a PEFT adapter.", show_default=False)
    ],
    utility: Annotated[Path | None, typer.Option(help="Held-out rows of the task.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a report, every answer and the figures.")
    ] = None,
    safety: options.Safety = "builtin",
    judge: options.Judges = None,
    metric: options.Metric = None,
    max_new_tokens: options.Tokens = 64,
    lm_eval: Annotated[
        list[str] | None,
        options.measuring(
            "--lm-eval", help="Tasks of lm-eval, in addition to or instead of yours.", show_default=False
        ),
    ] = None,
    inspect: Annotated[
        Path | None, options.measuring(help="An Inspect task file: your own Python code, which is run.")
    ] = None,
    limit: Annotated[int | None, options.measuring(help="At most this many samples per harness task.")] = None,
    answer_prefix: options.Prefix = "",
    template_kwargs: options.Template = "{}",
    adapter: options.Adapter = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.Remote = False,
) -> None:
    """Measure attack success (by each judge separately), over-refusal and utility of a model."""
    if safety == "none" and not (utility or lm_eval or inspect):
        raise UsageError("there is nothing to measure: give --safety, --utility, --lm-eval or --inspect")
    template = options.template_variables(template_kwargs)
    options.require_model(model)
    quiet_libraries()
    from gradshield.evaluation.evaluate import evaluate as run
    from gradshield.evaluation.exam import exams_of
    from gradshield.models.loading import ModelSource

    exams = exams_of(
        safety, judge, None if utility is None else str(utility), metric, max_new_tokens, answer_prefix, False, template
    )
    with progress() as report:
        found = run(
            ModelSource(model, adapter, dtype, trust_remote_code, device=device),
            exams.report,
            output=output,
            lm_eval=lm_eval or (),
            inspect=inspect,
            limit=limit,
            command=command_line(),
            progress=report,
        )
    rates(None, found.figures, noted(exams.report.record()))
    for name, rate in found.harness.items():
        out.print(f"{plain(name)}  {plain(str(rate))}")
    for one in found.agreement:
        kappa = "– (one verdict for all)" if one.kappa is None else f"{one.kappa:.2f}"
        out.print(
            f"[dim]{plain(' / '.join(one.judges))}: Cohen's kappa {kappa}, {len(one.differ)} answers differ[/dim]"
        )
    if output is not None:
        out.print(f"report  [bold]{escape(str(output / 'report.html'))}[/bold]")


def certify(
    run: Annotated[
        Path,
        typer.Argument(help="Folder of a finished `gradshield train` or `gradshield evaluate`.", show_default=False),
    ],
    confidence: Annotated[
        str | None, typer.Option(help="Confidence at which the bounds of all judges hold jointly (default 95%).")
    ] = None,
    looks: Annotated[
        int | None,
        typer.Option(help="Times the report requests were used to choose this model (default 1: this once)."),
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Highest attack success rate that a judge's bound may reach (default 6%).")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help='Labelled answers of this model: JSON lines of {"prompt", "answer", "unsafe"}.'),
    ] = None,
    judge: options.Judges = None,
    check: Annotated[
        bool, typer.Option("--check", help="Recompute every hash and bound offline, and fail on any change.")
    ] = False,
) -> None:
    """Bound the attack success rate of a finished run's model (certificate.json), or check its certificate.

    Exit code 5 if the model is not certified, or if the files no longer match the certificate.
    """
    given = {"--confidence": confidence, "--looks": looks, "--limit": limit, "--calibrate": calibrate, "--judge": judge}
    if check and (named := [name for name, value in given.items() if value is not None]):
        raise UsageError(
            f"--check uses the claim in the certificate, and {named[0]} sets another: leave one of them out"
        )
    claim: dict[str, Any] = {} if looks is None else {"looks": looks}
    for name, text in (("confidence", confidence), ("limit", limit)):
        if (value := options.share(f"--{name}", text)) is not None:
            claim[name] = value
    quiet_libraries()
    from gradshield.evaluation import certify as work

    if check:
        _checked(work.check(run), run)
        return
    from gradshield.judges import parse_all

    _made(work.certify(run, calibrate=calibrate, judges=parse_all(judge or ()), **claim)["predicate"], run)


def _made(predicate: Mapping[str, Any], run: Path) -> None:
    """Print a line per judge, the file and the verdict. Raises GateError if the model is not certified."""
    from gradshield.stats import percent

    for name, one in predicate["judges"].items():
        known = one["calibration"]
        note = (
            "its own error is unknown: give labelled answers with --calibrate"
            if known is None
            else f"calibrated on {known['unsafe']} unsafe and {known['safe']} safe answers, "
            f"{predicate['calibration']['of_this_run']} of them from this run"
        )
        out.print(f"{plain(name):20} {one['k']} of {one['n']}, at most {percent(one['upper'])} [dim]({note})[/dim]")
    if lost := predicate["lost"]:
        out.print(f"{'harmless lost':20} {lost['k']} of {lost['n']}, at most {percent(lost['upper'])}")
    out.print(f"certificate          [bold]{plain(str(run / 'certificate.json'))}[/bold]")
    _verdict(predicate)


def _checked(found: Checked, run: Path) -> None:
    """Print what was compared and what could not be. Raises GateError on any change, or if the model is not certified."""
    for clause in found.unchecked:
        err.print(f"[yellow]not checked:[/yellow] {plain(clause)}")
    if found.changed:
        named, more = found.changed[:NAMED], len(found.changed) - NAMED
        raise GateError(
            f"the certificate of {str(run)!r} does not match its files: {'; '.join(named)}"
            f"{f'; and {more} more' if more > 0 else ''}; restore the files, or certify the run again"
        )
    out.print(f"nothing changed: {plain(', '.join(found.same))}")
    _verdict(found.predicate)


def _verdict(predicate: Mapping[str, Any]) -> None:
    if predicate["data"] is None:
        out.print("measured             only: no training and no scan stand behind this certificate")
    if not predicate["certified"]:
        raise GateError(f"nothing is certified: {predicate['reason']}; the certificate says so")
    out.print(verdict(predicate))
