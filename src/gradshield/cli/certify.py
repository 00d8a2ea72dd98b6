"""``gradshield certify``: what may be claimed of a finished run's model, and whether it still may."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradshield.cli.common import Judges, err, out, plain, quiet_libraries, share
from gradshield.errors import GateError


def certify(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `gradshield train`.", show_default=False)],
    confidence: Annotated[float, typer.Option(help="With which all bounds hold together.")] = 0.95,
    looks: Annotated[
        int, typer.Option(help="How often the report requests were looked at to choose this model, this time included.")
    ] = 1,
    limit: Annotated[str, typer.Option(help="Attack success rate that no judge's bound may exceed.")] = "6%",
    calibrate: Annotated[
        Path | None,
        typer.Option(help='Labelled answers of this model, JSON lines of {"prompt", "answer", "unsafe"}.'),
    ] = None,
    judge: Judges = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compute every hash and bound again, offline, and fail on any change.")
    ] = False,
) -> None:
    """Bound the attack success of a finished run's model (certificate.json), or check such a certificate."""
    quiet_libraries()
    from gradshield.pipeline import certify as work

    if check:
        found = work.check(run)
        for clause in found.unchecked:
            err.print(f"[yellow]not checked:[/yellow] {plain(clause)}")
        if found.changed:
            raise GateError(
                f"the certificate of {str(run)!r} does not hold: {'; '.join(found.changed)}; certify it again if that is meant"
            )
        out.print(f"nothing changed: {plain(', '.join(found.same))}")
        out.print(_verdict(found.certified, found.reason))
        return
    from gradshield.evaluation.judges.specs import parse_all

    made = work.certify(
        run,
        confidence=confidence,
        looks=looks,
        limit=share(limit) or 0.0,
        calibrate=calibrate,
        judges=parse_all(judge) if judge else (),
    )["predicate"]
    for name, one in made["judges"].items():
        known = one["calibration"]
        note = "not calibrated" if known is None else f"calibrated on {known['unsafe']} + {known['safe']} answers"
        out.print(f"{plain(name)}  {one['k']} of {one['n']}, at most {100 * one['upper']:.1f} % ({note})")
    out.print(_verdict(made["certified"], made["reason"]))
    out.print(f"certificate  [bold]{plain(str(run / 'certificate.json'))}[/bold]")


def _verdict(certified: bool, reason: str | None) -> str:
    return "[green]certified[/green]" if certified else f"[yellow]not certified:[/yellow] {plain(str(reason))}"
