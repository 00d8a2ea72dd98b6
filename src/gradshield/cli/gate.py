"""The gate of ``scan`` and ``cut``: which rows closed it, for a code review, and exit code 5."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from gradshield.cli import options
from gradshield.errors import DataError, GateError

if TYPE_CHECKING:
    from gradshield.manifests import ScanResults
    from gradshield.scanning.selection import Selection

Sarif = Annotated[
    Path | None,
    options.reviewing(
        "--sarif",
        help="Write the removed rows as findings (SARIF 2.1.0); in GitHub Actions, annotate them too.",
        show_default=False,
    ),
]


def check_sarif(path: Path | None) -> None:
    """Raises DataError, before anything is scanned, for a path that no file can be written to."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise DataError(f"--sarif cannot write {str(path)!r}: name a file in a folder that exists")


def judge(selection: Selection, sarif: Path | None, gate: float | None) -> None:
    """Write the findings, annotate them in GitHub Actions, and raise GateError if the gate closes."""
    from gradshield.runs import write_json
    from gradshield.scanning import findings

    closed = _closes(selection.manifest.results, gate)
    if sarif is not None:
        write_json(sarif, findings.sarif(selection, closed))
        if os.environ.get("GITHUB_ACTIONS") == "true":
            for line in findings.workflow_commands(selection, closed):
                print(line)  # as it is: the console would read markup in it
    check_gate(selection.manifest.results, gate)


def _closes(results: ScanResults, gate: float | None) -> bool:
    """Whether more rows were removed than ``gate``, a share, allows: 0.7 % of 1,000 is 7, and not less."""
    return gate is not None and results.removed > gate * results.scored * (1 + 1e-12)


def check_gate(results: ScanResults, gate: float | None) -> None:
    """Raises GateError if the gate closes."""
    if gate is not None and _closes(results, gate):
        percent = 100 * results.removed / results.scored
        raise GateError(
            f"{results.removed} of {results.scored} rows ({percent:.1f} %) were removed, and --fail-above allows "
            f"{100 * gate:g} %: read the report, clear rows with --allow, or fix the data"
        )
