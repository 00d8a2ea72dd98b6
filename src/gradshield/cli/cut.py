"""``gradshield cut``: cut saved scores again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradshield.cli import options
from gradshield.cli.common import command_line, out, summary
from gradshield.cli.gate import Sarif, check_sarif, judge
from gradshield.errors import DataError


def cut(
    folder: Annotated[Path, typer.Argument(help="Output folder of a finished scan.", show_default=False)],
    threshold: options.Rule = None,
    allow: options.Allow = None,
    deny: options.Deny = None,
    fail_above: options.FailAbove = None,
    sarif: Sarif = None,
) -> None:
    """Cut saved scores again with another threshold; no model is needed."""
    gate = options.share("--fail-above", fail_above)
    from gradshield.scanning.decide import read_ids

    allowed = None if allow is None else read_ids(allow, "the --allow file")
    denied = None if deny is None else read_ids(deny, "the --deny file")
    check_sarif(sarif)
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}: run `gradshield scan` into it first")
    from gradshield.scanning.cut import ALLOW, DENY, own_list
    from gradshield.scanning.cut import cut as cut_again

    own = {name: own_list(folder, name) for name, given in ((ALLOW, allowed), (DENY, denied)) if given is None}
    allowed, denied = own.get(ALLOW, allowed), own.get(DENY, denied)
    selection = cut_again(folder, threshold, allowed, denied, command=command_line())
    if any(own.values()):
        out.print("lists   " + ", ".join(f"{name} ({len(ids)})" for name, ids in own.items() if ids))
    summary(selection, folder, [*(allowed or ()), *(denied or ())])
    judge(selection, sarif, gate)
