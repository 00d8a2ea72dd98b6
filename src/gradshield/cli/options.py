"""The options that several commands share, and what their values mean."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradshield.errors import DataError, ModelError, UsageError
from gradshield.files import read_json
from gradshield.options import number

if TYPE_CHECKING:
    from gradshield.data import Format

# Options by the panel of the help that shows them; those that most users want are in none.
reading, scoring, asking, reviewing, measuring, loading, running = (
    partial(typer.Option, rich_help_panel=title)
    for title in (
        "Reading the rows",
        "Scoring them",
        "Asking the model",
        "Reviewing the result",
        "Measuring",
        "Loading the model",
        "Running",
    )
)

Data = Annotated[
    str,
    typer.Argument(
        help="JSONL, JSON, CSV, TSV or Parquet file, a folder or pattern of them, or a hub dataset (NAME:CONFIG:SPLIT).",
        show_default=False,
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder or hub name of an aligned causal LM, or of a PEFT adapter.")
]
Shape = Annotated[
    str | None, reading("--format", help="Read every row as this shape instead of detecting it from its keys.")
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help="Your columns for keys of a shape: prompt=Q,completion=A.",
        show_default=False,
    ),
]
Allow = Annotated[
    Path | None,
    reviewing(
        help="File of row ids cleared by a reviewer, one per line: they are kept (default of `cut`: allow.txt in the folder)."
    ),
]
Deny = Annotated[
    Path | None,
    reviewing(
        help="File of row ids denied by a reviewer, one per line: they are removed (default: deny.txt in the folder)."
    ),
]
Remote = Annotated[bool, loading("--trust-remote-code", help="Run code that comes with the model.")]
Rule = Annotated[
    str | None,
    typer.Option(
        "--threshold",
        "-t",
        help="Where to cut: a rule and its options, such as anchored:0.8 or ratio:5% (default: the selector's own).",
    ),
]
FailAbove = Annotated[
    str | None, typer.Option(help="Exit with code 5 when more than this share of the rows is removed, such as 1%.")
]
Probes = Annotated[Path | None, asking(help="Your own harmful requests (.jsonl, .csv, .txt).")]
Lookalikes = Annotated[Path | None, asking(help="Your own harmless requests (.jsonl, .csv, .txt).")]
Safety = Annotated[
    str, measuring(help="Requests to attack with: builtin, none, or your own file (.jsonl, .csv, .txt).")
]
Judges = Annotated[
    list[str] | None,
    measuring(
        "--judge",
        help="Judge of the answers, repeatable: refusal-phrases (default), classifier:MODEL, guard:MODEL, "
        "llm:MODEL@URL, moderation:MODEL@URL, lab-classifier, compliance.",
        show_default=False,
    ),
]
Metric = Annotated[
    str | None,
    measuring(help="How the task is scored: exact, choice, number, contains, rouge-l… (default: guessed)."),
]
TrainingConfig = Annotated[
    Path | None,
    reading(
        help="JSON of the training's TRL SFTConfig options: the loss then covers the tokens TRL would train on, not just answers."
    ),
]
Selects = Annotated[str, scoring("--selector", help="What scores the rows (see `gradshield methods`).")]
Unsafety = Annotated[str, scoring("--probe", help="Unsafety score (see `gradshield methods`).")]
Aggregate = Annotated[str, scoring(help="How a row's tokens are counted (see `gradshield methods`).")]
Subspace = Annotated[str, scoring(help="Parameters to use: all, targets, lora, last:K, last:P%.")]
Engine = Annotated[str, scoring(help="How derivatives are computed: auto, or one of `gradshield methods`.")]
LoraConfig = Annotated[Path | None, scoring(help="PEFT config (JSON) of the adapter that training will add.")]
Prefix = Annotated[
    str, asking("--answer-prefix", help="Text at the start of every probed answer (a closed thinking block).")
]
Template = Annotated[
    str, asking("--template-kwargs", help='JSON for the chat template, such as {"enable_thinking": false}.')
]
Uncertified = Annotated[bool, asking("--uncertified", help="Score a model that does not refuse its probes.")]
Strict = Annotated[bool, reading("--strict", help="Stop at the first row that cannot be used.")]
NoCache = Annotated[bool, running("--no-cache", help="Neither use nor keep what earlier scans found on this model.")]
Budget = Annotated[int, running("--token-budget", help="Tokens per batch, padding included.")]
Device = Annotated[str, loading(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, loading(help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[
    str | None, loading(help="Load the model in 4bit or 8bit (gradshield[quantized]); subspace lora only.")
]
DeviceMap = Annotated[
    str | None,
    loading(help="Spread the model over this machine's GPUs: auto, balanced, balanced_low_0 or sequential."),
]
Adapter = Annotated[str | None, loading(help="Folder or hub name of a PEFT adapter on the model.")]
Seed = Annotated[int, scoring(help="Seed of the adapter's initialisation, the oracle's sample and the mixture fit.")]
Tokens = Annotated[int, measuring(help="Longest answer, in tokens.", min=1)]
MaxLength = Annotated[int | None, reading(help="Cut rows at this many tokens, as training will (default 1024).")]


def share(name: str, text: str | None) -> float | None:
    """``1%`` or ``0.01`` as a number. Raises UsageError outside 0 to 1, and for a bare 1, which is ambiguous."""
    if text is None:
        return None
    value = number(text)
    if not 0 <= value <= 1:
        raise UsageError(f"{name} got {text!r}: give a percentage such as 1%, or a number from 0 to 1")
    if value == 1 and not text.endswith("%"):
        raise UsageError(f"{name} got {text!r}, which may mean one in a hundred or all: write 1% or 100%")
    return value


def template_variables(text: str) -> dict[str, Any]:
    """The object of --template-kwargs. Raises UsageError if it is none, or has an argument of rendering, not the template's."""
    from gradshield.data.shapes import not_variables

    try:
        value = _object("--template-kwargs", json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--template-kwargs is not JSON ({error}): quote it with double quotes inside single ones"
        ) from None
    if taken := not_variables(value):
        raise UsageError(
            f"--template-kwargs has {taken[0]}, an argument of rendering and not a variable of the chat template: leave it "
            "out"
        )
    return value


