"""``gradshield certify``: certify the model of a finished run, or check its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradshield.cli import options
from gradshield.cli.common import err, out, plain, quiet_libraries, verdict
from gradshield.errors import GateError, UsageError

if TYPE_CHECKING:
    from gradshield.evaluation.certify import Checked

NAMED = 5  # changes that the error lists; the rest are counted


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
