"""The commands that decide which rows stay: ``scan``, ``estimate``, ``cut``, ``review`` and ``show``."""

from __future__ import annotations

import inspect
import logging
import os
import webbrowser
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from gradshield import cache
from gradshield.cli import options
from gradshield.cli.common import command_line, err, out, plain, progress, quiet_libraries, read_as, summary
from gradshield.errors import DataError, GateError, UsageError
from gradshield.files import read_labels
from gradshield.manifests import ScanManifest, ScanResults
from gradshield.report.text import duration, visible
from gradshield.runs import alone, read_manifest, write_json

if TYPE_CHECKING:
    from gradshield.scanning.decide import Selection

REASONS = 5  # why rows cannot be scored, printed one by one; the rest are counted
_BRACKETS = str.maketrans({"⟦": "\\u27e6", "⟧": "\\u27e7"})  # a row cannot draw marks of its own

Sarif = Annotated[
    Path | None,
    options.reviewing(
        "--sarif",
        help="Write the removed rows as findings (SARIF 2.1.0); in GitHub Actions, annotate them too.",
        show_default=False,
    ),
]
Finished = Annotated[Path, typer.Argument(help="Output folder of a finished scan.", show_default=False)]


def scan(
    context: typer.Context,
    data: options.Data,
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the rows, scores, report and manifest.", show_default=False),
    ],
    columns: options.Columns = None,
    threshold: options.Rule = None,
    fail_above: options.FailAbove = None,
    format: options.Shape = None,
    strict: options.Strict = False,
    max_length: options.MaxLength = None,
    training_config: options.TrainingConfig = None,
    selector: options.Selects = "screen",
    probe: options.Unsafety = "token_gap",
    aggregate: options.Aggregate = "push",
    subspace: options.Subspace = "all",
    engine: options.Engine = "auto",
    lora_config: options.LoraConfig = None,
    seed: options.Seed = 0,
    probes: options.Probes = None,
    lookalikes: options.Lookalikes = None,
    answer_prefix: options.Prefix = "",
    template_kwargs: options.Template = "{}",
    uncertified: options.Uncertified = False,
    allow: options.Allow = None,
    labels: Annotated[
        Path | None, options.reviewing(help="JSON list of 0 and 1 (harmful) per row: reported, never used to decide.")
    ] = None,
    sarif: Sarif = None,
    adapter: options.Adapter = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    trust_remote_code: options.Remote = False,
    token_budget: options.Budget = 4096,
    no_cache: options.NoCache = False,
    workers: Annotated[
        int | None,
        options.running(
            help="Processes that share the rows, each with its own model (default: 1; with --ray, one per GPU or CPU).",
            min=1,
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        options.running(
            help="Measure on the Ray cluster at this address: host:port, or auto for this machine's cluster.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Find the rows of a fine-tuning set that would make the model less safe, and split them from the rest.

    Writes kept, removed, quarantine.jsonl, scores.parquet, report.html and manifest.json. An interrupted scan resumes
    where it stopped.
    """
    _check_map(device_map, selector, alone=workers in (None, 1) and ray is None)
    gate = options.share("--fail-above", fail_above)
    check_sarif(sarif)
    from gradshield.scanning.decide import read_ids

    allowed, truth = read_ids(allow, "the --allow file"), read_labels(labels, "the --labels file")
    checked = _checked(context.params)
    from gradshield.scanning.cut import ALLOW, DENY
    from gradshield.scanning.scan import scan as run
    from gradshield.scanning.workers import Workers

    crew = Workers(workers, ray)
    earlier = None
    with suppress(DataError):  # nothing yet, or nothing of ours: `run` says what it cannot write into
        earlier = read_manifest(output, ScanManifest).data
    with progress() as report:
        selection = run(
            data,
            **checked,
            output=output,
            allow=allowed,
            labels=truth,
            workers=crew,
            command=command_line(),
            progress=report,
        )
    lists = [name for name in (ALLOW, DENY) if (output / name).is_file() and not (name == ALLOW and allowed)]
    if lists:
        rule = selection.manifest.settings.threshold
        err.print(
            f"note: {' and '.join(lists)} in {plain(str(output))} did not count in this scan: apply what is there with "
            f"{plain(f'`gradshield cut {output} --threshold {rule}`')}"
        )
    if earlier and earlier.sha256 != selection.manifest.data.sha256:
        err.print(f"note: {plain(str(output))} held a scan of {plain(earlier.name)}, which this one replaces")
    summary(selection, output, allowed)
    judge(selection, sarif, gate)


def estimate(context: typer.Context, **given: Any) -> None:
    """Say what the rows are and how long a scan of them takes, from a sample, in one process; writes nothing.

    Takes the options of `gradshield scan` that change this.
    """
    _check_map(given["device_map"], given["selector"], alone=True)
    checked = _checked(context.params)
    from gradshield.scanning.estimate import estimate as run

    with progress() as report:
        found = run(given["data"], **checked, progress=report)
    out.print(f"rows       [bold]{found.scored:,}[/bold] of {found.rows:,} can be scored")
    read_as(found.read_as)
    for reason, line, count in found.unusable[:REASONS]:
        out.print(f"           {count:,} cannot: {plain(reason)} [dim](first: line {line})[/dim]")
    if others := sum(count for _, _, count in found.unusable[REASONS:]):
        out.print(f"           {others:,} cannot, for other reasons")
    loss = 100 * found.loss_tokens / found.tokens
    out.print(f"tokens     {found.tokens:,}, {loss:.0f} % of them in the loss; the longest row has {found.longest:,}")
    if found.engine:
        out.print(f"engine     {plain(found.engine)}")
    whole, low, high = found.seconds.value, found.seconds.low, found.seconds.high
    spread = f" [dim]({duration(low)} to {duration(high)})[/dim]" if high > low else ""
    out.print(f"time       [bold]{duration(whole)}[/bold]{spread} to measure, {duration(found.before)} before it")
    out.print(
        f"           [dim]timed on {found.sampled_rows:,} rows, {found.sampled} of {found.shards} shards; "
        f"{found.scored / whole:,.0f} rows a second[/dim]"
    )
    if found.memory:
        out.print(f"memory     {found.memory / 2**30:.1f} GiB at most")


# Typer reads a command's options from its signature.
_shared = inspect.signature(scan, eval_str=True)
_left_out = ("output", "labels", "allow", "fail_above", "sarif", "workers", "ray")
estimate.__signature__ = _shared.replace(  # type: ignore[attr-defined]
    parameters=[option for name, option in _shared.parameters.items() if name not in _left_out]
)


def cut(
    folder: Finished,
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
    _require_scan(folder)
    from gradshield.scanning.cut import ALLOW, DENY, own_list
    from gradshield.scanning.cut import cut as cut_again

    own = {name: own_list(folder, name) for name, given in ((ALLOW, allowed), (DENY, denied)) if given is None}
    allowed, denied = own.get(ALLOW, allowed), own.get(DENY, denied)
    selection = cut_again(folder, threshold, allowed, denied, command=command_line())
    if any(own.values()):
        out.print("lists   " + ", ".join(f"{name} ({len(ids)})" for name, ids in own.items() if ids))
    summary(selection, folder, [*(allowed or ()), *(denied or ())])
    judge(selection, sarif, gate)


def review(
    folder: Finished,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 takes a free one.", min=0, max=65535)] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """Read the rows nearest to the cut on a local page, keep or remove each, and split the rows again.

    Only this machine can reach the page, and only with its address. Every decision is written at once, to allow.txt and
    deny.txt in the folder; Ctrl-C ends.
    """
    _require_scan(folder)
    from gradshield.scanning.review import Review, Server

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

    view = seen(data, row, model=model, format=shape, training_args=training, trust_remote_code=trust_remote_code)
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


def _require_scan(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}: run `gradshield scan` into it first")


def check_sarif(path: Path | None) -> None:
    """Raises DataError, before anything is scanned, for a path that no file can be written to."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise DataError(f"--sarif cannot write {str(path)!r}: name a file in a folder that exists")


def judge(selection: Selection, sarif: Path | None, gate: float | None) -> None:
    """Write the findings, annotate them in GitHub Actions, and raise GateError if the gate closes."""
    from gradshield.scanning import findings

    closed = closed_gate(selection.manifest.results, gate)
    if sarif is not None:
        write_json(sarif, findings.sarif(selection, closed is not None))
        if os.environ.get("GITHUB_ACTIONS") == "true":
            for line in findings.workflow_commands(selection, closed is not None):
                print(line)  # as it is: the console would read markup in it
    if closed is not None:
        raise closed


def closed_gate(results: ScanResults, gate: float | None) -> GateError | None:
    """The error if more rows were removed than ``gate``, a share, allows: 0.7 % of 1,000 is 7, and not less."""
    if gate is None or results.removed <= gate * results.scored * (1 + 1e-12):
        return None
    return GateError(
        f"{results.removed} of {results.scored} rows ({100 * results.removed / results.scored:.1f} %) were removed, and "
        f"--fail-above allows {100 * gate:g} %: read the report, clear rows with --allow, or fix the data"
    )


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """What `gs.scan` and `gs.estimate` share, from the options of their commands; the model is still to be loaded."""
    template = options.template_variables(given["template_kwargs"])
    training = options.training_options(given["training_config"], given["max_length"])
    lora = options.json_file("--lora-config", given["lora_config"])
    shape = options.row_format(given["format"], given["columns"], given["strict"])
    options.require_data(given["data"])
    options.require_model(given["model"])
    quiet_libraries()
    from gradshield.models.loading import ModelSource
    from gradshield.scanning.settings import ScanSettings, peft_config, trl_options

    if given["no_cache"]:
        os.environ[cache.VARIABLE] = ""
    logging.getLogger("gradshield").setLevel(logging.INFO)
    source = ("adapter", "device", "dtype", "trust_remote_code", "quantize", "device_map")
    scoring = ("probe", "aggregate", "subspace", "engine", "threshold", "seed", "token_budget", "selector")
    return {
        "model": ModelSource(given["model"], **{name: given[name] for name in source}),
        "settings": ScanSettings(**{name: given[name] for name in scoring}),
        "probing": options.probing(
            given["probes"], given["lookalikes"], given["answer_prefix"], template, given["uncertified"]
        ),
        "peft_config": peft_config(lora),
        "training_args": trl_options(training),
        "format": shape,
    }


def _check_map(device_map: str | None, selector: str, alone: bool) -> None:
    """Raises UsageError for options that do not work with a model spread over several devices."""
    if device_map is None:
        return
    from gradshield.options import Spec
    from gradshield.selectors import SELECTORS

    if not SELECTORS[Spec.split(selector).name].probed:
        raise UsageError(
            f"the selector {selector!r} needs the model on one device, and --device-map spreads it: leave one of them out"
        )
    if not alone:
        raise UsageError(
            "--device-map gives one model every device of this machine, and --workers and --ray need a device per process: "
            "leave out one of the two"
        )
