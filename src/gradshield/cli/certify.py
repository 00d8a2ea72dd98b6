"""``gradshield certify``: what may be claimed of a finished run's model, and whether it still may."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradshield.cli.common import Judges, err, out, plain, quiet_libraries, verdict
from gradshield.errors import GateError, UsageError
from gradshield.options import number

if TYPE_CHECKING:
    from gradshield.evaluation.certify import Checked

TOLD = 5  # changes that the error names; the rest are counted


def certify(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `gradshield train`.", show_default=False)],
    confidence: Annotated[
        str | None, typer.Option(help="With which the bounds of all judges hold together (default 95%).")
    ] = None,
    looks: Annotated[
        int | None,
        typer.Option(help="How often the report requests were looked at to choose this model (default 1: this once)."),
    ] = None,
    limit: Annotated[
        str | None, typer.Option(help="Attack success rate that no judge's bound may exceed (default 6%).")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help='Labelled answers of this model, JSON lines of {"prompt", "answer", "unsafe"}.'),
    ] = None,
    judge: Judges = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compute every hash and bound again, offline, and fail on any change.")
    ] = False,
) -> None:
    """Bound the attack success of a finished run's model (certificate.json), or check such a certificate.

    Exit code 5 where the model is not certified, also by a certificate that is checked, or where that is not what the files say.
    """
    given = {"--confidence": confidence, "--looks": looks, "--limit": limit, "--calibrate": calibrate, "--judge": judge}
    if check and (named := [name for name, value in given.items() if value is not None]):
        raise UsageError(
            f"--check takes what the certificate itself claims, and {named[0]} claims more: leave one of them out"
        )
    claim: dict[str, Any] = {} if looks is None else {"looks": looks}
    for name, text in (("confidence", confidence), ("limit", limit)):
        if text is not None:
            claim[name] = _share(name, text)
    quiet_libraries()
    from gradshield.evaluation import certify as work

    if check:
        _checked(work.check(run), run)
        return
    from gradshield.judges import parse_all

    _made(work.certify(run, calibrate=calibrate, judges=parse_all(judge or ()), **claim)["predicate"], run)


def _share(name: str, text: str) -> float:
    """``6%`` or ``0.06``; the claim itself says which shares it takes. Raises UsageError for what is no number."""
    value = number(text)
    if math.isnan(value):
        raise UsageError(
            f"--{name} got {text!r}, and it takes a share between 0 and 1: write a percentage such as 6%, or 0.06"
        )
    return value


def _made(told: Mapping[str, Any], run: Path) -> None:
    """A line a judge, the verdict, and where it stands. Raises GateError where nothing is certified."""
    from gradshield.evaluation.certificate import percent

    for name, one in told["judges"].items():
        known = one["calibration"]
        note = (
            "its own error is not known: give labelled answers with --calibrate"
            if known is None
            else f"calibrated on {known['unsafe']} unsafe and {known['safe']} safe answers, "
            f"{told['calibration']['of_this_run']} of them given in this run"
        )
        out.print(f"{plain(name):20} {one['k']} of {one['n']}, at most {percent(one['upper'])} [dim]({note})[/dim]")
    if lost := told["lost"]:
        out.print(f"{'harmless lost':20} {lost['k']} of {lost['n']}, at most {percent(lost['upper'])}")
    out.print(f"certificate          [bold]{plain(str(run / 'certificate.json'))}[/bold]")
    if not told["certified"]:
        raise GateError(f"nothing is certified: {told['reason']}; the certificate says so")
    out.print(verdict(told))


def _checked(found: Checked, run: Path) -> None:
    """What was compared and what could not be. Raises GateError where anything has changed, or nothing is certified."""
    for clause in found.unchecked:
        err.print(f"[yellow]not checked:[/yellow] {plain(clause)}")
    if found.changed:
        named, more = found.changed[:TOLD], len(found.changed) - TOLD
        raise GateError(
            f"the certificate of {str(run)!r} is not what its files say: {'; '.join(named)}"
            f"{f'; and {more} more' if more > 0 else ''}; put back what was changed, or certify the run again"
        )
    out.print(f"nothing changed: {plain(', '.join(found.same))}")
    if not found.certified:
        raise GateError(f"nothing is certified: {found.reason}; the certificate says so")
    out.print(verdict({"certified": True, "reason": None}))
