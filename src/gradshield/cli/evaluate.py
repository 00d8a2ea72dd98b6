"""``gradshield evaluate``: how safe and how useful a model is, measured as after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gradshield.cli import options
from gradshield.cli.common import command_line, noted, out, plain, progress, quiet_libraries, rates
from gradshield.errors import UsageError


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
