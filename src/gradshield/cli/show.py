"""``gradshield show``: one row as the model sees it."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

from gradshield.cli import options
from gradshield.cli.common import out, plain, quiet_libraries
from gradshield.report.text import visible


def show(
    data: options.Data,
    row: Annotated[int, typer.Option("--row", "-n", help="Position in the file, from 0.", min=0)] = 0,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model whose tokenizer and template to use (default: the bundled lab's)."),
    ] = None,
    format: options.Shape = None,
    columns: options.Columns = None,
    max_length: options.MaxLength = None,
    training_config: options.TrainingConfig = None,
    trust_remote_code: options.Remote = False,
) -> None:
    """Print a row as the model sees it, with the loss tokens in colour, or between ⟦ and ⟧ where there is none (a pipe)."""
    training = options.training_options(training_config, max_length)
    shape = options.row_format(format, columns)
    options.require_data(data)
    if model is not None:
        options.require_model(model)
    quiet_libraries()
    from gradshield.scanning.show import show as seen

    view = seen(
        data,
        row,
        model=model,
        format=shape,
        training_args=training,
        trust_remote_code=trust_remote_code,
    )
    coloured = out.color_system is not None and not out.no_color
    for counts, run in groupby(view.pieces, key=lambda piece: piece[1]):
        text = visible("".join(text for text, _ in run))
        if not coloured:
            text = text.translate(_BRACKETS)
            text = f"⟦{text}⟧" if counts else text
        out.print(Text(text, style="bold green" if counts else "dim"), end="")
    out.print()
    out.print(
        f"[dim]row {row} · {escape(view.shape)} · {view.tokens} tokens, [/dim][bold green]{view.counted} in the loss[/bold green]"
        + ("" if coloured else " (between ⟦ and ⟧)")
        + f"[dim] · tokenizer of {plain(model or 'the bundled lab')}[/dim]"
    )


_BRACKETS = str.maketrans({"⟦": "\\u27e6", "⟧": "\\u27e7"})  # a row cannot draw marks of its own
