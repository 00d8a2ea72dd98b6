"""``gradshield cut``: cut saved scores again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradshield.cli.common import Allow, Deny, FailAbove, Rule, command_line, read_ids, share, summary
from gradshield.cli.gate import Sarif, check_sarif, judge
from gradshield.errors import DataError


def cut(
    folder: Annotated[Path, typer.Argument(help="Output folder of a finished scan.", show_default=False)],
    threshold: Rule = None,
    allow: Allow = None,
    deny: Deny = None,
    fail_above: FailAbove = None,
    sarif: Sarif = None,
) -> None:
    """Cut saved scores again with another threshold; no model is needed."""
    gate = share("--fail-above", fail_above)
    allowed, denied = read_ids("--allow", allow), read_ids("--deny", deny)
    check_sarif(sarif)
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}: run `gradshield scan` into it first")
    from gradshield.scanning.cut import cut as cut_again

    selection = cut_again(folder, threshold, allowed, denied, command=command_line())
    summary(selection, folder, [*allowed, *denied])
    judge(selection, sarif, gate)
