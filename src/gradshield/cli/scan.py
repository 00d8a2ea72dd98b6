"""``gradshield scan``: find the rows that would make the model less safe. ``gradshield estimate``: what that will take."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradshield import cache
from gradshield.cli import options
from gradshield.cli.common import command_line, err, out, plain, progress, quiet_libraries, read_as, summary
from gradshield.cli.gate import Sarif, check_sarif, judge
from gradshield.errors import DataError, UsageError
from gradshield.files import read_labels
from gradshield.report.text import duration

if TYPE_CHECKING:
    from gradshield.manifests import Data as Dataset

REASONS = 5  # why rows cannot be scored, printed one by one; the rest are counted


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
    earlier = _scanned(output)
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


def _scanned(folder: Path) -> Dataset | None:
    """The data of the finished scan in the folder, if it holds one that can be read."""
    from gradshield.manifests import ScanManifest
    from gradshield.runs import read_manifest

    try:
        return read_manifest(folder, ScanManifest).data
    except DataError:  # nothing yet, or nothing of ours: `run` says what it cannot write into
        return None


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
