"""``gradshield scan``: find the rows that would make the model less safe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gradshield import cache
from gradshield.cli.common import (
    Allow,
    Columns,
    Data,
    FailAbove,
    Lookalikes,
    MaxLength,
    Model,
    Probes,
    Remote,
    Rule,
    Shape,
    TrainingConfig,
    check_gate,
    command_line,
    json_file,
    json_object,
    probing,
    progress,
    quiet_libraries,
    read_ids,
    read_labels,
    require_data,
    require_model,
    row_format,
    share,
    summary,
    training_options,
)
from gradshield.cli.estimate import print_estimate
from gradshield.errors import UsageError


def scan(
    data: Data,
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the rows, scores, report and manifest (required without --dry-run).",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Describe the rows and estimate the cost of the scan; write nothing.")
    ] = False,
    selector: Annotated[str, typer.Option(help="What scores the rows (see `gradshield methods`).")] = "screen",
    threshold: Rule = None,
    probe: Annotated[str, typer.Option(help="Unsafety score (see `gradshield methods`).")] = "token_gap",
    aggregate: Annotated[str, typer.Option(help="How a row's tokens are counted (see `gradshield methods`).")] = "push",
    subspace: Annotated[str, typer.Option(help="Parameters to use: all, targets, lora, last:K, last:P%.")] = "all",
    engine: Annotated[
        str, typer.Option(help="How derivatives are computed: auto, or one of `gradshield methods`.")
    ] = "auto",
    lora_config: Annotated[
        Path | None, typer.Option(help="PEFT config (JSON) of the adapter that training will add.")
    ] = None,
    training_config: TrainingConfig = None,
    probes: Probes = None,
    lookalikes: Lookalikes = None,
    answer_prefix: Annotated[
        str, typer.Option(help="Text at the start of every probed answer (a closed thinking block).")
    ] = "",
    template_kwargs: Annotated[
        str, typer.Option(help='JSON for the chat template, such as {"enable_thinking": false}.')
    ] = "{}",
    labels: Annotated[
        Path | None, typer.Option(help="JSON list of 0 and 1 (harmful) per row: reported, never used to decide.")
    ] = None,
    allow: Allow = None,
    fail_above: FailAbove = None,
    format: Shape = None,
    columns: Columns = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use nor keep what earlier scans found on this model.")
    ] = False,
    uncertified: Annotated[
        bool, typer.Option("--uncertified", help="Score a model that does not refuse its probes.")
    ] = False,
    max_length: MaxLength = None,
    token_budget: Annotated[int, typer.Option(help="Tokens per batch, padding included.")] = 4096,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(help="Load the model in 4bit or 8bit (gradshield[quantized]); subspace lora only."),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread the model over this machine's GPUs: auto, balanced, balanced_low_0 or sequential."),
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder or hub name of a PEFT adapter on the model.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes that share the rows, each with its own model (default: 1; with --ray, one per GPU or CPU).",
            min=1,
            show_default=False,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Measure on the Ray cluster at this address: host:port, or auto for this machine's cluster.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the adapter's initialisation, the oracle's sample and the mixture fit.")
    ] = 0,
    trust_remote_code: Remote = False,
) -> None:
    """Find the rows of a fine-tuning set that would make the model less safe, and split them from the rest.

    Writes kept, removed, quarantine.jsonl, scores.parquet, report.html and manifest.json. An interrupted scan resumes
    where it stopped.
    """
    _check_options(output, dry_run, workers, ray, {"--fail-above": fail_above, "--allow": allow, "--labels": labels})
    _check_map(device_map, selector, alone=workers in (None, 1) and ray is None)
    gate = share("--fail-above", fail_above)
    allowed, truth = read_ids(allow), read_labels(labels)
    template = json_object("--template-kwargs", template_kwargs)
    training = training_options(training_config, max_length)
    lora = json_file("--lora-config", lora_config)
    shape = row_format(format, columns, strict)
    require_data(data)
    require_model(model)
    quiet_libraries()
    from gradshield.models import loading
    from gradshield.scanning.options import peft_config, sft_options
    from gradshield.scanning.scan import scan as run
    from gradshield.scanning.settings import ScanSettings
    from gradshield.scanning.workers import Workers

    crew = Workers(workers, ray)  # checked before the model is loaded
    settings = ScanSettings(probe, aggregate, subspace, engine, threshold, seed, token_budget, selector=selector)
    if no_cache:
        os.environ[cache.VARIABLE] = ""
    asked = probing(probes, lookalikes, answer_prefix, template, uncertified)
    peft, arguments = peft_config(lora), sft_options(training)
    with progress() as report:
        report("loading the model", 0, 1)
        loaded = loading.load(
            model, adapter, device, dtype, trust_remote_code, quantize=quantize, device_map=device_map
        )
        report("loading the model", 1, 1)
        common: dict[str, Any] = {
            "model": loaded,
            "peft_config": peft,
            "training_args": arguments,
            "settings": settings,
            "probing": asked,
            "format": shape,
            "progress": report,
        }
        if output is None:
            from gradshield.scanning.estimate import estimate

            found = estimate(data, **common)
        else:
            selection = run(
                data,
                **common,
                output=output,
                allow=allowed,
                labels=truth,
                workers=crew,
                command=command_line(),
            )
    if output is None:
        print_estimate(found)
        return
    summary(selection, output)
    check_gate(selection, gate)


def _check_options(
    output: Path | None, dry_run: bool, workers: int | None, ray: str | None, removal: Mapping[str, object]
) -> None:
    """Raises UsageError for options that exclude each other; those in ``removal`` need rows to be removed."""
    if not dry_run:
        if output is None:
            raise UsageError("a scan needs a folder to write to: give --output FOLDER, or estimate it with --dry-run")
        return
    if workers is not None or ray is not None or output is not None:
        raise UsageError("--dry-run times this one process and writes nothing: leave out --output, --workers and --ray")
    for name, value in removal.items():
        if value is not None:
            raise UsageError(f"--dry-run removes no row, and {name} is about removed rows: leave out one of the two")


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
