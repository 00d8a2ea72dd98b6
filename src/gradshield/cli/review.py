"""``gradshield review``: a person keeps or removes the rows near the cut, on a local page."""

from __future__ import annotations

import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gradshield.cli.common import command_line, out
from gradshield.errors import DataError
from gradshield.runs import alone


def review(
    folder: Annotated[Path, typer.Argument(help="Output folder of a finished scan.", show_default=False)],
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.", min=0, max=65535)] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """Read the rows nearest to the cut on a local page, keep or remove each, and split the rows again.

    Only this machine can reach the page, and only with its address. Every decision is written at once, to allow.txt and
    deny.txt in the folder; Ctrl-C ends.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}: run `gradshield scan` into it first")
    from gradshield.scanning.review import Review
    from gradshield.scanning.review_server import Server

    with alone(folder):
        found = Review(folder)
        with Server(found, port, command_line()) as server:
            out.print(f"review  [bold]{escape(server.url)}[/bold]\n[dim]Ctrl-C ends[/dim]")
            if not no_browser:
                webbrowser.open(server.url)
            with suppress(KeyboardInterrupt):  # the usual end
                server.serve_forever()
        left = " Decisions that are not applied yet are kept for the next review." if found.waiting else ""
        out.print(f"\n{len(found.verdicts)} rows decided; {found.removed} rows removed with them.{left}")