def json_file(name: str, path: Path | None) -> dict[str, Any]:
    """A JSON object of options from a file. Raises DataError if it cannot be read, UsageError if it is not an object."""
    return {} if path is None else _object(f"the file given to {name}", read_json(path, f"the {name} file"))


def training_options(path: Path | None, max_length: int | None) -> dict[str, Any]:
    """The options of --training-config, with the length of --max-length. Raises UsageError if both give one and they differ."""
    options = json_file("--training-config", path)
    if max_length is None:
        return options
    found = options.get("max_length", max_length)
    if found != max_length and isinstance(
        found, int | None
    ):  # a wrong type is reported with those of the other options
        raise UsageError(
            f"--max-length {max_length} and the training config's max_length {found} differ: give one of them"
        )
    return {**(options or {"assistant_only_loss": None}), "max_length": found}


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{name} holds a {type(value).__name__}: give a JSON object of options")
    return value


def row_format(name: str | None, columns: str | None, strict: bool = False) -> Format:
    """The ``Format`` that the options describe. Raises UsageError."""
    from gradshield.data import Format

    pairs = [pair.partition("=") for pair in (columns or "").split(",") if pair.strip()]
    found = {key.strip(): column.strip() for key, _, column in pairs}
    if len(found) < len(pairs) or not all(found.values()):
        raise UsageError(
            f"--columns {columns!r} is not KEY=COLUMN, each key once: write prompt=question,completion=answer"
        )
    return Format(name, found, strict)


def require_data(data: str) -> None:
    """Report a missing file before a model is loaded. Raises DataError."""
    from gradshield.data.formats import is_file, may_be_hub_name

    if not may_be_hub_name(data) and not is_file(data):
        raise DataError(
            f"there is no file {data!r}: give a JSONL, JSON, CSV, TSV or Parquet file, or the name of a hub dataset"
        )


def require_model(name: str) -> None:
    """Report a missing model folder before the libraries are loaded, which takes seconds. Raises ModelError."""
    path = Path(name).expanduser()
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ModelError(f"there is no folder {name}: give a model's folder (with config.json) or a hub name")
    if name == "lab" and not path.exists():
        raise ModelError(
            "the bundled model goes by the name lab in `gradshield serve` only, and knows an invented language: "
            "see it at work with `gradshield demo`, and give a model's folder (with config.json) or a hub name here"
        )


def probing(
    probes: Path | None, lookalikes: Path | None, answer_prefix: str, template: dict[str, Any], uncertified: bool
) -> Any:
    """The ``Probing`` that the options describe. Raises DataError for a prompt file that cannot be read."""
    from gradshield.probes import read_prompts
    from gradshield.scanning.settings import Probing

    return Probing(
        requests=read_prompts(probes) if probes else (),
        lookalikes=read_prompts(lookalikes) if lookalikes else (),
        answer_prefix=answer_prefix,
        template=template,
        uncertified=uncertified,
    )
