"""``gradshield show``: one row as the model sees it."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

from gradshield.cli.common import (
    Data,
    Format,
    MaxLength,
    Remote,
    TrainingConfig,
    out,
    quiet_libraries,
    require_data,
    require_model,
    training_options,
)
from gradshield.report.text import visible


def show(
    data: Data,
    row: Annotated[int, typer.Option("--row", "-n", help="Position in the file, from 0.", min=0)] = 0,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Model whose tokenizer and template to use (default: the bundled lab's)."),
    ] = None,
    format: Format = None,
    max_length: MaxLength = None,
    training_config: TrainingConfig = None,
    trust_remote_code: Remote = False,
) -> None:
    """Print a row as the model sees it, with the loss tokens in colour."""
    training = training_options(training_config, max_length)
    require_data(data)
    if model is not None:
        require_model(model)
    quiet_libraries()
    from gradshield.scanning.show import show as seen

    view = seen(
        data,
        row,
        model=model,
        format=format,
        training_args=training,
        trust_remote_code=trust_remote_code,
    )
    for text, counts in view.pieces:
        out.print(Text(visible(text), style="bold green" if counts else "dim"), end="")
    out.print()
    out.print(
        f"[dim]row {row} · {escape(view.shape)} · {view.tokens} tokens, [/dim][bold green]{view.counted} in the loss[/bold green]"
    )
